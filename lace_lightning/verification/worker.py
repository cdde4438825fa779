"""The program of one verification worker: JSON lines in, JSON lines out, until its input ends.

Run as ``python -P worker.py MEMORY_BYTES SECONDS`` by :class:`~lace_lightning.verification.verifier.Verifier`; it needs
nothing of this package. It says ``"ready"`` once, then answers each line ``[reference, answer]`` with ``"correct"``,
``"wrong"`` or ``"unparsable"``. Whoever started it sets the time limit by killing it: math-verify's own limits are
switched off, because Python signals can't interrupt one long operation in C such as ``9**9**9``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import lru_cache

from math_verify import parse, verify


@lru_cache(maxsize=1024)  # the threads of a group share their reference
def read(text: str) -> list:
    """Readings of a bare LaTeX or plain answer; empty if there is none."""
    return parse(f"${text}$", parsing_timeout=None)


def is_comparable(gold: list, target: list) -> bool:
    """Whether both were read, and the target as mathematics where the gold is: unread text comes back as a string."""
    return bool(gold and target) and (_is_text(gold) or not _is_text(target))


def compare(reference: str, answer: str) -> str:
    """Name of the verdict on an answer. An answer may be any text."""
    try:
        gold, target = read(reference), read(answer)
        if verify(gold, target, timeout_seconds=None):
            return "correct"
        return "wrong" if is_comparable(gold, target) else "unparsable"
    except Exception:  # deep recursion, exhausted memory, parser errors: unreadable, whatever the cause
        return "unparsable"


def serve(judge: Callable[[str, str], str], seconds: float) -> None:
    """Answer jobs until the input ends.

    An alarm without a handler ends the process ``seconds`` after a job began: nobody would kill a worker that hangs
    after its parent has died.
    """
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a parser prints may pass for a reply
    _reply(replies, "ready")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = judge(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, verdict)


def _is_text(readings: list) -> bool:
    return all(isinstance(reading, str) for reading in readings)


def _reply(descriptor: int, value: str) -> None:
    os.write(descriptor, json.dumps(value).encode() + b"\n")


def _limit_memory(num_bytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every platform can
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


if __name__ == "__main__":
    logging.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory(int(sys.argv[1]))
    serve(compare, float(sys.argv[2]))

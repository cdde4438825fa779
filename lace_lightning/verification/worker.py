"""The program of one verification worker: JSON lines in, JSON lines out, until its input ends.

Run as ``python -P worker.py MEMORY_BYTES SECONDS`` by :class:`~lace_lightning.verification.verifier.Verifier`; it needs
nothing of this package. It says ``"ready"`` once, then answers each line, the fields of a
:class:`~lace_lightning.verification.sight.Question`, with ``"correct"``, ``"wrong"`` or ``"unparsable"``. Whoever
started it sets the time limit by killing it: math-verify's own limits are switched off, because Python signals can't
interrupt one long operation in C such as ``9**9**9``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Integer, Rational, Symbol, UnevaluatedExpr

POINTS = (Rational(37, 59), Rational(83, 47))
"""Where expressions are told apart; each symbol gets its own neighbourhood of them."""

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@lru_cache(maxsize=1024)  # the threads of a group share their reference
def read(text: str) -> list:
    r"""Readings of a bare LaTeX or plain answer; empty if there is none. Unread text comes back as a string.

    The text is read as a whole or not at all: math-verify could also pick numbers out of prose, code and broken LaTeX.
    """
    if _INTEGER.fullmatch(text):
        return [Integer(text)]
    return parse(f"${text}$", (LatexExtractionConfig(),), parsing_timeout=None)


def read_reference(text: str) -> list:
    r"""Readings of a reference; its right side where the left can't be read, as in ``m_{\max}=7``."""
    readings = read(text)
    _, equals, value = text.rpartition("=")
    return read(value) if equals and _is_text(readings) else readings


def compare(gold: Sequence[str], target: Sequence[str], tolerance: float = 0.0) -> str:
    """Name of the verdict on the values of an answer, each of which must be one of the reference's, in any order.

    Both may be any texts. A single value is the common case.
    """
    try:
        left = [read(value) for value in target]
        if not all(left):
            return "unparsable"
        for value in gold:
            wanted = read_reference(value)
            match = next((readings for readings in left if are_equal(wanted, readings, tolerance)), None)
            if match is None:
                return "wrong" if all(is_comparable(wanted, readings) for readings in left) else "unparsable"
            left.remove(match)
        return "wrong" if left else "correct"
    except Exception:  # deep recursion, exhausted memory, parser errors: unreadable, whatever the cause
        return "unparsable"


def are_equal(gold: list, target: list, tolerance: float) -> bool:
    """Whether two values mean the same, or are numbers at most ``tolerance`` apart."""
    if tolerance and is_near(gold, target, tolerance):
        return True
    if are_apart(gold, target):
        return False
    return verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None)


def is_comparable(gold: list, target: list) -> bool:
    """Whether both were read, and the target as mathematics where the gold is."""
    return bool(gold and target) and (_is_text(gold) or not _is_text(target))


def is_near(gold: list, target: list, tolerance: float) -> bool:
    """Whether both are real numbers at most ``tolerance`` apart, up to the rounding of one decimal."""
    if not (_is_expression(gold) and _is_expression(target)):
        return False
    distance = (gold[0] - target[0]).evalf()
    return bool(distance.is_Float or distance.is_Rational) and abs(float(distance)) <= tolerance * (1 + 1e-9)


def are_apart(gold: list, target: list) -> bool:
    """Whether two expressions have plainly different values at a point, which spares math-verify its long search.

    Never where it compares by other rules than values: names, percentages, sets and equations.
    """
    if not (_is_expression(gold) and _is_expression(target)):
        return False
    if any(isinstance(reading, Symbol) or reading.has(UnevaluatedExpr) for reading in (gold[0], target[0])):
        return False
    return any(_differ(_value(gold[0], point), _value(target[0], point)) for point in POINTS)


def _value(expression: Expr, point: Rational) -> complex | None:
    """The value with each symbol at its own place near ``point``, infinity included; None if it has none."""
    places = {symbol: point + Rational(sum(map(ord, symbol.name)), 9973) for symbol in expression.free_symbols}
    value = expression.subs(places).evalf(15)
    if value.is_infinite:
        return complex(math.inf)
    return complex(value) if value.is_number and value.is_finite else None


def _differ(a: complex | None, b: complex | None) -> bool:
    """Whether both are real or infinite and differ by far more than the rounding of any answer."""
    if a is None or b is None or a.imag or b.imag:
        return False
    if math.inf in (a.real, b.real):
        return a != b
    return abs(a - b) > 1e-3 * max(1.0, abs(a), abs(b))


def _is_expression(readings: list) -> bool:
    return bool(readings) and isinstance(readings[0], Expr)


def _is_text(readings: list) -> bool:
    return all(isinstance(reading, str) for reading in readings)


def serve(judge: Callable[..., str], seconds: float) -> None:
    """Answer jobs until the input ends; the fields of each are the judge's keyword arguments.

    An alarm without a handler ends the process after ``seconds`` of processor time for one job: nobody would kill a
    worker that hangs after its parent has died.
    """
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a parser prints may pass for a reply
    _reply(replies, "ready")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = judge(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, verdict)


def _reply(descriptor: int, value: Any) -> None:
    os.write(descriptor, json.dumps(value).encode() + b"\n")


def limit_memory(num_bytes: int) -> None:
    """Let allocations beyond ``num_bytes`` of address space fail in this process, where the platform can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


if __name__ == "__main__":
    logging.disable()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit_memory(int(sys.argv[1]))
    serve(compare, float(sys.argv[2]))

"""Running one ``lace`` command in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""Between SIGTERM, after which a stage saves a checkpoint, and SIGKILL."""


class CommandFailed(RuntimeError):
    """A command ended badly or took too long; the message says how, and names its log."""


class Stopped(RuntimeError):
    """A command was ended because the sweep ends; it goes on when the sweep is called again."""


@dataclass
class Room:
    """Where and for how long the commands of a trial run.

    Args:
        environment: variables on top of the sweep's own.
        deadline: ``time.monotonic()`` at which a command is ended as failed; put off by what it waits for others.
        stop: set when the sweep ends.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    deadline: float = float("inf")
    stop: Event = field(default_factory=Event)

    def check(self, what: str) -> None:
        """Raise what ends the trial, if something does."""
        if self.stop.is_set():
            raise Stopped(what)
        if time.monotonic() > self.deadline:
            raise CommandFailed(f"{what}: the trial took longer than limits.trial_minutes")

    def wait(self, what: str) -> None:
        """Give other processes a moment for work that this trial needs too."""
        if self.stop.is_set():
            raise Stopped(what)
        time.sleep(POLL_SECONDS)
        self.deadline += POLL_SECONDS

    def run(self, arguments: Sequence[str], log: Path) -> None:
        """Run ``lace`` with the arguments; its output is appended to ``log``.

        Raises:
            CommandFailed: it ended badly, or the deadline passed.
            Stopped: the sweep ends.
        """
        command = [sys.executable, "-m", "lace_lightning.sweep.child", str(os.getpid()), *arguments]
        with log.open("a") as output:
            output.write(f"$ lace {shlex.join(arguments)}\n")
            output.flush()
            begin = output.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    self.check(f"lace {arguments[0]}")
                    time.sleep(POLL_SECONDS)
            finally:
                _end(process)
        if process.returncode:
            raise CommandFailed(
                f"lace {arguments[0]} {_ending(process.returncode)}: {_last_words(log, begin)} (see {log})"
            )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    _signal(process, signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def _last_words(log: Path, begin: int) -> str:
    """The last error, else the last line, of what stands in the log from that byte on."""
    said = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "error:" in line]
    return (told or lines or ["it said nothing"])[-1][:300]

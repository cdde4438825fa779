"""A ``lace`` command that does not outlive the sweep: ``python -m lace_lightning.sweep.child PARENT COMMAND …``."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Run ``lace`` with the arguments behind the parent's process id; returns its exit code."""
    _end_with(int(argv[0]))
    from lace_lightning.cli.main import main as lace

    return lace(argv[1:])


def _end_with(parent: int) -> None:
    """Ask Linux to end us when the parent dies, however it dies; elsewhere an orphan runs to its end."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

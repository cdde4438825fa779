"""What to do next: the last lines of a command."""

from __future__ import annotations

import sys


def say_next(*steps: tuple[str, str]) -> None:
    """Print commands with what each is for, to stderr: what a command prints for programs to read stays as it is."""
    lines = [f"  {purpose}:\n    {command}" for purpose, command in steps]
    print("\n".join(["\nnext:", *lines]), file=sys.stderr, flush=True)

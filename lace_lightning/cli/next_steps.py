"""What to do next: the last lines of a command."""

from __future__ import annotations

import sys


def say_next(*steps: tuple[str, str]) -> None:
    """Print commands with what each is for, to stderr: what a command prints for programs to read stays as it is."""
    width = max(len(command) for _, command in steps)
    lines = [f"  {command:<{width}}   {purpose}" for purpose, command in steps]
    print("\n".join(["\nnext:", *lines]), file=sys.stderr, flush=True)

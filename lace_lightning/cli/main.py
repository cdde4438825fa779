"""The ``lace`` command. Importing this module is cheap; torch is imported by the subcommand that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

STAGES = {
    "fit": "train a stage: lace fit --config configs/demo/base.yaml --config configs/demo/sft.yaml",
    "validate": "sample groups of the validation problems and print the metrics",
    "test": "the same on the test problems",
    "predict": "sample groups and write them as JSON lines",
}
TOOLS = {
    "generate": ("lace_lightning.cli.generate", "a prompt in, N threads side by side in the terminal"),
    "demo": ("lace_lightning.cli.demo", "train and compare threads that talk and threads that don't, in minutes"),
    "ui": ("lace_lightning.cli.ui", "browse the runs in MLflow, on this machine only"),
    "sync": ("lace_lightning.cli.sync", "send what a dead tracking server missed"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command not in STAGES and command not in TOOLS:
        print(f"lace: {command!r} is no command\n\n{_help()}", file=sys.stderr)
        return 2
    if command in TOOLS:
        return import_module(TOOLS[command][0]).run(arguments[1:])
    return import_module("lace_lightning.cli.stages").run(arguments)


def explain(error: Exception) -> int:
    """Print an error as one message for its reader; returns the exit code. ``LACE_TRACEBACK=1`` shows its way too."""
    if os.environ.get("LACE_TRACEBACK"):
        raise error
    print(f"lace: error: {error}\n(LACE_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
    return 2


def _help() -> str:
    lines = [
        "usage: lace COMMAND [options]        (lace COMMAND --help lists them)",
        "",
        "Reasoning threads that read each other while they are decoded (LACE, arXiv 2604.15529).",
        "",
        *(f"  {name:<10}{meaning}" for name, meaning in STAGES.items()),
        "",
        *(f"  {name:<10}{meaning}" for name, (_, meaning) in TOOLS.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

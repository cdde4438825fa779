"""The ``lace`` command. Importing this module is cheap; torch is imported by the subcommand that needs it."""

from __future__ import annotations

import os
import re
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
    "init": ("lace_lightning.cli.init", "copy the shipped configs, to edit"),
    "doctor": ("lace_lightning.cli.doctor", "before a long run: what memory it will take, and whether all is there"),
    "synth": ("lace_lightning.cli.synth", "make traces from problems and a teacher"),
    "generate": ("lace_lightning.cli.generate", "a prompt in, N threads side by side in the terminal"),
    "eval": ("lace_lightning.cli.eval", "compare methods on benchmarks, at equal tokens and seconds"),
    "view": ("lace_lightning.cli.view", "look at the threads of an evaluation in the browser"),
    "sweep": ("lace_lightning.cli.sweep", "run many trials of a chain of stages, and make one table of them"),
    "bench": ("lace_lightning.cli.bench", "measure decoding and training beside the floor of this machine"),
    "demo": ("lace_lightning.cli.demo", "train and compare threads that talk and threads that don't, in minutes"),
    "export": ("lace_lightning.cli.export", "a checkpoint as safetensors for plain transformers, with a model card"),
    "register": ("lace_lightning.cli.register", "put a run's model into MLflow's registry: problems in, groups out"),
    "ui": ("lace_lightning.cli.ui", "browse the runs in MLflow, on this machine only"),
    "sync": ("lace_lightning.cli.sync", "send what a dead tracking server missed"),
}

MISTAKE, UNHEALTHY, INTERRUPTED = 2, 3, 130
"""Exit codes: of a mistake that the user can mend, of a run that HealthMonitor stopped, and the one that shells give to
a command ended by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command not in STAGES and command not in TOOLS:
        print(f"lace: {command!r} is no command\n\n{_help()}", file=sys.stderr)
        return MISTAKE
    from lace_lightning.cli.discretion import be_discreet

    be_discreet()
    module, rest = (TOOLS[command][0], arguments[1:]) if command in TOOLS else ("lace_lightning.cli.stages", arguments)
    try:
        return import_module(module).run(rest)
    except KeyboardInterrupt:
        return INTERRUPTED


def explain(error: Exception) -> int:
    """Print an error as one message for its reader, without secrets; returns the exit code.

    ``LACE_TRACEBACK=1`` shows its way too.
    """
    if os.environ.get("LACE_TRACEBACK"):
        raise error
    from lace_lightning.printable import printable
    from lace_lightning.tracking.redact import redact_lines

    told = printable(redact_lines(without_unions(str(error))))  # it may quote data
    print(f"lace: error: {told}\n(LACE_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
    return MISTAKE


def without_unions(message: str) -> str:
    """A message of jsonargparse without its report on the union (our class or None) in which the mistake was found."""
    noise = (
        r"Does not validate against any of|Subtypes: |Errors:$|- Expected a <class 'NoneType'>|Given value( type)?: "
    )
    told = "\n".join(line for line in message.splitlines() if not re.match(rf"\s*({noise})", line))
    return told.strip().removeprefix("- ")


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

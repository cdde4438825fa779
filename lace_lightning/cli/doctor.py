"""``lace doctor``: before a long run, what memory it will take, which option lowers it, and whether all is there."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lace_lightning.cli.main import explain, without_unions
from lace_lightning.cli.next_steps import say_next

if TYPE_CHECKING:
    from rich.console import Console

    from lace_lightning.cli.doctor_checks import Check
    from lace_lightning.cli.stages import ParsedCLI
    from lace_lightning.datamodules.base import GroupData
    from lace_lightning.memory import Estimate, Run
    from lace_lightning.modules import ThreadedModule

FAILED = 1
"""Exit code if a check failed."""
KNOBS_SHOWN = 6


def run(argv: Sequence[str]) -> int:
    """Examine the stage that ``lace fit`` with the same options would run; the exit code: 0, 1 if a check failed, 2 for
    a mistake in the options."""
    given, rest = _parser().parse_known_args(argv)
    is_ours = "HF_HUB_OFFLINE" not in os.environ
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not on this machine is not there
    try:
        return _examine(rest, given.device_memory)
    except _mistakes() as error:
        return explain(error)
    finally:
        if is_ours:
            os.environ.pop("HF_HUB_OFFLINE", None)


def _mistakes() -> tuple[type[Exception], ...]:
    from lace_lightning.cli.stages import MISTAKES

    return MISTAKES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace doctor",
        usage="lace doctor --config FILE [--config FILE …] [options of lace fit] [--device_memory GB]",
        allow_abbrev=False,
        description="Say what memory a stage will take and whether all that it needs is there; nothing is trained.",
        epilog="example: lace doctor --config configs/demo/base.yaml --config configs/demo/sft.yaml --device_memory 80",
    )
    parser.add_argument(
        "--device_memory", type=float, metavar="GB", help="plan for a GPU of so many GB (that of this machine)"
    )
    return parser


def _examine(arguments: Sequence[str], device_memory: float | None) -> int:
    from rich.console import Console

    from lace_lightning.cli.doctor_checks import Check, checks_of_settings, checks_of_stage
    from lace_lightning.cli.planned import planned_run
    from lace_lightning.memory import estimate

    console = Console(width=None if sys.stdout.isatty() else 120)
    cli = parsed(arguments)
    settings = cli.settings()
    on_cuda = runs_on_cuda(settings["trainer"], device_memory)
    try:
        module, data = made(cli)
        planned = planned_run(module, data, settings["trainer"], on_cuda)
    except (OSError, ValueError) as error:  # no tokenizer, no config of the backbone: memory cannot be counted
        failed = Check("model and data", "failed", _one_line(str(error)))
        show_checks(console, [failed, *checks_of_settings(settings, on_cuda)])
        return FAILED
    total = device_bytes(device_memory) if on_cuda else None
    counted = estimate(planned)
    show_estimate(console, counted, total)
    show_knobs(console, planned)
    outline = module.spec.outline(data.tokenizer)
    found = [
        memory_check(counted, total),
        *checks_of_settings(settings, on_cuda),
        *checks_of_stage(module, settings, planned, outline),
    ]
    show_checks(console, found)
    if any(check.state == "failed" for check in found):
        return FAILED
    say_next(("start the run", f"lace fit {shlex.join(arguments)}"))
    return 0


# ---------------------------------------------------------------- the configuration


def parsed(arguments: Sequence[str]) -> ParsedCLI:
    """The options of ``lace fit``, checked.

    Raises:
        ArgumentError: an option is unknown, or its value is of a wrong type.
    """
    from lace_lightning.cli.stages import ParsedCLI, build

    cli = build(arguments, run=False, kind=ParsedCLI)
    assert isinstance(cli, ParsedCLI)
    return cli


def made(cli: ParsedCLI) -> tuple[ThreadedModule, GroupData]:
    """The stage and its DataModule; no trainer, logger, callback or weight is made.

    Raises:
        ValueError: options that do not fit together, or a tokenizer that cannot be loaded.
    """
    config = cli.config.clone()
    for name in ("callbacks", "logger", "plugins", "strategy", "profiler"):
        config.trainer[name] = None
    objects = cli.parser.instantiate_classes(config)
    return objects.model, objects.data


def runs_on_cuda(trainer: dict[str, Any], device_memory: float | None) -> bool:
    """Whether the run takes a GPU; a given memory means that one is planned for."""
    import torch

    accelerator = str(trainer.get("accelerator") or "auto")
    if accelerator == "auto":
        return torch.cuda.is_available() or device_memory is not None
    return accelerator in ("gpu", "cuda")


def device_bytes(device_memory: float | None) -> int | None:
    """Bytes of the device: as given, or of this machine's GPU."""
    import torch

    if device_memory is not None:
        return int(device_memory * 1e9)
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


# ---------------------------------------------------------------- what is shown


def memory_check(counted: Estimate, total: int | None) -> Check:
    """Whether the peak fits on the device, with what CUDA itself takes."""
    from lace_lightning.cli.doctor_checks import Check
    from lace_lightning.memory.estimate import CONTEXT

    needed = counted.peak.total + CONTEXT
    if total is None:
        return Check(
            "memory", "note", f"peak {_gb(counted.peak.total)}; no GPU here to compare with (--device_memory GB)"
        )
    detail = f"{_gb(needed)} with CUDA's own {_gb(CONTEXT)}, of {_gb(total)}"
    if needed > total:
        return Check("memory", "failed", f"does not fit: {detail}")
    if needed > 0.9 * total:
        return Check("memory", "note", f"tight: {detail}; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True helps")
    return Check("memory", "ok", detail)


def show_estimate(console: Console, counted: Estimate, total: int | None) -> None:
    """The peak's parts, and the other phases."""
    from rich import box
    from rich.table import Table

    peak = counted.peak
    device = f" of {_gb(total)}" if total else ""
    console.print(f"estimated peak per device: [bold]{_gb(peak.total)}[/bold]{device}, in phase {peak.name!r}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what takes it")
    table.add_column("GB", justify="right")
    for name, size in sorted(peak.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, f"{size / 1e9:.3f}")
    for phase in counted.phases:
        if phase is not peak:
            table.add_row(f"[dim]phase {phase.name!r} in all[/dim]", f"[dim]{phase.total / 1e9:.3f}[/dim]")
    console.print(table)


def show_knobs(console: Console, planned: Run) -> None:
    """Options that bring the peak down."""
    from rich import box
    from rich.table import Table

    from lace_lightning.memory import knobs

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what brings it down")
    table.add_column("GB less", justify="right")
    for knob in knobs(planned)[:KNOBS_SHOWN]:
        table.add_row(knob.option, f"{knob.saved / 1e9:.3f}")
    if table.row_count:
        console.print(table)


def show_checks(console: Console, found: Sequence[Check]) -> None:
    """One line per check."""
    marks = {"ok": "[green]ok[/green]    ", "note": "[yellow]note[/yellow]  ", "failed": "[red]FAILED[/red]"}
    from rich.markup import escape

    from lace_lightning.printable import printable
    from lace_lightning.tracking.redact import redact_lines

    for check in found:
        detail = escape(printable(redact_lines(check.detail)))
        console.print(f"{marks[check.state]}  {check.name}: {detail}", highlight=False, soft_wrap=True)


def _one_line(message: str) -> str:
    return " ".join(without_unions(message).split()).split(" Given value: Namespace(")[0]


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

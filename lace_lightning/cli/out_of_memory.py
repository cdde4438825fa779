"""What to say when a GPU's memory ran out: what the memory model expected, and which option helps most."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lace_lightning.cli.main import MISTAKE
from lace_lightning.memory import Estimate, Knob, estimate, knobs
from lace_lightning.memory.estimate import CONTEXT
from lace_lightning.printable import printable
from lace_lightning.tracking.redact import redact_lines

_SHOWN = 3


def explain_out_of_memory(error: torch.OutOfMemoryError, arguments: Sequence[str]) -> int:
    """Print one message for the reader; returns the exit code.

    Args:
        error: of torch; its first sentence says how much was asked for.
        arguments: what stands behind ``lace``, the subcommand first.
    """
    asked = str(error).partition(". GPU")[0].strip().removesuffix(".")
    lines = [f"lace: error: a GPU ran out of memory ({asked})"]
    try:
        lines += _remedies(arguments)
    except Exception as reason:  # a second error must not hide the first
        lines.append(f"(no estimate of what it should have taken: {reason})")
    print("\n".join(printable(redact_lines(line)) for line in lines), file=sys.stderr)
    return MISTAKE


def _remedies(arguments: Sequence[str]) -> list[str]:
    from lace_lightning.cli import doctor
    from lace_lightning.cli.planned import planned_run

    cli = doctor.parsed(arguments[1:])
    module, data = doctor.made(cli)
    run = planned_run(module, data, cli.settings()["trainer"], on_cuda=True)
    return remedies(estimate(run), knobs(run), doctor.device_bytes(None))


def remedies(counted: Estimate, found: Sequence[Knob], total: int | None) -> list[str]:
    """Lines: what was expected, and what lowers it.

    Args:
        counted: the estimate.
        found: options that help, the best first.
        total: bytes of the device; None if they are not known.
    """
    peak = counted.peak
    largest = sorted(peak.parts.items(), key=lambda part: -part[1])[:_SHOWN]
    parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in largest)
    lines = [f"The memory model expects a peak of {peak.total / 1e9:.1f} GB in phase {peak.name!r}: {parts}, …"]
    if total is not None and peak.total + CONTEXT < total:
        lines.append(
            f"That fits in {total / 1e9:.1f} GB: look for other processes on the GPU (nvidia-smi), and set "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation"
        )
    if found:
        best, *others = found[:_SHOWN]
        then = (peak.total - best.saved) / 1e9
        lines.append(f"What helps most: {best.option} ({best.saved / 1e9:.1f} GB less: {then:.1f} GB)")
        lines += [f"then: {knob.option} ({knob.saved / 1e9:.1f} GB less)" for knob in others]
    return [*lines, "`lace doctor` with the same options shows all of it"]

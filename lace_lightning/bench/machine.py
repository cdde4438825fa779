"""The machine a benchmark runs on: what it is, and the two rates that every floor is computed from."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lace_lightning.bench.clock import Clock, spread
from lace_lightning.tracking.run_info import git_state, hardware

PACKAGES = ("lace-lightning", "torch", "triton", "transformers", "flash-attn", "flash-attn-4")
_SAMPLES = 5


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Hardware, versions and git state; a given ``commit`` stands for the git state."""
    record = hardware()
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else record["cpu"],
        "device": device.type,
        "hardware": record,
        "versions": versions(),
        "git": git(commit),
    }


def git(commit: str | None = None) -> dict[str, Any]:
    """Commit, branch and whether (not which: results are published) files had changes; ``commit`` stands for them."""
    state = None if commit else git_state(Path(__file__).parent)
    if state is None:
        return {"commit": commit, "dirty": None}
    return {name: value for name, value in state.items() if name != "changed"}


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and of the packages that numbers depend on; None where one is missing."""
    import platform

    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    # The package may run from a checkout that was never installed; torch's own string names the build.
    return found | {"torch": torch.__version__}


def rates(device: torch.device) -> dict[str, Any]:
    """Both measured rates, with their samples."""
    return {"bandwidth": bandwidth(device), "matrix_rate": matrix_rate(device)}


def bandwidth(device: torch.device) -> dict[str, Any]:
    """Bytes per second of a device copy; every byte counts twice, once read and once written."""
    size, copies = (2**32, 8) if device.type == "cuda" else (2**26, 2)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return _rate(device, copy, 2 * size * copies) | {"unit": "byte/s", "size": size}


def matrix_rate(device: torch.device) -> dict[str, Any]:
    """Floating-point operations per second of a square bfloat16 matrix product on random data."""
    size, products = (8192, 8) if device.type == "cuda" else (512, 2)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(left, right, out=out)

    return _rate(device, multiply, 2 * size**3 * products) | {"unit": "FLOP/s", "size": size}


def _rate(device: torch.device, work: Any, amount: int) -> dict[str, Any]:
    clock = Clock(device)
    work()  # warm-up
    return spread([amount / (1e-3 * clock.milliseconds(work)) for _ in range(_SAMPLES)])

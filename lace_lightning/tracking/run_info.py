"""What a run needs beside its config to be understood later: environment, git state, hardware. Pure functions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from lace_lightning.tracking.redact import redact_lines

MAX_DIFF_CHARACTERS = 1_000_000
_GIT_SECONDS = 10.0


def environment() -> dict[str, Any]:
    """Python, operating system and the version of every installed package. No environment variables."""
    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch, dirty flag and changed files of the checkout around ``folder``; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    if commit is None or status is None:
        return None
    return {
        "commit": commit.strip(),
        "branch": (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(status.strip()),
        "changed": status.splitlines(),
    }


def git_diff(folder: Path) -> str:
    """Uncommitted changes to tracked files, secrets hidden, cut (and marked so) above a million characters."""
    diff = redact_lines(_git(folder, "diff", "--no-ext-diff", "--no-textconv", "HEAD") or "")
    if len(diff) <= MAX_DIFF_CHARACTERS:
        return diff
    return diff[:MAX_DIFF_CHARACTERS] + f"\n… cut: the diff has {len(diff)} characters\n"


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, and the visible GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of one git command; None where there is no git, no checkout or no answer in time."""
    try:
        done = subprocess.run(
            # A checkout may name programs for git to run: none is.
            ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments],
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")

"""Does a long run grow? Lattice GRPO on the doors puzzle for minutes, with everything that a real run has.

    .venv/bin/python benchmarks/soak.py [--minutes M] [--output FILE] [--folder FOLDER]

One real ``lace fit`` of the demo's configs in this process: rollouts, rewards, checkpoints, validations, tables, traces
and MLflow's spool. Every few seconds its resident memory, open files and threads are noted. The first third is
warm-up (allocators, caches, MLflow's store); through the rest goes a line by least squares. Prints the slopes per hour
on one line and writes them with all samples as JSON. Exit code 1 if files grow by more than 5 or memory by more than
30 MB an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from lightning.pytorch import Callback, Trainer

from lace_lightning.bench.machine import git, versions
from lace_lightning.cli.stages import build
from lace_lightning.tracking.run_info import hardware
from lace_lightning.whole_file import write_text

WARM_UP = 1 / 3
"""Share of the samples that no line goes through."""
QUANTITIES = ("memory_mb", "open_files", "threads")
LIMITS = {"memory_mb": 30.0, "open_files": 5.0, "threads": 5.0}
"""Growth per hour that is no noise any more."""


class Watch(Callback):
    """Notes what this process holds, at most once in ``seconds``, between two batches.

    Args:
        seconds: from one sample to the next.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.samples: list[dict[str, float]] = []
        self._process = psutil.Process()
        self._began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Take a sample if one is due."""
        now = time.monotonic() - self._began
        if not self.samples or now - self.samples[-1]["seconds"] >= self.seconds:
            with self._process.oneshot():
                self.samples.append(
                    {
                        "seconds": round(now, 1),
                        "step": trainer.global_step,
                        "memory_mb": self._process.memory_info().rss / 1e6,
                        "open_files": self._process.num_fds(),
                        "threads": self._process.num_threads(),
                    }
                )


def slopes(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each quantity: growth per hour after the warm-up, its standard error (of independent noise), start and end."""
    kept = samples[int(len(samples) * WARM_UP) :]
    hours = np.array([sample["seconds"] for sample in kept]) / 3600
    found = {}
    for name in QUANTITIES:
        values = np.array([sample[name] for sample in kept])
        (slope, start), covariance = np.polyfit(hours - hours[0], values, 1, cov=True)
        found[name] = {
            "per_hour": float(slope),
            "error": float(covariance[0, 0] ** 0.5),
            "start": float(start),
            "end": float(values[-1]),
        }
    return found


def arguments_of(minutes: float, folder: Path) -> list[str]:
    """The command: the demo's GRPO, smaller batches, a validation and a page of groups now and then."""
    limit = timedelta(minutes=minutes)
    return [
        "fit", "--config", "configs/demo/base.yaml", "--config", "configs/demo/grpo.yaml",
        "--config", "configs/trainer/cpu.yaml",
        "--trainer.max_steps=1000000", f"--trainer.max_time={{'seconds': {int(limit.total_seconds())}}}",
        "--trainer.val_check_interval=40", f"--trainer.default_root_dir={folder}",
        f"--trainer.logger.init_args.tracking_uri=sqlite:///{folder}/mlflow.db",
        f"--trainer.logger.init_args.save_dir={folder}/runs", "--trainer.logger.init_args.system_seconds=2",
        "--data.batch_size=4", "--data.num_train_problems=400", "--data.num_problems=32", "--data.val_batch_size=32",
        "--model.groups_per_problem=8", "--model.passes=2", "--model.minibatches=2",
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock minutes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="between samples (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("soak.json"), help="the result (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="of the run's files (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, state = (options.folder or Path(temporary)).resolve(), git()
        watch = Watch(options.seconds)
        build(arguments_of(options.minutes, folder), callbacks=[watch])
    found = slopes(watch.samples)
    last = watch.samples[-1]
    content = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "minutes": last["seconds"] / 60,
        "steps": last["step"],
        "warm_up": WARM_UP,
        "slopes": found,
        "hardware": hardware(),
        "versions": versions(),
        "git": state,
        "columns": list(last),
        "samples": [[round(value, 1) for value in sample.values()] for sample in watch.samples],
    }
    write_text(options.output, json.dumps(content) + "\n")
    told = ", ".join(
        f"{name} {at['per_hour']:+.2f} ± {at['error']:.2f} per hour (now {at['end']:.0f})" for name, at in found.items()
    )
    print(f"soak: {last['step']:.0f} optimizer steps in {last['seconds'] / 60:.1f} minutes: {told}")
    return int(any(found[name]["per_hour"] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())

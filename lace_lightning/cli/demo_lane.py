"""A lane of the demo: a process that runs steps one after the other and says how far it is."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal

from lace_lightning.cli.demo_plan import Step
from lace_lightning.cli.discretion import be_discreet


@dataclass(frozen=True)
class Event:
    """News of a step: it has begun a phase of ``total`` batches, done ``done`` of them, ended, or failed."""

    step: str
    kind: Literal["begun", "moved", "ended", "failed"]
    phase: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class LaneOptions:
    """What is the same for all lanes.

    Args:
        folder: where checkpoints, metrics and logs go.
        seed: of everything.
        num_cpu_threads: of torch, in each lane.
        max_steps: shortens every step, to see that everything runs.
        num_problems: likewise for validation.
    """

    folder: Path
    seed: int
    num_cpu_threads: int
    max_steps: int | None = None
    num_problems: int | None = None


def run_lane(name: str, steps: Sequence[Step], options: LaneOptions, events: Queue[Event]) -> None:
    """Run the steps; everything they print goes to ``<folder>/<name>.log``. Exits with code 1 if one fails."""
    _write_output_to(options.folder / f"{name}.log")
    be_discreet()
    import torch

    torch.set_num_threads(options.num_cpu_threads)
    for step in steps:
        try:
            start = time.perf_counter()
            _run_step(step, options, events)
            events.put(Event(step.name, "ended", seconds=time.perf_counter() - start))
        except BaseException as error:
            events.put(Event(step.name, "failed", note=f"{type(error).__name__}: {error}"))
            raise


def _run_step(step: Step, options: LaneOptions, events: Queue[Event]) -> None:
    from lace_lightning.cli.stages import build
    from lace_lightning.tracking.run_folder import run_folder

    news = _make_reporter(step.name, events)
    fitted = build(step.fit(options.folder, options.seed, options.max_steps), callbacks=[news])
    fitted.trainer.save_checkpoint(step.checkpoint(options.folder))
    shutil.copy(run_folder(fitted.trainer) / "config.yaml", step.config(options.folder))
    if step.is_validated:
        validated = build(step.validate(options.folder, options.seed, options.num_problems), callbacks=[news])
        shutil.copy(run_folder(validated.trainer) / "val_summary.json", step.metrics(options.folder))


def _make_reporter(step: str, events: Queue[Event]) -> Any:
    from lightning import Callback, LightningModule, Trainer

    class Reporter(Callback):
        """Turns the trainer's batches into events."""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            events.put(Event(step, "begun", "training", total=trainer.max_steps))

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            shown = {name: trainer.progress_bar_metrics[name] for name in trainer.progress_bar_metrics if "/" in name}
            note = ", ".join(f"{name.split('/')[1]} {value:.2f}" for name, value in shown.items())
            events.put(Event(step, "moved", "training", trainer.global_step, trainer.max_steps, note))

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            events.put(Event(step, "begun", "playing", total=int(sum(trainer.num_val_batches))))

        def on_validation_batch_end(
            self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int, *_: Any
        ) -> None:
            events.put(Event(step, "moved", "playing", index + 1, int(sum(trainer.num_val_batches))))

    return Reporter()


def _write_output_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("w")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())

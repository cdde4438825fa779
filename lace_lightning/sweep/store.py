"""Folders of stages and evaluations, named by what they hold: what is there already is not done again."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lace_lightning.sweep.outcome import OUTCOMES
from lace_lightning.sweep.plan import PlannedStage, Trial
from lace_lightning.sweep.process import CommandFailed, Room
from lace_lightning.sweep.spec import Tracking
from lace_lightning.whole_file import write_text

DONE, LOCK, LOG = "done.json", ".lock", "log.txt"


@dataclass(frozen=True)
class Store:
    """The folders of a sweep, or of several.

    Args:
        folder: of them all.
        room: how commands run.
        tracking: whether runs are tracked; the room's environment names their store and parent.
        tell: is told what begins.
    """

    folder: Path
    room: Room
    tracking: Tracking | None = None
    tell: Callable[[str], None] = print

    def run(self, trial: Trial) -> Path:
        """Train what is not trained and evaluate it; the folder of the evaluation.

        Raises:
            CommandFailed: a command of the trial failed.
            Stopped: the sweep ends.
        """
        for stage in trial.stages:
            self._once(stage.folder, partial(self._fit, stage, trial))
        return self._once(trial.folder, partial(self._evaluate, trial))

    def checkpoints(self, stage: PlannedStage) -> list[str]:
        """The weights of a stage, with those that it started from: later ones win."""
        return [*self._before(stage), str(self._checkpoint(self.folder / stage.folder))]

    def _before(self, stage: PlannedStage) -> list[str]:
        """The weights that a stage starts from, each once."""
        return list(dict.fromkeys(path for parent in stage.after for path in self.checkpoints(parent)))

    def is_done(self, name: str) -> bool:
        return (self.folder / name / DONE).exists()

    def _once(self, name: str, work: Callable[[Path], None]) -> Path:
        """Do the work of a folder unless it is done; while another process is at it, wait."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with self._held(folder):
            if not self.is_done(name):
                self.tell(name)
                start = time.monotonic()
                work(folder)
                write_text(folder / DONE, json.dumps({"seconds": round(time.monotonic() - start, 1)}) + "\n")
        return folder

    @contextmanager
    def _held(self, folder: Path) -> Iterator[None]:
        """Hold the folder alone. The system frees the lock of a process that dies, so the next one takes over."""
        with (folder / LOCK).open("a") as lock:
            is_told = False
            while not _lock(lock.fileno()):
                if not is_told:
                    self.tell(f"{folder.name}: waits for the process that is at it")
                is_told = True
                self.room.wait(folder.name)
            yield

    def _fit(self, stage: PlannedStage, trial: Trial, folder: Path) -> None:
        settings = deepcopy(dict(stage.settings))
        if stage.after:
            settings["model"]["init_args"]["init_from"] = self._before(stage)
        settings["trainer"] |= {
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "callbacks": [
                _kept_in(folder, callback)
                for callback in settings["trainer"]["callbacks"]
                if not callback["class_path"].endswith("ProgressBar")  # a log is no place for one
            ],
            "logger": self._logger(f"{stage.name}, {trial.point.label}, seed {trial.seed}", folder),
        }
        config = folder / "stage.yaml"
        write_text(config, yaml.safe_dump(settings, sort_keys=False))
        checkpoint = self._checkpoint(folder)
        arguments = ["fit", f"--config={config}"]
        if checkpoint.exists():  # of a process that was ended in the middle
            arguments.append(f"--ckpt_path={checkpoint}")
        self._command(arguments, folder)
        if not checkpoint.exists():
            raise CommandFailed(f"{stage.name} left no {checkpoint}: see {folder / LOG}")

    def _evaluate(self, trial: Trial, folder: Path) -> None:
        settings = deepcopy(dict(trial.evaluation))
        settings["policies"]["trained"]["init_from"] = self.checkpoints(trial.stages[-1])
        settings["output"] = str(folder / OUTCOMES)
        if (tracking := self.tracking) is not None and tracking.children:
            name = f"eval, {trial.point.label}, seed {trial.seed}"
            settings["tracking"] = {"experiment": tracking.experiment, "run_name": name}
        config = folder / "evaluation.yaml"
        write_text(config, yaml.safe_dump(settings, sort_keys=False))
        self._command(["eval", f"--config={config}"], folder)

    def _command(self, arguments: Sequence[str], folder: Path) -> None:
        """Run it; what a failed one left is no ground to go on from."""
        try:
            self.room.run(arguments, folder / LOG)
        except CommandFailed:
            for left in ("checkpoints", OUTCOMES):
                shutil.rmtree(folder / left, ignore_errors=True)
            raise

    def _logger(self, run_name: str, folder: Path) -> Any:
        tracking = self.tracking
        if tracking is None or not tracking.children:
            return False
        options = {"experiment_name": tracking.experiment, "run_name": run_name}
        options |= {"save_dir": str(folder / "tracking")}
        return {"class_path": "lace_lightning.tracking.MLflowLogger", "init_args": options}

    @staticmethod
    def _checkpoint(folder: Path) -> Path:
        return folder / "checkpoints" / "last.ckpt"


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kept_in(folder: Path, callback: Mapping[str, Any]) -> dict[str, Any]:
    """A callback that keeps checkpoints does so in the stage's folder."""
    options = callback.get("init_args") or {}
    if not options.get("save_last"):
        return dict(callback)
    return {**callback, "init_args": {**options, "dirpath": str(folder / "checkpoints")}}

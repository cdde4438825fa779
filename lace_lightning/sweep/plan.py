"""The trials of a sweep: which stages each needs, under which address, and how it differs from the base."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lace_lightning import __version__
from lace_lightning.sweep.points import Point, planned_points
from lace_lightning.sweep.resolve import evaluation_settings, leaves, stage_settings, stages_of
from lace_lightning.sweep.spec import EVALUATION, SweepError, SweepSpec

_WITHOUT_EFFECT = ("trainer.logger", "trainer.enable_progress_bar", "data.init_args.num_workers")
"""Settings that the weights do not depend on."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a trial.

    Args:
        name: in the sweep.
        settings: resolved, but for the weights that it starts from and the folder.
        after: the stages whose weights it starts from.
        digest: of settings, data and ``after``: stages with one digest are the same.
    """

    name: str
    settings: Mapping[str, Any]
    after: tuple[PlannedStage, ...]
    digest: str

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.digest[:12]}"


@dataclass(frozen=True)
class Trial:
    """One row with one seed.

    Args:
        point: the row.
        seed: the seed.
        stages: in order, at least one; the last one's model is evaluated.
        evaluation: settings of ``lace eval``, but for weights and output folder.
    """

    point: Point
    seed: int
    stages: tuple[PlannedStage, ...]
    evaluation: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return _digest([self.evaluation, data_of(self.evaluation), self.stages[-1].digest])

    @property
    def folder(self) -> str:
        return f"{EVALUATION}-{self.digest[:12]}"


def plan(sweep: SweepSpec) -> list[Trial]:
    """All trials that are known beforehand, the base's seeds first.

    Raises:
        SweepError: anything about the sweep or its configs is wrong; nothing has run then.
    """
    points = sorted(planned_points(sweep), key=lambda point: point.label != sweep.base)
    return [plan_trial(sweep, point, seed) for seed in sweep.seeds for point in points]


def plan_trial(sweep: SweepSpec, point: Point, seed: int) -> Trial:
    """One row with one seed, all its settings checked."""
    stages: dict[str, PlannedStage] = {}
    for name in stages_of(sweep, point):
        settings = stage_settings(sweep, point, name, seed)
        _require_last_checkpoint(name, settings)
        after = tuple(stages[before] for before in sweep.stages[name].after if before in stages)
        stages[name] = PlannedStage(name, settings, after, _stage_digest(settings, after))
    last = [*stages.values()][-1]
    return Trial(point, seed, tuple(stages.values()), evaluation_settings(sweep, point, dict(last.settings), seed))


def difference(trial: Trial, base: Trial) -> Iterator[str]:
    """The settings in which two trials with one seed differ, one line each."""
    ours = {stage.name: stage.settings for stage in trial.stages} | {EVALUATION: trial.evaluation}
    theirs = {stage.name: stage.settings for stage in base.stages} | {EVALUATION: base.evaluation}
    for name in theirs | ours:
        if name not in ours or name not in theirs:
            yield f"{name}: {'left out' if name not in ours else 'only here'}"
            continue
        now, then = leaves(ours[name]), leaves(theirs[name])
        for key in then | now:
            # The evaluated model is the last stage's: its settings are listed there.
            is_told = name == EVALUATION and key.startswith("policies.trained.")
            if then.get(key) != now.get(key) and not is_told:
                yield f"{name}: {key}: {_shown(then, key)} -> {_shown(now, key)}"


def data_of(settings: Any) -> dict[str, str]:
    """Digests of the files and folders that settings name, by path: the same path may hold other data tomorrow."""
    values = settings.values() if isinstance(settings, Mapping) else settings if isinstance(settings, list) else ()
    found = {path: digest for value in values for path, digest in data_of(value).items()}
    if isinstance(settings, str) and (files := _files_of(settings)):
        root = Path(settings)
        found[settings] = _digest([[str(file.relative_to(root)), _file_digest(file)] for file in files])
    return found


def _files_of(text: str) -> list[Path]:
    """The file, or all files of the folder, that a setting names; not of one that holds the working directory."""
    if os.path.isfile(text):  # unlike pathlib's, it has an answer for every text
        return [Path(text)]
    if not os.path.isdir(text) or Path.cwd().is_relative_to(Path(text).resolve()):
        return []
    return sorted(file for file in Path(text).rglob("*") if file.is_file())


def _stage_digest(settings: Mapping[str, Any], after: tuple[PlannedStage, ...]) -> str:
    kept = {key: value for key, value in leaves(settings).items() if not key.startswith(_WITHOUT_EFFECT)}
    named = {name: settings[name] for name in ("data", "model")}
    return _digest([__version__, kept, data_of(named), [stage.digest for stage in after]])


def _require_last_checkpoint(name: str, settings: Mapping[str, Any]) -> None:
    callbacks = settings["trainer"]["callbacks"] or []
    if not any((callback.get("init_args") or {}).get("save_last") for callback in callbacks):
        raise SweepError(
            f"stage {name!r} keeps no last.ckpt: add lace_lightning.callbacks.StageCheckpoint with save_last: true to "
            "trainer.callbacks"
        )


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _content_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _content_digest(path: Path, size: int, modified: int) -> str:
    """Of a file as it was then; all trials name the same ones, which may be a model's weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], default=str) if key in settings else "not there"

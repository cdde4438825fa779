"""From configs and changes to the settings that a stage or an evaluation runs with; every key is checked."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from lace_lightning.sweep.points import Point
from lace_lightning.sweep.reading import shipped
from lace_lightning.sweep.spec import EVALUATION, SweepError, SweepSpec

Settings = dict[str, Any]


def stages_of(sweep: SweepSpec, point: Point) -> list[str]:
    """The stages that a row trains, in order.

    Raises:
        SweepError: a change names a stage that does not exist, or leaves out all of them.
    """
    for change in point.changes:
        for name in [*change.skip, *change.stages, *(name for key in change.set for name in _targets(sweep, key))]:
            if name not in sweep.stages and name != EVALUATION:
                raise SweepError(f"row {point.label!r} names stage {name!r}, and there are {', '.join(sweep.stages)}")
    left = [name for name in sweep.stages if not any(name in change.skip for change in point.changes)]
    if not left:
        raise SweepError(f"row {point.label!r} leaves out every stage")
    return left


def stage_settings(sweep: SweepSpec, point: Point, name: str, seed: int) -> Settings:
    """The resolved settings of a stage.

    Raises:
        SweepError: a key is unknown or a value is not fit for it.
    """
    stage, configs = sweep.stages[name], sweep.stages[name].configs
    for change in point.changes:
        configs = change.stages.get(name, configs)
        if not sweep.applies_to or name in sweep.applies_to:
            configs = [*configs, *change.configs]
    options = {**stage.set, **_settings_for(sweep, point, name)}
    arguments = [f"--config={shipped(path)}" for path in configs]
    arguments += [f"--{key}={_as_option(value)}" for key, value in options.items()]
    # One parse serves all seeds: the seeded keys are known to exist after the first.
    arguments += [f"--{key}={sweep.seeds[0]}" for key in stage.seeded]
    settings = deepcopy(_parsed(arguments, f"stage {name!r} of row {point.label!r}"))
    for key in ["seed_everything", *stage.seeded]:
        _put(settings, key.split("."), seed)
    return settings


def evaluation_settings(sweep: SweepSpec, point: Point, last: Settings, seed: int) -> Settings:
    """The settings of the evaluation, but for weights and output folder.

    Args:
        sweep: the sweep.
        point: the row.
        last: settings of the stage whose model is evaluated.
        seed: of the trial.

    Raises:
        SweepError: a key is unknown or a value is not fit for it.
    """
    from lace_lightning.cli.eval_config import merge, read_settings

    options = {**sweep.evaluation.set, **_settings_for(sweep, point, EVALUATION)}
    where = f"evaluation of row {point.label!r}"
    try:
        settings = read_settings(
            [shipped(path) for path in sweep.evaluation.configs],
            [f"--{key}={json.dumps(value)}" for key, value in options.items()],
        )
    except ValueError as error:
        raise SweepError(f"{where}: {error}") from error
    model, data = last["model"]["init_args"], last["data"]["init_args"]
    policy = {"spec": model["spec"], "max_length": data["max_length"], "tokenizer": data.get("tokenizer")}
    policy |= {"decoding": model["validation"]} if model.get("validation") else {}
    settings = merge({"policies": {"trained": policy}, "output": ""}, settings) | {"seeds": [seed]}
    _check_evaluation(json.dumps(settings), where)
    _check_names(sweep, settings)
    return settings


def _settings_for(sweep: SweepSpec, point: Point, name: str) -> Settings:
    """What the changes of a row set in a stage or the evaluation."""
    return {
        key.rpartition(":")[2]: value
        for change in point.changes
        for key, value in change.set.items()
        if name in _targets(sweep, key)
    }


def _targets(sweep: SweepSpec, key: str) -> Sequence[str]:
    stages, colon, _ = key.partition(":")
    return stages.split(",") if colon else sweep.applies_to or [*sweep.stages]


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(arguments: Sequence[str], where: str) -> Settings:
    from lace_lightning.cli.main import without_unions

    try:
        return _parse_once(tuple(arguments))
    except (ArgumentError, ValueError, OSError) as error:
        raise SweepError(f"{where}: {without_unions(str(error))}") from error


@cache
def _parse_once(arguments: tuple[str, ...]) -> Settings:
    from lace_lightning.cli.stages import resolve

    return resolve(arguments)


def _check_evaluation(settings: str, where: str) -> None:
    """Types and names, before any weights exist."""
    try:
        _check_once(settings)
    except (ArgumentError, TypeError, ValueError) as error:
        raise SweepError(f"{where}: {error}") from error


@cache
def _check_once(settings: str) -> None:
    from jsonargparse import ArgumentParser

    from lace_lightning.evaluation.spec import EvaluationSpec

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EvaluationSpec, None)
    EvaluationSpec(**vars(parser.instantiate_classes(parser.parse_object(json.loads(settings)))))


def _check_names(sweep: SweepSpec, settings: Settings) -> None:
    from lace_lightning.evaluation.statistics import STATISTICS

    for option, name, known in (
        ("benchmark", sweep.benchmark, settings["benchmarks"]),
        ("method", sweep.method, settings["methods"]),
        *((option, name, STATISTICS) for option, names in _statistics(sweep).items() for name in names),
    ):
        if name is not None and name not in known:
            raise SweepError(f"{option}={name!r} is none of {', '.join(known)}")


def _statistics(sweep: SweepSpec) -> dict[str, list[str]]:
    return {"metric": [sweep.metric], "columns": sweep.columns}


def _put(settings: Settings, names: Sequence[str], value: Any) -> None:
    for name in names[:-1]:
        settings = settings[name]
    settings[names[-1]] = value


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{prefix}.{name}" if prefix else name
        found |= leaves(value, path) if isinstance(value, Mapping) and value else {path: value}
    return found

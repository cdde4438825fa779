"""From configs and options of ``lace eval`` to an evaluation: merging, sweeps, and what each name means."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lace_lightning.cli.mapping import read_mapping
from lace_lightning.evaluation.spec import EvaluationSpec

Settings = dict[str, Any]


def read_settings(configs: Sequence[str], options: Sequence[str]) -> Settings:
    """The settings of several YAML files and ``--name.path=value`` options, the last one winning, sweeps written out.

    Mappings are merged key by key; where both name a ``class_path`` and these differ, the later one replaces.

    Raises:
        ValueError: a file is no YAML mapping, or an option is not of that form.
    """
    settings: Settings = {}
    for path in configs:
        settings = merge(settings, read_mapping(Path(path), f"--config {path}"))
    for name, value in _pairs(options):
        settings = merge(settings, _nested(name.split("."), value))
    return with_sweeps(settings)


def merge(base: Any, over: Any) -> Any:
    """``over`` on top of ``base``; neither is changed."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return deepcopy(over)
    if "class_path" in over and over["class_path"] != base.get("class_path", over["class_path"]):
        return deepcopy(dict(over))
    return {key: merge(base.get(key), over[key]) if key in over else deepcopy(base[key]) for key in {**base, **over}}


def with_sweeps(settings: Settings) -> Settings:
    """Each method under ``sweeps`` once per value of its option: ``vote: {num_threads: [1, 4]}`` gives two methods.

    They are called ``vote@1`` and ``vote@4``, and take the place of ``vote``.

    Raises:
        ValueError: a sweep is of no method, or not of one option with a list of values, or either is no mapping.
    """
    settings = dict(settings)
    sweeps, methods = settings.pop("sweeps", None) or {}, settings.get("methods") or {}
    for name, value in (("sweeps", sweeps), ("methods", methods)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} must be a mapping of names")
    for name, sweep in sweeps.items():
        if name not in methods:
            raise ValueError(f"sweeps.{name}: there is no method {name!r}")
        if not isinstance(sweep, Mapping) or [type(values) for values in sweep.values()] != [list]:
            raise ValueError(f"sweeps.{name}={sweep!r}: give one option with a list of values, {{num_threads: [1, 4]}}")
    settings["methods"] = dict(
        point for name, method in methods.items() for point in _points(name, method, sweeps.get(name))
    )
    return settings


def _points(name: str, method: Settings, sweep: Mapping[str, list[Any]] | None) -> list[tuple[str, Settings]]:
    if not sweep:
        return [(name, method)]
    [(option, values)] = sweep.items()
    return [(f"{name}@{value}", merge(method, {"init_args": {option: value}})) for value in values]


def parse(settings: Settings) -> tuple[EvaluationSpec, dict[str, Settings]]:
    """The evaluation, and what each of its names means: what a resumed evaluation must agree on.

    Raises:
        ValueError: a setting is unknown, of a wrong type, or out of range.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EvaluationSpec, None)
    try:
        parsed = parser.parse_object(deepcopy(settings))  # it changes what it gets
        resolved = yaml.safe_load(parser.dump(parsed))
        spec = EvaluationSpec(**vars(parser.instantiate_classes(parsed)))
    except (ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error
    return spec, meanings_of(spec, resolved)


def meanings_of(spec: EvaluationSpec, resolved: Settings) -> dict[str, Settings]:
    """Settings that outcomes depend on, by section and name; weights by their content."""
    for policy in spec.policies.values():
        policy.check()
    policies = {
        name: _without(settings, "device") | {"weights": spec.policies[name].fingerprint()}
        for name, settings in resolved["policies"].items()
    }
    benchmarks = {
        name: _without(settings, "num_problems", "on_bad") for name, settings in resolved["benchmarks"].items()
    }
    return {"policies": policies, "methods": resolved["methods"], "benchmarks": benchmarks}


def _without(settings: Settings, *names: str) -> Settings:
    return {name: value for name, value in settings.items() if name not in names}


def _pairs(options: Sequence[str]) -> list[tuple[str, Any]]:
    """(name, value) of ``--name=value`` and ``--name value``, values read as YAML."""
    pairs, rest = [], list(options)
    while rest:
        option = rest.pop(0)
        name, equals, value = option.partition("=")
        if not name.startswith("--") or (not equals and not rest):
            raise ValueError(
                f"{option}: options are --config FILE, and --name.of.setting=value for any of its settings"
            )
        try:
            pairs.append((name.removeprefix("--"), yaml.safe_load(value if equals else rest.pop(0))))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{option}: the value is no YAML: {error}") from error
    return pairs


def _nested(names: Sequence[str], value: Any) -> Any:
    return {names[0]: _nested(names[1:], value)} if names else value

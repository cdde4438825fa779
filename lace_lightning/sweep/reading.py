"""Reading a sweep's file."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lace_lightning.cli.mapping import read_mapping
from lace_lightning.cli.shipped import with_shipped_configs
from lace_lightning.sweep.spec import (
    Axis,
    Change,
    EvaluationSettings,
    Limits,
    StageSpec,
    SweepError,
    SweepSpec,
    Tracking,
)


def read_sweep(path: str) -> SweepSpec:
    """The sweep of a YAML file.

    ``extends`` names files beneath it, relative to its own folder; a key at the top of a later file replaces that of an
    earlier one as a whole.

    Raises:
        SweepError: the file cannot be read, or a setting is unknown or out of range.
    """
    settings = _settings(Path(shipped(path)), ())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepSpec, None)
    try:
        parser.parse_object(_names_and_types(settings))
        return _built(settings)
    except (ArgumentError, TypeError, ValueError) as error:
        raise SweepError(f"{path}: {error}") from error


def _names_and_types(settings: Any) -> Any:
    """The settings without what stages will check: jsonargparse imports whatever class such a value names."""
    if isinstance(settings, list):
        return [_names_and_types(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    left_out = {"set": (dict, {}), "values": (list, [0])}
    return {
        key: left_out[key][1] if key in left_out and isinstance(value, left_out[key][0]) else _names_and_types(value)
        for key, value in settings.items()
    }


def _built(settings: dict[str, Any]) -> SweepSpec:
    """The records, without jsonargparse: it would build whatever class a value names."""

    def records(kind: Callable[..., Any], name: str) -> dict[str, Any]:
        return {key: kind(**value) for key, value in (settings.get(name) or {}).items()}

    def axis(choices: dict[str, Any] | None = None, **rest: Any) -> Axis:
        return Axis(choices={key: Change(**value) for key, value in (choices or {}).items()}, **rest)

    built: dict[str, Any] = {
        "stages": records(StageSpec, "stages"),
        "rows": records(Change, "rows"),
        "axes": records(axis, "axes"),
    }
    built["evaluation"] = EvaluationSettings(**settings["evaluation"])
    if settings.get("limits"):
        built["limits"] = Limits(**settings["limits"])
    if settings.get("tracking") is not None:
        built["tracking"] = Tracking(**settings["tracking"])
    return SweepSpec(**{**settings, **built})


def shipped(path: str) -> str:
    """A ``configs/…`` that is not under the working directory is the one that we ship."""
    return with_shipped_configs([path])[0]


def _settings(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    try:
        place = path.resolve()
    except ValueError as error:  # a null byte
        raise SweepError(f"extends: {str(path)!r} is no path: {error}") from error
    if place in above:
        raise SweepError(f"extends: {path} lies beneath itself")
    try:
        own = read_mapping(path, str(path))
    except ValueError as error:
        raise SweepError(str(error)) from error
    settings: dict[str, Any] = {}
    below = own.pop("extends", [])
    below = [below] if isinstance(below, str) else below
    if not isinstance(below, list) or not all(isinstance(name, str) for name in below):
        raise SweepError(f"{path}: extends={below!r} must be a file or a list of files")
    for name in below:
        settings |= _settings(path.parent / name, (*above, place))
    return settings | own

"""A stage's settings in its checkpoint, as text: what a resumed run must agree on with the one that it resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from lace_lightning.checkpoints import CheckpointError
from lace_lightning.rewards import Reward

SETTINGS = "lace_settings"
"""Key of a checkpoint: the settings of the run that wrote it, as JSON."""


def settings_text(settings: Mapping[str, Any]) -> str:
    """A JSON object of the repr of every leaf of nested ``settings`` by its dotted name."""
    return json.dumps(dict(_flatten(settings)))


def check_settings(text: str, settings: Mapping[str, Any], path: str | Path) -> None:
    """Raise CheckpointError unless ``settings`` are those of ``text``, which the checkpoint at ``path`` holds."""
    then: dict[str, str] = json.loads(text)
    now, default = dict(_flatten(settings)), dict(_defaults(settings))
    # A setting that is younger than the checkpoint was at its default.
    values = {name: (then.get(name, default.get(name, "not set")), now.get(name, "not set")) for name in then | now}
    changed = [f"model.{name} was {old} and is {new}" for name, (old, new) in values.items() if old != new]
    if changed:
        raise CheckpointError(
            f"--ckpt_path {path} resumes a run as it was, but {'; '.join(changed)}. To start a new run from these "
            "weights, give the file as model.init_from instead"
        )


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, repr) of every leaf of nested dicts, lists, dataclasses and rewards."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif is_dataclass(value):
        told = [f for f in fields(value) if not f.metadata.get("neutral")]
        items = [("type", type(value).__name__), *((f.name, getattr(value, f.name)) for f in told)]
    elif isinstance(value, Reward):
        plain = {name: part for name, part in vars(value).items() if isinstance(part, bool | int | float | str)}
        items = [("type", type(value).__name__), *plain.items()]
    else:
        yield prefix, repr(value)
        return
    for name, part in items:
        yield from _flatten(part, f"{prefix}.{name}" if prefix else str(name))


def _defaults(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, repr) of every leaf of nested dicts and dataclasses that has a default, as it is by default."""
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
        for f in fields(value):
            name = f"{prefix}.{f.name}" if prefix else f.name
            if f.default is not MISSING:
                yield from _flatten(f.default, name)
            elif f.default_factory is not MISSING:
                yield from _flatten(f.default_factory(), name)
    for name, part in items:
        yield from _defaults(part, f"{prefix}.{name}" if prefix else name)

"""Reading a sweep's file."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lace_lightning.cli.shipped import with_shipped_configs
from lace_lightning.sweep.spec import SweepError, SweepSpec


def read_sweep(path: str) -> SweepSpec:
    """The sweep of a YAML file.

    ``extends`` names files beneath it, relative to its own folder; a key at the top of a later file replaces that of an
    earlier one as a whole.

    Raises:
        SweepError: the file cannot be read, or a setting is unknown or out of range.
    """
    settings = _settings(Path(shipped(path)))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepSpec, None)
    try:
        return SweepSpec(**vars(parser.instantiate_classes(parser.parse_object(settings))))
    except (ArgumentError, TypeError) as error:
        raise SweepError(f"{path}: {error}") from error


def shipped(path: str) -> str:
    """A ``configs/…`` that is not under the working directory is the one that we ship."""
    return with_shipped_configs([path])[0]


def _settings(path: Path) -> dict[str, Any]:
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is no YAML: {error}") from error
    if not isinstance(own, dict):
        raise SweepError(f"{path} holds no settings: a sweep is a YAML mapping")
    settings: dict[str, Any] = {}
    below = own.pop("extends", [])
    for name in [below] if isinstance(below, str) else below:
        settings |= _settings(path.parent / name)
    return settings | own

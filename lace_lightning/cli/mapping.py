"""Files of settings that are no LightningCLI configs: YAML with names at its top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_mapping(path: Path, name: str) -> dict[str, Any]:
    """The settings of a YAML file.

    Args:
        path: the file.
        name: what the user calls it, for error messages.

    Raises:
        ValueError: it cannot be read, is no YAML, or holds something else.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} holds no settings: it must be a YAML mapping")
    return settings

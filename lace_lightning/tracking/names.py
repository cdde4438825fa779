"""Names that MLflow and file systems accept, and nested settings by their dotted names."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

_MAX_KEY_CHARACTERS = 250


def flat(settings: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested settings under their dotted names; lists stay whole."""
    if not isinstance(settings, Mapping) or not settings:
        yield prefix, settings
        return
    for name, value in settings.items():
        yield from flat(value, f"{prefix}.{name}" if prefix else str(name))


def key(name: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    plain = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("./")
    return plain[:_MAX_KEY_CHARACTERS] or "_"


def file_name(name: str) -> str:
    """A name for a file or folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"

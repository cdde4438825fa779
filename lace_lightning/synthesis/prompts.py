"""Prompt templates: text files with ``$names``, one folder per version, each known by its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from string import Template

SHIPPED = Path(__file__).parent / "templates"
NAMES: Mapping[str, frozenset[str]] = {
    "attempt": frozenset({"problem"}),
    "solve": frozenset({"problem"}),
    "avoid": frozenset({"problem", "methods"}),
    "debate": frozenset({"problem", "own", "others", "task"}),
    "compress": frozenset({"problem", "steps", "answer", "max_tokens"}),
    "rank": frozenset({"problem", "solutions", "count"}),
}
"""The templates of a version, and the names that each must use."""


class Prompts:
    """The templates of one version.

    Args:
        version: a shipped version (``v1``), or a folder with the same files.

    Raises:
        ValueError: a file is missing, or uses other names than it is given.
    """

    def __init__(self, version: str = "v1") -> None:
        folder = SHIPPED / version if (SHIPPED / version).is_dir() else Path(version)
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
            raise ValueError(f"prompts={version!r} is neither a shipped version ({shipped}) nor a folder")
        texts = {name: _read(folder / f"{name}.txt", names) for name, names in NAMES.items()}
        self._templates = {name: Template(text) for name, text in texts.items()}
        self.versions = {name: f"{folder.name}/{name}.txt {_digest(text)}" for name, text in texts.items()}

    def fill(self, name: str, **values: object) -> str:
        """A prompt. Values are put in as they are: a ``$`` in a problem is nothing special."""
        return self._templates[name].substitute({key: str(value) for key, value in values.items()})


def _read(path: Path, names: frozenset[str]) -> str:
    if not path.is_file():
        raise ValueError(f"prompts: {path} is missing; a version has {', '.join(f'{name}.txt' for name in NAMES)}")
    text = path.read_text(encoding="utf-8")
    template = Template(text)
    if not template.is_valid() or set(template.get_identifiers()) != names:
        used = ", ".join(f"${name}" for name in template.get_identifiers())
        needed = ", ".join(f"${name}" for name in sorted(names))
        raise ValueError(f"prompts: {path} must use exactly {needed} (it uses {used}); write $$ for a dollar sign")
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]

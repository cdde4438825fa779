"""Rows of the pipeline's files: JSON lines that appear whole or not at all, and digests of what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lace_lightning.traces.schema import Problem
from lace_lightning.whole_file import write_text

Row = dict[str, Any]
"""One problem on its way through the stages: ``position`` (its place in the problems stage), ``problem``, and what the
stages found out. A row with a reason under ``removed`` goes no further."""


def to_line(row: Mapping[str, Any]) -> str:
    """One line of JSON, keys in the order in which they were set."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of ours.

    Raises:
        ValueError: the file was damaged after it was written.
    """
    return parse_rows((line for line in path.read_bytes().split(b"\n") if line), path)


def parse_rows(lines: Iterable[bytes], path: Path) -> list[Row]:
    """The rows on the lines of a file of ours; ValueError, which names it, if one is damaged."""
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is damaged ({error}): remove the file, and its stage is done again"
            ) from error
    return rows


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write JSON lines; the file appears whole or not at all."""
    write_text(path, "".join(map(to_line, rows)))


def problem_of(row: Row) -> Problem:
    return Problem(**row["problem"])


def describe(value: Any) -> Any:
    """What a configured object is, as JSON values: its ``identity`` if it has one, else class and public attributes."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if hasattr(value, "identity"):
        return value.identity
    names = [field.name for field in fields(value)] if is_dataclass(value) else vars(value)
    public = {name: describe(getattr(value, name)) for name in names if not name.startswith("_")}
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}"} | public


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values, as 64 hexadecimal digits."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

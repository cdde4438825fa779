"""How public data sets name what we call id, problem and answer: said in YAML, never by code from data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lace_lightning.traces.tags import parse_answer

Extraction = Literal["whole", "after_hashes", "boxed"]
"""How an answer stands in its column: ``whole``: it is all of it; ``after_hashes``: behind the last ``####``, commas
between digits removed (GSM8K); ``boxed``: in the last ``\\boxed{…}`` of a solution."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set.

    A row that lacks a named column is read by our own name for it (docs/data.md), so that a benchmark's YAML reads both
    the hub's rows and converted files. A list of one text counts as that text; numbers count as their digits.

    Args:
        id: column of the id; null: rows are numbered from 1 where they have no ``id``.
        problem: column of the statement.
        answer: column of the answer.
        extract: how the answer stands in its column.

    Raises:
        ValueError: ``extract`` is unknown.
    """

    id: str | None = "id"
    problem: str = "problem"
    answer: str = "answer"
    extract: Extraction = "whole"

    def __post_init__(self) -> None:
        if self.extract not in get_args(Extraction):
            raise ValueError(f"extract={self.extract!r}: choose one of {', '.join(get_args(Extraction))}")

    def rename(self, row: object, place: str) -> object:
        """The row in our own names; other columns stay, and become the problem's facts.

        Args:
            row: a decoded row; what is no object is returned as it is, for the schema to refuse.
            place: where it stands, ending in its number.
        """
        if not isinstance(row, dict):
            return row
        fields: dict[str, Any] = dict(row)
        for name, column in (("id", self.id), ("problem", self.problem), ("answer", self.answer)):
            if column in fields:
                fields[name] = _plain(fields.pop(column))
        if fields.get("id") is None:
            fields["id"] = (re.findall(r"\d+", place) or ["0"])[-1]
        if isinstance(fields.get("answer"), str):
            fields["answer"] = _EXTRACTIONS[self.extract](fields["answer"])
        return fields


def _plain(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        return _plain(value[0])
    if type(value) is float and value.is_integer():
        return str(int(value))
    return str(value) if type(value) in (int, float) else value


def _after_hashes(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d)", "", text.rpartition("####")[2].strip())


def _boxed(text: str) -> str:
    return (parse_answer(text) or "") if "\\boxed{" in text else text


_EXTRACTIONS: dict[str, Callable[[str], str]] = {
    "whole": lambda text: text,
    "after_hashes": _after_hashes,
    "boxed": _boxed,
}

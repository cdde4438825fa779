"""An outcome as one JSON object, and back: whoever wrote the object, what is read has the types that it should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lace_lightning.decoding.group import Thread
from lace_lightning.evaluation.inspection import SEGMENTS, Inspection, Read
from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.method import Cost, Passage
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Tag

_DECIMALS = 4
"""Of stored log-probabilities, gates and shares of attention."""
_NUMBER = (int, float)
_LISTS: dict[str, Any] = {"observations": str, "token_ids": int, "columns": int, "logprobs": _NUMBER, "forced": bool}
"""What a thread has lists of."""


def to_json(record: JudgedOutcome) -> dict[str, Any]:
    """The record as JSON values; :func:`from_json` reads them back."""
    return {
        "benchmark": record.benchmark,
        "method": record.method,
        "seed": record.seed,
        "problem": asdict(record.problem),
        "passages": [_passage_to_json(passage) for passage in record.passages],
        "chosen": record.chosen,
        "found": record.found,
        "confidence": record.confidence,
        "cost": asdict(record.cost),
        "notes": dict(record.notes),
        "statistics": dict(record.statistics),
    }


def from_json(row: Mapping[str, Any]) -> JudgedOutcome:
    """The record of a row that :func:`to_json` made.

    Raises:
        KeyError, TypeError, ValueError: the row is something else.
    """
    passages = tuple(_passage_from_json(passage) for passage in row["passages"])
    chosen = row["chosen"]
    if chosen is not None and _is(int, chosen) not in range(len(passages)):
        raise ValueError(f"chosen={chosen} is none of {len(passages)} passages")
    return JudgedOutcome(
        _is(str, row["benchmark"]),
        _is(str, row["method"]),
        _is(int, row["seed"]),
        _problem(row["problem"]),
        passages,
        chosen,
        Cost(**{name: _is(_NUMBER, value) for name, value in row["cost"].items()}),
        None if row["confidence"] is None else _is(_NUMBER, row["confidence"]),
        _is(dict, row["notes"]),
        {name: _is(_NUMBER, value) for name, value in row["statistics"].items()},
    )


def _passage_to_json(record: JudgedPassage) -> dict[str, Any]:
    passage, thread = record.passage, record.passage.thread
    return {
        "role": passage.role,
        "group": passage.group,
        "verdict": record.verdict,
        **asdict(thread),
        "logprobs": [round(value, _DECIMALS) for value in thread.logprobs],
        "inspection": None if record.inspection is None else _inspection_to_json(record.inspection),
    }


def _problem(row: Mapping[str, Any]) -> Problem:
    return Problem(**{name: _is(dict if name == "facts" else str, value) for name, value in row.items()})


def _passage_from_json(row: Mapping[str, Any]) -> JudgedPassage:
    thread = Thread(
        text=_is(str, row["text"]),
        thought=_is(str, row["thought"]),
        answer=None if row["answer"] is None else _is(str, row["answer"]),
        tag=None if row["tag"] is None else Tag(row["tag"]),
        finished=_is(str, row["finished"]),
        **{name: _all(kind, row[name]) for name, kind in _LISTS.items()},
    )
    verdict = None if row["verdict"] is None else Verdict(row["verdict"])
    inspection = None if row["inspection"] is None else _inspection_from_json(row["inspection"], thread.num_tokens)
    return JudgedPassage(Passage(thread, _is(str, row["role"]), _is(int, row["group"])), verdict, inspection)


def _inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    gates, reads = inspection.gates, inspection.reads
    return {
        "thread": inspection.thread,
        "pieces": inspection.pieces,
        "segments": inspection.segments,
        "gates": None if gates is None else [round(value, _DECIMALS) for value in gates],
        "reads": None
        if reads is None
        else [[(n, time, round(share, _DECIMALS)) for n, time, share in token] for token in reads],
    }


def _inspection_from_json(row: Mapping[str, Any], num_tokens: int) -> Inspection:
    gates, reads = row["gates"], row["reads"]
    found = Inspection(
        _index(row["thread"]),
        _all(str, row["pieces"]),
        _is(str, row["segments"]),
        None if gates is None else _all(_NUMBER, gates),
        None if reads is None else tuple(tuple(map(_read, token)) for token in reads),
    )
    each = [found.pieces, found.segments, *(part for part in (found.gates, found.reads) if part is not None)]
    if any(len(part) != num_tokens for part in each) or set(found.segments) - set(SEGMENTS):
        raise ValueError(f"the inspection is not of a thread of {num_tokens} tokens")
    return found


def _read(row: Any) -> Read:
    thread, time, share = row
    return _index(thread), _is(int, time), _is(_NUMBER, share)


def _index(value: Any) -> int:
    if _is(int, value) < 0:
        raise ValueError(f"{value} is no index of a thread")
    return int(value)


def _is(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} is not of type {kind}")
    return value


def _all(kind: type | tuple[type, ...], values: Any) -> tuple[Any, ...]:
    return tuple(_is(kind, value) for value in _is(list, values))

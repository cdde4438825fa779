"""Rows into problems and traces: every field is checked, and a bad row is refused with the reason.

The row schema is documented in docs/data.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread


def parse_problem(row: object) -> Problem:
    """The problem of one row.

    Raises:
        ValueError: the reason why the row is bad.
    """
    fields = _object(row, "row")
    known = {"id", "problem", "answer", "source", "facts", "threads"}
    extra = {key: value for key, value in fields.items() if key not in known and value is not None}
    text = _string(fields, "problem")
    if not text.strip():
        raise ValueError("field 'problem' is empty")
    return Problem(
        id=_string_or_number(fields, "id"),
        text=text,
        answer=_string_or_number(fields, "answer"),
        facts=_facts(fields.get("facts")) | extra,
        source=_string(fields, "source", default=""),
    )


def parse_trace(row: object) -> Trace:
    """The trace of one row.

    Raises:
        ValueError: the reason why the row is bad.
    """
    problem = parse_problem(row)
    threads = _object(row, "row").get("threads")
    if not isinstance(threads, list):
        raise ValueError(f"field 'threads' must be a list, not {_kind(threads)}")
    if not threads:
        raise ValueError("field 'threads' is empty")
    return Trace(problem, tuple(_named(f"threads[{n}]", _thread, thread) for n, thread in enumerate(threads)))


def _thread(value: object) -> TraceThread:
    fields = _object(value, "thread")
    text, answer, tag = _string(fields, "text"), _string(fields, "answer"), _string(fields, "tag")
    if tag not in list(Tag):
        raise ValueError(f"unknown tag {tag!r}: use {', '.join(Tag)}")
    for name, content in (("text", text), ("answer", answer)):
        if any(known in content for known in Tag):
            raise ValueError(f"field {name!r} contains a tag, which only the field 'tag' may hold")
    return TraceThread(
        text=text,
        answer=answer,
        tag=Tag(tag),
        strategy=_string(fields, "strategy", default=""),
        origin=_string(fields, "origin", default=""),
        forced=_forced(fields.get("forced"), len(text)),
    )


def _forced(value: object, length: int) -> tuple[tuple[int, int], ...]:
    """Spans that are ascending, not empty, apart from each other and inside a text of ``length`` characters."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"field 'forced' must be a list of [start, end], not {_kind(value)}")
    spans = []
    position = 0
    for span in value:
        if not isinstance(span, list) or len(span) != 2 or not all(type(edge) is int for edge in span):
            raise ValueError(f"field 'forced' must be a list of [start, end] integers, not {span!r}")
        start, end = span
        if not 0 <= start < end <= length:
            raise ValueError(f"forced span {span} is empty or outside the text of {length} characters")
        if start < position:
            raise ValueError(f"forced span {span} overlaps the one before it, or they are not in ascending order")
        spans.append((start, end))
        position = end
    return tuple(spans)


def _facts(value: object) -> dict[str, Any]:
    """Facts stand as an object in JSONL, and as the JSON text of one in Parquet, whose columns have one type."""
    if value is None:
        return {}
    try:
        return dict(_object(parse_json(value) if isinstance(value, str) else value, "field 'facts'"))
    except ValueError as error:
        raise ValueError(f"field 'facts' must be a JSON object: {error}") from None


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {_kind(value)}")
    return value


def _string(fields: dict[str, Any], key: str, default: str | None = None) -> str:
    value = fields.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"missing field {key!r}")
    if not isinstance(value, str):
        raise ValueError(f"field {key!r} must be a string, not {_kind(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"field {key!r} holds half a surrogate pair, which is no Unicode text")
    return value


def _string_or_number(fields: dict[str, Any], key: str) -> str:
    """A string; public data sets also hold ids and answers as whole numbers, which become their digits."""
    value = fields.get(key)
    return str(value) if type(value) is int else _string(fields, key)


def _named(name: str, parse: Callable[[object], TraceThread], value: object) -> TraceThread:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parse_json(text: str | bytes) -> object:
    """The value of a JSON text, which may start with a byte order mark.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__

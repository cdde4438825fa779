"""Problems and traces in files: JSONL, gzipped JSONL, Parquet, or a data set of the Hugging Face hub.

The row schema is documented in docs/data.md. Every row is checked; a bad one is reported by file, line and reason.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from lace_lightning.traces.checksum import checksum_file, has_other_checksum, write_checksum
from lace_lightning.traces.columns import Columns
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
from lace_lightning.whole_file import whole_file

OnBad = Literal["error", "skip"]
"""What a bad row does: end the reading, or be left out and counted in a warning."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MAX_REPORTED = 10
_BATCH_ROWS = 256
_T = TypeVar("_T", Problem, Trace)


class BadDataError(ValueError):
    """A source that cannot be used; the message names the option, the place and the reason."""


def read_problems(
    source: str | Path,
    *,
    split: str = "train",
    on_bad: OnBad = "error",
    option: str = "problems",
    adapt: Callable[[Problem], Problem] | None = None,
    subset: str | None = None,
    columns: Columns | None = None,
) -> list[Problem]:
    """Read and check all problems of a source. Keys beyond the schema go to ``Problem.facts``.

    Args:
        source: path of a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or a data set's name on the hub.
        split: split of a hub data set; files have none.
        on_bad: ``"error"`` ends at bad rows, ``"skip"`` leaves them out and warns with their count.
        option: what the user calls ``source``, for error messages.
        adapt: last word on each row: returns the problem to keep, or raises ValueError or KeyError to refuse it.
        subset: which part of a hub data set, where it has several ("main" of GSM8K); files have none.
        columns: the rows' own names for our fields; None: they have ours.

    Raises:
        BadDataError: the source is missing, of an unknown kind, unreadable, without usable rows, or has bad rows
            (listed as ``file:line: reason``) under ``on_bad="error"``.
    """
    first_seen: dict[str, str] = {}

    def parse(row: object, place: str) -> Problem:
        row = row if columns is None else columns.rename(row, place)
        problem = _adapted(parse_problem(row), adapt)
        if problem.id in first_seen:
            raise ValueError(f"id {problem.id!r} repeats {first_seen[problem.id]}")
        first_seen[problem.id] = place
        return problem

    return _read(source, split, on_bad, option, parse, subset)


def read_traces(
    source: str | Path,
    *,
    split: str = "train",
    on_bad: OnBad = "error",
    option: str = "traces",
    adapt: Callable[[Trace], Trace] | None = None,
) -> list[Trace]:
    """Read and check all traces of a source; arguments and errors as in :func:`read_problems`.

    What depends on a model (number of threads, length in tokens) is checked by ``adapt``, for instance
    :meth:`lace_lightning.traces.collate.TraceCollator.check`.
    """
    return _read(source, split, on_bad, option, lambda row, place: _adapted(parse_trace(row), adapt))


def write_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Write traces as JSONL, gzipped JSONL or Parquet, chosen by suffix; the file appears whole or not at all.

    Its checksum is kept beside it, in ``<path>.sha256``, and checked by whoever reads it here.

    Raises:
        BadDataError: unsupported suffix.
        OSError: the disk is full; an earlier file is as it was.
    """
    path = Path(path)
    suffix = _suffix(path, "path")
    rows = (_row(trace) for trace in traces)
    with whole_file(path) as unfinished:
        if suffix == ".parquet":
            _write_parquet(rows, unfinished)
        else:
            _write_jsonl(rows, unfinished, compress=suffix == ".jsonl.gz")
        checksum_file(path).unlink(missing_ok=True)  # the earlier file's
    write_checksum(path)


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
        return dict(_object(_parse_json(value) if isinstance(value, str) else value, "field 'facts'"))
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


def _adapted(item: _T, adapt: Callable[[_T], _T] | None) -> _T:
    try:
        return item if adapt is None else adapt(item)
    except KeyError as error:
        raise ValueError(f"missing field {error}") from None


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


# ---------------------------------------------------------------------------------------------------- sources


def _read(
    source: str | Path,
    split: str,
    on_bad: OnBad,
    option: str,
    parse: Callable[[object, str], _T],
    subset: str | None = None,
) -> list[_T]:
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad={on_bad!r}: use 'error' or 'skip'")
    items: list[_T] = []
    bad: list[str] = []
    for place, row in _rows(str(source), split, option, subset):
        try:
            items.append(parse(_parse_json(row) if isinstance(row, bytes) else row, place))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad:
        _report(bad, len(items), on_bad, f"{option}={str(source)!r}")
    if not items:
        raise BadDataError(f"{option}={str(source)!r}: no rows in it; give a source with at least one")
    return items


def _report(bad: list[str], num_good: int, on_bad: OnBad, name: str) -> None:
    listed = "\n".join(["", *bad[:_MAX_REPORTED], *(["…"] if len(bad) > _MAX_REPORTED else [])])
    count = f"{name}: {len(bad)} of {len(bad) + num_good} rows are bad"
    if on_bad == "error":
        raise BadDataError(f"{count}; mend them, or leave them out with on_bad='skip':{listed}")
    if not num_good:
        raise BadDataError(f"{count}, so none is left; mend them:{listed}")
    warnings.warn(f"{count} and left out (on_bad='skip'):{listed}", stacklevel=4)


def _rows(source: str, split: str, option: str, subset: str | None) -> Iterator[tuple[str, object]]:
    """(place, row) of every row: the bytes of a JSONL line, or a decoded object. Lines and rows count from 1."""
    path = Path(source)
    if not path.exists() and _HUB_NAME.fullmatch(source) and not source.startswith(".") and not _has_suffix(path):
        return _numbered(_load_hub(source, split, option, subset), f"{source}[{split}]")
    if path.is_dir():
        raise BadDataError(f"{option}={source!r}: is a folder; give one {', '.join(SUFFIXES)} file")
    suffix = _suffix(path, option)
    if not path.exists():
        raise BadDataError(f"{option}={source!r}: no such file; check the path (it is relative to {os.getcwd()})")
    if has_other_checksum(path):
        raise BadDataError(
            f"{option}={source!r}: it is damaged or was changed: {checksum_file(path)} has another checksum; make or "
            "copy it anew, or delete that file if you changed the rows yourself"
        )
    if suffix == ".parquet":
        return _numbered(_load_parquet(path, option), source)
    return _lines(path, option, compressed=suffix == ".jsonl.gz")


def _lines(path: Path, option: str, compressed: bool) -> Iterator[tuple[str, bytes]]:
    try:
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise BadDataError(f"{option}={str(path)!r}: cannot be read ({error}); is the file whole?") from error


def _numbered(rows: Iterable[object], name: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}:row {number}", row


def _load_parquet(path: Path, option: str) -> Iterator[object]:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadDataError(
            f"{option}={str(path)!r}: cannot be read as Parquet ({error}); is the file whole?"
        ) from error


def _load_hub(name: str, split: str, option: str, subset: str | None) -> Iterable[object]:
    import datasets  # slow to import

    try:
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadDataError(
            f"{option}={name!r}: is no file here, and the hub has no such data set with split {split!r} "
            f"within reach ({error}); give a path, or check name, split and network"
        ) from error


def _parse_json(text: str | bytes) -> object:
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _has_suffix(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _suffix(path: Path, option: str) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise BadDataError(f"{option}={str(path)!r}: unsupported kind of file; use {', '.join(SUFFIXES)}")


# ---------------------------------------------------------------------------------------------------- writing


def _row(trace: Trace) -> dict[str, Any]:
    problem = trace.problem
    return {
        "id": problem.id,
        "problem": problem.text,
        "answer": problem.answer,
        "source": problem.source,
        "facts": problem.facts,
        "threads": [
            {
                "text": thread.text,
                "answer": thread.answer,
                "tag": str(thread.tag),
                "strategy": thread.strategy,
                "origin": thread.origin,
                "forced": [list(span) for span in thread.forced],
            }
            for thread in trace.threads
        ],
    }


def _write_jsonl(rows: Iterable[dict[str, Any]], path: Path, compress: bool) -> None:
    with gzip.open(path, "wt", encoding="utf-8") if compress else path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    texts = [(name, pa.string()) for name in ("text", "answer", "tag", "strategy", "origin")]
    threads = pa.list_(pa.struct([*texts, ("forced", pa.list_(pa.list_(pa.int64())))]))
    columns = [(name, pa.string()) for name in ("id", "problem", "answer", "source", "facts")]
    schema = pa.schema([*columns, ("threads", threads)])
    listed = ({**row, "facts": json.dumps(row["facts"], ensure_ascii=False)} for row in rows)
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        while batch := list(islice(listed, _BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))

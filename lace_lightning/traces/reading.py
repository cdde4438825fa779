"""Problems and traces of a source, all rows checked; a bad one is reported by file, line and reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from lace_lightning.traces.columns import Columns
from lace_lightning.traces.parsing import parse_json, parse_problem, parse_trace
from lace_lightning.traces.schema import Problem, Trace
from lace_lightning.traces.sources import BadDataError, rows_of

OnBad = Literal["error", "skip"]
"""What a bad row does: end the reading, or be left out and counted in a warning."""

_MAX_REPORTED = 10
_T = TypeVar("_T", Problem, Trace)


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
    for place, row in rows_of(str(source), split, option, subset):
        try:
            items.append(parse(parse_json(row) if isinstance(row, bytes) else row, place))
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


def _adapted(item: _T, adapt: Callable[[_T], _T] | None) -> _T:
    try:
        return item if adapt is None else adapt(item)
    except KeyError as error:
        raise ValueError(f"missing field {error}") from None

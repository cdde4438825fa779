"""The folder of an evaluation: outcomes and errors as JSON lines that grow, and what they were made with.

``outcomes.jsonl`` and ``errors.jsonl`` get whole lines, flushed to the disk batch by batch: a process that is killed
loses the batch that it was at. ``evaluation.json`` says what the named methods, policies and benchmarks were; a run
that means something else by one of the names is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from lace_lightning.evaluation.judged import JudgedOutcome, Key
from lace_lightning.evaluation.judged_json import from_json, to_json
from lace_lightning.whole_file import append_lines, open_lines, write_text

OUTCOMES, ERRORS, SETTINGS = "outcomes.jsonl", "errors.jsonl", "evaluation.json"
_BLOCK = 1 << 20
_T = TypeVar("_T")


class StoreError(ValueError):
    """A folder cannot be used for this evaluation; the message names it, the reason and the remedy."""


@dataclass(frozen=True)
class Failure:
    """A problem that a method could not be run on; it is tried again when the evaluation is resumed.

    Args:
        benchmark, method, seed, problem: of which outcome.
        type: class of the exception.
        message: its text.
        traceback: its last lines.
    """

    benchmark: str
    method: str
    seed: int
    problem: str
    type: str
    message: str
    traceback: str = ""

    @property
    def key(self) -> Key:
        return Key(self.benchmark, self.method, self.seed, self.problem)


class Store:
    """Writes an evaluation's folder; a context manager that holds the folder alone.

    Args:
        folder: made if it is not there.
        settings: what each name means: ``{"policies": {name: …}, "methods": {…}, "benchmarks": {…}}``, JSON values.
            Names may come new; those that are there already must mean the same.
        display: what reports need besides (reference, order of names); the last run's counts.

    Raises:
        StoreError: another process works in the folder, or a name means something else there.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Mapping[str, Any]], display: Mapping[str, Any]
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._outcomes = open_lines(self.folder / OUTCOMES)
        try:
            _lock(self._outcomes, self.folder)
            _mend(self.folder / OUTCOMES)
            _mend(self.folder / ERRORS)
            self._errors = open_lines(self.folder / ERRORS)
            _agree(self.folder, settings, display)
        except BaseException:
            self._outcomes.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self._outcomes.close()
        self._errors.close()

    def add(self, records: Iterable[JudgedOutcome]) -> None:
        """Keep finished outcomes; they are on the disk when this returns."""
        _append(self._outcomes, map(to_json, records))

    def add_failure(self, failure: Failure) -> None:
        """Keep what went wrong."""
        _append(self._errors, [asdict(failure)])

    def finished(self) -> dict[Key, str]:
        """The finished outcomes, with the text of their problems: what need not be done again."""
        return dict(_read_as(_finished, self.folder / OUTCOMES))


def read_outcomes(folder: str | Path) -> Iterator[JudgedOutcome]:
    """The finished outcomes of an evaluation, in the order in which they came.

    Raises:
        StoreError: the folder holds none, or a line is damaged.
    """
    return _read_as(from_json, Path(folder, OUTCOMES))


def read_failures(folder: str | Path) -> list[Failure]:
    """What went wrong and has not been mended by a later run: the last failure of each outcome that is missing.

    Raises:
        StoreError: a line is damaged.
    """
    if not Path(folder, ERRORS).exists():
        return []
    failures = {failure.key: failure for failure in _read_as(lambda row: Failure(**row), Path(folder, ERRORS))}
    for record in read_outcomes(folder):
        failures.pop(record.key, None)
    return list(failures.values())


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What ``evaluation.json`` holds: ``policies``, ``methods``, ``benchmarks`` and ``display``.

    Raises:
        StoreError: it is missing or damaged.
    """
    path = Path(folder, SETTINGS)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: give the folder that `lace eval` wrote (its option output)") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    return dict(settings)


def _finished(row: Mapping[str, Any]) -> tuple[Key, str]:
    problem = row["problem"]
    return Key(row["benchmark"], row["method"], row["seed"], problem["id"]), problem["text"]


def _read_as(make: Callable[[dict[str, Any]], _T], path: Path) -> Iterator[_T]:
    for place, row in _rows(path):
        try:
            yield make(row)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{place} is not of `lace eval`: {error!r}; remove the line to do it again") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every whole line; what a killed process left unfinished is no line yet."""
    if not path.exists():
        raise StoreError(f"{path} is missing: give the folder that `lace eval` wrote (its option output)")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise StoreError(f"{path}:{number} is damaged: {error}; remove the line to do it again") from error


def _agree(folder: Path, settings: Mapping[str, Mapping[str, Any]], display: Mapping[str, Any]) -> None:
    """Write ``evaluation.json`` with the names of both runs."""
    path = folder / SETTINGS
    merged: dict[str, Any] = {"display": dict(display)}
    before = read_settings(folder) if path.exists() else {}
    for section, entries in json.loads(json.dumps(settings, default=str)).items():
        known = before.get(section, {})
        changed = [name for name in entries if name in known and known[name] != entries[name]]
        if changed:
            raise StoreError(
                f"{folder} holds outcomes of another {section} {changed[0]!r}: "
                f"{_difference(known[changed[0]], entries[changed[0]])}. Give this evaluation another output folder, "
                "or that entry another name"
            )
        merged[section] = known | entries
    write_text(path, json.dumps(merged, indent=2) + "\n")


def _difference(then: Any, now: Any, name: str = "") -> str:
    """The first setting that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then | now:
            if then.get(key) != now.get(key):
                return _difference(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    return f"{name or 'it'} was {then!r} and is {now!r}"


def _lock(file: FileIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"another `lace eval` works in {folder}: wait for it, or give another output folder") from None


def _mend(path: Path) -> None:
    """Cut off the line that a killed process did not finish."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def _append(file: FileIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write whole lines, all or none of them."""
    append_lines(file, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    os.fsync(file.fileno())

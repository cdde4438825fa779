"""A folder in which every stage keeps its rows, is done once, and goes on where it was killed."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lace_lightning.synthesis.rows import Row, digest, parse_rows, read_rows, to_line, write_rows
from lace_lightning.whole_file import append_lines, open_lines, write_text

Work = Callable[[Sequence[Row]], Iterable[Row]]
"""A stage's work: rows in; of each, one row out as soon as it is done, in any order."""


@dataclass(frozen=True)
class Outcome:
    """What a stage made of its rows: those that go on, and those with a reason under ``removed``."""

    kept: list[Row]
    removed: list[Row]


class WorkFolder:
    """The stages' files: ``NAME.jsonl``, ``NAME.removed.jsonl``, ``NAME.json`` (what they were made from and counts).

    While a stage runs, ``NAME.partial.jsonl`` holds the rows done so far, one line each; a killed run continues after
    the last whole line.

    Args:
        path: the folder; it is made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            ValueError: one is at work here.
        """
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"folder={str(self.path)!r}: another lace synth is at work there: wait, or stop it"
                ) from error
            yield

    def stage(self, name: str, settings: Any, rows: Sequence[Row], work: Work) -> Outcome:
        """The stage's outcome: read if it was made from the same settings and rows, else worked out and kept.

        Args:
            name: of the stage and its files.
            settings: everything besides the rows that the outcome depends on, as JSON values.
            rows: what goes in, by ascending ``position``.
            work: what to do.
        """
        origin = {"settings": digest(settings), "input": digest(rows)}
        if self._manifest(name).items() >= origin.items():
            outcome = self.outcome(name)
            self._say(name, outcome, "as before")
            return outcome
        done = self._work_out(name, origin, rows, work)
        outcome = Outcome([row for row in done if not row.get("removed")], [row for row in done if row.get("removed")])
        self.keep(name, settings, rows, outcome)
        self._journal(name).unlink(missing_ok=True)
        self._say(name, outcome, f"of {len(rows)}")
        return outcome

    def keep(self, name: str, settings: Any, rows: Sequence[Row], outcome: Outcome) -> None:
        """Write the outcome of a stage; what it was made from is written last, so that half an outcome never counts."""
        self._file(name, "json").unlink(missing_ok=True)
        write_rows(outcome.removed, self._file(name, "removed.jsonl"))
        write_rows(outcome.kept, self._file(name, "jsonl"))
        counts = {"kept": len(outcome.kept), "removed": len(outcome.removed)}
        manifest = {"settings": digest(settings), "input": digest(rows), **counts, "made_with": settings}
        write_text(self._file(name, "json"), json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")

    def outcome(self, name: str) -> Outcome:
        """The kept outcome of a stage.

        Raises:
            ValueError: the stage has not been finished here.
        """
        if not self._manifest(name):
            raise ValueError(f"{self.path}: the stage {name!r} has not been finished there: run lace synth first")
        return Outcome(read_rows(self._file(name, "jsonl")), read_rows(self._file(name, "removed.jsonl")))

    def has_settings(self, name: str, settings: Any) -> bool:
        """Whether the kept outcome of a stage was made with these settings."""
        return self._manifest(name).get("settings") == digest(settings)

    def _work_out(self, name: str, origin: dict[str, str], rows: Sequence[Row], work: Work) -> list[Row]:
        journal = self._journal(name)
        done = {row["position"]: row for row in _read_journal(journal, origin)}
        todo = [row for row in rows if row["position"] not in done]
        with open_lines(journal) as file, self._progress(name, len(rows), len(done)) as advance:
            for row in work(todo):
                append_lines(file, to_line(row))  # out of this process at once: it survives its death
                done[row["position"]] = row
                advance()
        return [done[row["position"]] for row in rows]

    @contextmanager
    def _progress(self, name: str, total: int, completed: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            task = bar.add_task(name, total=total, completed=completed)
            yield lambda: bar.advance(task)

    def _say(self, name: str, outcome: Outcome, note: str) -> None:
        removed = f", {len(outcome.removed)} removed" if outcome.removed else ""
        self._console.print(f"{name}: {len(outcome.kept)} kept{removed} ({note})")

    def _manifest(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._file(name, "json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def _journal(self, name: str) -> Path:
        return self._file(name, "partial.jsonl")

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / f"{name}.{suffix}"


def _read_journal(path: Path, origin: dict[str, str]) -> list[Row]:
    """The rows done before; the file is cut to them, or begun anew if it was from other settings or rows.

    Raises:
        ValueError: the file was not written by us.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what has no line end was cut by a kill
    whole = parse_rows(lines, path)
    if whole and whole[0] == origin:
        if any("position" not in row for row in whole[1:]):
            raise ValueError(f"{path}: a row has no position: move the file away to begin this stage anew")
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    else:
        whole = [origin]
        write_rows(whole, path)
    return whole[1:]

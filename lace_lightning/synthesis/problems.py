"""Stage 1: problems from a source, without near-copies of each other and of evaluation problems."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lace_lightning.synthesis.overlap import Match, contaminated, near_duplicates
from lace_lightning.synthesis.rows import Row
from lace_lightning.tasks import Puzzle, Task
from lace_lightning.traces.checksum import file_digest
from lace_lightning.traces.reading import OnBad, read_problems
from lace_lightning.traces.schema import Problem


@dataclass(frozen=True)
class ProblemOptions:
    """Which problems to take.

    Args:
        source: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file or a hub data set; null: the problems of the puzzle.
        split: of a hub data set or a puzzle.
        limit: how many to take, the first ones; null: all of a source.
        on_bad: ``error`` ends at bad rows, ``skip`` leaves them out.
        duplicate_ngram: words per n-gram, between problems.
        duplicate_threshold: Jaccard similarity of n-grams from which on the later of two problems goes.
        evaluation: files or hub data sets whose problems must not come in.
        evaluation_split: of hub data sets among them.
        evaluation_ngram: words per n-gram, against evaluation problems.
        evaluation_threshold: a problem goes if it shares so much of the n-grams of the shorter statement.

    Raises:
        ValueError: an option is out of range.
    """

    source: str | None = None
    split: str = "train"
    limit: int | None = None
    on_bad: OnBad = "error"
    duplicate_ngram: int = 5
    duplicate_threshold: float = 0.8
    evaluation: tuple[str, ...] = ()
    evaluation_split: str = "test"
    evaluation_ngram: int = 6
    evaluation_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("duplicate_ngram", "evaluation_ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"problems.{name}={getattr(self, name)}: an n-gram has at least 1 word")
        for name in ("duplicate_threshold", "evaluation_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"problems.{name}={getattr(self, name)} must be above 0 and at most 1 (equal)")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"problems.limit={self.limit}: take at least 1 problem, or null for all")
        if self.source is None and self.limit is None:
            raise ValueError("problems: give source, or with a puzzle as task limit (a puzzle never runs out)")


def collect(options: ProblemOptions, task: Task) -> list[Row]:
    """One row per problem, those that go with the reason under ``removed`` and what they matched under ``match``.

    Near-copies of evaluation problems go first, then of the rest the later of two near-duplicates.

    Raises:
        ValueError: the task makes no problems and no source is given, or a source cannot be used.
    """
    problems = [_normalised(problem) for problem in _read(options, task)]
    texts = [problem.text for problem in problems]
    rows: list[Row] = [{"position": n, "problem": asdict(problem)} for n, problem in enumerate(problems)]
    references = [reference for source in options.evaluation for reference in _references(source, options, task)]
    leaked = contaminated(
        texts, [r.text for _, r in references], options.evaluation_ngram, options.evaluation_threshold
    )
    for n, match in leaked.items():
        source, reference = references[match.index]
        _remove(rows[n], "evaluation problem", match, reference, source)
    staying = [n for n in range(len(rows)) if n not in leaked]
    copies = near_duplicates([texts[n] for n in staying], options.duplicate_ngram, options.duplicate_threshold)
    for k, match in copies.items():
        original = problems[staying[match.index]]
        _remove(rows[staying[k]], "near-duplicate", match, original, options.source or "")
    return rows


def fingerprint(options: ProblemOptions) -> dict[str, Any]:
    """The options, with the digests of the files that they name."""
    named = [options.source, *options.evaluation]
    files = {name: file_digest(Path(name)) for name in named if name is not None and Path(name).is_file()}
    return asdict(options) | {"files": files}


def _read(options: ProblemOptions, task: Task) -> list[Problem]:
    if options.source is None:
        if not isinstance(task, Puzzle):
            raise ValueError(f"problems.source=null: {type(task).__name__} makes no problems of its own; give a source")
        return [task.problem(index, options.split) for index in range(options.limit or 0)]
    adapt = _tidied(task.adapt)
    problems = read_problems(
        options.source, split=options.split, on_bad=options.on_bad, option="problems.source", adapt=adapt
    )
    return problems[: options.limit]


def _references(source: str, options: ProblemOptions, task: Task) -> list[tuple[str, Problem]]:
    """The problems of an evaluation source, worded as the task asks them where it can, so that they compare."""
    option = "problems.evaluation"
    found = read_problems(source, split=options.evaluation_split, on_bad="skip", option=option)
    return [(source, _normalised(_worded(problem, task))) for problem in found]


def _worded(problem: Problem, task: Task) -> Problem:
    try:
        return task.adapt(problem)
    except (ValueError, KeyError):  # of another kind than the task's: compared as it stands
        return problem


def _tidied(adapt: Callable[[Problem], Problem]) -> Callable[[Problem], Problem]:
    return lambda problem: adapt(_normalised(problem))


def _normalised(problem: Problem) -> Problem:
    """Composed Unicode and no white space around statement and answer; the inside of a statement stays as it is."""
    text, answer = (unicodedata.normalize("NFC", part).strip() for part in (problem.text, problem.answer))
    return replace(problem, text=text, answer=answer)


def _remove(row: Row, reason: str, match: Match, other: Problem, source: str) -> None:
    row["removed"] = reason
    row["match"] = {"id": other.id, "source": source, "overlap": round(match.overlap, 4), "problem": other.text}


def shard_of(rows: Sequence[Row], index: int, count: int) -> list[Row]:
    """The rows of one of ``count`` shards: every ``count``-th position."""
    return [row for row in rows if row["position"] % count == index]

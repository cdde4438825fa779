"""Stage 3: logically different solutions of each problem, right and wrong, with a history of methods (LACE.md §5)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from rapidfuzz.distance import Levenshtein

from lace_lightning.decoding.random import group_seed
from lace_lightning.embedding import Embedder
from lace_lightning.synthesis.judged import judge
from lace_lightning.synthesis.rounds import converse
from lace_lightning.synthesis.rows import Row, problem_of
from lace_lightning.synthesis.teacher import Query, Solution, Teacher, Usage
from lace_lightning.tasks import Task, Verdict
from lace_lightning.traces.schema import Tag

Style = Literal["history", "resample", "debate"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample, when to reject, when to stop.

    Args:
        style: ``history`` tells the teacher which methods were used; ``resample`` asks again without a history and
            rejects nothing for likeness (superficial diversity, for comparison); ``debate`` lets threads read each
            other, round by round.
        solutions: enough accepted solutions of a problem; in a debate, its threads.
        min_correct, min_failed: so many of them must be right, and wrong, before they are enough.
        max_attempts: most solutions asked for per problem.
        patience: stop after so many rejections and errors in a row.
        max_tokens: stop once a problem has cost so many tokens of replies; null: no limit.
        min_edit_distance: reject at a smaller normalised edit distance (characters) to an accepted solution.
        min_embedding_distance: reject at a smaller cosine distance to one.
        rounds: of a debate.

    Raises:
        ValueError: an option is out of range.
    """

    style: Style = "history"
    solutions: int = 4
    min_correct: int = 1
    min_failed: int = 0
    max_attempts: int = 12
    patience: int = 4
    max_tokens: int | None = None
    min_edit_distance: float = 0.2
    min_embedding_distance: float = 0.02
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("solutions", "max_attempts", "patience", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name}={getattr(self, name)} must be at least 1")
        for name in ("min_edit_distance", "min_embedding_distance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"sampling.{name}={getattr(self, name)} must lie between 0 (rejects nothing) and 1")
        if self.max_attempts < self.solutions or self.min_correct + self.min_failed > self.max_attempts:
            raise ValueError(
                f"sampling.max_attempts={self.max_attempts} leaves no room for solutions={self.solutions}, "
                f"min_correct={self.min_correct} and min_failed={self.min_failed}: raise it"
            )


@dataclass(frozen=True)
class Attempt:
    """One solution that was asked for, and what became of it.

    Args:
        text, answer, method, error: of the solution.
        seed: that it was asked with.
        verdict: of the task; empty if it was not judged.
        outcome: ``accepted``, or why not: ``error``, ``no answer``, ``unusable text``, ``edit distance``,
            ``embedding distance``.
        nearest: smallest edit and embedding distance to the accepted ones before it; None for the first.
        usage: what it took.
    """

    text: str
    answer: str | None
    method: str
    seed: int
    verdict: str
    outcome: str
    nearest: dict[str, float] | None = None
    error: str = ""
    usage: dict[str, int] = field(default_factory=lambda: asdict(Usage()))


class Judged(NamedTuple):
    """A solution, and the task's verdict on it."""

    solution: Solution
    verdict: Verdict


def sample(
    rows: Sequence[Row],
    teacher: Teacher,
    task: Task,
    embedder: Embedder,
    options: SamplingOptions,
    seed: int,
    width: int,
) -> Iterator[Row]:
    """Rows with ``attempts`` and ``stopped`` (by which rule); those without an accepted solution are removed."""
    opening = task.template.opening.strip()
    talks = (_explore(row, embedder, options, opening, seed) for row in rows)
    return converse(talks, asking(teacher, task), width)


def asking(teacher: Teacher, task: Task) -> Callable[[Sequence[Query]], list[Judged]]:
    """Asks the teacher for solutions and the task for verdicts on them, many at once."""

    def ask(queries: Sequence[Query]) -> list[Judged]:
        solutions = teacher.solve(queries)
        problems = [query.problem for query in queries]
        verdicts = judge(task, problems, [s.text for s in solutions], [s.answer for s in solutions])
        return [Judged(*pair) for pair in zip(solutions, verdicts, strict=True)]

    return ask


def _explore(
    row: Row, embedder: Embedder, options: SamplingOptions, opening: str, seed: int
) -> Generator[Query, Judged, Row]:
    problem = problem_of(row)
    attempts: list[Attempt] = []
    while not (stopped := _why_stop(attempts, options)):
        own_seed = group_seed("sampling", seed, problem.id, len(attempts))
        accepted = [attempt for attempt in attempts if attempt.outcome == "accepted"]
        methods = [attempt.method for attempt in accepted] if options.style == "history" else []
        solution, verdict = yield Query(problem, own_seed, tuple(dict.fromkeys(methods)))
        nearest = _nearest(solution.text, [attempt.text for attempt in accepted], embedder)
        outcome = unusable(solution, opening) or _too_similar(nearest, options) or "accepted"
        attempts.append(record(solution, verdict, own_seed, outcome, nearest))
    return outcome_of(row, attempts, stopped, options.style)


def record(
    solution: Solution, verdict: Verdict, seed: int, outcome: str, nearest: dict[str, float] | None = None
) -> Attempt:
    """The attempt that a solution was."""
    told = (solution.text, solution.answer, solution.method)
    return Attempt(*told, seed, str(verdict), outcome, nearest, solution.error, asdict(solution.usage))


def outcome_of(row: Row, attempts: Sequence[Attempt], stopped: str, style: Style) -> Row:
    """The row that goes on, removed if nothing was accepted."""
    done = row | {"style": style, "attempts": [asdict(attempt) for attempt in attempts], "stopped": stopped}
    has_any = any(attempt.outcome == "accepted" for attempt in attempts)
    return done if has_any else done | {"removed": "no solution accepted"}


def unusable(solution: Solution, opening: str) -> str:
    """Why a solution can be no thread of a trace; empty if it can."""
    if solution.error:
        return "error"
    if not solution.answer or not solution.answer.strip() or not solution.text.strip():
        return "no answer"
    written = solution.text + "\n" + solution.answer
    has_mark = any(tag in written for tag in Tag) or bool(opening and opening in written)
    has_half_sign = any("\ud800" <= character <= "\udfff" for character in written)
    return "unusable text" if has_mark or has_half_sign else ""


def _nearest(text: str, others: Sequence[str], embedder: Embedder) -> dict[str, float] | None:
    """Smallest normalised edit distance, and smallest cosine distance, to the others."""
    if not others or not text.strip():
        return None
    edit = min(Levenshtein.normalized_distance(text.strip(), other.strip()) for other in others)
    own, *rest = embedder.embed([text, *others])
    cosine = min(1 - float(own @ other) for other in rest)
    return {"edit": round(edit, 6), "embedding": round(max(cosine, 0.0), 6)}


def _too_similar(nearest: dict[str, float] | None, options: SamplingOptions) -> str:
    if nearest is None or options.style == "resample":
        return ""
    if nearest["edit"] < options.min_edit_distance:
        return "edit distance"
    return "embedding distance" if nearest["embedding"] < options.min_embedding_distance else ""


def _why_stop(attempts: Sequence[Attempt], options: SamplingOptions) -> str:
    """The rule that says to stop; empty if none does."""
    accepted = [attempt for attempt in attempts if attempt.outcome == "accepted"]
    num_correct = sum(attempt.verdict == Verdict.CORRECT for attempt in accepted)
    has_mix = num_correct >= options.min_correct and len(accepted) - num_correct >= options.min_failed
    if len(accepted) >= options.solutions and has_mix:
        return "enough"
    if len(attempts) >= options.max_attempts:
        return "max_attempts"
    recent = attempts[-options.patience :]
    if len(recent) == options.patience and all(attempt.outcome != "accepted" for attempt in recent):
        return "patience"
    spent = sum(attempt.usage["completion_tokens"] for attempt in attempts)
    return "max_tokens" if options.max_tokens is not None and spent >= options.max_tokens else ""


def accepted_of(row: Row) -> list[dict[str, Any]]:
    """The accepted attempts of a row, in order."""
    return [attempt for attempt in row["attempts"] if attempt["outcome"] == "accepted"]

"""Stage 6: N tagged threads per problem as a trace; the collator lays it on the lattice and aligns the assessments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from lace_lightning.synthesis.rows import Row, problem_of
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Tag, Trace, TraceThread


@dataclass(frozen=True)
class AssemblyOptions:
    """Which threads make a trace.

    Args:
        num_threads: N.
        min_correct: fewest correct threads; 0 takes problems that nobody solved, whose thread 0 then says best.
        max_correct: most correct threads; null: no limit.
        min_failed: fewest wrong threads.

    Raises:
        ValueError: the numbers contradict each other.
    """

    num_threads: int = 4
    min_correct: int = 1
    max_correct: int | None = None
    min_failed: int = 0

    def __post_init__(self) -> None:
        most = self.num_threads if self.max_correct is None else self.max_correct
        if not 0 <= self.min_correct <= most or self.min_failed < 0 or self.num_threads < 1:
            raise ValueError(f"assembly: min_correct={self.min_correct} and max_correct={self.max_correct} contradict")
        if self.min_correct + self.min_failed > self.num_threads:
            raise ValueError(
                f"assembly: min_correct={self.min_correct} and min_failed={self.min_failed} "
                f"are more than num_threads={self.num_threads}"
            )


def assemble(rows: Sequence[Row], options: AssemblyOptions, origin: str, seed: int) -> Iterator[Row]:
    """Rows with ``threads``, the numbers of the chosen solutions in lattice order; those that can't fill N removed.

    Args:
        rows: of the judging stage.
        options: which threads to take.
        origin: the teacher's identity.
        seed: of the choice among failed threads, and of the order of the threads.
    """
    for row in rows:
        chosen, why = _choose(row, options, Random(f"assembly {seed} {row['problem']['id']}"))
        yield row | ({"removed": why} if why else {"threads": chosen, "origin": origin})


def to_trace(row: Row) -> Trace:
    """The trace of an assembled row."""
    return Trace(problem_of(row), tuple(_thread(row["solutions"][index], row["origin"]) for index in row["threads"]))


def _thread(solution: dict[str, Any], origin: str) -> TraceThread:
    return TraceThread(
        text=solution["text"].strip(),
        answer=solution["answer"].strip(),
        tag=Tag(solution["tag"]),
        strategy=solution["method"],
        origin=f"{origin} seed {solution['seed']}",
    )


def _choose(row: Row, options: AssemblyOptions, rng: Random) -> tuple[list[int], str]:
    """Numbers of the solutions in lattice order, and why there are none.

    The best is always in; then the correct ones in the judge's order, as many as the failed ones leave room for. Failed
    ones are drawn at random. Debates are kept whole and in order, because their threads name each other by number.
    """
    solutions = row["solutions"]
    failed = [index for index, solution in enumerate(solutions) if solution["verdict"] != Verdict.CORRECT]
    correct = [index for index in row["judging"]["order"] if index not in failed]
    if row["style"] == "debate":
        return _whole_debate(solutions, correct, failed, options)
    if len(correct) < options.min_correct:
        return [], "too few correct"
    if len(failed) < options.min_failed:
        return [], "too few failed"
    room = options.num_threads - options.min_failed
    right = correct[: min(room, room if options.max_correct is None else options.max_correct)]
    wrong = _drawn(failed, options.num_threads - len(right), solutions, rng)
    taken = right + wrong
    if len(taken) < options.num_threads:
        return [], "too few threads"
    if right:  # otherwise the one tagged best stands first, as thread 0
        rng.shuffle(taken)
    return taken, ""


def _whole_debate(
    solutions: Sequence[dict[str, Any]], correct: list[int], failed: list[int], options: AssemblyOptions
) -> tuple[list[int], str]:
    if len(solutions) != options.num_threads:
        return [], "too few threads"
    most = options.num_threads if options.max_correct is None else options.max_correct
    if not options.min_correct <= len(correct) <= most or len(failed) < options.min_failed:
        return [], "other mix of correct and failed"
    return list(range(len(solutions))), ""


def _drawn(failed: list[int], count: int, solutions: Sequence[dict[str, Any]], rng: Random) -> list[int]:
    """``count`` failed solutions (or all), the one tagged best first if it is one of them."""
    best = [index for index in failed if solutions[index]["tag"] == Tag.BEST]
    others = [index for index in failed if index not in best]
    rng.shuffle(others)
    return (best + others)[:count]

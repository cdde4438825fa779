"""Stage 2: keep the problems that the model to be trained solves sometimes (LACE.md §5): S in (0, 0.5]."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce

from lace_lightning.decoding.random import group_seed
from lace_lightning.synthesis.judged import judge
from lace_lightning.synthesis.rounds import converse
from lace_lightning.synthesis.rows import Row, problem_of
from lace_lightning.synthesis.solver import Solver
from lace_lightning.synthesis.teacher import Query, Solution, Usage
from lace_lightning.tasks import Task, Verdict

_Talk = Generator[list[Query], list[Solution], Row]


@dataclass(frozen=True)
class DifficultyOptions:
    """Which success rates to keep.

    Args:
        samples: attempts per problem, k.
        above: problems solved at this rate or less often are too hard.
        at_most: problems solved more often are too easy.

    Raises:
        ValueError: an option is out of range.
    """

    samples: int = 8
    above: float = 0.0
    at_most: float = 0.5

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"difficulty.samples={self.samples}: take at least 1 per problem")
        if not -1 <= self.above < self.at_most <= 1:
            raise ValueError(f"difficulty: above={self.above} must be below at_most={self.at_most}, which is at most 1")


def measure(
    rows: Sequence[Row], solver: Solver, task: Task, options: DifficultyOptions, seed: int, width: int
) -> Iterator[Row]:
    """Rows with ``S``, the share of correct attempts, ``verdicts`` and ``usage``; too hard and too easy ones removed.

    An attempt that failed on the way (a dead server) counts neither for nor against; a problem without any other is
    removed with the error.
    """
    talks = (_attempts(row, task, options, seed) for row in rows)
    return converse(talks, _asking(solver), width)


def _attempts(row: Row, task: Task, options: DifficultyOptions, seed: int) -> _Talk:
    problem = problem_of(row)
    seeds = [group_seed("difficulty", seed, problem.id, k) for k in range(options.samples)]
    solutions = yield [Query(problem, own) for own in seeds]
    usage = asdict(reduce(Usage.__add__, (solution.usage for solution in solutions)))
    valid = [solution for solution in solutions if not solution.error]
    if not valid:
        return row | {"S": None, "verdicts": [], "usage": usage, "removed": "error", "error": solutions[0].error}
    verdicts = judge(task, [problem] * len(valid), [s.text for s in valid], [s.answer for s in valid])
    rate = verdicts.count(Verdict.CORRECT) / len(verdicts)
    judged = row | {"S": rate, "verdicts": [str(verdict) for verdict in verdicts], "usage": usage}
    if rate <= options.above:
        return judged | {"removed": "too hard"}
    return judged | {"removed": "too easy"} if rate > options.at_most else judged


def _asking(solver: Solver) -> Callable[[Sequence[list[Query]]], list[list[Solution]]]:
    def ask(questions: Sequence[list[Query]]) -> list[list[Solution]]:
        flat = [query for queries in questions for query in queries]
        solutions = iter(solver.attempt([query.problem for query in flat], [query.seed for query in flat]))
        return [[next(solutions) for _ in queries] for queries in questions]

    return ask

"""A benchmark: problems by hub name or path, and the task that asks and judges them."""

from __future__ import annotations

from dataclasses import dataclass

from lace_lightning.tasks import Puzzle, Task
from lace_lightning.traces.columns import Columns
from lace_lightning.traces.reading import OnBad, read_problems
from lace_lightning.traces.schema import Problem

NUM_PUZZLES = 256
"""How many problems to evaluate on where a puzzle could go on for ever."""


@dataclass(frozen=True)
class Benchmark:
    """Problems to evaluate on.

    Args:
        task: how problems are asked, played and judged.
        problems: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or a hub name; null takes the test split of a
            puzzle.
        split: split of ``problems`` if it is a hub data set.
        subset: part of a hub data set that has several.
        columns: the rows' names for id, problem and answer; null: those of docs/data.md.
        num_problems: at most so many, from the first on; null takes all of a file and 256 of a puzzle.
        on_bad: what a bad row does: ``error`` ends the evaluation before it starts, ``skip`` leaves it out and warns.

    Raises:
        ValueError: ``num_problems`` is not positive, or there are no problems to be had.
    """

    task: Task
    problems: str | None = None
    split: str = "test"
    subset: str | None = None
    columns: Columns | None = None
    num_problems: int | None = None
    on_bad: OnBad = "error"

    def __post_init__(self) -> None:
        if self.num_problems is not None and self.num_problems < 1:
            raise ValueError(f"num_problems={self.num_problems} of a benchmark must be at least 1")
        if self.problems is None and not isinstance(self.task, Puzzle):
            raise ValueError(
                f"problems=null: {type(self.task).__name__} makes no problems of its own; set problems to a file or a "
                "hub name"
            )

    def read(self, name: str) -> list[Problem]:
        """All problems, worded by the task.

        Args:
            name: what the configuration calls this benchmark, for messages.

        Raises:
            BadDataError: the source is missing, or has bad rows.
        """
        if self.problems is None:
            assert isinstance(self.task, Puzzle)
            return [self.task.problem(index, "test") for index in range(self.num_problems or NUM_PUZZLES)]
        found = read_problems(
            self.problems,
            split=self.split,
            on_bad=self.on_bad,
            option=f"benchmarks.{name}.problems",
            adapt=self.task.adapt,
            subset=self.subset,
            columns=self.columns,
        )
        return found[: self.num_problems]

"""Training batches of problems, for Lattice GRPO, whose groups the model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lace_lightning.datamodules.base import NUM_PUZZLES, GroupData, require_at_least
from lace_lightning.tasks import Puzzle, Task
from lace_lightning.traces.loader import ResumableLoader
from lace_lightning.traces.reading import OnBad
from lace_lightning.traces.schema import Problem


class ProblemData(GroupData):
    """Problems to train and to validate on; every batch is a ``list[Problem]``.

    Of several processes each gets the training batch of all: who samples which groups is the stage's business.

    The order is reshuffled by (seed, epoch); a run resumed in mid-epoch continues with the very next batch.

    Args:
        task: how problems are asked, played and judged; a puzzle makes its own problems.
        train_problems: problems to train on: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or a hub name. None
            takes the train split of a puzzle.
        train_split: split of ``train_problems`` if it is a hub data set.
        num_train_problems: at most so many problems per epoch; None takes all of a file and 256 of a puzzle.
        fresh: a puzzle makes new problems in each epoch instead of the same again.
        problems: problems to evaluate on: a file or a hub name. None takes the test split of a puzzle; other tasks then
            have no validation.
        problems_split: split of ``problems`` if it is a hub data set.
        num_problems: at most so many problems to evaluate on; None takes all of a file and 256 of a puzzle.
        tokenizer: folder or hub name of a tokenizer; None takes the task's own.
        num_threads: N, the threads per group.
        batch_size: problems per training batch of one process.
        val_batch_size: problems per evaluation batch of one process.
        max_length: most columns of a group, prompt included.
        on_bad: what a bad row does: ``error`` ends the run at once, ``skip`` leaves it out and warns with the count.
        seed: of the order.
        num_workers: processes that prepare training batches ahead; 0 prepares them in the training process.

    Raises:
        ValueError: an option is out of range, or the tokenizer lacks what is needed.
    """

    def __init__(
        self,
        task: Task,
        train_problems: str | None = None,
        train_split: str = "train",
        num_train_problems: int | None = None,
        fresh: bool = True,
        problems: str | None = None,
        problems_split: str = "test",
        num_problems: int | None = None,
        tokenizer: str | None = None,
        num_threads: int = 4,
        batch_size: int = 16,
        val_batch_size: int = 64,
        max_length: int = 2048,
        on_bad: OnBad = "error",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            task, problems, problems_split, num_problems, tokenizer, num_threads, batch_size, val_batch_size,
            max_length, on_bad, seed, num_workers,
        )  # fmt: skip
        require_at_least(1, num_train_problems=num_train_problems)
        self.train_problems = train_problems
        self.train_split = train_split
        self.num_train_problems = num_train_problems
        self.fresh = fresh
        self._get: Callable[[int], Problem] | None = None
        self._size = 0

    def setup(self, stage: str) -> None:
        """Read and check what the stage needs.

        Raises:
            ValueError: bad data, or nothing to train on though training is the stage.
        """
        super().setup(stage)
        if stage == "fit" and self._get is None:
            self._get, self._size = self._source()

    def train_dataloader(self) -> ResumableLoader[Problem, list[Problem]]:
        """Batches of type ``list[Problem]``."""
        assert self._get is not None, "setup('fit') comes first"
        fresh = self.fresh and self.train_problems is None
        return self.make_train_loader(self._get, self._size, fresh, _without_serials, is_shared=True)

    def _source(self) -> tuple[Callable[[int], Problem], int]:
        """The problem of an index, and how many an epoch has."""
        if self.train_problems is not None:
            problems = self.read_problems(self.train_problems, self.train_split, "train_problems")
            problems = problems[: self.num_train_problems]
            return problems.__getitem__, len(problems)
        if not isinstance(self.task, Puzzle):
            raise ValueError(
                f"train_problems=None: {type(self.task).__name__} makes no problems of its own; set train_problems "
                "to a file or a hub name"
            )
        self.check_problem(self.task.problem(0))
        return self.task.problem, NUM_PUZZLES if self.num_train_problems is None else self.num_train_problems


def _without_serials(examples: Sequence[tuple[Problem, int]]) -> list[Problem]:
    return [problem for problem, _ in examples]

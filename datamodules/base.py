"""What the DataModules share: a task, a tokenizer, and problems to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader

from lace_lightning.tasks import Puzzle, Task
from lace_lightning.tokenizer import load_tokenizer
from lace_lightning.traces.batch import TraceBatch
from lace_lightning.traces.loader import EpochSampler, ResumableLoader, SerialDataset
from lace_lightning.traces.reading import OnBad, read_problems
from lace_lightning.traces.schema import Problem

Item = TypeVar("Item")
Batch = TypeVar("Batch")

NUM_PUZZLES = 256
"""How many problems to evaluate on, and how many examples an epoch has, where a puzzle could go on for ever."""


class GroupData(LightningDataModule):
    """Validation, test and prediction batches as lists of problems; subclasses add the training batches.

    Under several processes each evaluates its own share of the problems, none twice.

    Attributes:
        task: how problems are asked, played and judged.
        tokenizer: the tokenizer, with an end-of-sequence and a padding token.
        num_threads: N, the threads per group.
        max_length: most columns of a group, prompt included.

    Args:
        task: how problems are asked, played and judged.
        problems: problems to evaluate on: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or a hub name. None takes
            the test split of a task that is a puzzle; other tasks then have no validation.
        problems_split: split of ``problems`` if it is a hub data set.
        num_problems: at most so many problems to evaluate on; None takes all of a file and 256 of a puzzle.
        tokenizer: folder or hub name of a tokenizer; None takes the task's own.
        num_threads: N, the threads per group.
        batch_size: traces or problems per training batch of one process.
        val_batch_size: groups per evaluation batch of one process.
        max_length: most columns of a group, prompt included.
        on_bad: what a bad row does: ``error`` ends the run at once, ``skip`` leaves it out and warns with the count.
        seed: of the order of the examples and of what is random about each.
        num_workers: processes that prepare training batches ahead; 0 prepares them in the training process.

    Raises:
        ValueError: an option is out of range, or the tokenizer lacks what is needed.
    """

    def __init__(
        self,
        task: Task,
        problems: str | None,
        problems_split: str,
        num_problems: int | None,
        tokenizer: str | None,
        num_threads: int,
        batch_size: int,
        val_batch_size: int,
        max_length: int,
        on_bad: OnBad,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        require_at_least(1, num_threads=num_threads, batch_size=batch_size, val_batch_size=val_batch_size)
        require_at_least(1, max_length=max_length, num_problems=num_problems)
        require_at_least(0, seed=seed, num_workers=num_workers)
        self.task = task
        self.problems = problems
        self.problems_split = problems_split
        self.num_problems = num_problems
        self.tokenizer = load_tokenizer(tokenizer, task)
        self.num_threads = num_threads
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.max_length = max_length
        self.on_bad: OnBad = on_bad
        self.seed = seed
        self.num_workers = num_workers
        self._evaluation: list[Problem] | None = None

    def setup(self, stage: str) -> None:
        """Read and check the problems to evaluate on.

        Raises:
            ValueError: bad data, or nothing to evaluate on though evaluation is the stage.
        """
        if self._evaluation is None:
            self._evaluation = self._evaluation_problems()
        if not self._evaluation and stage != "fit":
            raise ValueError(
                f"problems=None: {type(self.task).__name__} makes no problems of its own to {stage} on; set "
                "problems to a file or a hub name"
            )

    def val_dataloader(self) -> DataLoader[Problem] | list[Any]:
        """Batches of type ``list[Problem]``, in order; no loader if there are no problems."""
        assert self._evaluation is not None, "setup() comes first"
        if not self._evaluation:
            return []
        rank, world_size = self._place()
        if world_size > len(self._evaluation):
            raise ValueError(f"{len(self._evaluation)} problems cannot feed {world_size} processes: raise num_problems")
        shared = UnrepeatedDistributedSampler(self._evaluation, world_size, rank, shuffle=False)
        return DataLoader(
            self._evaluation,  # type: ignore[arg-type]  # a list is a map-style data set
            batch_size=self.val_batch_size,
            sampler=shared if world_size > 1 else None,
            collate_fn=list,
            generator=torch.Generator(),  # keeps its worker seed out of the global random stream
        )

    def test_dataloader(self) -> DataLoader[Problem] | list[Any]:
        """The problems of :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Problem] | list[Any]:
        """The problems of :meth:`val_dataloader`."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a trace batch; problems stay as they are (Lightning refuses frozen records)."""
        if not isinstance(batch, TraceBatch):
            return batch
        moved = {name: getattr(batch, name).to(device) for name in ("input_ids", "attention_mask", "segments")}
        return replace(batch, **moved)

    def check_problem(self, problem: Problem) -> Problem:
        """The problem itself if its prompt leaves room for threads.

        Raises:
            ValueError: the prompt alone fills ``max_length``.
        """
        length = len(self.task.template.encode_prompt(problem.text, self.tokenizer))
        if length >= self.max_length:
            raise ValueError(
                f"the prompt of problem {problem.id!r} has {length} tokens, which leaves no room for threads in "
                f"max_length={self.max_length}: raise max_length, or leave out the problem"
            )
        return problem

    def read_problems(self, source: str, split: str, option: str) -> list[Problem]:
        """All problems of a source, adapted by the task and checked."""
        adapt = lambda problem: self.check_problem(self.task.adapt(problem))  # noqa: E731
        return read_problems(source, split=split, on_bad=self.on_bad, option=option, adapt=adapt)

    def make_train_loader(
        self,
        get: Callable[[int], Item],
        size: int,
        fresh: bool,
        collate: Callable[[Sequence[tuple[Item, int]]], Batch],
        is_shared: bool = False,
    ) -> ResumableLoader[Item, Batch]:
        """A loader over ``get(0 … size-1)`` that is reshuffled in each epoch and resumes in mid-epoch.

        Each process gets its part of every batch or, if it ``is_shared``, the batch of all processes.
        """
        rank, world_size = self._place()
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = EpochSampler(size, self.batch_size, self.seed, not overfit, rank, world_size)
        if is_shared:
            sampler = EpochSampler(size, sampler.global_batch_size, self.seed, not overfit)
        num_processed = None if self.trainer is None else self._num_processed_batches
        return ResumableLoader(SerialDataset(get, size, fresh), sampler, collate, self.num_workers, num_processed)

    def _evaluation_problems(self) -> list[Problem]:
        if self.problems is not None:
            return self.read_problems(self.problems, self.problems_split, "problems")[: self.num_problems]
        if isinstance(self.task, Puzzle):
            numbers = range(NUM_PUZZLES if self.num_problems is None else self.num_problems)
            return [self.check_problem(self.task.problem(number, "test")) for number in numbers]
        return []

    def _num_processed_batches(self) -> int:
        """Batches of the running epoch that the trainer has finished."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def _place(self) -> tuple[int, int]:
        """(rank, world size) of this process."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def require_at_least(least: int, **options: int | None) -> None:
    """Raise ValueError for the first option that is below ``least``; None stands for an option left open."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")

"""Training batches of traces, for pre-training, continued pre-training and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lace_lightning.datamodules.base import NUM_PUZZLES, GroupData, require_at_least
from lace_lightning.tasks import Puzzle, Task
from lace_lightning.traces.batch import TraceBatch
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.loader import ResumableLoader
from lace_lightning.traces.reading import OnBad, read_traces
from lace_lightning.traces.schema import Trace


class TraceData(GroupData):
    """Traces to train on, as :class:`TraceBatch`, and problems to validate on, as ``list[Problem]``.

    The order is reshuffled by (seed, epoch); a run resumed in mid-epoch continues with the very next batch.

    Args:
        task: how problems are asked, played and judged; a puzzle makes its own traces and problems.
        traces: traces to train on: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or a hub name (docs/data.md). None
            takes those that a puzzle makes.
        traces_split: split of ``traces`` if it is a hub data set.
        num_traces: at most so many traces per epoch; None takes all of a file and 256 of a puzzle.
        fresh: a puzzle makes new traces in each epoch instead of the same again.
        problems: problems to evaluate on: a file or a hub name. None takes the test split of a puzzle; other tasks then
            have no validation.
        problems_split: split of ``problems`` if it is a hub data set.
        num_problems: at most so many problems to evaluate on; None takes all of a file and 256 of a puzzle.
        tokenizer: folder or hub name of a tokenizer; None takes the task's own.
        num_threads: N, the threads per group; traces with another number are bad.
        batch_size: traces per training batch of one process.
        val_batch_size: problems per evaluation batch of one process.
        max_length: most columns of a group, prompt included.
        shuffle_threads: serve the threads of a trace in a random order. Leave it off for puzzles whose traces depend
            on the order of the threads (LACE.md §8).
        jitter: longest random delay of a thread in columns (LACE.md §6).
        barrier: threads wait for each other after the assessment opening, as in decoding (LACE.md §4).
        on_bad: what a bad row does: ``error`` ends the run at once, ``skip`` leaves it out and warns with the count.
        seed: of order, thread shuffling and jitter.
        num_workers: processes that prepare training batches ahead; 0 prepares them in the training process.

    Raises:
        ValueError: an option is out of range, or the tokenizer lacks what is needed.
    """

    def __init__(
        self,
        task: Task,
        traces: str | None = None,
        traces_split: str = "train",
        num_traces: int | None = None,
        fresh: bool = True,
        problems: str | None = None,
        problems_split: str = "test",
        num_problems: int | None = None,
        tokenizer: str | None = None,
        num_threads: int = 4,
        batch_size: int = 16,
        val_batch_size: int = 64,
        max_length: int = 2048,
        shuffle_threads: bool = False,
        jitter: int = 0,
        barrier: bool = True,
        on_bad: OnBad = "error",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            task, problems, problems_split, num_problems, tokenizer, num_threads, batch_size, val_batch_size,
            max_length, on_bad, seed, num_workers,
        )  # fmt: skip
        require_at_least(0, jitter=jitter)
        require_at_least(1, num_traces=num_traces)
        if traces is None and not isinstance(task, Puzzle):
            raise ValueError(
                f"traces=None: {type(task).__name__} makes no traces of its own; set traces to a file or a hub name"
            )
        self.traces = traces
        self.traces_split = traces_split
        self.num_traces = num_traces
        self.fresh = fresh
        self.collate = TraceCollator(
            self.tokenizer, task.template, num_threads, max_length, shuffle_threads, jitter, barrier, seed
        )
        self._get: Callable[[int], Trace] | None = None
        self._size = 0

    def setup(self, stage: str) -> None:
        """Read and check what the stage needs.

        Raises:
            ValueError: bad data.
        """
        super().setup(stage)
        if stage == "fit" and self._get is None:
            self._get, self._size = self._source()

    def train_dataloader(self) -> ResumableLoader[Trace, TraceBatch]:
        """Batches of type :class:`TraceBatch`."""
        assert self._get is not None, "setup('fit') comes first"
        return self.make_train_loader(self._get, self._size, self.fresh and self.traces is None, self.collate)

    def _source(self) -> tuple[Callable[[int], Trace], int]:
        """The trace of an index, and how many an epoch has; a puzzle's are made when they are needed."""
        if self.traces is not None:
            traces = read_traces(self.traces, split=self.traces_split, on_bad=self.on_bad, adapt=self._adapt)
            traces = traces[: self.num_traces]
            return traces.__getitem__, len(traces)
        assert isinstance(self.task, Puzzle)
        get = partial(self.task.trace, num_threads=self.num_threads)
        self.collate.check(get(0))
        return get, NUM_PUZZLES if self.num_traces is None else self.num_traces

    def _adapt(self, trace: Trace) -> Trace:
        return self.collate.check(replace(trace, problem=self.task.adapt(trace.problem)))

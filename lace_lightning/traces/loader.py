"""Which example comes when: an order that is a pure function of seed and epoch, and a loader that resumes inside it.

An example's *serial number* is ``epoch * size + index``: unique over the whole run, so it can seed what is random about
one serving of the example, and it travels through workers without any state there. The complement ``~serial``, which is
negative, is the same serving as a stand-in: a process that would be left without an example computes it, and nothing
of it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class Stream(IntEnum):
    """Independent uses of one seed."""

    ORDER = 0
    LAYOUT = 1


def counter_rng(seed: int, stream: Stream, counter: int) -> np.random.Generator:
    """A generator of its own for every (seed, stream, counter); no generator is ever advanced from one to the next."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, counter)))


class SerialDataset(Dataset[tuple[Item, int]]):
    """Items by serial number.

    Args:
        get: the item of an index.
        size: number of items in an epoch.
        fresh: every epoch goes on to indices never used before (for puzzles, which never run out);
            otherwise each epoch serves indices 0 … size-1.
    """

    def __init__(self, get: Callable[[int], Item], size: int, fresh: bool = False) -> None:
        self._get = get
        self._size = size
        self._fresh = fresh

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, serial: int) -> tuple[Item, int]:
        number = served(serial)
        return self._get(number if self._fresh else number % self._size), serial


def served(serial: int) -> int:
    """The serial number itself, of stand-ins too."""
    return serial if serial >= 0 else ~serial


class EpochSampler:
    """Batches of serial numbers for one rank, from a global order that only seed and epoch decide.

    In step s all ranks together take the examples that one rank with as many times the batch size would, none twice.
    Of a last batch that is smaller than the world size some ranks get a stand-in, so that all take equally many steps.

    Args:
        size: examples per epoch.
        batch_size: examples per batch of one rank; the last batch of an epoch may be smaller.
        seed: of the order.
        shuffle: reshuffle in each epoch; otherwise every epoch is epoch 0 in ascending order.
        rank, world_size: this process among those that share the epoch.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_batch = 0

    @property
    def global_batch_size(self) -> int:
        """Examples per step of all ranks together."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is about; Lightning calls this when an epoch starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in a whole epoch, whatever ``first_batch`` is."""
        return -(-self.size // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the epoch from ``first_batch`` on."""
        order, first_serial = np.arange(self.size), 0
        if self.shuffle:
            order = counter_rng(self.seed, Stream.ORDER, self.epoch).permutation(self.size)
            first_serial = self.epoch * self.size
        for start in range(self.first_batch * self.global_batch_size, self.size, self.global_batch_size):
            step = order[start : start + self.global_batch_size] + first_serial
            yield step[self.rank :: self.world_size].tolist() or [~int(step[0])]


class ResumableLoader(Generic[Item, Batch]):
    """A data loader that continues in mid-epoch with the very batch that comes next.

    Lightning 2.6 saves ``state_dict()`` in each checkpoint, hands it to ``load_state_dict()`` before it asks for the
    first iterator, and calls ``sampler.set_epoch()`` only after that. So an iterator here begins its work when its
    first batch is asked for: by then the epoch is known, and workers start at the right place at once.

    It is no subclass of ``DataLoader`` and has no ``dataset``, because Lightning would rebuild it with samplers
    of its own.

    Args:
        dataset: items by serial number.
        sampler: batches of serial numbers.
        collate: makes a batch of (item, serial number) pairs.
        num_workers: processes that prepare batches ahead; 0 prepares them here.
        num_processed: how many batches of the running epoch the trainer has finished; a batch that was handed out
            but interrupted comes again after resuming.
    """

    def __init__(
        self,
        dataset: SerialDataset[Item],
        sampler: EpochSampler,
        collate: Callable[[Sequence[tuple[Item, int]]], Batch],
        num_workers: int = 0,
        num_processed: Callable[[], int] | None = None,
    ) -> None:
        self.sampler = sampler
        self._num_processed = num_processed
        self._position = (0, 0)  # epoch, batches of it that were handed out
        self._resume: tuple[int, int] | None = None
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable of lists of indices will do
            collate_fn=collate,
            num_workers=num_workers,
            # Iterators draw a worker seed when they are made; from the global generator, that would shift its stream.
            generator=torch.Generator().manual_seed(sampler.seed),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.sampler.epoch
        resume, self._resume = self._resume, None
        first_batch = resume[1] if resume is not None and resume[0] == epoch else 0
        self.sampler.first_batch = first_batch
        self._position = (epoch, first_batch)
        for number, batch in enumerate(self._loader, start=first_batch + 1):
            self._position = (epoch, number)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what the order that this place is in was made from."""
        epoch, batch = self._position
        if self._num_processed is not None:
            batch = min(batch, self._num_processed())
        return {"epoch": epoch, "batch": batch, "num_batches": len(self), "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved place.

        Raises:
            ValueError: the place is in mid-epoch, and the order of that epoch would now be another one.
        """
        order, old = self._order(), dict(state["order"])
        old["batch_size"] *= old.pop("world_size", 1)  # older checkpoints note the batch size of one process
        if 0 < state["batch"] < state["num_batches"] and old != order:
            changed = ", ".join(f"{key}={now} (was {old[key]})" for key, now in order.items() if now != old[key])
            raise ValueError(
                f"this checkpoint ends inside an epoch whose order is not the one of the data now: {changed}. Resume "
                "with the settings of the first run, or start a new run from its weights with init_from"
            )
        self._resume = self._position = (state["epoch"], state["batch"])

    def _order(self) -> dict[str, int | bool]:
        order = {name: getattr(self.sampler, name) for name in ("size", "seed", "shuffle")}
        return order | {"batch_size": self.sampler.global_batch_size}

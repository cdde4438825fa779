"""FSDP2 with checkpoints in shards, written while training goes on."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.modules.fully_sharded import FullySharded
from lace_lightning.shards import (
    META,
    CheckpointError,
    ShardReader,
    aside,
    frozen,
    is_sharded,
    join,
    split,
    write,
)
from lace_lightning.write_queue import WriteQueue

_IS_SHARDED = "lace_is_sharded"
"""Key of a checkpoint in memory: its tensors are this process's shards."""


class FullyShardedOnDisk(FullySharded):
    """FullySharded whose checkpoints are folders (:mod:`lace_lightning.shards`) that each process writes its part of.

    The folder changes in one step, when all of it is on the disk; a write that failed is raised on all processes, at
    the next checkpoint or at the end. Any number of processes reads it, with any strategy, and this one reads the
    single files of others. Up to two copies of this process's shards wait for the disk in main memory.

    Args:
        in_background: go on training while a checkpoint is written; otherwise wait for it.
        process_group_backend: of ``torch.distributed``; null: NCCL on GPUs, Gloo on CPUs.
        timeout: how long processes wait for each other.
    """

    def __init__(
        self,
        in_background: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend, timeout)
        self._save_distributed_checkpoint = True  # Lightning then collects shards for the state of the model
        self._in_background = in_background
        self._queue = WriteQueue()
        self._writers_group: Any = None

    # ---------------------------------------------------------------- writing

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This process's shards of the state, by names of parameters."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # out of Lightning's wrapper
        return get_optimizer_state_dict(self.model, optimizer, options=StateDictOptions(cpu_offload=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Copy the state now, write it later."""
        path = Path(self.broadcast(filepath))
        self._settle(left=1)
        if self.is_global_zero and path.is_file():  # of another strategy; a folder cannot take its place in one step
            path.replace(aside(path))
        shards = self.broadcast(f"shards-{uuid.uuid4().hex[:12]}")
        tensors, rest = split(checkpoint)
        if self.root_device.type == "cpu":  # elsewhere they are copies already
            tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._queue.add(write, tensors, frozen(rest), path, shards, self._writers(), self.is_global_zero)
        if not self._in_background:
            self.finish_checkpoints()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove it when what was saved before is on the disk."""
        if self.is_global_zero:
            self._queue.add(self.checkpoint_io.remove_checkpoint, filepath)

    def finish_checkpoints(self) -> None:
        """Wait until all that was saved is on the disk; a collective."""
        self._settle(left=0)

    def teardown(self) -> None:
        """Finish. No collective: after an error the other processes may be elsewhere."""
        try:
            self._queue.close()
        finally:
            super().teardown()

    def _settle(self, left: int) -> None:
        """Wait until at most ``left`` writes are to be done, and let all processes know of failures."""
        failure = None
        try:
            self._queue.settle(left)
        except Exception as error:  # of whatever kind: it is passed on
            failure = str(error)
        self._agree(failure, OSError, "a checkpoint could not be written")

    def _agree(self, failure: str | None, kind: type[Exception], what: str) -> None:
        """Raise on all processes if one has a failure to report."""
        failures: list[str | None] = [None] * self.world_size
        dist.all_gather_object(failures, failure)
        told = [f"process {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
        if told:
            raise kind(f"{what}: {'; '.join(told)}")

    def _writers(self) -> Any:
        """A group for the thread that writes, which must never get between the collectives of the main thread."""
        if self._writers_group is None:
            self._writers_group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._writers_group

    # ---------------------------------------------------------------- reading

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A file's content, or this process's shards; nothing is changed yet.

        Raises:
            CheckpointError: it is missing, damaged or foreign, or would run code.
        """
        path = Path(self.broadcast(checkpoint_path))
        self.finish_checkpoints()
        if not is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        reader = ShardReader(path, read_checkpoint(path / META))
        self._check(reader)
        own = self._own_tensors()
        sizes = {name: torch.Size(entry["size"]) for name, entry in reader.index.items()}
        here = {name: torch.empty_like(own[name]) for name, size in sizes.items() if _fits(own.get(name), size)}
        reader.read_into(here, self._writers())
        # What does not fit is for the stage to see, and to refuse.
        others = {name: torch.empty(size, device="meta") for name, size in sizes.items() if name not in here}
        return join(others | here, reader.rest) | {_IS_SHARDED: True}

    def _check(self, reader: ShardReader) -> None:
        failure = None
        try:
            reader.check(self.global_rank, self.world_size)
        except CheckpointError as error:
            failure = str(error)
        self._agree(failure, CheckpointError, f"checkpoint {reader.path}")

    def _own_tensors(self) -> dict[str, Tensor]:
        """The shards of model and optimizers by flat name."""
        assert self.model is not None
        states = [get_optimizer_state_dict(self.model, optimizer) for optimizer in self.optimizers]
        return split({"state_dict": get_model_state_dict(self.model), "optimizer_states": states})[0]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over the weights."""
        if _IS_SHARDED not in checkpoint:
            return super().load_model_state_dict(checkpoint, strict)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(strict=strict))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the moments."""
        if _IS_SHARDED not in checkpoint:
            return super().load_optimizer_state_dict(checkpoint)
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state)


def _fits(own: Tensor | None, size: torch.Size) -> bool:
    return own is not None and own.shape == size

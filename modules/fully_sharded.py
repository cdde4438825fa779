"""FSDP2 as a strategy of Lightning's Trainer, over all processes of the run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lace_lightning.shards import by_number

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


class FullySharded(ModelParallelStrategy):
    """Weights, gradients and AdamW's state are divided among all processes; stages shard themselves when configured.

    Lightning's own strategy wants the number of processes once more, and its optimizer states fit no other strategy.
    Checkpoints here are the single files of any other strategy: read and written by the trainer's checkpoint plugin,
    checked by the stage before anything is changed, and resumed on any number of processes.

    Args:
        process_group_backend: of ``torch.distributed``; null: NCCL on GPUs, Gloo on CPUs.
        timeout: how long processes wait for each other.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Count the processes, now that all nodes are known."""
        self._data_parallel_size = self.world_size
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The trainer hands optimizer states to :meth:`load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file's content, on every process; nothing is changed yet."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its rows of the weights."""
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=WHOLE)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as an optimizer of whole weights has it, on rank zero; empty elsewhere."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # out of Lightning's wrapper
        state = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        return by_number(state) if state else state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its rows of the moments."""
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _named(state, optimizer, self.lightning_module)
            set_optimizer_state_dict(self.lightning_module, optimizer, named, options=WHOLE)


def _named(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The reverse of :func:`by_number`, for an optimizer of the same parameters in the same order."""
    of_parameter = {parameter: name for name, parameter in module.named_parameters()}
    names = [of_parameter[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: part for i, part in state["state"].items()}, "param_groups": groups}

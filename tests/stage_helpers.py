"""What the tests of the stages share: tiny stages on the doors puzzle, quiet trainers, and a recorder of steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lace_lightning.datamodules import ProblemData, TraceData
from lace_lightning.exchange import ExchangeConfig, LatticeAttentionConfig
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules import DecodingSpec, OptimizerSpec, ThreadedModule
from lace_lightning.puzzles import Doors
from lace_lightning.traces.schema import Problem

NUM_THREADS = 3
MAX_LENGTH = 24
SHORTEST_PROMPT = 6
QWEN: dict[str, Any] = dict(
    model_type="qwen3", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
LATTICE = LatticeAttentionConfig(width=8, heads=2, scope="aligned")
DECODING = DecodingSpec(max_new_tokens=12)


class UnevenDoors(Doors):
    """Doors whose prompts have 6 to 9 tokens."""

    def __init__(self) -> None:
        super().__init__(doors=(4, 6), tries=(1, 2))

    def problem(self, index: int, split: str = "train") -> Problem:
        problem = super().problem(index, split)
        return replace(problem, text="tries " * (index % 4) + problem.text)


class SignalWhenRead(UnevenDoors):
    """Sends this process a signal when the first problem is made: data are read, no model has been built."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number

    def problem(self, index: int, split: str = "train") -> Problem:
        os.kill(os.getpid(), self.number)
        return super().problem(index, split)


def spec(exchange: ExchangeConfig = LATTICE, architecture: dict[str, Any] = QWEN, **options: Any) -> ModelSpec:
    settings = {"num_threads": NUM_THREADS, "layers": [0, 1]} | options
    return ModelSpec(architecture=architecture, exchange=exchange, **settings)


def trace_data(task: Doors | None = None, **options: Any) -> TraceData:
    settings = dict(batch_size=4, val_batch_size=5, num_traces=12, num_problems=10, max_length=MAX_LENGTH)
    return TraceData(task or UnevenDoors(), **{"num_threads": NUM_THREADS, **settings, **options})


def problem_data(**options: Any) -> ProblemData:
    settings = dict(batch_size=2, val_batch_size=5, num_train_problems=12, num_problems=10, max_length=MAX_LENGTH)
    return ProblemData(UnevenDoors(), **{"num_threads": NUM_THREADS, **settings, **options})


def quiet_trainer(max_steps: int = 2, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        accelerator="cpu", max_steps=max_steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    return Trainer(**settings | options)


def ready(module: ThreadedModule, data: Any, **options: Any) -> ThreadedModule:
    """The stage as it stands before its first step; what it logs goes nowhere, so that its steps can be called."""
    quiet_trainer(max_steps=0, **options).fit(module, data)
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module.train()


def fitted(module: ThreadedModule, data: Any, **options: Any) -> Trainer:
    trainer = quiet_trainer(**options)
    trainer.fit(module, data)
    return trainer


def saved(module: ThreadedModule, path: Path) -> Path:
    """A checkpoint of a stage as its trainer has left it."""
    module.trainer.save_checkpoint(path)
    return path


def values(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


FAST = OptimizerSpec(lr=0.01)


class Recorder(Callback):
    """What each training batch returned."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.steps: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs.append(outputs)
        self.steps.append(trainer.global_step)


class Validations(Callback):
    """Optimizer steps after which a validation came to its end."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)


class Slow(Callback):
    """Gives others the time to kill this process in mid-run."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


class Signal(Callback):
    """Sends this process a SIGTERM inside its training batch of that number, from 0, over all epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)

"""A stage as it was configured, in the terms of the memory model; builds nothing on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from lace_lightning.datamodules.base import GroupData
from lace_lightning.decoding import DecodingSpec
from lace_lightning.memory import Decoding, Pass, Precision, Run, Shape
from lace_lightning.memory.run import Engine
from lace_lightning.modules import LatticeGRPO, ThreadedModule
from lace_lightning.modules.scoring import CPU_TOKENS
from lace_lightning.tasks import Puzzle
from lace_lightning.threaded_lm import ThreadedLM

NEVER = 1_000_000
"""Batches between validations from which on configs mean that there are none."""


def planned_run(module: ThreadedModule, data: GroupData, trainer: Mapping[str, Any], on_cuda: bool) -> Run:
    """The run of a stage on one device, at the longest groups that ``data.max_length`` lets through.

    Args:
        module: the stage, its model not built.
        data: its DataModule.
        trainer: the settings under ``trainer``.
        on_cuda: whether it runs on a GPU.

    Raises:
        OSError: the backbone's config cannot be read.
    """
    spec, outline = module.spec, module.spec.outline(data.tokenizer)
    devices = count_of_devices(trainer)
    validates = _validates(data, trainer)
    run = Run(
        Shape.of(outline, module.trainable(outline)),
        Precision.of(str(trainer.get("precision") or "32-true"), spec.dtype),
        validation=_decoding(module.validation, data.val_batch_size, outline, data, on_cuda) if validates else None,
        attention=spec.attn_implementation or "sdpa",
        checkpointing=spec.gradient_checkpointing,
        compile=spec.compile,
        on_cuda=on_cuda,
        devices=devices,
        strategy=_strategy(trainer, devices),
    )
    return _grpo(run, module, outline, data) if isinstance(module, LatticeGRPO) else _from_traces(run, module, data)


def _from_traces(run: Run, module: ThreadedModule, data: GroupData) -> Run:
    batch = Pass(data.batch_size, module.spec.num_threads, 0, data.max_length)
    return replace(run, training=batch)


def _grpo(run: Run, module: LatticeGRPO, outline: ThreadedLM, data: GroupData) -> Run:
    groups = data.batch_size * module.groups_per_problem
    rollout = _decoding(module.rollout, groups, outline, data, run.on_cuda)
    minibatch = -(-groups // module.minibatches)
    columns = rollout.prompt + rollout.new
    at_once = module.microbatch_size or minibatch
    if module.microbatch_size is None and not run.on_cuda:
        at_once = max(1, CPU_TOKENS // (rollout.threads * columns))
    at_once = min(at_once, minibatch)
    return replace(
        run,
        training=Pass(at_once, rollout.threads, rollout.prompt, columns),
        rollout=rollout,
        head="scored",
        keeps_gradients=at_once < minibatch,
        has_reference=bool(module.loss.kl_weight),
    )


def _decoding(spec: DecodingSpec, groups: int, outline: ThreadedLM, data: GroupData, on_cuda: bool) -> Decoding:
    new = max(1, min(spec.max_new_tokens, data.max_length - 1))
    threads = spec.num_threads or outline.num_threads
    groups = min(groups, spec.groups_at_once or groups)
    return Decoding(groups, threads, data.max_length - new, new, engine_of(spec, outline, on_cuda), spec.sampling)


def engine_of(spec: DecodingSpec, outline: ThreadedLM, on_cuda: bool) -> Engine:
    """What will decode; where this machine has no GPU, what a GPU machine with all that is needed would take."""
    from lace_lightning.engine import obstacle

    device = "cuda" if on_cuda and torch.cuda.is_available() else "cpu"
    if spec.engine == "plain" or obstacle(outline, device) is not None:
        return "plain"
    return "graphs" if on_cuda else "fast"


def count_of_devices(trainer: Mapping[str, Any]) -> int:
    """Processes of the run, over all hosts; ``auto`` is what this machine has."""
    devices, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, list):
        return nodes * len(devices)
    if str(devices) in ("auto", "-1"):
        return nodes * max(1, torch.cuda.device_count())
    parts = [part for part in str(devices).split(",") if part]
    return nodes * (len(parts) if len(parts) > 1 else int(parts[0]))


def _strategy(trainer: Mapping[str, Any], devices: int) -> Literal["single", "ddp", "sharded"]:
    """How several devices share the work."""
    strategy = trainer.get("strategy") or "auto"
    name = str(strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy).lower()
    if any(word in name for word in ("fsdp", "modelparallel", "sharded", "deepspeed")):
        return "sharded"
    return "ddp" if devices > 1 else "single"


def _validates(data: GroupData, trainer: Mapping[str, Any]) -> bool:
    """Whether the run decodes validation problems between its steps."""
    if trainer.get("limit_val_batches") == 0 or (data.problems is None and not isinstance(data.task, Puzzle)):
        return False
    interval, steps = trainer.get("val_check_interval"), trainer.get("max_steps")
    is_never = isinstance(interval, int) and (interval >= NEVER or 0 < int(steps or -1) < interval)
    return not (trainer.get("check_val_every_n_epoch") is None and is_never)

"""Milliseconds per step of supervised fine-tuning: forward, backward and AdamW, exchange on and off in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lace_lightning.backbone import checkpoint_layers
from lace_lightning.bench import floors
from lace_lightning.bench.bench import Bench, joined
from lace_lightning.bench.clock import CaseFailed, free_memory, spread
from lace_lightning.bench.memory import allocated_bytes, peak_bytes, reset_peak
from lace_lightning.compiled_layers import compile_layers
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class Grid:
    """A batch of B groups of N threads of L tokens; every token is a target.

    Args:
        groups, threads, length: B, N and L.
        checkpointing: recompute activations in the backward pass.
        compile: decoder layers compiled one by one.
    """

    groups: int
    threads: int
    length: int
    checkpointing: bool
    compile: bool

    @property
    def tokens(self) -> int:
        return self.groups * self.threads * self.length

    def __str__(self) -> str:
        return f"{self.groups} × {self.threads} × {self.length} tokens"


class Trainee:
    """A model with its optimizer, whose state is made by the first step.

    Args:
        model: in training mode from here on.
        grid: the batch.
        seed: of the batch.
    """

    def __init__(self, model: ThreadedLM, grid: Grid, seed: int) -> None:
        self._model = prepare(model, grid)
        device = next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
        generator = torch.Generator().manual_seed(seed)
        shape = (grid.groups, grid.threads, grid.length)
        vocabulary = cast(Any, model.backbone).config.vocab_size
        self._ids = torch.randint(vocabulary, shape, generator=generator).to(device)
        self.loss = torch.zeros(())

    def step(self) -> None:
        """One step; without waiting for it on CUDA."""
        self.loss = sft_loss(self._model, self._ids)
        self.loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.loss = self.loss.detach()


def prepare(model: ThreadedLM, grid: Grid) -> ThreadedLM:
    """Set the model up as :class:`~lace_lightning.model_spec.ModelSpec` does it for training."""
    if grid.checkpointing:
        checkpoint_layers(model.backbone)
    if grid.compile:
        compile_layers(model.backbone)
    return model.train()


def sft_loss(model: ThreadedLM, ids: Tensor) -> Tensor:
    """The loss of :class:`~lace_lightning.modules.SupervisedFinetuning` where every token is a target.

    Args:
        model: any.
        ids: (B, N, L) long.
    """
    everything = torch.ones_like(ids, dtype=torch.bool)
    return model.mean_nll(ids, everything, everything)


def train(bench: Bench, grids: Sequence[Grid]) -> Iterator[dict[str, Any]]:
    """One cell per grid."""
    for grid in grids:
        yield _measure(bench, grid)
        free_memory()


def _measure(bench: Bench, grid: Grid) -> dict[str, Any]:
    models = bench.models()
    trainees = {case: Trainee(model, grid, bench.settings.seed) for case, model in models.items()}
    samplers: dict[str, Callable[[], float]] = {
        case: partial(_sample, bench, trainee) for case, trainee in trainees.items()
    }
    samples, errors = bench.in_turn(grid, samplers)
    cases = {
        case: _record(bench, models[case], grid, taken) | {"loss": float(trainees[case].loss)}
        for case, taken in samples.items()
    }
    del models, trainees, samplers
    for case, record in cases.items():
        record["peak_bytes"] = _peak(bench, case, grid)
    return asdict(grid) | joined(cases, errors)


def _sample(bench: Bench, trainee: Trainee) -> float:
    """Milliseconds of a step.

    Raises:
        CaseFailed: the loss is not finite. Products of NaNs draw less power and are faster: they measure nothing.
    """
    bench.clock.settle()
    taken = bench.clock.milliseconds(trainee.step)
    if not trainee.loss.isfinite():
        raise CaseFailed(f"the loss is {float(trainee.loss)}")
    return taken


def _record(bench: Bench, model: ThreadedLM, grid: Grid, samples: Sequence[float]) -> dict[str, Any]:
    step = spread(samples)
    flops = floors.training_flops(model, grid.groups, grid.threads, grid.length)
    return {
        "step_ms": step,
        "tokens_per_second": 1e3 * grid.tokens / step["median"],
        "flops": flops,
        "matrix_share": floors.matrix_share(flops, step["median"], bench.flops_per_second),
    }


def _peak(bench: Bench, case: str, grid: Grid) -> int | None:
    """Peak bytes of two steps of a model that has the device to itself: AdamW's state stands from the second one on."""
    free_memory()
    before = allocated_bytes(bench.device)
    if before is None:
        return None
    bench.progress(f"{grid}: memory, {case}")
    trainee = Trainee(bench.model(case), grid, bench.settings.seed)
    reset_peak(bench.device)
    trainee.step()
    trainee.step()
    bench.clock.settle()
    peak = peak_bytes(bench.device)
    return None if peak is None else peak - before

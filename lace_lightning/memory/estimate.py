"""The estimate: what stands on the device in each phase of a run, and which phase has the peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lace_lightning.memory import caches, head
from lace_lightning.memory.activations import casts, kept_by_all_layers, largest_layer
from lace_lightning.memory.run import Decoding, Pass, Precision, Run

CONTEXT = 600 * 2**20
"""Bytes that CUDA's context, cuBLAS and compiled kernels take beside what torch allocates (seen on H100 and H200)."""


@dataclass(frozen=True)
class Phase:
    """A moment of a run: its name, and bytes by what takes them."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """The phases of a run; the largest is the peak, in bytes that torch allocates on one device."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def estimate(run: Run) -> Estimate:
    """Count one run."""
    phases = []
    if run.training is not None:
        phases += [_loss(run), _backward(run, run.training), _step(run)]
    for name, decoding in (("rollout", run.rollout), ("validation", run.validation)):
        if decoding is not None:
            phases += [_decoding(run, name, decoding)]
    return Estimate(tuple(phases or [Phase("weights", _standing(run))]))


def _standing(run: Run) -> dict[str, int]:
    """What stands all the time."""
    shape, w, shards = run.shape, run.precision.weights, run.shards
    parts = {"weights": shape.parameters * w // shards}
    if run.has_reference:
        parts["reference model"] = shape.parameters * w
    if run.training is not None:
        parts["AdamW's states"] = 2 * shape.trained * w // shards
        if run.strategy == "ddp":
            parts["gradient buckets"] = shape.trained * w
    if run.strategy == "sharded":
        parts["gathered weights"] = (2 * shape.layer + shape.tables) * run.precision.compute
    return parts


def _kept_rollout(run: Run) -> dict[str, int]:
    """The engine's caches of the last rollout, which stay until another batch size comes; a copy takes its along."""
    if run.rollout is None or run.rollout.engine != "graphs" or run.precision.is_mixed:
        return {}
    return {"caches of the last rollout": sum(caches.cached(run, run.rollout).values())}


def _gradients(run: Run) -> dict[str, int]:
    return {"gradients": run.shape.trained * run.precision.weights // run.shards}


def _loss(run: Run) -> Phase:
    """The end of the forward pass: all activations, and the head at work."""
    parts = _standing(run) | _kept_rollout(run) | (_gradients(run) if run.keeps_gradients else {})
    parts["activations"] = kept_by_all_layers(run) + head.hidden_states(run)
    parts["logits"] = head.logits(run)
    parts["head's gradient and copies"] = head.matrix(run)
    parts["weights in lower precision"] = casts(run)
    return Phase("loss", _without_zeros(parts))


def _backward(run: Run, batch: Pass) -> Phase:
    """The larger of the backward pass's ends: all activations, or all gradients; in both a layer at work."""
    parts = _standing(run) | _kept_rollout(run)
    working = batch.tokens * run.precision.compute * (3 * run.shape.inner + 2 * run.shape.hidden)
    layer = largest_layer(run)
    begin = kept_by_all_layers(run) + (layer if run.checkpointing else 0)
    before = _gradients(run)["gradients"] if run.keeps_gradients and run.head == "scored" else 0
    at_begin = (
        begin + working + casts(run) + max(before, run.shape.tables * run.precision.weights * run.shape.learns_head)
    )
    at_end = layer + working + _gradients(run)["gradients"]
    if at_begin > at_end:
        rest = {"activations": begin, "weights in lower precision": casts(run)}
        rest["gradients"] = at_begin - begin - working - casts(run)
    else:
        rest = {"activations": layer} | _gradients(run)
    return Phase("backward", _without_zeros(parts | rest | {"a layer's derivatives": working}))


def _step(run: Run) -> Phase:
    """AdamW at work; fused, it needs nothing of its own."""
    return Phase("optimizer step", _standing(run) | _kept_rollout(run) | _gradients(run))


def _decoding(run: Run, name: str, decoding: Decoding) -> Phase:
    """Decoding of a batch; stages from traces still hold the last step's gradients."""
    holds = run.training is not None and run.head == "fused" and name == "validation"
    parts = _standing(run) | (_gradients(run) if holds else {})
    if run.precision.is_mixed or run.strategy == "sharded":  # a copy, or all shards gathered
        numbers = run.precision.compute
        parts["weights for decoding"] = run.shape.parameters * numbers
        run = replace(run, precision=Precision(numbers, numbers, numbers))
    parts |= caches.cached(run, decoding)
    return Phase(name, _without_zeros(parts | {"prompts": caches.prefill(run, decoding)}))


def _without_zeros(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}

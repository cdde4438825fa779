"""What a run computes: the settings that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lace_lightning.decoding import Sampling
from lace_lightning.memory.shape import Shape

Engine = Literal["graphs", "fast", "plain"]
"""What decodes: kernels on CUDA, the fast step in plain torch, or the Hugging Face model."""


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Args:
        weights: of weights, gradients and AdamW's states.
        compute: of what matrix products take.
        residual: of the decoder's hidden states between its layers.
    """

    weights: int
    compute: int
    residual: int

    @property
    def is_mixed(self) -> bool:
        """Autocast: products take copies of the weights."""
        return self.weights != self.compute

    @classmethod
    def of(cls, trainer: str, dtype: str) -> Precision:
        """From ``trainer.precision`` and ``model.spec.dtype``; autocast leaves hidden states as the embedding is."""
        weights = 2 if trainer.endswith("-true") and not trainer.startswith("32") else _BYTES.get(dtype, 4)
        weights = {"64-true": 8, "64": 8}.get(trainer, weights)
        return cls(weights, 2 if trainer.endswith("-mixed") else weights, weights)


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Pass:
    """The groups of one forward and backward pass.

    Args:
        groups: B.
        threads: N.
        prompt: P, columns of the prompt.
        columns: P + L, all columns.
        has_holes: whether some column holds no token (padding, waiting): attention then takes a mask.
        is_packed: whether the prompt is computed once per group, as on CPUs.
    """

    groups: int
    threads: int
    prompt: int
    columns: int
    has_holes: bool = True
    is_packed: bool = False

    @property
    def rows(self) -> int:
        return self.groups * self.threads

    @property
    def attended(self) -> int:
        """Tokens in rows of one thread each."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Tokens that layers compute."""
        if not self.is_packed:
            return self.attended
        return self.groups * (self.prompt + self.threads * (self.columns - self.prompt))

    @property
    def positions(self) -> int:
        """Positions of the lattice."""
        return self.rows * (self.columns - self.prompt)


@dataclass(frozen=True)
class Decoding:
    """Groups that are decoded together.

    Args:
        groups: B.
        threads: N.
        prompt: P.
        new: most columns after it.
        engine: what computes them.
        sampling: how tokens are drawn.
    """

    groups: int
    threads: int
    prompt: int
    new: int
    engine: Engine = "graphs"
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def rows(self) -> int:
        return self.groups * self.threads


@dataclass(frozen=True)
class Run:
    """A stage on one device of ``devices``.

    Args:
        shape: the model.
        precision: bytes per number.
        training: one forward and backward pass; None: nothing is trained.
        rollout: how training groups are decoded, in GRPO.
        validation: how groups are decoded in between.
        head: ``fused``: loss and gradients of the head in one go (stages from traces); ``scored``: log-probabilities
            (GRPO).
        attention: attention of the backbone.
        checkpointing: activations are recomputed.
        compile: decoder layers are compiled.
        keeps_gradients: gradients of the step before, or of earlier microbatches, stand during a forward pass.
        has_reference: a frozen copy of the model stands beside it (GRPO's KL term).
        on_cuda: the device is a GPU.
        devices: processes with a device each.
        strategy: ``single``, ``ddp`` (gradients once more, in buckets) or ``sharded`` (weights, gradients and states
            shared out).
    """

    shape: Shape
    precision: Precision
    training: Pass | None = None
    rollout: Decoding | None = None
    validation: Decoding | None = None
    head: Literal["fused", "scored"] = "fused"
    attention: str = "sdpa"
    checkpointing: bool = False
    compile: bool = False
    keeps_gradients: bool = True
    has_reference: bool = False
    on_cuda: bool = True
    devices: int = 1
    strategy: Literal["single", "ddp", "sharded"] = "single"

    @property
    def shards(self) -> int:
        return self.devices if self.strategy == "sharded" else 1

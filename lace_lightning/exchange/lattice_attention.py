"""Lattice attention (arXiv 2604.15529 §3.1, Eq. 4; LACE.md §3): the gated attention path across threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lace_lightning.exchange.backends import BACKENDS, Backend, Heads, attention_weights, choose
from lace_lightning.exchange.base import Exchange, ExchangeConfig, Geometry, OwnAttention
from lace_lightning.exchange.rotary import Rotation
from lace_lightning.lattice import Lattice, LatticeMask, Own, Reading, Scope, Topology

Gate = Literal["sigmoid", "none"]


@dataclass(frozen=True)
class LatticeAttentionConfig(ExchangeConfig):
    """Settings of :class:`LatticeAttention`.

    Args:
        width: lattice width r.
        heads: lattice heads h; d = r / h.
        scope: which columns a token reads: ``causal``, ``aligned`` or ``window``. ``aligned`` was at least as good as
            ``causal`` wherever both were measured, and is cheaper (docs/results.md).
        own: ``include`` the thread's own positions, ``exclude`` them, or read ``only`` them (a control that
            communicates nothing).
        window: number of columns that scope ``window`` reads.
        time_dims: d_t, how many of the d dims turn with lattice time; None: half of d.
        thread_dims: d_n, how many turn with the thread index; None: the other half.
        rotary_base: base of both rotary embeddings.
        gate: ``sigmoid`` as in the paper, or ``none``: all that was read is added.
        gate_bias: start value of b_g; 0 opens every gate half.
        backend: attention backend: ``auto``, ``eager``, ``sdpa``, ``folded``, ``pointwise``, ``flex`` or ``flash``.

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """

    width: int = 128
    heads: int = 4
    scope: Scope = "aligned"
    own: Own = "include"
    window: int | None = None
    time_dims: int | None = None
    thread_dims: int | None = None
    rotary_base: float = 10_000.0
    gate: Gate = "sigmoid"
    gate_bias: float = 0.0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"exchange width={self.width} must be a positive multiple of heads={self.heads}")
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate={self.gate!r} is unknown: choose one of {', '.join(get_args(Gate))}")
        if self.gate == "none" and self.gate_bias:
            raise ValueError(f"gate_bias={self.gate_bias} needs gate: sigmoid; gate: none has no bias")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is unknown: choose auto or one of {', '.join(BACKENDS)}")
        time_dims, thread_dims = self.rotary_dims
        if time_dims % 2 or thread_dims % 2 or min(time_dims, thread_dims) < 0 or time_dims + thread_dims > self.dim:
            raise ValueError(
                f"time_dims={time_dims} and thread_dims={thread_dims} must be even and fit into the head width "
                f"{self.dim} (= width {self.width} / heads {self.heads})"
            )
        self.topology  # noqa: B018  (its own constructor checks scope, own and window)

    @property
    def dim(self) -> int:
        """Head width d."""
        return self.width // self.heads

    @property
    def rotary_dims(self) -> tuple[int, int]:
        """(d_t, d_n) with defaults filled in: even, together at most d."""
        half = self.dim // 4 * 2
        return (
            half if self.time_dims is None else self.time_dims,
            half if self.thread_dims is None else self.thread_dims,
        )

    @property
    def topology(self) -> Topology:
        return Topology(self.scope, self.own, self.window)

    def build(self, geometry: Geometry) -> LatticeAttention:
        return LatticeAttention(self, geometry)


class LatticeAttention(Exchange):
    """The gated side path: down-projection, attention over the lattice, gate, zero-started up-projection.

    The names of the paper: ``down`` is W_down (D_a -> r), ``qkv`` W_qkv, ``gate`` W_g and b_g
    (None without a gate), ``up`` W_up (r -> D_a).
    """

    site = "attention"
    Config: ClassVar = LatticeAttentionConfig

    def __init__(self, config: LatticeAttentionConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        r = config.width
        factory: dict[str, Any] = {"dtype": geometry.dtype, "device": geometry.device}
        self.down = nn.Linear(geometry.attention_width, r, bias=False, **factory)
        self.qkv = nn.Linear(r, 3 * r, bias=False, **factory)
        self.gate = nn.Linear(2 * r, r, **factory) if config.gate == "sigmoid" else None
        self.up = nn.Linear(r, geometry.attention_width, bias=False, **factory)
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, config.gate_bias)
        nn.init.zeros_(self.up.weight)  # identity start: a fresh block adds exactly nothing

    def forward(self, hidden: Tensor, lattice: Lattice, layer_idx: int, own: OwnAttention | None = None) -> Tensor:
        z = self.down(hidden.transpose(1, 2))  # (B, L, N, r): time-major, as the attention needs it
        q, k, v = self._project(z, lattice)
        mask = lattice.mask(self.config.topology)
        if lattice.cache is not None and self.config.scope != "aligned":
            k, v = lattice.cache.append(layer_idx, k, v)
        bias = self._bias(z, mask, lattice, layer_idx)
        if bias is None:
            read = choose(self.config.backend, mask, self._heads(q.dtype)).attend(q, k, v, mask)
        else:
            read = attention_weights(q, k, mask, bias).to(v.dtype) @ v
        read = read.transpose(1, 2).reshape(z.shape)
        gate = torch.ones_like(read) if self.gate is None else torch.sigmoid(self.gate(torch.cat([z, read], dim=-1)))
        if lattice.readings is not None:
            weights = attention_weights(q, k, mask, bias)
            lattice.readings.append(_reading(layer_idx, gate.transpose(1, 2), weights, mask, lattice))
        return self.up(gate * read).transpose(1, 2)

    def _bias(self, z: Tensor, mask: LatticeMask, lattice: Lattice, layer_idx: int) -> Tensor | None:
        """(B', 1, Q, K) to add to the scores, for variants that weigh threads; None: nothing."""
        return None

    def prepare(self, lattice: Lattice) -> None:
        mask, device = lattice.mask(self.config.topology), lattice.visible.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.qkv.weight.dtype
        choose(self.config.backend, mask, self._heads(dtype)).prepare(mask, self._heads(dtype))
        self._rotation(lattice, dtype)

    def _heads(self, dtype: torch.dtype) -> Heads:
        return Heads(self.config.heads, self.config.dim, dtype)

    def _project(self, z: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B', h, positions, d), time-major; ``aligned`` folds columns into B'."""
        batch, columns, num_threads, _ = z.shape
        config = self.config
        q, k, v = (x.unflatten(-1, (config.heads, config.dim)) for x in self.qkv(z).chunk(3, dim=-1))
        rotation = self._rotation(lattice, z.dtype)
        folded = (batch * columns, num_threads) if config.scope == "aligned" else (batch, columns * num_threads)
        q, k, v = (x.reshape(*folded, config.heads, config.dim).transpose(1, 2) for x in (rotation(q), rotation(k), v))
        return q, k, v

    def _rotation(self, lattice: Lattice, dtype: torch.dtype) -> Rotation:
        """The rotation of this pass, made once for all layers with the same settings."""
        config = self.config
        settings = (config.heads, config.dim, *config.rotary_dims, config.rotary_base, dtype)
        if settings not in lattice.rotations:
            _, num_threads, columns = lattice.visible.shape
            times = torch.arange(columns, device=lattice.visible.device) + lattice.first_time
            lattice.rotations[settings] = Rotation.of(times, num_threads, *settings)
        return lattice.rotations[settings]


def _reading(layer_idx: int, gate: Tensor, weights: Tensor, mask: LatticeMask, lattice: Lattice) -> Reading:
    """Summarise one pass: gates and where the attention mass (B', h, Q, K) went."""
    batch, num_threads, columns = lattice.visible.shape
    mass = weights.mean(1).unflatten(-1, (-1, num_threads)).sum(-2)  # (B', Q, N): mass per thread read
    mass = mass.reshape(batch, columns, num_threads, num_threads).transpose(1, 2)  # (B, N, L, N)
    total, own = mass.sum(-1), mass.diagonal(dim1=1, dim2=3).transpose(1, 2)  # (B, N, L)
    taking_part = lattice.visible & (total > 0)
    counted = (mass * taking_part[..., None]).sum(2)
    return Reading(
        layer_idx=layer_idx,
        gate=gate.mean(-1),
        cross_share=torch.where(taking_part, 1 - own / total, torch.nan),
        thread_share=counted / counted.sum(-1, keepdim=True).clamp_min(torch.finfo(counted.dtype).tiny),
        visible=lattice.visible,
        weights=weights.mean(1) if lattice.keep_weights else None,
    )

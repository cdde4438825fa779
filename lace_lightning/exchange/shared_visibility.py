"""Shared visibility of keys and values, in the manner of Group Think (arXiv 2505.11107) and Hogwild! (2504.06261)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lace_lightning.exchange.base import Exchange, ExchangeConfig, Geometry, OwnAttention
from lace_lightning.lattice import Lattice, Topology

_ALL, _OTHERS = Topology("causal", "include"), Topology("causal", "exclude")
_UNKNOWN = ("sliding_window", "softcap", "s_aux")
"""What some backbones do in their own attention, and this one does not."""


@dataclass(frozen=True)
class SharedVisibilityConfig(ExchangeConfig):
    """Settings of :class:`SharedVisibility`.

    Args:
        stride: thread n's k-th token after the prompt of P tokens stands at position P + n * stride + k of the
            backbone: Group Think's slots, at least as long as the longest thread. With 0 all threads share one range,
            and a thread cannot tell others' tokens from its own.
        gated: learn one scalar per layer, 0 at the start, by which the difference that the others make is multiplied;
            otherwise there are no weights, and threads read each other from the start.

    Raises:
        ValueError: a negative stride, or ``reads_prompt``.
    """

    stride: int = 1024
    gated: bool = False

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise ValueError(f"stride={self.stride} must be 0 or more positions")
        if self.reads_prompt:
            raise ValueError("reads_prompt=True: threads share one prompt, and would read N copies; leave it off")

    @property
    def position_stride(self) -> int:
        return self.stride

    def build(self, geometry: Geometry) -> SharedVisibility:
        return SharedVisibility(self, geometry)


class SharedVisibility(Exchange):
    """The layer's own queries read the keys and values of all threads, t' <= t, and the prompt once.

    One softmax goes over the prompt, the thread's own past and the others' columns up to its own. Where no other thread
    is visible, the layer's own output stays as it is, bitwise.
    """

    site = "attention"
    reads_keys = True
    Config: ClassVar = SharedVisibilityConfig

    def __init__(self, config: SharedVisibilityConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"dtype": geometry.dtype, "device": geometry.device}
        self.gate = nn.Parameter(torch.zeros(1, **factory)) if config.gated else None  # FSDP2 divides no scalars

    def forward(self, hidden: Tensor, lattice: Lattice, layer_idx: int, own: OwnAttention | None = None) -> Tensor:
        assert own is not None  # the backbone sees to it
        if unknown := [name for name in _UNKNOWN if own.options.get(name) is not None]:
            raise ValueError(
                f"layer {layer_idx} of the backbone attends with {', '.join(unknown)}: SharedVisibility knows plain "
                "causal attention only; choose other layers"
            )
        shape = (*hidden.shape[:3], -1)
        query = _time_major(own.query[:, :, lattice.skip :], lattice)
        query = query.masked_fill(~_time_major(lattice.visible.flatten(0, 1)[:, None, :, None], lattice), 0.0)
        key, value = (_all_positions(x, lattice, query.shape[1]) for x in (own.key, own.value))
        mask, scale = _joint_mask(lattice), own.options.get("scaling")
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        read = _by_position(read.transpose(1, 2).flatten(2), shape)
        reads_others = _by_position(lattice.mask(_OTHERS).reads_anything[:, 0], shape)
        read = (read - hidden).masked_fill(~reads_others, 0.0)
        return read if self.gate is None else self.gate * read

    def prepare(self, lattice: Lattice) -> None:
        _joint_mask(lattice)
        lattice.mask(_OTHERS).reads_anything  # noqa: B018  (made once, kept)


def _time_major(x: Tensor, lattice: Lattice) -> Tensor:
    """(B * N, H, columns, d) as (B, H, columns * N, d)."""
    return x.unflatten(0, (-1, lattice.num_threads)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _by_position(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, L * N, D) time-major as (B, N, L, D)."""
    return x.unflatten(1, (shape[2], shape[1])).transpose(1, 2)


def _all_positions(x: Tensor, lattice: Lattice, heads: int) -> Tensor:
    """Keys or values (B * N, H_kv, C, d): the prompt's of one thread, then all threads', time-major, (B, H, P + K, d).

    What stands at positions that nobody may read may be anything, also not finite: it becomes 0.
    """
    prompt = 0 if lattice.prompt is None else lattice.prompt.shape[1]
    x = torch.cat([x[:: lattice.num_threads, :, :prompt], _time_major(x[:, :, prompt:], lattice)], dim=2)
    x = x.masked_fill(~_visible(lattice)[:, None, :, None], 0.0)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _visible(lattice: Lattice) -> Tensor:
    """(B, P + K) bool: the prompt's real tokens and the visible positions of the lattice."""
    positions = lattice.mask(_ALL).key_visible
    return positions if lattice.prompt is None else torch.cat([lattice.prompt, positions], dim=1)


def _joint_mask(lattice: Lattice) -> Tensor:
    """(B, 1, Q, P + K) bool: the prompt's real tokens, and what is visible up to the query's column; made once."""
    mask = lattice.mask(_ALL)
    if "joint" not in mask.made:
        joint = mask.dense
        if lattice.prompt is not None:
            joint = torch.cat([lattice.prompt[:, None, None].expand(-1, -1, mask.num_queries, -1), joint], dim=-1)
        # A row of a waiting column may be empty: let it read all, it is dropped.
        mask.made["joint"] = joint | ~joint.any(-1, keepdim=True)
    return mask.made["joint"]

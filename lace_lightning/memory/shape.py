"""The widths and counts of a model that its memory is counted from; read off a model on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lace_lightning.backbone import causal_lm, decoder_of, text_config
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class LatticeShape:
    """Where the exchange stands and how wide it is.

    Args:
        layers: lattice layers, sorted.
        width: r.
        heads: h.
        keeps_keys: whether decoding caches the lattice's keys (every scope but ``aligned``).
        site: ``attention`` or ``layer``.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    keeps_keys: bool
    site: str


@dataclass(frozen=True)
class Shape:
    """A model, and which of its weights learn.

    Args:
        layers: decoder layers.
        hidden: D.
        queries: width of all query heads together, D_a.
        keys: width of all key heads together.
        heads: query heads.
        head_dim: width of one.
        inner: width of the MLP.
        vocabulary: V.
        has_head_norms: whether queries and keys are normed by head (Qwen3).
        backbone: parameters of the backbone.
        exchange: parameters of the exchange.
        layer: parameters of one decoder layer, the largest.
        tables: parameters of embedding and head; once if they are tied.
        trained: parameters that learn.
        learns_linears: whether inputs of the layers' products must be kept: their weights, or LoRA's, learn.
        learns_norms: whether the norms' weights learn.
        learns_head: whether the head's weights learn.
        lattice: the exchange; None without one.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    inner: int
    vocabulary: int
    has_head_norms: bool
    backbone: int
    exchange: int
    layer: int
    tables: int
    trained: int
    learns_linears: bool
    learns_norms: bool
    learns_head: bool
    lattice: LatticeShape | None

    @property
    def parameters(self) -> int:
        return self.backbone + self.exchange

    @property
    def first_with_gradient(self) -> int:
        """The lowest layer that gradients pass: the first lattice layer below a frozen backbone's."""
        if self.learns_linears or self.learns_norms or self.lattice is None:
            return 0
        return self.lattice.layers[0]

    @classmethod
    def of(cls, model: ThreadedLM, trained: Iterable[nn.Parameter]) -> Shape:
        """Of a model on any device, the meta device among them.

        Args:
            model: the model.
            trained: those of its parameters that learn.
        """
        config, decoder = text_config(model.backbone), decoder_of(model.backbone)
        base = causal_lm(model.backbone)
        learning = {id(parameter) for parameter in trained}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = base.get_output_embeddings().weight
        tables = {id(table): table.numel() for table in (head, base.get_input_embeddings().weight)}
        counts = model.parameter_counts()
        matrices = [p for p in decoder.layers.parameters() if p.dim() >= 2]
        return cls(
            layers=len(decoder.layers),
            hidden=config.hidden_size,
            queries=config.num_attention_heads * head_dim,
            keys=key_heads * head_dim,
            heads=config.num_attention_heads,
            head_dim=head_dim,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=head.shape[0],
            has_head_norms=any("q_norm" in name for name, _ in decoder.layers[0].named_parameters()),
            backbone=counts["backbone"],
            exchange=counts["exchange"],
            layer=max(sum(p.numel() for p in layer.parameters()) for layer in decoder.layers),
            tables=sum(tables.values()),
            trained=sum(p.numel() for p in model.parameters() if id(p) in learning),
            learns_linears=any(id(p) in learning for p in matrices),
            learns_norms=any(id(p) in learning for p in decoder.layers.parameters() if p.dim() < 2),
            learns_head=id(head) in learning,
            lattice=_lattice(model),
        )


def _lattice(model: ThreadedLM) -> LatticeShape | None:
    if not model.exchange_at:
        return None
    config: Any = model.exchange_config
    site = next(iter(model.exchange_at.values())).site
    keeps_keys = site == "attention" and getattr(config, "scope", "aligned") != "aligned"
    return LatticeShape(
        tuple(model.exchange_at), getattr(config, "width", 0), getattr(config, "heads", 1), keeps_keys, site
    )

"""Decoder layers compiled one by one ("regional" compilation): one graph for all layers with exchange, one without."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from lace_lightning.backbone import decoder_of

MAX_GRAPHS = 64
"""Graphs per kind of layer before torch falls back to uncompiled code: with and without exchange, mask and gradients,
in training and evaluation, and each once for the first length and once for all others."""

_OPTIONS: dict[str, Any] = {} if torch.__version__ >= "2.13" else {"triton.mix_order_reduction": False}
"""Before torch 2.13 the fused gradients of a norm forget the brackets around a sum of lengths: prompt + threads."""


def compile_layers(backbone: nn.Module) -> None:
    """Let the decoder layers of a connected backbone run compiled wherever no cache is filled.

    Decoding stays uncompiled: its steps are short and of ever new lengths.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    for layer_idx, layer in enumerate(decoder_of(backbone).layers):
        layer.forward = _CompiledForward(layer, layer_idx)


def are_compiled(backbone: nn.Module) -> bool:
    """Whether :func:`compile_layers` was called."""
    return isinstance(decoder_of(backbone).layers[0].forward, _CompiledForward)


class _CompiledForward:
    """Stands in for the ``forward`` of one layer; an object and no closure, so that a copied layer runs its copy.

    It binds the exchange to the layer outside of the compiled code: there, all layers must look the same.
    """

    def __init__(self, layer: nn.Module, layer_idx: int) -> None:
        self._layer, self._layer_idx = layer, layer_idx

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lattice = kwargs.get("lattice")
        is_recorded = lattice is not None and (lattice.cache is not None or lattice.readings is not None)
        if is_recorded or kwargs.get("past_key_values") is not None:
            return type(self._layer).forward(self._layer, *args, **kwargs)
        if lattice is not None:
            kwargs["lattice"] = here = lattice.at("attention", self._layer_idx)
            if here is not None:
                here.exchange.prepare(lattice)
        return _compiled(type(self._layer).forward)(self._layer, *args, **kwargs)


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class of layers: once compiled, it serves each of them."""
    return torch.compile(forward, options=_OPTIONS)

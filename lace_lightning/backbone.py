"""Joining exchanges to Hugging Face decoders, without a copy of modelling code.

transformers lets a model's attention be replaced by name. For every implementation X in :data:`INNER` we register
``lace_X`` (attention and mask): it runs X untouched and then, if the forward pass carries a ``lattice`` keyword, lets
the exchange of this layer read. Without that keyword the model is exactly the base model.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lace_lightning.exchange.base import Geometry, OwnAttention
from lace_lightning.lattice import Lattice
from lace_lightning.packing import pack, unpack

INNER = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
PREFIX = "lace_"
FLASH = "flash_attention_"
SOFTMAX_LAYERS = {"full_attention", "sliding_attention"}


class BackboneError(ValueError):
    """A model cannot carry an exchange; the message says why."""


def causal_lm(backbone: Any) -> Any:
    """The Hugging Face causal LM itself, taken out of a PEFT wrapper if it is in one."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def decoder_of(backbone: nn.Module) -> Any:
    """The decoder stack of a causal LM (also inside a PEFT wrapper); it has ``layers``.

    Raises:
        BackboneError: there is no such stack.
    """
    base = causal_lm(backbone)
    config = base.config
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(f"{type(base).__name__} is an encoder-decoder: only decoder-only models can carry threads")
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise BackboneError(f"{type(base).__name__} has no decoder with a list of layers")
    return decoder


def text_config(backbone: nn.Module) -> Any:
    """The configuration of the language model (inside a multimodal model: of its text part)."""
    return causal_lm(backbone).config.get_text_config(decoder=True)


def default_layers(num_layers: int) -> list[int]:
    """Every second layer from the middle of the stack to its end (LACE.md §3, "Placement").

    >>> default_layers(28)
    [14, 16, 18, 20, 22, 24, 26]
    """
    return list(range(num_layers // 2, num_layers, 2))


def takes_packed_rows(backbone: nn.Module) -> bool:
    """Whether the model can run on packed rows (:mod:`lace_lightning.packing`); flash attention makes no masks."""
    return text_config(backbone)._attn_implementation.removeprefix(PREFIX) in ("eager", "sdpa")


def check_layers(layers: list[int], num_layers: int) -> list[int]:
    """Lattice layers, sorted.

    Raises:
        BackboneError: a layer does not exist or is named twice.
    """
    if len(set(layers)) != len(layers) or not all(0 <= layer < num_layers for layer in layers):
        raise BackboneError(f"layers={layers}: name each lattice layer once, between 0 and {num_layers - 1}")
    return sorted(layers)


def geometry_of(backbone: nn.Module, layer_idx: int) -> Geometry:
    """Widths, dtype and device at one decoder layer."""
    config = text_config(backbone)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = next(p for p in decoder_of(backbone).layers[layer_idx].parameters() if p.is_floating_point())
    return Geometry(config.num_attention_heads * head_dim, config.hidden_size, weight.dtype, weight.device)


def connect(backbone: PreTrainedModel) -> None:
    """Let every layer of the model see the ``lattice`` keyword of its forward.

    Raises:
        BackboneError: the model's attention does not go through transformers' attention interface, or some layer is
            of another kind.
    """
    base = causal_lm(backbone)
    decoder = decoder_of(backbone)
    if not getattr(base, "_supports_attention_backend", False):
        raise BackboneError(
            f"the attention of {type(base).__name__} does not go through transformers' attention interface "
            "(_supports_attention_backend is not set): it cannot carry an exchange"
        )
    foreign = set(getattr(text_config(base), "layer_types", None) or []) - SOFTMAX_LAYERS
    if foreign:
        raise BackboneError(
            f"{type(base).__name__} has layers of type {', '.join(sorted(foreign))}: only layers of type "
            f"{' and '.join(sorted(SOFTMAX_LAYERS))} ignore waiting columns, as every layer of a backbone must"
        )
    inner = text_config(base)._attn_implementation or "eager"
    if not inner.startswith(PREFIX):
        if inner not in INNER:
            raise BackboneError(f"attn_implementation={inner!r} cannot be wrapped: load the model with one of {INNER}")
        base.set_attn_implementation(_registered(inner))
    for layer_idx, layer in enumerate(decoder.layers):
        # A backbone may serve several models (isolated and exchanging ones): a second hook would read twice.
        if not any(isinstance(hook, _LayerHook) for hook in layer._forward_hooks.values()):
            layer.register_forward_hook(_LayerHook(layer_idx), with_kwargs=True)


def checkpoint_layers(backbone: PreTrainedModel) -> None:
    """Recompute the decoder layers' activations in the backward pass.

    transformers then makes the embedding's output ask for gradients, which only reentrant checkpoints need: below a
    frozen backbone's first lattice layer they would be computed, and every layer's input kept, for nothing.
    """
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.disable_input_require_grads()


class _LayerHook:
    """A forward hook that lets the exchange of this layer read at the layer's output."""

    def __init__(self, layer_idx: int) -> None:
        self._layer_idx = layer_idx

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        lattice = kwargs.get("lattice")
        here = None if lattice is None else lattice.at("layer", self._layer_idx)
        if here is None:
            return output
        hidden = here.apply(output[0] if isinstance(output, tuple) else output)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _registered(inner: str) -> str:
    """Our name for an implementation; without "flash" in it, which transformers would take for a package to load."""
    return PREFIX + inner.replace(FLASH, "fa")


class _Posing:
    """An attention module whose config names the implementation it runs: FlashAttention is looked up by that name."""

    def __init__(self, module: Any, inner: str) -> None:
        self._module, self.config = module, SimpleNamespace(_attn_implementation=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _threaded_attention(inner: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention implementation ``inner`` followed by the layer's exchange."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        lattice = kwargs.pop("lattice", None)
        # "eager" is no registered name: every modelling file brings its own (Gemma 2 caps its scores there).
        attend = (
            import_module(type(module).__module__).eager_attention_forward
            if inner == "eager"
            else ALL_ATTENTION_FUNCTIONS[inner]
        )
        posing = _Posing(module, inner) if inner.startswith(FLASH) else module
        is_packed = isinstance(lattice, Lattice) and lattice.is_packed  # compiled layers are never given packed rows
        if is_packed:
            query, key, value = (_rows_per_thread(x, lattice) for x in (query, key, value))
        out, weights = attend(posing, query, key, value, attention_mask, **kwargs)  # (rows, columns, heads, head_dim)
        if is_packed:
            out = pack(out.unflatten(0, (-1, lattice.num_threads)), lattice.skip)
        # A vision tower of the same model has no layer index, and no lattice either.
        here = None if lattice is None else lattice.at("attention", module.layer_idx)
        if here is not None:
            own = OwnAttention(query, key, value, kwargs) if here.exchange.reads_keys else None
            out = here.apply(out.flatten(2), own).view_as(out)
        return out, weights

    return attention


def _rows_per_thread(x: Tensor, lattice: Lattice) -> Tensor:
    """Queries, keys or values (B, heads, P + N * L, head_dim) of packed rows as (B * N, heads, P + L, head_dim)."""
    return unpack(x.transpose(1, 2), lattice.num_threads, lattice.skip).flatten(0, 1).transpose(1, 2)


def _threaded_mask(inner: str) -> Callable[..., Any]:
    """The mask function of ``inner`` that measures distances in the thread's own tokens.

    Waiting columns are holes in ``attention_mask``. The backbone must not notice them, so a sliding window spans real
    tokens, not columns. Of packed rows it gets the ``attention_mask`` of a row per thread, and makes the mask of those.
    """

    def mask(
        *args: Any,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None and mask_function is not causal_mask_function:
            positions = token_positions(attention_mask)
            by_column = mask_function

            def mask_function(b: Any, h: Any, q: Any, k: Any) -> Any:
                return by_column(b, h, positions[b, q], positions[b, k])

        if attention_mask is not None and len(attention_mask) != kwargs["batch_size"]:
            kwargs |= _of_rows_per_thread(attention_mask, kwargs)
        make = ALL_MASK_ATTENTION_FUNCTIONS[inner]
        return make(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)

    return mask


def _of_rows_per_thread(attention_mask: Tensor, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that transformers took from packed rows, as they are with a row per thread."""
    rows, columns = attention_mask.shape
    if "q_length" in sizes:
        return {"batch_size": rows, "q_length": columns}
    return {"batch_size": rows, "cache_position": sizes["cache_position"][:columns]}  # the first releases of 5.x


def token_positions(attention_mask: Tensor) -> Tensor:
    """Position of each column (rows, L) among the row's own real tokens; 0 before the first one."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


for _inner in INNER:
    AttentionInterface.register(_registered(_inner), _threaded_attention(_inner))
    AttentionMaskInterface.register(_registered(_inner), _threaded_mask(_inner))

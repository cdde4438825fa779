"""The weights that one decoding step needs: the backbone's own tensors, and the exchange's merged for decoding."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lace_lightning.backbone import causal_lm, decoder_of, text_config
from lace_lightning.exchange import Exchange, LatticeAttention, LatticeAttentionConfig
from lace_lightning.threaded_lm import ThreadedLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers the engine knows: RMSNorm, rotary grouped-query attention, SiLU-gated MLP, nothing else."""
MIN_WIDTH = 16
"""Narrowest heads that kernels take."""


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one decoder layer; linear weights are (out, in). Views, never copies."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class SidePath:
    """LatticeAttention's weights, merged for decoding.

    Queries, keys, values and the gate's part of Z are all linear in the attention's output A_std, so their weights are
    multiplied out: W_in = [W_qkv W_down; W_g,z W_down], (4r, D_a). W_up only meets the layer's output projection, which
    is linear too: W_out = W_o W_up, (D, r).
    """

    def __init__(self, block: LatticeAttention, o: Tensor) -> None:
        self.config: LatticeAttentionConfig = block.config
        assert block.gate is not None  # blocks without one never come here
        self._block, self._gate, self._o = block, block.gate, o
        r = block.config.width
        self.w_in = block.down.weight.new_empty(4 * r, block.down.in_features)
        self.w_out = o.new_empty(o.shape[0], r)
        self.w_gate = block.gate.weight.new_empty(r, r)
        self.b_gate = block.gate.bias.detach()

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge again, into the same tensors: the weights may have been trained."""
        r, block = self.config.width, self._block
        heads = torch.cat([block.qkv.weight, self._gate.weight[:, :r]])
        self.w_in.copy_(_product(heads, block.down.weight))
        self.w_out.copy_(_product(self._o, block.up.weight))
        self.w_gate.copy_(self._gate.weight[:, r:])


class DecoderWeights:
    """All weights of one model; ``refresh`` brings the merged ones up to date.

    Args:
        model: a model that :func:`obstacle` has nothing against.
    """

    def __init__(self, model: ThreadedLM) -> None:
        base, decoder, config = causal_lm(model.backbone), decoder_of(model.backbone), text_config(model.backbone)
        attention = decoder.layers[0].self_attn
        self.num_heads = config.num_attention_heads
        self.num_key_heads = config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.scale = attention.scaling
        self.eps = config.rms_norm_eps
        self.layers = [_layer(layer) for layer in decoder.layers]
        self.embedding = base.get_input_embeddings().weight.detach()
        self.norm = decoder.norm.weight.detach()
        self.head = base.get_output_embeddings().weight.detach()
        self.rotary = decoder.rotary_emb
        self.sides = {
            i: SidePath(block, self.layers[i].o)
            for i, block in model.exchange_at.items()
            if _has_kernels(block) and block.config.gate == "sigmoid"
        }

    def refresh(self) -> None:
        for side in self.sides.values():
            side.refresh()

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """(length, head_dim) float32 cosines and sines of the backbone's own positions."""
        positions = torch.arange(length, device=self.norm.device)[None]
        like = torch.empty(0, device=self.norm.device, dtype=torch.float32)
        cos, sin = self.rotary(like, positions)
        return cos[0].contiguous(), sin[0].contiguous()

    @property
    def num_bytes(self) -> int:
        """Bytes that one decoding step must read: every weight once, of the embedding only the head's use of it."""
        layers = [t for layer in self.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        sides = [t for side in self.sides.values() for t in (side.w_in, side.w_out, side.w_gate)]
        return sum(t.numel() * t.element_size() for t in (*layers, *sides, self.norm, self.head))


def obstacle(model: ThreadedLM, device: str | None = None) -> str | None:
    """Why the engine cannot decode with this model; None if it can.

    Args:
        model: any.
        device: type of device to decode on; None: the model's own.
    """
    base, config = causal_lm(model.backbone), text_config(model.backbone)
    if config.model_type not in FAMILIES:
        return f"it knows models of type {', '.join(FAMILIES)}, not {config.model_type}"
    decoder = decoder_of(model.backbone)
    linears = [
        getattr(part, name)
        for layer in decoder.layers
        for part, names in ((layer.self_attn, "q k v o"), (layer.mlp, "gate up down"))
        for name in (f"{n}_proj" for n in names.split())
    ]
    if any(type(linear) is not nn.Linear for linear in (*linears, base.get_output_embeddings())):
        return "some projections are no plain nn.Linear (adapters? merge them first)"
    if any(layer.self_attn.o_proj.bias is not None or layer.mlp.gate_proj.bias is not None for layer in decoder.layers):
        return "output or MLP projections have biases"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (config.model_type == "mistral" and config.sliding_window):
        return "some layers have a sliding window"
    if config.hidden_act not in ("silu", "swish"):
        return f"the MLP's activation is {config.hidden_act}, not silu"
    if getattr(decoder.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        return f"its rotary positions depend on the length ({decoder.rotary_emb.rope_type})"
    if len({p.dtype for p in model.parameters()}) > 1:
        return "its weights differ in dtype"
    if model.exchange_config.reads_prompt and model.exchanges:
        return "threads exchange on the prompt (reads_prompt)"
    if any(block.reads_keys for block in model.exchange_at.values()):
        return "threads read each other in the backbone's own attention"
    on_cuda = (device or next(model.parameters()).device.type) == "cuda"
    return _kernel_obstacle(model, decoder.layers[0].self_attn.head_dim) if on_cuda else None


def _kernel_obstacle(model: ThreadedLM, head_dim: int) -> str | None:
    """What the kernels for CUDA cannot do, beyond what the step in plain torch cannot."""
    if not _is_installed("triton"):
        return "its kernels need triton, which is not installed"
    if not _is_installed("triton.experimental.gluon"):
        return "its kernels need a triton with Gluon (3.6 or newer)"
    if torch.version.hip or (torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)):
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or more"
    if not _fits_kernels(head_dim):
        return f"the backbone's heads are {head_dim} wide: kernels take powers of two from {MIN_WIDTH} on"
    for block in model.exchange_at.values():
        if not _has_kernels(block):
            return f"its kernels know LatticeAttention, not {type(block).__name__}"
        if block.config.gate == "none":
            return "its kernels need a gate (gate: sigmoid)"
        if not _fits_kernels(block.config.dim):
            return f"the lattice's heads are {block.config.dim} wide: kernels take powers of two from {MIN_WIDTH} on"
    return None


def _has_kernels(block: Exchange) -> TypeGuard[LatticeAttention]:
    """Whether a block is lattice attention itself: variants of it read otherwise."""
    return type(block) is LatticeAttention


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package lacks
        return False


def _fits_kernels(width: int) -> bool:
    return width >= MIN_WIDTH and width & (width - 1) == 0


def _layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp

    def weight(module: Any) -> Tensor:
        return module.weight.detach()

    q, k, v = (p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    has_norms = hasattr(attention, "q_norm")
    return LayerWeights(
        input_norm=weight(layer.input_layernorm),
        q=weight(attention.q_proj),
        k=weight(attention.k_proj),
        v=weight(attention.v_proj),
        biases=None if q is None else (q.detach(), k.detach(), v.detach()),
        q_norm=weight(attention.q_norm) if has_norms else None,
        k_norm=weight(attention.k_norm) if has_norms else None,
        o=weight(attention.o_proj),
        mlp_norm=weight(layer.post_attention_layernorm),
        gate=weight(mlp.gate_proj),
        up=weight(mlp.up_proj),
        down=weight(mlp.down_proj),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and rounded once."""
    return a.float() @ b.float() if a.dtype != torch.float64 else a @ b

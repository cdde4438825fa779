"""The fewest bytes and operations that a step can take: what the measured time is compared with.

Symbols: B groups, N threads, P prompt columns, t lattice time, r lattice width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lace_lightning.backbone import decoder_of, geometry_of, text_config
from lace_lightning.exchange import LatticeAttentionConfig
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decoding step must read.

    Args:
        weights: every weight once; of an input embedding that is not also the head only a few rows, counted as none.
        keys_values: keys and values of the prompt once per group, of the threads' own columns once per thread.
        lattice: lattice keys and values, once per group.
    """

    weights: int
    keys_values: int
    lattice: int

    @property
    def total(self) -> int:
        return self.weights + self.keys_values + self.lattice

    def record(self, bytes_per_second: float) -> dict[str, Any]:
        """The bytes, and the milliseconds that reading them takes at the measured bandwidth."""
        return {f"{name}_bytes": count for name, count in asdict(self).items()} | {
            "ms": 1e3 * self.total / bytes_per_second
        }


def step_bytes(model: ThreadedLM, groups: int, num_threads: int, prompt: int, time: float) -> StepBytes:
    """What one step reads when every thread has ``time`` columns of its own behind the prompt."""
    return StepBytes(
        weights=multiplied_parameters(model) * _element_size(model),
        keys_values=round(groups * (prompt + num_threads * time) * kv_bytes_per_token(model)),
        lattice=round(groups * num_threads * _columns_read(model, time) * lattice_bytes_per_token(model)),
    )


def multiplied_parameters(model: ThreadedLM) -> int:
    """Parameters that each token meets: all, less an input embedding that is looked up and is not also the head."""
    counts = model.parameter_counts()
    embedding, head = (get() for get in (model.backbone.get_input_embeddings, model.backbone.get_output_embeddings))
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    looked_up = 0 if embedding.weight is head.weight else embedding.weight.numel()
    return counts["backbone"] + counts["exchange"] - looked_up


def kv_bytes_per_token(model: ThreadedLM) -> int:
    """Keys and values that all layers of the backbone keep of one token."""
    config = text_config(model.backbone)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * len(decoder_of(model.backbone).layers) * config.num_key_value_heads * head_dim * _element_size(model)


def lattice_bytes_per_token(model: ThreadedLM) -> int:
    """Lattice keys and values that all lattice layers keep of one token; 0 where nothing is cached."""
    config = model.exchange_config
    if not isinstance(config, LatticeAttentionConfig) or config.scope == "aligned":
        return 0
    return 2 * config.width * len(model.exchanges) * _element_size(model)


def kv_record(model: ThreadedLM, groups: int, num_threads: int, prompt: int, columns: int) -> dict[str, int]:
    """Bytes of keys and values that decoding must keep, and what copies of the prompt for every thread would add."""
    per_token = kv_bytes_per_token(model)
    return {
        "prompt_once_bytes": groups * prompt * per_token,
        "prompt_per_thread_bytes": groups * num_threads * prompt * per_token,
        "own_bytes": groups * num_threads * columns * per_token,
        "lattice_bytes": groups * num_threads * columns * lattice_bytes_per_token(model),
    }


def training_flops(model: ThreadedLM, groups: int, num_threads: int, length: int) -> int:
    """Operations of one training step, forward (1) and backward (2); recomputed activations do not count.

    6 · parameters · tokens for the matrices, and of attention 12 · width for each pair (query, key) that the mask
    lets through: L(L + 1)/2 pairs per thread and layer in the backbone, in each lattice layer those of its scope.
    """
    width = geometry_of(model.backbone, 0).attention_width
    backbone = len(decoder_of(model.backbone).layers) * num_threads * _pairs(length) * width
    config = model.exchange_config
    lattice = 0
    if isinstance(config, LatticeAttentionConfig):
        lattice = len(model.exchanges) * _lattice_pairs(config, num_threads, length) * config.width
    tokens = groups * num_threads * length
    return 6 * multiplied_parameters(model) * tokens + 12 * groups * (backbone + lattice)


def _pairs(length: int) -> int:
    return length * (length + 1) // 2


def _lattice_pairs(config: LatticeAttentionConfig, num_threads: int, length: int) -> int:
    """Pairs (query, key) of one group in one lattice layer; ``own`` is left aside."""
    if config.scope == "aligned":
        return num_threads**2 * length
    reach = min(config.window or length, length)
    return num_threads**2 * (_pairs(length) - _pairs(length - reach))


def _columns_read(model: ThreadedLM, time: float) -> float:
    config = model.exchange_config
    window = config.window if isinstance(config, LatticeAttentionConfig) else None
    return time if window is None else min(time, window)


def _element_size(model: ThreadedLM) -> int:
    return next(model.backbone.parameters()).element_size()


def matrix_share(flops: int, milliseconds: float, flops_per_second: float) -> float:
    """Share of the measured matrix rate that a step of so many operations reached."""
    return flops / (1e-3 * milliseconds) / flops_per_second

"""Models of the benchmark: named shapes with random weights, made where they will run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lace_lightning.exchange import ExchangeConfig
from lace_lightning.threaded_lm import ThreadedLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3
    | {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "qwen3-1.7b": _QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-4b": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""Settings by name. ``tiny`` is no model of anything: it lets tests run every command on a CPU."""


def load_config(shape: str) -> PreTrainedConfig:
    """Settings of a named shape, or those in a config.json or in the folder that holds one.

    Raises:
        ValueError: neither a name nor a file.
    """
    from transformers import AutoConfig

    if shape in SHAPES:
        settings = dict(SHAPES[shape])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    elif Path(shape).exists():
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False)
    else:
        raise ValueError(f"--shape {shape} is neither a config.json (or its folder) nor one of {', '.join(SHAPES)}")
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None  # nothing ends a measured thread
    return config


def build_backbone(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A Hugging Face model with random weights, made on the device: no copy of it ever stands on the host."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    own = copy.deepcopy(config)  # a model notes its attention there: peers must not find the exchange's
    with torch.device(device):
        return AutoModelForCausalLM.from_config(own, dtype=dtype).eval()


def add_exchange(
    backbone: PreTrainedModel, exchange: ExchangeConfig, num_threads: int, layers: list[int] | None, seed: int
) -> ThreadedLM:
    """Threads on a backbone, which several models may share.

    A fresh exchange adds exactly nothing and no step could tell that it is there: W_up gets random weights.
    """
    torch.manual_seed(seed)
    model = ThreadedLM(backbone, exchange, num_threads, layers).eval()
    for block in model.exchanges.values():
        up = block.get_submodule("up")
        assert isinstance(up, nn.Linear)
        nn.init.normal_(up.weight, std=0.02)
    return model

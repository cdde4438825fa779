"""What YAML says about a model, and the model made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from lace_lightning.backbone import checkpoint_layers
from lace_lightning.compiled_layers import compile_layers
from lace_lightning.exchange import ExchangeConfig, Isolated
from lace_lightning.threaded_lm import ThreadedLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSpec:
    """A backbone with an exchange.

    Args:
        backbone: hub name or folder of a Hugging Face model whose weights are loaded.
        architecture: instead of ``backbone``: settings of a model with random weights, ``model_type`` among them. The
            vocabulary size is the tokenizer's unless it is given.
        exchange: the exchange; ``lace_lightning.exchange.Isolated`` for none.
        num_threads: N.
        layers: lattice layers; null: every second layer from the middle of the stack on.
        dtype: of weights: ``float32`` or ``bfloat16``.
        attn_implementation: attention of the backbone itself; null: transformers' choice.
        gradient_checkpointing: recompute activations in the backward pass: a third more work for a fraction of the
            memory.
        compile: compile the decoder layers for training; the first steps then take a minute longer.
        lora: arguments of ``peft.LoraConfig`` for the backbone; null: no LoRA.

    Raises:
        ValueError: not exactly one of ``backbone`` and ``architecture`` is given.
    """

    backbone: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    exchange: ExchangeConfig = field(default_factory=Isolated)
    num_threads: int = 4
    layers: list[int] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.backbone is None) == (not self.architecture):
            raise ValueError(
                f"model.spec: give either backbone ({self.backbone!r}: a model to load) or architecture "
                f"({self.architecture!r}: settings of a model with random weights, with model_type)"
            )
        if self.architecture and "model_type" not in self.architecture:
            raise ValueError("model.spec.architecture needs model_type, for example qwen3")

    def build(self, tokenizer: PreTrainedTokenizerBase) -> ThreadedLM:
        """The model, on the CPU.

        Raises:
            ValueError: the tokenizer has more tokens than the model embeds.
        """
        backbone = self._backbone(tokenizer)
        embedded = cast(nn.Embedding, backbone.get_input_embeddings()).num_embeddings
        if len(tokenizer) > embedded:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the backbone embeds {embedded}: "
                "data.tokenizer and model.spec do not belong together"
            )
        if self.gradient_checkpointing:
            checkpoint_layers(backbone)
        model = self._with_threads(backbone, tokenizer)
        if self.compile:
            compile_layers(model.backbone)
        return model

    def outline(self, tokenizer: PreTrainedTokenizerBase) -> ThreadedLM:
        """The model on the meta device: all its shapes and none of its weights; of a backbone only the config is read.

        Raises:
            OSError: the backbone's config cannot be read.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = self._config(tokenizer) if self.backbone is None else AutoConfig.from_pretrained(self.backbone)
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
            return self._with_threads(backbone, tokenizer)

    def _with_threads(self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ThreadedLM:
        if self.lora is not None:
            from peft import LoraConfig, get_peft_model

            backbone = get_peft_model(backbone, LoraConfig(task_type="CAUSAL_LM", **self.lora))  # type: ignore[assignment]
        return ThreadedLM(backbone, self.exchange, self.num_threads, self.layers, tokenizer)

    def _backbone(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.backbone is not None:
            return AutoModelForCausalLM.from_pretrained(self.backbone, trust_remote_code=False, **options)
        return AutoModelForCausalLM.from_config(self._config(tokenizer), **options)

    def _config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """Settings of the model with random weights."""
        from transformers import AutoConfig

        settings = {"vocab_size": len(tokenizer)} | self.architecture
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return AutoConfig.for_model(settings.pop("model_type"), **(special | settings))

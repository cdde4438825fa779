"""The stages that learn from traces: pre-training of a backbone, continued pre-training, supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lace_lightning.embedding import Embedder
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules.base import DecodingSpec, ThreadedModule
from lace_lightning.modules.optimizer import OptimizerSpec
from lace_lightning.threaded_lm import ThreadedLM, num_predictable
from lace_lightning.traces.batch import TraceBatch


class TraceStage(ThreadedModule):
    """Minimises the mean negative log-likelihood of a stage's target tokens; logs it as ``train/loss``.

    The mean is over the tokens of the batch of all processes, however they are spread.
    """

    def targets(self, batch: TraceBatch) -> Tensor:
        """(B, N, L) bool, the tokens that are learned; forced ones never are."""
        return batch.unforced

    def training_step(self, batch: TraceBatch, batch_idx: int) -> Tensor:
        assert self.model is not None
        targets = self.targets(batch)
        count = self.add_up(num_predictable(batch.attention_mask, targets))
        part = self.model.mean_nll(batch.input_ids, batch.attention_mask, targets, batch.prompt_length, count)
        loss = self.add_up(part)
        self.check_finite(loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.input_ids))
        return part * self.trainer.world_size  # gradients are averaged over the processes


class BackbonePretraining(TraceStage):
    """Plain language modelling of a small backbone on traces, all parameters, for demos and tests.

    Use it with ``exchange: Isolated`` and single threads to get a backbone that knows the language of a puzzle.
    """

    stage = "BackbonePretraining"


class ContinuedPretraining(TraceStage):
    """Continued pre-training (LACE.md §6.1): all tokens of traces; only the exchange learns, the backbone is frozen."""

    stage = "ContinuedPretraining"

    def trainable(self, model: ThreadedLM) -> Iterator[nn.Parameter]:
        return model.exchanges.parameters()


class SupervisedFinetuning(TraceStage):
    """Supervised fine-tuning (LACE.md §6.2): loss on the threads' own tokens.

    Args:
        spec, optimizer, validation, init_from, embedder: see :class:`~lace_lightning.modules.base.ThreadedModule`.
        learn: ``all`` parameters, only the ``exchange``, or ``lora``: exchange and LoRA weights of ``spec.lora``.

    Raises:
        ValueError: ``learn: lora`` without ``spec.lora``.
    """

    stage = "SupervisedFinetuning"

    def __init__(
        self,
        spec: ModelSpec,
        optimizer: OptimizerSpec | None = None,
        validation: DecodingSpec | None = None,
        init_from: Sequence[str] = (),
        embedder: Embedder | None = None,
        learn: Literal["all", "exchange", "lora"] = "all",
    ) -> None:
        super().__init__(spec, optimizer, validation, init_from, embedder)
        if learn == "lora" and spec.lora is None:
            raise ValueError("model.learn=lora needs model.spec.lora, for example {r: 16, target_modules: all-linear}")
        self.learn = learn

    def trainable(self, model: ThreadedLM) -> Iterator[nn.Parameter]:
        for name, parameter in model.named_parameters():
            if self.learn == "all" or name.startswith("exchanges.") or (self.learn == "lora" and "lora_" in name):
                yield parameter

    def targets(self, batch: TraceBatch) -> Tensor:
        return batch.written

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"learn": self.learn}

"""What the stages share: the model, its weights' origin, sampling groups, and one validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lace_lightning.checkpoints import (
    FROZEN,
    TRAINED,
    CheckpointError,
    check_fit,
    check_frozen,
    initialise,
    sample_frozen,
    weights_of,
)
from lace_lightning.datamodules.base import GroupData
from lace_lightning.decoding import DecodingSpec, group_seed
from lace_lightning.embedding import Embedder, NgramEmbedder
from lace_lightning.metrics import GroupMetrics, TagConfusion
from lace_lightning.metrics.names import TAG_METRICS
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules.optimizer import OptimizerSpec
from lace_lightning.modules.sampled_groups import SampledGroups
from lace_lightning.modules.stage_settings import SETTINGS, check_settings, settings_text
from lace_lightning.sharding import shard, whole
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem

SEED = "lace_seed"
"""Key of a checkpoint: the seed of what is random inside the model."""


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite."""


class ThreadedModule(LightningModule):
    """Base of the stages; a subclass says what learns (:meth:`trainable`) and from what (``training_step``).

    The model is built when the trainer has its DataModule, whose tokenizer it needs.

    Args:
        spec: backbone and exchange.
        optimizer: AdamW's settings.
        validation: how groups are sampled in validation, test and prediction.
        init_from: checkpoints of earlier stages whose weights this run starts from, in order, later ones winning. Not
            to be confused with ``--ckpt_path``, which resumes a run.
        embedder: embeds thoughts for ``expl``.

    Attributes:
        is_sampling: groups are being decoded and judged, which changes nothing that a checkpoint holds.
    """

    stage: ClassVar[str]

    def __init__(
        self,
        spec: ModelSpec,
        optimizer: OptimizerSpec | None = None,
        validation: DecodingSpec | None = None,
        init_from: Sequence[str] = (),
        embedder: Embedder | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.optimizer_spec = optimizer or OptimizerSpec()
        self.validation = validation or DecodingSpec()
        self.init_from = list(init_from)
        self.strict_loading = False  # on_load_checkpoint knows better what must be there
        self.model: ThreadedLM | None = None
        self.has_health_monitor = False  # a callback that decides what a bad loss does
        self._seed = torch.initial_seed()
        self._whole = ExitStack()  # weights that are whole until an evaluation ends
        self.is_sampling = False
        embedder = embedder or NgramEmbedder()
        self.group_metrics = nn.ModuleDict({name: GroupMetrics(embedder) for name in ("val", "test")})
        self.tag_metrics = nn.ModuleDict({name: TagConfusion() for name in ("val", "test")})

    # ---------------------------------------------------------------- the model and its weights

    @property
    def data(self) -> GroupData:
        """The DataModule of this run."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, GroupData):
            raise TypeError(f"{self.stage} needs a DataModule of lace_lightning.datamodules, not {type(data).__name__}")
        return data

    def setup(self, stage: str) -> None:
        if self.data.num_threads != self.spec.num_threads:
            raise ValueError(
                f"data.num_threads={self.data.num_threads} and model.spec.num_threads={self.spec.num_threads} differ: "
                "give both the same N"
            )

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.spec.build(self.data.tokenizer)
        initialise(self, self.init_from)
        learning = {id(p) for p in self.trainable(self.model)}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        if not learning and self.trainer.training:
            raise ValueError(f"{self.stage} has nothing to train: exchange {self.spec.exchange} has no parameters")
        self._announce(self.model)
        self.shard(self.model)

    def shard(self, model: ThreadedLM) -> None:
        """Divide the weights among the processes if the trainer's strategy wants that (``FullySharded``)."""
        if self.device_mesh is not None:
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            shard(model, self.device_mesh["data_parallel"], dtype)

    def trainable(self, model: ThreadedLM) -> Iterator[nn.Parameter]:
        """The parameters that learn in this stage."""
        return model.parameters()

    def _announce(self, model: ThreadedLM) -> None:
        counts = model.parameter_counts()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rank_zero_info(
            f"{self.stage}: backbone {counts['backbone']:,} parameters, exchange {counts['exchange']:,} "
            f"({counts['exchange'] / counts['backbone']:.2%} extra) on layers {model.layers}; {trained:,} learn"
        )

    def on_fit_start(self) -> None:
        assert self.model is not None
        if self.logger is not None:
            counts = {f"parameters/{name}": count for name, count in self.model.parameter_counts().items()}
            self.logger.log_hyperparams(counts)

    def trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def settings(self) -> dict[str, Any]:
        """Options under ``model`` that shape the numbers of training: what a resumed run must agree on."""
        return {"stage": self.stage, "spec": self.spec, "optimizer": self.optimizer_spec}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint[TRAINED] = sorted(trained)
        checkpoint[FROZEN] = sample_frozen(self)
        checkpoint[SETTINGS] = settings_text(self.settings())
        checkpoint[SEED] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not belong here, before anything is changed.

        Raises:
            CheckpointError: the checkpoint is foreign, lacks something that this stage trains, rests on other frozen
                weights or, if a run is to be resumed, was written under other settings.
        """
        path, own = self.trainer.ckpt_path or "", self.state_dict()
        weights = weights_of(checkpoint, path)
        if self.trainer.training:
            check_settings(checkpoint[SETTINGS], self.settings(), path)
            self._seed = checkpoint[SEED]
        check_fit(weights, own, path)
        if missing := sorted(self.trained_names() - set(weights)):
            raise CheckpointError(f"checkpoint {path} lacks {len(missing)} trained tensors, {missing[0]} among them")
        check_frozen(checkpoint, own | weights, path)

    # ---------------------------------------------------------------- optimisation

    def on_train_start(self) -> None:
        """Give the data loader the place to resume at.

        With ``max_epochs`` set, the number of steps is found out by making the loader before the checkpoint is
        restored. Lightning 2.6 then forgets to hand over the loader's state, and the epoch would begin anew.
        """
        self.trainer.fit_loop._load_combined_loader_states()  # once: it does nothing if that has been done

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by its place in the run: a resumed run draws what it would have."""
        place = (self.trainer.current_epoch, batch_idx, self.trainer.global_rank)
        seed = group_seed("dropout", self._seed, *place)
        # torch.manual_seed would note down, with a traceback, to seed each kind of device that has not started yet.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes, without gradients; every process must call it."""
        return cast(Tensor, self.trainer.strategy.reduce(values.detach().clone(), reduce_op="sum"))

    @property
    def num_optimizer_steps(self) -> float:
        """Optimizer steps in the whole run; infinite if nothing limits it."""
        return self.trainer.estimated_stepping_batches

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer_spec.build(self.parameters(), self.num_optimizer_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_finite(self, loss: Tensor) -> None:
        """Raise before a bad loss reaches the weights, unless a HealthMonitor looks after that."""
        if not self.has_health_monitor and not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"{self.stage}: the loss is {loss.item()} at step {self.global_step}. Look at the last batch; lower "
                "model.optimizer.lr, raise its warmup_steps, or set trainer.gradient_clip_val"
            )

    # ---------------------------------------------------------------- sampling and validation

    def sample(self, problems: Sequence[Problem], spec: DecodingSpec, seeds: Sequence[int]) -> SampledGroups:
        """Decode one group per problem and judge its threads; the model's mode is kept."""
        assert self.model is not None
        self.is_sampling = True
        try:
            return SampledGroups.of(self.model, self.data, problems, spec, seeds)
        finally:
            self.is_sampling = False

    def validation_step(self, batch: list[Problem], batch_idx: int) -> dict[str, SampledGroups]:
        return {"sampled": self._evaluate("val", batch)}

    def test_step(self, batch: list[Problem], batch_idx: int) -> dict[str, SampledGroups]:
        return {"sampled": self._evaluate("test", batch)}

    def predict_step(self, batch: list[Problem], batch_idx: int) -> SampledGroups:
        return self.sample(batch, self.validation, self._validation_seeds(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, name: str, batch: list[Problem]) -> SampledGroups:
        sampled = self.sample(batch, self.validation, self._validation_seeds(batch))
        for metric in self.evaluation_metrics(name):
            metric.update(sampled.groups, sampled.verdicts)
        return sampled

    def _validation_seeds(self, batch: Sequence[Problem]) -> list[int]:
        return [group_seed("validation", self.validation.seed, problem.id) for problem in batch]

    def _log_evaluation(self, name: str) -> None:
        """Log the means; callbacks may still read the metrics' states, which the next epoch's start clears."""
        self._whole.close()
        group_metrics, tag_metrics = self.evaluation_metrics(name)
        metrics = group_metrics.compute()
        self.log_dict({f"{name}/{metric}": value for metric, value in metrics.items()}, prog_bar=False)
        family = "tags" if name == "val" else f"{name}/tags"
        adherence = tag_metrics.compute()
        self.log_dict({f"{family}/{metric}": adherence[metric] for metric in TAG_METRICS})

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        self._gather_weights()

    def on_predict_epoch_end(self) -> None:
        self._whole.close()

    def _begin_evaluation(self, name: str) -> None:
        for metric in self.evaluation_metrics(name):
            metric.reset()
        self._gather_weights()

    def _gather_weights(self) -> None:
        """Make the weights whole for an epoch of sampling, of which processes may have unequal numbers of batches."""
        assert self.model is not None
        self._whole.enter_context(whole(self.model))

    def evaluation_metrics(self, name: str) -> tuple[GroupMetrics, TagConfusion]:
        """The metrics of ``val`` or ``test``, holding what the last epoch saw."""
        return cast(GroupMetrics, self.group_metrics[name]), cast(TagConfusion, self.tag_metrics[name])

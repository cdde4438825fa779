"""Watching the lattice layers: gates and where attention goes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lace_lightning.callbacks.reporting import current_step, mlflow_loggers, sampled_in, threaded
from lace_lightning.decoding import Rollout
from lace_lightning.decoding.segments import Segmenter
from lace_lightning.figures import gate_figure, thread_figure
from lace_lightning.metrics import ReadingMetrics
from lace_lightning.modules import ThreadedModule

_MAX_PAIRS = 2**24
"""Most pairs of lattice positions whose attention weights are held at once, per head."""


class GateMonitor(Callback):
    """Reads the groups of the first validation batches again and logs what the lattice layers did.

    Scalars ``gate/layer_<i>``, ``gate/<segment>``, ``cross_ratio/layer_<i>`` and ``cross_ratio/mean``; pictures
    ``gate/map`` and ``cross_ratio/threads``. Where no exchange can be read it says so once and does nothing.

    Args:
        num_batches: validation batches to read, on each process.

    Raises:
        ValueError: ``num_batches`` is below 1.
    """

    def __init__(self, num_batches: int = 1) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches} must be at least 1: leave GateMonitor out to read nothing")
        self.num_batches = num_batches
        self._metrics: ReadingMetrics | None = None
        self._has_explained = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._metrics = None
        if trainer.sanity_checking:
            return
        module = threaded(pl_module)
        assert module.model is not None
        spec, layers = module.validation, sorted(module.model.exchange_at)
        if not layers:
            return self._explain("the threads are isolated")
        num_threads = spec.num_threads or module.spec.num_threads
        self._metrics = ReadingMetrics(layers, num_threads, spec.max_new_tokens).to(module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read the batch's groups if it is one of the first."""
        sampled = sampled_in(outputs)
        if self._metrics is not None and sampled is not None and batch_idx < self.num_batches:
            self._read(self._metrics, threaded(pl_module), sampled.rollout)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        if self._metrics is None:
            return
        scalars, maps = self._metrics.compute(), self._metrics.maps()
        known = {name: value for name, value in scalars.items() if not value.isnan()}
        pl_module.log_dict(known)
        if known:
            for logger in mlflow_loggers(trainer):
                step = current_step(trainer)
                logger.log_image("gate/map", gate_figure(maps, self._metrics.layers, self._metrics.bin_width), step)
                logger.log_image("cross_ratio/threads", thread_figure(maps.thread_share), step)

    def _read(self, metrics: ReadingMetrics, module: ThreadedModule, rollout: Rollout) -> None:
        assert module.model is not None
        segments = Segmenter(module.data.task.template, module.data.tokenizer).rollout(rollout)
        _, num_threads, columns = segments.shape
        size = max(1, _MAX_PAIRS // (num_threads * columns) ** 2)
        parts = (rollout.input_ids, rollout.attention_mask, segments[..., rollout.prompt_length :])
        for ids, mask, after_prompt in zip(*(part.split(size) for part in parts), strict=True):
            readings = module.model.read(ids, mask, rollout.prompt_length)
            if not readings:  # so it is on every rank
                self._metrics = None
                return self._explain(f"{type(module.model.exchange_config).__name__} records none")
            metrics.update(readings, after_prompt)

    def _explain(self, reason: str) -> None:
        if not self._has_explained:
            rank_zero_info(f"GateMonitor: no gates to watch, {reason}")
            self._has_explained = True

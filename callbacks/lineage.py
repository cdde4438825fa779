"""What a run is and where it comes from, for its page in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lace_lightning.callbacks.reporting import current_step, mlflow_loggers
from lace_lightning.checkpoints import RUN, writer_of
from lace_lightning.datamodules.base import GroupData
from lace_lightning.modules import ThreadedModule
from lace_lightning.tracking.run_folder import run_folder

_DOES: dict[TrainerFn | None, str] = {
    TrainerFn.FITTING: "Training",
    TrainerFn.VALIDATING: "Validation",
    TrainerFn.TESTING: "Test",
    TrainerFn.PREDICTING: "Prediction",
}


class Lineage(Callback):
    """Describes the run in words, links it to the runs whose weights it uses, and its last checkpoint to its metrics.

    Checkpoints carry the id of the run that wrote them, so the chain of stages needs no bookkeeping.

    Args:
        command: repeats the run.
    """

    def __init__(self, command: str = "") -> None:
        self.command = command
        self._began = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run."""
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run."""
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run."""
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run."""
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run."""
        self._begin(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sign it."""
        for logger in mlflow_loggers(trainer):
            checkpoint[RUN] = logger.run_id

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Link the checkpoint of an interrupted or failed run."""
        self._link(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Link the checkpoint."""
        self._link(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._began or not isinstance(pl_module, ThreadedModule):
            return
        self._began = True
        loggers = mlflow_loggers(trainer)
        if not loggers:
            return
        is_fit = trainer.state.fn == TrainerFn.FITTING
        used = [writer_of(path) for path in [*pl_module.init_from, trainer.ckpt_path] if path is not None]
        runs = [run for run in used if run is not None]
        for logger in loggers:
            logger.log_tag("lace.stage", pl_module.stage if is_fit else _DOES[trainer.state.fn].lower())
            logger.use_weights(runs, evaluates=not is_fit)
            logger.describe(_what(trainer, pl_module), self.command, runs[-1] if runs else None)
            if (card := _card(pl_module.data)) is not None:
                logger.log_text(card.read_text(), f"data/{card.name}")

    def _link(self, trainer: Trainer) -> None:
        if not self._began or trainer.state.fn != TrainerFn.FITTING:
            return
        self._began = False
        for logger in mlflow_loggers(trainer):
            if (path := last_checkpoint(trainer)) is not None:
                config = Path(logger.log_dir, "config.yaml").absolute()
                places = {"checkpoint": str(path.absolute()), "config": str(config)}
                logger.log_weights(current_step(trainer), places | _data_of(trainer, str(logger.run_id)))


def _what(trainer: Trainer, module: ThreadedModule) -> str:
    assert module.model is not None
    task, exchange = type(module.data.task).__name__, module.model.exchange_config
    how = type(exchange).__name__.removesuffix("Config")
    scope = f" ({exchange.scope})" if hasattr(exchange, "scope") else ""
    steps = f", {trainer.max_steps:,} steps" if trainer.state.fn == TrainerFn.FITTING and trainer.max_steps > 0 else ""
    return (
        f"**{_DOES[trainer.state.fn]}**, {module.stage} on {task}: N = {module.spec.num_threads} threads, exchange "
        f"{how}{scope} on layers {', '.join(map(str, sorted(module.model.exchange_at))) or 'none'}{steps}."
    )


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of this run. No collective: after an error the other ranks may be elsewhere."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
    written = [Path(path) for c in callbacks for path in (c.last_model_path, c.best_model_path) if path]
    folders = [Path(c.dirpath) for c in callbacks if c.dirpath] or [run_folder(trainer) / "checkpoints"]
    there = [path for path in [*written, *(folder / "interrupted.ckpt" for folder in folders)] if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime) if there else None


def _data_of(trainer: Trainer, run_id: str) -> dict[str, str]:
    """What the run learned from: its task, its files, and the artifact with their data card."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, GroupData):
        return {}
    files = {name: getattr(data, name, None) for name in ("traces", "problems")}
    named = {f"data.{name}": str(file) for name, file in files.items() if file is not None}
    card = _card(data)
    shown = {} if card is None else {"data.card": f"runs:/{run_id}/data/{card.name}"}
    return {"data.task": type(data.task).__name__, **named, **shown}


def _card(data: GroupData) -> Path | None:
    """The data card beside the traces, as `lace synth` writes it; a puzzle makes its own data."""
    traces = getattr(data, "traces", None)
    card = None if traces is None else Path(traces).parent / "card.md"
    return card if card is not None and card.is_file() else None

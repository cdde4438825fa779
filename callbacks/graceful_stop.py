"""Ctrl-C, SIGTERM and SIGUSR1: save a checkpoint at the next clean state, end the run as killed; requeue SLURM's."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lace_lightning.checkpoint_io import finish_checkpoints
from lace_lightning.signals import STOPPING, Interrupted
from lace_lightning.tracking.run_folder import checkpoint_folder


class GracefulStop(Callback):
    """The first SIGINT, SIGTERM or SIGUSR1 lets the batch finish, saves ``interrupted.ckpt`` and exits; a second exits
    at once.

    The checkpoint lies in the run's checkpoint folder and is what ``--ckpt_path`` resumes from. It has the state at the
    end of the last training batch; a validation that was interrupted runs again, whole, when the run is resumed. In the
    sanity check, ``validate``, ``test`` and ``predict`` there is nothing to save. With several processes it is enough
    that one of them gets the signal.

    A single process that is decoding groups does not finish them: they may take minutes, and a resumed run decodes the
    same again. Before the first batch, and outside of the main thread, signals do what they did before: see
    :func:`~lace_lightning.signals.stopping_anywhere`.

    In a SLURM job, the signal of ``--signal`` (SIGUSR1, or ``requeue_signal`` of Lightning's SLURMEnvironment) does the
    same and then, if there is a checkpoint to resume from, puts the job back into the queue; Lightning's own handler
    would save in the middle of a batch. ``SLURMEnvironment(auto_requeue=False)`` turns it off.

    Raises:
        Interrupted: out of ``Trainer.fit`` and its siblings, after Lightning has cleaned up and loggers were finalised.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._saved: Path | None = None
        self._requeued = False
        self._previous: dict[int, Any] = {}
        self._module: LightningModule | None = None
        self._place: dict[str, Any] | None = None  # what the last batch would have saved of the loops
        self._is_rewinding = False
        self._shared_batches = 0.0  # evaluation batches that every process has

    # Lightning sets its own SIGTERM handler after `setup` and `on_fit_start`, and raises from it without a checkpoint:
    # these are the first hooks after that.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; save anew if the last batch was interrupted, lest its validation be skipped."""
        self._install(pl_module)
        if self._saved is not None:
            self._save(trainer, in_validation=True)
            self._exit(trainer)
        self._count_batches(trainer, trainer._evaluation_loop.max_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install(pl_module)
        self._count_batches(trainer, trainer._evaluation_loop.max_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install(pl_module)
        self._count_batches(trainer, trainer.predict_loop.max_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save if a signal came. The process ends at the next hook, when the batch's metrics have been logged."""
        if not pl_module.automatic_optimization:  # only such a stage decodes groups in training
            self._place = {"epoch": trainer.current_epoch, "fit_loop": trainer.fit_loop.state_dict()}
        if self._is_stopping(trainer):
            self._save(trainer, in_validation=False)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End if the last batch was interrupted."""
        if self._saved is not None:
            self._exit(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End if the epoch's last batch was interrupted."""
        if self._saved is not None:
            self._exit(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Save if this validation is part of a fit, and end."""
        if batch_idx < self._shared_batches and self._is_stopping(trainer):
            if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
                self._save(trainer, in_validation=True)
            self._exit(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the books of a validation that ran again, before other callbacks save them."""
        if trainer.state.fn == TrainerFn.FITTING:
            total = _validation_progress(trainer).total
            total.processed = total.completed = total.ready

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """End."""
        if batch_idx < self._shared_batches and self._is_stopping(trainer):
            self._exit(trainer)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """End."""
        if batch_idx < self._shared_batches and self._is_stopping(trainer):
            self._exit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal that came after the last batch still ends the process."""
        if self._is_stopping(trainer):
            self._save(trainer, in_validation=False)
            self._exit(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what an interrupted rollout or validation has not touched; give the signals back."""
        try:
            if isinstance(exception, Interrupted) and self._module is not None:
                self._end(trainer)
        finally:
            self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where a batch was given up, say that it has not begun."""
        if self._is_rewinding and self._place is not None:
            checkpoint["epoch"] = self._place["epoch"]
            checkpoint["loops"]["fit_loop"] = self._place["fit_loop"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _end(self, trainer: Trainer) -> None:
        """Save if nothing is saved yet, and say how to go on."""
        if self._saved is None and trainer.state.fn == TrainerFn.FITTING:
            self._save_last_state(trainer)
            self._requeue(trainer)
        path = self._saved
        _say(f"Stopped: saved {path}. Resume with: --ckpt_path {path}" if path else "Stopped: nothing to save.")

    def _install(self, module: LightningModule) -> None:
        self._module = module
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*STOPPING, _requeue_signal(module.trainer)):
            if number is not None and signal.getsignal(number) != self._handle:
                self._previous[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # at a normal end Lightning has restored everything already
                # SLURM sends SIGTERM to the job that it has requeued: nothing is left to do but to end in good order.
                # A handler is None if it was not set from Python.
                signal.signal(number, signal.SIG_IGN if self._requeued else handler or signal.SIG_DFL)
        self._previous.clear()
        self._signal = self._saved = self._module = self._place = None
        self._is_rewinding = self._requeued = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requeued:
            return
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        if self._is_alone_and_sampling():
            os.write(2, b"\nStopping with a checkpoint; once more to stop at once and lose it.\n")
            raise Interrupted(128 + number)
        # Not print: the signal may have interrupted a print.
        os.write(2, b"\nStopping after this batch with a checkpoint; once more to stop at once and lose it.\n")

    def _is_alone_and_sampling(self) -> bool:
        """Whether the batch can be given up: nothing has been learned from it, and no other process waits for it."""
        module = self._module
        return module is not None and module.trainer.world_size == 1 and getattr(module, "is_sampling", False)

    def _is_stopping(self, trainer: Trainer) -> bool:
        """Whether any process got a signal; a collective, so that all of them stop at the same batch."""
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _count_batches(self, trainer: Trainer, own: Sequence[float]) -> None:
        """Note how often all processes can be asked: some have a batch more, and nobody would answer them after it."""
        num_batches = torch.tensor(float(min(own)), device=trainer.strategy.root_device)
        self._shared_batches = float(trainer.strategy.reduce(num_batches, reduce_op="min"))  # type: ignore[arg-type]

    def _save(self, trainer: Trainer, in_validation: bool) -> None:
        path = checkpoint_folder(trainer) / "interrupted.ckpt"
        if in_validation:
            with _validation_not_begun(trainer):
                trainer.save_checkpoint(path, weights_only=False)
        else:
            trainer.save_checkpoint(path, weights_only=False)
        finish_checkpoints(trainer)
        self._saved = path

    def _save_last_state(self, trainer: Trainer) -> None:
        """Save what groups that were given up have not touched, if there is anything new."""
        if trainer.validating:
            self._save(trainer, in_validation=True)
        elif self._place is not None and not trainer.sanity_checking:
            self._is_rewinding = True
            self._save(trainer, in_validation=False)

    def _exit(self, trainer: Trainer) -> None:
        self._requeue(trainer)
        raise Interrupted(128 + (self._signal or signal.SIGTERM))

    def _requeue(self, trainer: Trainer) -> None:
        """Put the SLURM job back into the queue if any process got its signal and the run can be resumed."""
        number = _requeue_signal(trainer)
        if number is None or self._saved is None:
            return
        self._requeued = trainer.strategy.reduce_boolean_decision(self._signal == number, all=False)
        if self._requeued:
            self._signal = number
            _put_back()


def _requeue_signal(trainer: Trainer) -> int | None:
    """What SLURM sends before the end of a job that is to be requeued; None elsewhere."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


@rank_zero_only
def _put_back() -> None:
    """Ask SLURM to run this job again."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        _say(f"SLURM job {job} could not be requeued, submit it again: {told}")
    else:
        _say(f"SLURM job {job} is requeued.")


@rank_zero_only
def _say(message: str) -> None:
    print(message, flush=True)


def _validation_progress(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop.batch_progress


@contextmanager
def _validation_not_begun(trainer: Trainer) -> Iterator[None]:
    """Make Lightning's counters say that the validation stopped inside its very first step.

    Of all states within a validation this is the one that Lightning resumes by running all of it; others make it
    validate on the first few batches only, or not at all.
    """
    progress = _validation_progress(trainer)
    before = progress.state_dict()
    none = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress.load_state_dict({"total": begun, "current": none, "is_last_batch": False})
    try:
        yield
    finally:
        progress.load_state_dict(before)

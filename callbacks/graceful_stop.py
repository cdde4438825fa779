"""Ctrl-C and SIGTERM: finish the batch, save a checkpoint, end the run as killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lace_lightning.tracking.run_folder import checkpoint_folder

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Ends the process with the exit code that shells give to a signal: 130 for SIGINT, 143 for SIGTERM."""


class GracefulStop(Callback):
    """The first SIGINT or SIGTERM lets the batch finish, saves ``interrupted.ckpt`` and exits; a second exits at once.

    The checkpoint lies in the run's checkpoint folder and is what ``--ckpt_path`` resumes from. It has the state at the
    end of the last training batch; a validation that was interrupted runs again, whole, when the run is resumed. In the
    sanity check, ``validate``, ``test`` and ``predict`` there is nothing to save. With several processes it is enough
    that one of them gets the signal. Before the first batch, and outside of the main thread, signals do what they do in
    Python.

    Raises:
        Interrupted: out of ``Trainer.fit`` and its siblings, after Lightning has cleaned up and loggers were finalised.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._saved: Path | None = None
        self._previous: dict[int, Any] = {}

    # Lightning sets its own SIGTERM handler after `setup` and `on_fit_start`, and raises from it without a checkpoint:
    # these are the first hooks after that.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; save anew if the last batch was interrupted, lest its validation be skipped."""
        self._install()
        if self._saved is not None:
            self._save(trainer, in_validation=True)
            self._exit()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._install()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if a signal came. The process ends at the next hook, when the batch's metrics have been logged."""
        if self._is_stopping(trainer):
            self._save(trainer, in_validation=False)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End if the last batch was interrupted."""
        if self._saved is not None:
            self._exit()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End if the epoch's last batch was interrupted."""
        if self._saved is not None:
            self._exit()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if this validation is part of a fit, and end."""
        if self._is_stopping(trainer):
            if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
                self._save(trainer, in_validation=True)
            self._exit()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the books of a validation that ran again, before other callbacks save them."""
        if trainer.state.fn == TrainerFn.FITTING:
            total = _validation_progress(trainer).total
            total.processed = total.completed = total.ready

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End."""
        if self._is_stopping(trainer):
            self._exit()

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End."""
        if self._is_stopping(trainer):
            self._exit()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal that came after the last batch still ends the process."""
        if self._is_stopping(trainer):
            self._save(trainer, in_validation=False)
            self._exit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != self._handle:
                self._previous[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # at a normal end Lightning has restored everything already
                signal.signal(number, handler)
        self._previous.clear()
        self._signal = self._saved = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        # Not print: the signal may have interrupted a print.
        os.write(2, b"\nStopping after this batch with a checkpoint; once more to stop at once and lose it.\n")

    def _is_stopping(self, trainer: Trainer) -> bool:
        """Whether any process got a signal; a collective, so that all of them stop at the same batch."""
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _save(self, trainer: Trainer, in_validation: bool) -> None:
        path = checkpoint_folder(trainer) / "interrupted.ckpt"
        if in_validation:
            with _validation_not_begun(trainer):
                trainer.save_checkpoint(path, weights_only=False)
        else:
            trainer.save_checkpoint(path, weights_only=False)
        self._saved = path

    def _exit(self) -> None:
        where = f"saved {self._saved}. Resume with: --ckpt_path {self._saved}" if self._saved else "nothing to save."
        _say(f"Stopped: {where}")
        raise Interrupted(128 + (self._signal or signal.SIGTERM))


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

"""Signals end a run with its batch finished, a checkpoint that resumes exactly, and the right exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from mlflow.tracking import MlflowClient

from lace_lightning.callbacks.graceful_stop import GracefulStop
from lace_lightning.checkpoint_io import AtomicCheckpointIO
from lace_lightning.cli.main import main
from lace_lightning.folder_lock import LOCK
from lace_lightning.signals import Interrupted
from tests.test_resume import sft_settings
from tests.tracking_helpers import BATCHES_PER_EPOCH, VALIDATION_BATCHES, TinyModel, tiny_trainer

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


def kill_self_at(stage: str, count: int, number: int = signal.SIGTERM) -> Callable[[str, int], None]:
    """Signals this process inside the given step."""

    def on_step(now: str, steps: int) -> None:
        if (now, steps) == (stage, count):
            os.kill(os.getpid(), number)

    return on_step


def interrupt(tmp_path: Path, stage: str, count: int, number: int = signal.SIGTERM, **options) -> tuple[int, Path]:
    """Fit until the signal in that step; the exit code and the checkpoint's path."""
    trainer = tiny_trainer(tmp_path, callbacks=[GracefulStop()], **options)
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(TinyModel(kill_self_at(stage, count, number)))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, tmp_path / "checkpoints" / "interrupted.ckpt"


def uninterrupted(tmp_path: Path, **options) -> TinyModel:
    model = TinyModel()
    tiny_trainer(tmp_path, **options).fit(model)
    return model


def resumed(tmp_path: Path, checkpoint: Path, **options) -> TinyModel:
    model = TinyModel()
    tiny_trainer(tmp_path, callbacks=[GracefulStop()], **options).fit(model, ckpt_path=checkpoint)
    return model


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_finishes_the_batch_and_saves_its_step(tmp_path: Path, number: int, code: int) -> None:
    exit_code, checkpoint = interrupt(tmp_path, "train", 1, number)
    assert exit_code == code
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 2


@pytest.mark.parametrize("step", [0, 2, BATCHES_PER_EPOCH - 1, BATCHES_PER_EPOCH, 2 * BATCHES_PER_EPOCH - 1])
def test_resumed_run_ends_with_the_weights_and_validations_of_an_uninterrupted_one(tmp_path: Path, step: int) -> None:
    _, checkpoint = interrupt(tmp_path, "train", step)
    whole, rest = uninterrupted(tmp_path / "whole"), resumed(tmp_path / "rest", checkpoint)
    assert torch.equal(whole.layer.weight, rest.layer.weight)
    assert rest.counts["train"] == 2 * BATCHES_PER_EPOCH - (step + 1)
    done_before = (step + 1) // (BATCHES_PER_EPOCH + 1)  # validations that ended before the signal
    assert rest.validations == [VALIDATION_BATCHES] * (2 - done_before)


@pytest.mark.parametrize("interval", [2, BATCHES_PER_EPOCH])
@pytest.mark.parametrize("val_step", [0, 1, VALIDATION_BATCHES - 1, VALIDATION_BATCHES + 1])
def test_interrupted_validation_runs_again_whole(tmp_path: Path, interval: int, val_step: int) -> None:
    _, checkpoint = interrupt(tmp_path, "val", val_step, val_check_interval=interval)
    whole = uninterrupted(tmp_path / "whole", val_check_interval=interval)
    rest = resumed(tmp_path / "rest", checkpoint, val_check_interval=interval)
    assert torch.equal(whole.layer.weight, rest.layer.weight)
    assert set(rest.validations) == {VALIDATION_BATCHES}
    assert len(rest.validations) == len(whole.validations) - val_step // VALIDATION_BATCHES


def test_checkpoints_after_a_resumed_validation_never_resume_into_half_a_validation(tmp_path: Path) -> None:
    _, interrupted = interrupt(tmp_path, "val", 1, val_check_interval=2)
    saver = ModelCheckpoint(tmp_path / "later", filename="step-{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = tiny_trainer(tmp_path, callbacks=[GracefulStop(), saver], val_check_interval=2)
    trainer.fit(TinyModel(), ckpt_path=interrupted)
    rest = resumed(tmp_path / "rest", tmp_path / "later" / "step-step=4.ckpt", val_check_interval=2)
    assert set(rest.validations) == {VALIDATION_BATCHES}


def test_signal_before_a_due_validation_does_not_wait_for_it(tmp_path: Path) -> None:
    model = TinyModel(kill_self_at("train", BATCHES_PER_EPOCH - 1))
    with pytest.raises(SystemExit):
        tiny_trainer(tmp_path, callbacks=[GracefulStop()]).fit(model)
    assert model.counts["val"] == 0


def test_second_interruption_after_a_resumed_validation_keeps_later_validations_whole(tmp_path: Path) -> None:
    _, first = interrupt(tmp_path / "first", "val", 1, val_check_interval=2)
    trainer = tiny_trainer(tmp_path / "second", callbacks=[GracefulStop()], val_check_interval=2)
    with pytest.raises(SystemExit):
        trainer.fit(TinyModel(kill_self_at("train", 1)), ckpt_path=first)
    rest = resumed(tmp_path / "rest", tmp_path / "second/checkpoints/interrupted.ckpt", val_check_interval=2)
    assert rest.validations == [VALIDATION_BATCHES] * 3  # at batch 4 of the first epoch and twice in the second


def test_metrics_of_the_interrupted_batch_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = tiny_trainer(tmp_path, callbacks=[GracefulStop()], logger=logger)
    with pytest.raises(SystemExit):
        trainer.fit(TinyModel(kill_self_at("train", 2)))
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3


def test_sanity_check_stops_promptly_and_saves_nothing(tmp_path: Path) -> None:
    _, checkpoint = interrupt(tmp_path, "val", 0, num_sanity_val_steps=2)
    assert not checkpoint.exists()


def test_validate_stops_after_the_batch(tmp_path: Path) -> None:
    model = TinyModel(kill_self_at("val", 1))
    with pytest.raises(SystemExit) as stopped:
        tiny_trainer(tmp_path, callbacks=[GracefulStop()]).validate(model)
    assert (stopped.value.code, model.validations) == (143, [2])


@pytest.mark.parametrize("end", ["normal", "signal", "crash"])
def test_signal_handlers_are_given_back(tmp_path: Path, end: str) -> None:
    def crash(stage: str, count: int) -> None:
        raise RuntimeError

    before = [signal.getsignal(number) for number, _ in SIGNALS]
    on_step = {"normal": lambda *_: None, "signal": kill_self_at("train", 1), "crash": crash}[end]
    trainer = tiny_trainer(tmp_path, callbacks=[GracefulStop()])
    try:
        trainer.fit(TinyModel(on_step))
    except (SystemExit, RuntimeError):
        assert end != "normal"
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before


def test_signal_handlers_are_given_back_when_the_last_save_fails(tmp_path: Path, monkeypatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError("no room")

    stop, trainer, model = GracefulStop(), tiny_trainer(tmp_path), TinyModel()
    model.trainer = trainer
    trainer.state.fn = TrainerFn.FITTING
    monkeypatch.setattr(stop, "_save_last_state", no_room)
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    stop._install(model)
    with pytest.raises(OSError, match="no room"):
        stop.on_exception(trainer, model, Interrupted(143))
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before


def test_failed_write_leaves_the_earlier_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint: object, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


PROGRAM = """
import sys, time
from pathlib import Path
from lace_lightning.callbacks.graceful_stop import GracefulStop
from lace_lightning.tracking import MLflowLogger
from tests.tracking_helpers import TinyModel, tiny_trainer

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def on_step(stage, count):
    if count == 1:
        print("in a batch", flush=True)
    time.sleep(seconds if count else 0)

logger = MLflowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db", save_dir=str(folder / "runs"))
tiny_trainer(folder, max_epochs=1000, logger=logger, callbacks=[GracefulStop()]).fit(TinyModel(on_step))
"""


def start_program(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    """A training process that is inside its second batch."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(seconds)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=-1, text=True
    )
    assert process.stdout is not None
    assert any("in a batch" in line for line in process.stdout)
    return process


def test_interrupted_process_exits_with_130_and_its_run_is_killed_with_every_metric(tmp_path: Path) -> None:
    process = start_program(tmp_path, 0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (checkpoint,) = tmp_path.glob("runs/lace/*/checkpoints/interrupted.ckpt")
    assert f"--ckpt_path {checkpoint}" in output

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert run.info.status == "KILLED"
    assert steps == list(range(torch.load(checkpoint, weights_only=False)["global_step"]))


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start_program(tmp_path, 100.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # signals that arrive together may merge into one
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_a_signal_before_the_first_batch_ends_the_run_as_killed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = sft_settings(tmp_path / "checkpoints")
    task = {"class_path": "tests.stage_helpers.SignalWhenRead", "init_args": {"number": int(signal.SIGUSR1)}}
    settings["data"]["init_args"]["task"] = task
    store = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "save_dir": str(tmp_path / "runs")}
    settings["trainer"]["logger"] = {"class_path": "lace_lightning.tracking.MLflowLogger", "init_args": store}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "run.yaml"])
    assert stopped.value.code == 138
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before
    client = MlflowClient(store["tracking_uri"])
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "KILLED"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [LOCK]


def test_a_second_signal_before_the_first_batch_ends_the_process_at_once(tmp_path: Path) -> None:
    program = """
import os, signal
from lace_lightning.signals import stopping_anywhere
with stopping_anywhere():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], timeout=60)
    assert done.returncode == 130

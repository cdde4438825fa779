"""One run per folder: a second one that would write or resume the same is refused, and a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_only

from lace_lightning.callbacks import OneRun
from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.cli.main import main
from lace_lightning.folder_lock import LOCK, FolderBusyError, FolderLock
from tests.stage_helpers import quiet_trainer
from tests.test_resume import sft_settings
from tests.tracking_helpers import TinyModel, tiny_trainer

ROOT = Path(__file__).parents[1]

HOLDER = """
import os, sys, time
from pathlib import Path
from lace_lightning.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "x")
if len(sys.argv) > 2 and os.fork() == 0:  # as a worker of a data loader would
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def config_of(tmp_path: Path, checkpoints: Path) -> str:
    """A config of two batches whose checkpoints lie in the folder."""
    settings = sft_settings(checkpoints)
    settings["trainer"] |= {"max_steps": 2, "logger": False}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    return str(config)


def test_a_second_run_in_one_folder_is_refused_with_all_that_helps(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "checkpoints"
    config = config_of(tmp_path, folder)
    with held(folder) as process:
        assert main(["fit", "--config", config]) == 2
        said = capsys.readouterr().err
        for told in (str(folder), f"process {process.pid} ", socket.gethostname(), "kill -TERM", "dirpath"):
            assert told in said
        assert [path.name for path in folder.iterdir()] == [LOCK], "refused before anything was written"


def test_a_run_cannot_be_resumed_twice_at_once_but_validated(tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["fit", "--config", config_of(tmp_path, first)]) == 0
    config = config_of(tmp_path, second)
    with held(first):
        assert main(["fit", "--config", config, "--ckpt_path", str(first / "last.ckpt")]) == 2
        assert str(first) in (said := capsys.readouterr().err) and "init_from" in said
        assert main(["validate", "--config", config, "--ckpt_path", str(first / "last.ckpt")]) == 0
    more = ["--trainer.max_steps=3", "--ckpt_path", str(first / "last.ckpt")]
    assert main(["fit", "--config", config, *more]) == 0, "free again when the other has ended"
    assert read_checkpoint(second / "last.ckpt")["global_step"] == 3
    assert (second / "config.yaml").is_file(), "without a logger the config lies beside the checkpoints"


def test_what_a_killed_run_left_unfinished_is_removed_by_the_next_and_not_under_a_live_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (left := folder / ".last.ckpt.123.part").touch()
    (own := folder / "notes.part").touch()
    with held(folder), pytest.raises(FolderBusyError):
        tiny_trainer(tmp_path, callbacks=[OneRun()]).fit(TinyModel())
    assert left.exists()
    tiny_trainer(tmp_path, callbacks=[OneRun()], max_epochs=1).fit(TinyModel())
    assert not left.exists() and own.exists()


def test_a_checkpoint_in_shards_is_held_and_rid_of_what_a_killed_run_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (left := folder / "last.ckpt" / "shards-1").mkdir(parents=True)
    with held(folder), pytest.raises(FolderBusyError, match="init_from"):
        OneRun().hold_known(quiet_trainer(), folder / "last.ckpt")
    assert left.exists()
    (one := OneRun()).hold_known(quiet_trainer(), folder / "last.ckpt")
    one.on_exception(quiet_trainer(), TinyModel(), RuntimeError())
    assert not left.exists()


def test_a_folder_that_only_the_trainer_knows_is_held_too(tmp_path: Path) -> None:
    with held(tmp_path / "checkpoints"), pytest.raises(FolderBusyError, match="in use by process"):
        tiny_trainer(tmp_path, callbacks=[OneRun()]).fit(TinyModel())
    tiny_trainer(tmp_path, callbacks=[OneRun()]).fit(TinyModel())


@pytest.mark.parametrize("end", ["normal", "crash"])
def test_a_run_that_has_ended_lets_others_in(tmp_path: Path, end: str) -> None:
    inside: list[int] = []

    def on_step(stage: str, count: int) -> None:
        probe = "import sys; from pathlib import Path; from lace_lightning.folder_lock import FolderLock; "
        probe += "FolderLock(Path(sys.argv[1]), '')"
        if not inside:
            done = subprocess.run([sys.executable, "-c", probe, str(tmp_path / "checkpoints")], cwd=ROOT)
            inside.append(done.returncode)
        if end == "crash":
            raise RuntimeError("crash")

    trainer = tiny_trainer(tmp_path, callbacks=[OneRun()], max_epochs=1)
    try:
        trainer.fit(TinyModel(on_step))
    except RuntimeError:
        assert end == "crash"
    assert inside == [1]
    with held(tmp_path / "checkpoints"):
        pass


def test_a_lock_dies_with_its_process_though_its_forks_live_on(tmp_path: Path) -> None:
    with held(tmp_path, "forks") as process:
        with pytest.raises(FolderBusyError):
            FolderLock(tmp_path, "x")
        process.kill()
        process.wait()
        FolderLock(tmp_path, "x").release()


def test_only_rank_zero_holds_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        (tmp_path / "last.ckpt").touch()
        OneRun().hold_known(quiet_trainer(), tmp_path / "last.ckpt")


def test_a_debug_run_that_writes_nothing_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "checkpoints"):
        tiny_trainer(tmp_path, callbacks=[OneRun()], fast_dev_run=1).fit(TinyModel())


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    FolderLock(tmp_path / "file" / "below", "x").release()
    assert "is not locked" in caplog.text

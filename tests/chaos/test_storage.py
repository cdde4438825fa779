"""Disks that fill up under every stage, and tracking servers that die, lie and hang: nothing is lost or doubled."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from mlflow.tracking import MlflowClient

from lace_lightning.checkpoints import read_checkpoint, read_weights
from lace_lightning.cli import sync
from lace_lightning.cli.main import main
from lace_lightning.modules import DecodingSpec
from lace_lightning.puzzles import Doors
from lace_lightning.tracking import MLflowLogger, TrackingError, sender
from lace_lightning.tracking.register import register
from lace_lightning.tracking.store import connect
from lace_lightning.tracking.traces import ThreadSpan, make_trace
from tests.stage_helpers import NUM_THREADS, QWEN, spec
from tests.storage_helpers import Line, TrackingServer, fill, small_disk, wait_until

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- full disks


class FillDisk(Callback):
    """Fills a disk after a training batch, but for a few bytes: less than a checkpoint needs."""

    def __init__(self, disk: str, step: int, leave: int) -> None:
        self.disk, self.step, self.leave = disk, step, leave

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            fill(Path(self.disk), self.leave)


STAGES = {
    "BackbonePretraining": "TraceData",
    "ContinuedPretraining": "TraceData",
    "SupervisedFinetuning": "TraceData",
    "LatticeGRPO": "ProblemData",
}


def stage_config(stage: str, folder: Path, disk: Path, fills: bool, leave: int = 0) -> dict[str, Any]:
    own: dict[str, Any] = {"groups_per_problem": 2} if stage == "LatticeGRPO" else {}
    puzzle = {"class_path": "tests.stage_helpers.UnevenDoors"}
    sizes = {"num_threads": NUM_THREADS, "num_problems": 4, "max_length": 24, "batch_size": 2}
    logger = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "save_dir": str(disk), "system_seconds": 0}
    keeper = {"every_n_train_steps": 1, "save_top_k": -1}
    callbacks = [{"class_path": "lace_lightning.callbacks.StageCheckpoint", "init_args": keeper}]
    if fills:
        filler = {"disk": str(disk), "step": 3, "leave": leave}
        callbacks.append({"class_path": "tests.chaos.test_storage.FillDisk", "init_args": filler})
    exchange = {"class_path": "lace_lightning.exchange.LatticeAttentionConfig"}
    exchange["init_args"] = {"width": 8, "heads": 2, "scope": "aligned"}  # type: ignore[assignment]
    spec = {"architecture": QWEN, "exchange": exchange, "num_threads": NUM_THREADS, "layers": [0, 1]}
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu", "max_steps": 5, "enable_progress_bar": False, "enable_model_summary": False,
            "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "callbacks": callbacks,
            "logger": {"class_path": "lace_lightning.tracking.MLflowLogger", "init_args": logger},
        },
        "data": {"class_path": f"lace_lightning.datamodules.{STAGES[stage]}", "init_args": {"task": puzzle, **sizes}},
        "model": {
            "class_path": f"lace_lightning.modules.{stage}",
            "init_args": {"spec": spec, "validation": {"max_new_tokens": 12}, **own},
        },
    }  # fmt: skip


def fit(path: Path, config: dict[str, Any], *more: str) -> int:
    path.write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(path), *more])


@pytest.mark.parametrize("leave", [0, 8_000])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_ends_a_stage_with_its_checkpoints_whole_and_it_resumes(tmp_path, stage, leave, capsys):
    assert fit(tmp_path / "whole.yaml", stage_config(stage, tmp_path, tmp_path / "whole", fills=False)) == 0
    expected = read_weights(next((tmp_path / "whole").rglob("*step=5.ckpt")))
    capsys.readouterr()
    with small_disk(tmp_path / "disk", 3) as disk:
        assert fit(tmp_path / "full.yaml", stage_config(stage, tmp_path, disk, fills=True, leave=leave)) == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said and "step=3.ckpt could not be written" in said
        checkpoints = sorted(disk.rglob("*.ckpt"))
        assert [read_checkpoint(path)["global_step"] for path in checkpoints] == [1, 2]
        assert not list(disk.rglob("*.part"))
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time"])
        assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]
        assert "could not be written" in runs[1].data.tags["mlflow.note.content"]
        (disk / "ballast").unlink()
        last = checkpoints[-1]
        config = stage_config(stage, tmp_path, disk, fills=False)
        assert fit(tmp_path / "again.yaml", config, "--ckpt_path", str(last)) == 0
        resumed = read_weights(next(disk.rglob("*step=5.ckpt")))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_model_that_finds_no_room_is_not_registered_in_part(tmp_path, monkeypatch):
    puzzle = {"class_path": "lace_lightning.puzzles.Doors"}
    model = spec().build(Doors().tokenizer())
    with small_disk(tmp_path / "disk", 4) as disk:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        client = connect(uri)
        client.create_experiment("lace", artifact_location=str(disk / "artifacts"))
        logger = MLflowLogger("lace", "trained", uri, save_dir=str(tmp_path), system_seconds=0)
        logger.log_weights(1, {})
        logger.finalize("success")

        def registered() -> None:
            register(model, puzzle, DecodingSpec(), 32, Doors().problem(0), "doors", str(logger.run_id), uri)

        ballast = fill(disk, 8_000)
        with pytest.raises(TrackingError, match="No space left on device"):
            registered()
        (disk / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(disk / "tmp"))
        with pytest.raises(OSError, match="(?i)no space left"):
            registered()
        assert not client.search_registered_models()
        monkeypatch.setattr(tempfile, "tempdir", None)
        ballast.unlink()
        registered()
        assert [one.name for one in client.search_registered_models()] == ["doors"]


# ---------------------------------------------------------------- a tracking server that fails


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def line(server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """What a run sees of the server; it sends often."""
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(sender, "MAX_WAIT_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    line = Line(server.port)
    yield line
    line.close()


class Story:
    """Logs one of everything per step, and holds what a server says against it."""

    def __init__(self, logger: MLflowLogger) -> None:
        self.logger, self.steps, self.traces = logger, 0, 0

    def log(self, steps: int) -> None:
        for step in range(self.steps, self.steps + steps):
            values = {"loss": step / 2, "odd/nan": float("nan"), "odd/inf": float("inf") if step % 2 else -1.0}
            self.logger.log_metrics(values, step)
        self.steps += steps
        self.logger.log_text(f"written at {self.steps}", f"pages/{self.steps}.html")
        self.logger.log_table([{"at": self.steps}], "last")
        figure = plt.figure()
        self.logger.log_image("gate/map", figure, self.steps)
        plt.close(figure)
        self.logger.log_hyperparams({f"at{self.steps}": self.steps})
        self.logger.log_tag("steps", str(self.steps))
        self.logger.log_weights(self.steps, {"checkpoint": f"step={self.steps}.ckpt"})
        threads = [ThreadSpan(f"thread {n}", "so", "7", {"tag": "[[best]]"}, 0.5) for n in range(3)]
        tags = {"step": str(self.steps)}
        self.logger.log_trace(make_trace("group", {"problem": "p"}, {"answer": "7"}, {}, tags, threads, 10**18, 10**9))
        self.traces += 1

    def check(self, server: TrackingServer, folder: Path, status: str = "FINISHED") -> None:
        """Everything is there, and nothing twice."""
        client = MlflowClient(f"http://127.0.0.1:{server.port}")
        run_id = str(self.logger.run_id)
        run = client.get_run(run_id)
        assert run.info.status == status
        for name in ("loss", "odd/nan", "odd/inf"):
            history = client.get_metric_history(run_id, name)
            assert sorted(metric.step for metric in history) == list(range(self.steps)), name
        losses = {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")}
        assert losses == {step: step / 2 for step in range(self.steps)}
        assert run.data.tags["steps"] == str(self.steps)
        ends = [int(name.removeprefix("at")) for name in run.data.params if name.startswith("at")]
        pages = {Path(item.path).stem for item in client.list_artifacts(run_id, "pages")}
        assert pages == set(map(str, ends)) and len(ends) == self.traces
        page = client.download_artifacts(run_id, f"pages/{self.steps}.html", str(folder))
        assert Path(page).read_text() == f"written at {self.steps}"
        images = Counter(Path(item.path).name.split("+step+")[1].split("+")[0] for item in self._images(client, run_id))
        assert images == dict.fromkeys(map(str, ends), 2)  # the picture and its thumbnail
        (model,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
        assert model.tags["step"] == str(self.steps)
        assert run.outputs is not None
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
        found = client.search_traces(locations=[run.info.experiment_id], run_id=run_id, max_results=500)
        assert sorted(int(trace.info.tags["step"]) for trace in found) == sorted(ends)
        assert {len(trace.data.spans) for trace in found} == {4}
        assert not Path(self.logger.log_dir, "spool/refused.jsonl").exists()

    def _images(self, client: MlflowClient, run_id: str) -> list[Any]:
        return list(client.list_artifacts(run_id, "images"))


def story(line: Line, folder: Path, name: str) -> Story:
    return Story(MLflowLogger("chaos", name, line.uri, save_dir=str(folder / "runs"), system_seconds=0))


@pytest.mark.parametrize("fault", ["refuse", "lose", "garble", "hang"])
def test_what_is_logged_while_answers_are_wrong_late_or_lost_arrives_once(
    server, line, fault, tmp_path, caplog, monkeypatch
):
    told = story(line, tmp_path, fault)
    told.log(10)
    time.sleep(0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if fault == "hang" else "20")
    line.fault = fault
    told.log(1_200)  # more than one request may hold
    wait_until(lambda: "does not take records" in caplog.text and line.faults_done > 1, 60)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    line.fault = None
    wait_until(lambda: "takes records again" in caplog.text, 120)
    told.log(10)
    told.logger.finalize("success")
    told.check(server, tmp_path)


def test_a_line_that_fails_at_random_to_the_end_doubles_nothing(server, line, tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "_CLOSING_WAIT_SECONDS", 0.1)
    told = story(line, tmp_path, "any")
    told.log(1)  # the run is there
    line.fault = "any"
    for _ in range(2):
        told.log(20)
        time.sleep(0.2)
    told.logger.finalize("success")
    wait_until(lambda: sync.run([str(tmp_path / "runs")]) == 0, 240)  # quiet cores need seconds
    assert line.faults_done > 2
    told.check(server, tmp_path)


def test_a_server_killed_in_mid_run_and_at_its_end_gets_everything_once(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(sender, "MAX_WAIT_SECONDS", 1.0)
    monkeypatch.setattr("lace_lightning.tracking.live_run.FLUSH_SECONDS", 2.0)
    uri = f"http://127.0.0.1:{server.port}"
    told = Story(MLflowLogger("chaos", "killed server", uri, save_dir=str(tmp_path / "runs"), system_seconds=0))
    told.log(100)
    server.kill()
    told.log(100)
    wait_until(lambda: "does not take records" in caplog.text, 60)
    server.start()
    told.log(100)
    wait_until(lambda: "takes records again" in caplog.text, 120)
    server.kill()
    told.log(100)
    told.logger.finalize("success")
    assert f"Nothing is lost; when it answers again: lace sync {told.logger.log_dir}/spool" in caplog.text
    assert sync.run([str(tmp_path / "runs")]) == 1  # still dead
    server.start()
    assert sync.run([str(tmp_path / "runs")]) == 0
    told.check(server, tmp_path)


def test_a_run_that_would_begin_without_its_server_ends_at_once_with_the_remedy(tmp_path, capsys):
    config = stage_config("SupervisedFinetuning", tmp_path, tmp_path / "runs", fills=False)
    config["trainer"]["logger"]["init_args"]["tracking_uri"] = "http://127.0.0.1:9"
    start = time.monotonic()
    assert fit(tmp_path / "x.yaml", config) == 2
    assert time.monotonic() - start < 20
    said = capsys.readouterr().err
    assert "tracking_uri='http://127.0.0.1:9'" in said and "log locally with tracking_uri='sqlite:///" in said
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- a process that is killed meanwhile

TRAINING = """
import sys
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lace_lightning.checkpoint_io import AtomicCheckpointIO
from lace_lightning.modules import DecodingSpec
from lace_lightning.puzzles import Doors
from lace_lightning.tracking import MLflowLogger, TrackingError, sender
from lace_lightning.tracking.register import register
from lace_lightning.tracking.store import connect
from tests.tracking_helpers import TinyModel, tiny_trainer
import time

sender.SEND_SECONDS = 0.05
folder, uri, checkpoint = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
logger = MLflowLogger("killed", None, uri, save_dir=str(folder / "runs"), system_seconds=0)
keep = ModelCheckpoint(dirpath=folder / "kept", every_n_train_steps=5, save_top_k=-1)
def on_step(stage, count):
    time.sleep(0.01)
    if count == 5:
        print("training", flush=True)
trainer = tiny_trainer(folder, max_epochs=25, logger=logger, callbacks=[keep], plugins=[AtomicCheckpointIO()])
trainer.fit(TinyModel(on_step), ckpt_path=checkpoint, weights_only=True)
"""


def test_a_run_killed_again_and_again_on_a_bad_line_has_every_value_once(server, line, tmp_path):
    line.fault, generator, checkpoint = None, random.Random(0), ""
    for kill in range(4):
        command = [sys.executable, "-c", TRAINING, str(tmp_path), line.uri, checkpoint]
        process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-3, text=True)
        assert process.stdout is not None
        assert any("training" in said for said in process.stdout)
        line.fault = "any"
        if kill < 3:
            time.sleep(generator.uniform(0.1, 0.6))
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        line.fault = None
        kept = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda path: read_checkpoint(path)["global_step"])
        checkpoint = str(kept[-1])
    assert sync.run([str(tmp_path / "runs")]) == 0
    client = MlflowClient(f"http://127.0.0.1:{server.port}")
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time"])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED", "KILLED", "KILLED"]
    seen: set[int] = set()
    for run in runs:
        steps = sorted(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))
        assert steps == list(range(steps[0], steps[-1] + 1))  # none is missing, none there twice
        seen.update(steps)
    assert seen >= set(range(100))  # epochs end where the last checkpoint says

"""Nothing that was logged is lost, whatever happens to server, run or process; secrets never leave."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from lace_lightning.callbacks.save_config import SaveConfig
from lace_lightning.cli import sync, ui
from lace_lightning.tracking import MLflowLogger, TrackingError, live_run, replay, sender, store
from lace_lightning.tracking.redact import HIDDEN, redact, redact_lines
from lace_lightning.tracking.spool import Spool
from lace_lightning.tracking.spool_reader import SpoolReader
from tests.storage_helpers import free_port, wait_until
from tests.tracking_helpers import TinyModel, tiny_trainer


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for all tests of this file; each uses an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def logger(uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> MLflowLogger:
    return MLflowLogger(request.node.name, "a run", uri, save_dir=str(tmp_path / "runs"))


def spool_of(logger: MLflowLogger) -> Path:
    return Path(logger.log_dir, "spool")


def run_of(logger: MLflowLogger) -> Run:
    return MlflowClient(logger.tracking_uri).get_run(logger.run_id)


def history(logger: MLflowLogger, name: str) -> list[tuple[int, float]]:
    metrics = MlflowClient(logger.tracking_uri).get_metric_history(logger.run_id, name)
    return sorted((metric.step, metric.value) for metric in metrics)


def artifact(logger: MLflowLogger, path: str, folder: Path) -> str:
    return Path(MlflowClient(logger.tracking_uri).download_artifacts(logger.run_id, path, str(folder))).read_text()


class Unreliable:
    """An MLflow client whose ``log_batch`` fails as told, before or after the store has taken the batch."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.fail: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def log_batch(self, *args: Any, **kwargs: Any) -> None:
        if self.fail == "before":
            raise ConnectionError("connection refused")
        if self.fail == "hang":
            time.sleep(3)
        self.client.log_batch(*args, **kwargs)
        if self.fail == "after":
            raise ConnectionError("connection reset")


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unreliable]:
    """Replaces the client of the next logger; sends and gives up ten times faster than in earnest."""
    box: list[Unreliable] = []
    connect = store.connect

    def connect_once(uri: str) -> Unreliable:
        if not box:
            box.append(Unreliable(connect(uri)))
        return box[0]

    class Proxy:
        def __setattr__(self, name: str, value: Any) -> None:
            setattr(box[0], name, value)

    monkeypatch.setattr(store, "connect", connect_once)
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(live_run, "FLUSH_SECONDS", 1.0)
    yield Proxy()  # type: ignore[misc]
    monkeypatch.undo()


# The life of a run


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt(), "KILLED"), (ValueError("non-finite"), "FAILED")]
)
def test_run_ends_as_it_ended_with_every_metric(
    logger: MLflowLogger, tmp_path: Path, error: BaseException | None, status: str
) -> None:
    def on_step(stage: str, count: int) -> None:
        if error and (stage, count) == ("train", 2):
            raise error

    before = signal.getsignal(signal.SIGINT)
    try:
        tiny_trainer(tmp_path, logger=logger).fit(TinyModel(on_step))
    except (SystemExit, ValueError):
        assert error is not None
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert run_of(logger).info.status == status
    assert [step for step, _ in history(logger, "train/loss")] == list(range(2 if error else 8))


def test_checkpoints_lie_in_the_runs_folder(logger: MLflowLogger, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, logger=logger)
    trainer.fit(TinyModel())
    assert trainer.checkpoint_callback.dirpath == os.path.join(logger.log_dir, "checkpoints")
    assert list(Path(logger.log_dir, "checkpoints").glob("*.ckpt"))


def test_two_runs_of_one_name_have_folders_of_their_own(logger: MLflowLogger) -> None:
    twin = MLflowLogger(logger.name, "a run", logger.tracking_uri, save_dir=logger.save_dir)
    assert logger.log_dir != twin.log_dir


def test_child_run_is_shown_under_its_parent(logger: MLflowLogger) -> None:
    child = MLflowLogger(logger.name, "child", logger.tracking_uri, {"stage": "sft"}, logger.run_id, logger.save_dir)
    tags = run_of(child).data.tags
    assert (tags["mlflow.parentRunId"], tags["stage"]) == (logger.run_id, "sft")


def test_environment_hardware_and_git_state_are_in_the_run(
    logger: MLflowLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_VARIABLE", "its-value")
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    Path("notes.txt").write_text("first\n")
    for command in (["init", "-q"], ["add", "notes.txt"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    Path("notes.txt").write_text("second\nhf_token: abc123\n")
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    assert run_of(logger).data.tags["git.commit"] == commit
    assert run_of(logger).data.tags["git.dirty"] == "true"
    diff = artifact(logger, "run/git.diff", tmp_path)
    assert "+second" in diff and "abc123" not in diff
    environment = json.loads(artifact(logger, "run/environment.json", tmp_path))
    assert environment["packages"]["numpy"] == np.__version__
    assert "its-value" not in json.dumps(environment)
    assert json.loads(artifact(logger, "run/hardware.json", tmp_path))["cores"] == len(os.sched_getaffinity(0))


# What is logged


def test_params_are_not_cut_and_longer_ones_become_artifacts(logger: MLflowLogger, tmp_path: Path) -> None:
    logger.log_hyperparams(
        {"model": {"short": "x" * 6000, "long": "y" * 6001}, "steps": 3, "layers": [1, 2], "token": "hush"}
    )
    logger.finalize("success")
    params = run_of(logger).data.params
    assert params["model.short"] == "x" * 6000
    assert params["token"] == HIDDEN
    assert params["steps"] == "3" and params["layers"] == "[1, 2]"
    assert "params/model.long.txt" in params["model.long"]
    assert artifact(logger, "params/model.long.txt", tmp_path) == "y" * 6001


def test_odd_names_and_values_of_metrics_arrive(logger: MLflowLogger) -> None:
    logger.log_metrics({"gate/layer[3]": 0.5, "loss": float("nan"), "note": "text", "/a//b": 1}, step=7)
    logger.finalize("success")
    metrics = run_of(logger).data.metrics
    assert metrics["gate/layer_3_"] == 0.5 and metrics["a/b"] == 1 and np.isnan(metrics["loss"])
    assert "note" not in metrics


def test_tables_are_read_back_by_mlflow(logger: MLflowLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    # load_table asks the global store, which a test before this one may have set.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", logger.tracking_uri)
    logger.log_table([{"prompt": "p", "tag": "[[best]]"}, {"prompt": "<b>q</b>", "length": 3}], "validation")
    logger.finalize("success")
    client = MlflowClient(logger.tracking_uri)
    table = client.load_table(run_of(logger).info.experiment_id, "tables/validation.json", [logger.run_id])
    assert table["prompt"].tolist() == ["p", "<b>q</b>"]
    assert table["tag"].tolist()[0] == "[[best]]" and table["length"].tolist()[1] == 3


def test_pictures_of_files_and_figures_have_the_names_that_mlflow_shows(logger: MLflowLogger, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    figure = plt.figure()
    logger.log_image("gate/map", str(tmp_path / "red.png"), step=3)
    logger.log_image("gate/map", figure, step=4)
    plt.close(figure)
    logger.finalize("success")
    client = MlflowClient(logger.tracking_uri)
    ours = {Path(item.path).name for item in client.list_artifacts(logger.run_id, "images")}
    client.log_image(logger.run_id, Image.new("RGB", (4, 4)), key="gate/map", step=5)
    theirs = {Path(item.path).name for item in client.list_artifacts(logger.run_id, "images")} - ours

    def shape(name: str) -> str:
        return re.sub(r"\+\d+", "+number", re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "uuid", name))

    assert {shape(name) for name in ours} == {shape(name) for name in theirs}
    assert len(ours) == 4
    (red,) = (name for name in ours if "+step+3+" in name and name.endswith(".png"))
    path = client.download_artifacts(logger.run_id, f"images/{red}", str(tmp_path))
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_artifact_outside_of_the_run_is_refused(logger: MLflowLogger) -> None:
    with pytest.raises(ValueError, match="artifact_file='../x'"):
        logger.log_text("x", "../x")


# Servers that fail


@pytest.mark.parametrize("failure", ["before", "after"])
def test_values_logged_during_an_outage_arrive_once_and_in_full(
    logger: MLflowLogger, unreliable: Unreliable, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger.log_metrics({"loss": -1.0}, 0)
    unreliable.fail = failure
    for step in range(1, 60):
        logger.log_metrics({"loss": float(step)}, step)
        time.sleep(0.01)
    wait_until(lambda: "does not take records" in caplog.text)
    unreliable.fail = None
    wait_until(lambda: "takes records again" in caplog.text)
    logger.finalize("success")
    assert history(logger, "loss") == [(0, -1.0)] + [(step, float(step)) for step in range(1, 60)]
    assert caplog.text.count("does not take records") == 1


def test_hanging_server_slows_neither_logging_nor_the_end(logger: MLflowLogger, unreliable: Unreliable) -> None:
    logger.log_metrics({"loss": 0.0}, 0)
    unreliable.fail = "hang"
    start = time.monotonic()
    for step in range(500):
        logger.log_metrics({"loss": float(step)}, step)
    assert time.monotonic() - start < 0.5
    logger.finalize("failed")
    assert time.monotonic() - start < 2.0
    assert "still" in replay(spool_of(logger)).problem  # the request that hangs may yet arrive


def test_what_a_dead_server_missed_is_synced_later_and_only_once(
    logger: MLflowLogger, unreliable: Unreliable, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.log_metrics({"loss": 0.0}, 0)
    unreliable.fail = "before"
    for step in range(1, 9):
        logger.log_metrics({"loss": float(step)}, step)
    logger.log_text("kept", "note.txt")
    logger.finalize("failed")
    assert f"lace sync {spool_of(logger)}" in caplog.text
    assert sync.run([logger.save_dir]) == 1  # still dead
    assert "connection refused" in capsys.readouterr().out

    unreliable.fail = None
    assert sync.run([logger.save_dir]) == 0
    assert history(logger, "loss") == [(step, float(step)) for step in range(9)]
    assert run_of(logger).info.status == "FAILED"
    (spool_of(logger) / "offset").unlink()  # as if the note of what was sent had been lost
    assert sync.run([logger.save_dir]) == 0
    assert len(history(logger, "loss")) == 9
    assert not (spool_of(logger) / "refused.jsonl").exists()


def test_sync_ends_a_run_without_an_end_as_killed(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("dead")).info.run_id
    spool = Spool(tmp_path / "spool", run_id, uri)
    spool.append({"kind": "metrics", "time": 1, "step": 0, "values": {"loss": 1.0}})
    spool.close()
    assert sync.run([str(tmp_path)]) == 0
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}


def test_sync_leaves_a_run_alone_that_is_still_being_written(logger: MLflowLogger) -> None:
    logger.log_metrics({"loss": 1.0}, 0)
    assert "still" in replay(spool_of(logger)).problem
    logger.finalize("success")
    assert replay(spool_of(logger)).problem == ""


def test_record_that_mlflow_refuses_is_set_aside_and_blocks_nothing(
    logger: MLflowLogger, caplog: pytest.LogCaptureFixture
) -> None:
    logger.log_hyperparams({"lr": 1})
    logger.log_hyperparams({"lr": 2})  # MLflow's params are constant
    logger.log_metrics({"loss": 3.0}, 0)
    logger.finalize("success")
    assert history(logger, "loss") == [(0, 3.0)]
    refused = [json.loads(line) for line in (spool_of(logger) / "refused.jsonl").read_text().splitlines()]
    assert [(record["key"], record["value"]) for record in refused] == [("lr", "2")]
    assert "refused" in caplog.text


FOREIGN = ["{outside}/x", "../outside/x", "files/../../outside/x", "files/link/x", "files/x", "run.json", "files/one/y"]


@pytest.mark.parametrize("file", FOREIGN)
def test_a_spool_sends_and_removes_nothing_but_its_own_copies(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody else wrote it."""
    outside, spool = tmp_path / "outside", tmp_path / "spool"
    for path in (outside / "x", spool / "files/x", spool / "files/one/x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (spool / "files/link").symlink_to(outside)
    (spool / "files/one/y").symlink_to(outside / "x")
    (spool / "run.json").write_text('{"run_id": "id", "tracking_uri": "sqlite:///x"}')
    record = {"kind": "artifact", "file": file.format(outside=outside), "folder": None}
    (spool / "records.jsonl").write_text(json.dumps(record) + "\n")
    sent: list[str] = []

    class Client:
        def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
            sent.append(path)

    reader = SpoolReader(spool)
    sender.drain(Client(), reader)  # type: ignore[arg-type]
    assert not sent and reader.pending() == 0
    assert [path.read_text() for path in (outside / "x", spool / "files/x", spool / "files/one/x")] == ["mine"] * 3
    assert json.loads((spool / "refused.jsonl").read_text())["kind"] == "unreadable"


def test_a_record_of_other_types_is_set_aside_and_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run_id": "id", "tracking_uri": "sqlite:///x"}')
    bad = {"kind": "metrics", "time": 1, "step": 0, "values": [1]}
    good = {"kind": "status", "status": "FINISHED", "time": 1}
    (tmp_path / "records.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n")
    ended: list[str] = []

    class Client:
        def set_terminated(self, run_id: str, status: str, time: int) -> None:
            ended.append(status)

    sender.drain(Client(), SpoolReader(tmp_path))  # type: ignore[arg-type]
    assert ended == ["FINISHED"] and '"values\\": [1]' in (tmp_path / "refused.jsonl").read_text()


def test_half_a_line_left_by_a_kill_is_not_read(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "id", "uri")  # kept alive: a killed process closes nothing
    spool.append({"kind": "tag", "key": "a", "value": "b"})
    with (tmp_path / "records.jsonl").open("a") as stream:
        stream.write('{"kind": "ta')
    records, end = SpoolReader(tmp_path).read()
    assert [record["key"] for record in records] == ["a"]
    assert end == (tmp_path / "records.jsonl").stat().st_size - len('{"kind": "ta')


def test_server_dead_at_start_is_an_error_at_once_that_names_the_option() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://user:hush@127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(TrackingError, match="tracking_uri='http://127.0.0.1") as error:
            MLflowLogger(tracking_uri=address)
    assert "sqlite:///" in str(error.value) and "hush" not in str(error.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("folder", ["./mlruns", "file:///tmp/mlruns"])
def test_folder_as_store_is_an_error_that_names_the_remedy(folder: str) -> None:
    with pytest.raises(ValueError, match="tracking_uri=.*sqlite:///"):
        MLflowLogger(tracking_uri=folder)


def test_store_is_the_environments_else_sqlite_in_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert MLflowLogger().tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/mlflow.db")
    assert MLflowLogger().tracking_uri == "sqlite:////elsewhere/mlflow.db"


# Configs and secrets


def cli(tmp_path: Path, logger: str, *more: str) -> LightningCLI:
    arguments = ["fit", "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_model_summary=false"]
    return LightningCLI(
        ConfiguredModel, args=[*arguments, f"--trainer.logger={logger}", *more], save_config_callback=SaveConfig
    )


class ConfiguredModel(TinyModel):
    def __init__(self, api_key: str = "hush", max_new_tokens: int = 5) -> None:
        super().__init__()


def test_resolved_config_is_file_artifact_and_params_without_its_secrets(uri: str, tmp_path: Path) -> None:
    made = cli(
        tmp_path,
        "lace_lightning.tracking.MLflowLogger",
        f"--trainer.logger.tracking_uri={uri}",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.logger.experiment_name=config",
    )
    logger = made.trainer.logger
    text = Path(logger.log_dir, "config.yaml").read_text()
    assert artifact(logger, "config/config.yaml", tmp_path) == text
    settings = yaml.safe_load(text)
    assert settings["model"] == {"api_key": HIDDEN, "max_new_tokens": 5}
    assert settings["trainer"]["max_steps"] == 1
    params = run_of(logger).data.params
    assert (params["trainer.max_steps"], params["model.api_key"]) == ("1", HIDDEN)


def test_config_is_saved_without_a_logger_too(tmp_path: Path) -> None:
    cli(tmp_path, "false")
    assert yaml.safe_load((tmp_path / "checkpoints/config.yaml").read_text())["model"]["max_new_tokens"] == 5


@pytest.mark.parametrize("key", ["api_key", "HF_TOKEN", "token", "password", "judge.openai-api-key", "client_secret"])
def test_texts_under_secret_keys_are_hidden(key: str) -> None:
    assert redact({"a": [{key: "hush"}]}) == {"a": [{key: HIDDEN}]}
    assert "hush" not in redact_lines(f"+  {key}: hush\n+{key} = 'hush'")


@pytest.mark.parametrize("key", ["max_new_tokens", "tokenizer", "pad_token", "num_tokens", "author", "key"])
def test_texts_under_ordinary_keys_stay(key: str) -> None:
    assert redact({key: "seen"}) == {key: "seen"}


def test_passwords_in_uris_are_hidden() -> None:
    assert redact("postgresql://me:hush@host/db") == "postgresql://host/db"
    assert redact("http://host:5000/a@b") == "http://host:5000/a@b"


# The pages


def test_busy_port_is_an_error_that_names_the_remedy(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    store.connect(uri).search_experiments()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.run(["--backend-store", uri, "--port", str(port)]) == 2
    assert f"--port {port} cannot be used" in capsys.readouterr().err


def test_missing_store_is_an_error_that_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.run(["--backend-store", f"sqlite:///{tmp_path}/none.db"]) == 2
    assert "lace fit" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()


# Real servers


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(command, stdout=-3, stderr=-3, start_new_session=True)

    def is_up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(is_up, 90)
    return server


def kill_server(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_server_killed_and_restarted_in_mid_run_gets_every_value_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lace_lightning")
    port = free_port()
    server = start_server(tmp_path, port)
    try:
        logger = MLflowLogger(tracking_uri=f"http://127.0.0.1:{port}", save_dir=str(tmp_path / "runs"))

        def log(steps: range) -> None:
            for step in steps:
                logger.log_metrics({"loss": step / 2}, step)
                time.sleep(0.01)

        log(range(300))
        kill_server(server)
        start = time.monotonic()
        log(range(300, 600))
        logger.log_text("written while the server was away", "note.txt")
        assert time.monotonic() - start < 6  # 300 steps of 10 ms, on a busy machine
        wait_until(lambda: "does not take records" in caplog.text)
        server = start_server(tmp_path, port)
        log(range(600, 700))
        wait_until(lambda: "takes records again" in caplog.text, 60)
        logger.finalize("success")
        assert history(logger, "loss") == [(step, step / 2) for step in range(700)]
        assert artifact(logger, "note.txt", tmp_path) == "written while the server was away"
        assert run_of(logger).info.status == "FINISHED"
    finally:
        kill_server(server)


@pytest.mark.slow
def test_killed_process_loses_nothing_and_is_ended_by_sync(uri: str, tmp_path: Path) -> None:
    program = (
        "import os, sys; from lace_lightning.tracking import MLflowLogger\n"
        "logger = MLflowLogger('killed', None, sys.argv[1], save_dir=sys.argv[2])\n"
        "for step in range(1000): logger.log_metrics({'loss': step}, step)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, uri, str(tmp_path)], cwd=Path(__file__).parents[1], check=False)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("killed").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "RUNNING"
    assert sync.run([str(tmp_path)]) == 0
    assert client.get_run(run.info.run_id).info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 1000


@pytest.mark.slow
def test_pages_are_served_on_this_machine_until_ctrl_c(uri: str) -> None:
    store.connect(uri).search_experiments()
    port = free_port()
    command = [sys.executable, "-c", "import sys; from lace_lightning.cli import ui; sys.exit(ui.run(sys.argv[1:]))"]
    process = subprocess.Popen(
        [*command, "--backend-store", uri, "--port", str(port)], cwd=Path(__file__).parents[1], stdout=-1, text=True
    )
    assert process.stdout is not None
    assert f"http://127.0.0.1:{port}" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0

"""From a metric to the checkpoint, config and commit that made it; what a run says about itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from lace_lightning.callbacks import GroupTraces, Lineage
from lace_lightning.cli import sync, ui
from lace_lightning.embedding import NgramEmbedder
from lace_lightning.exchange import SameStepConfig
from lace_lightning.modules import LatticeGRPO, SupervisedFinetuning, ThreadedModule
from lace_lightning.rewards import AccuracyReward, DiversityReward
from lace_lightning.tasks import Verdict
from lace_lightning.traces.writing import write_traces
from lace_lightning.tracking import MLflowLogger
from lace_lightning.tracking.logger import PARENT_RUN
from lace_lightning.tracking.note import NOTE, differences
from lace_lightning.tracking.outcome_traces import trace_of
from lace_lightning.tracking.recipe import recipe
from lace_lightning.tracking.redact import HIDDEN
from lace_lightning.tracking.spool_reader import SpoolReader
from lace_lightning.tracking.system import SystemMetrics
from tests.eval_helpers import judged
from tests.stage_helpers import DECODING, UnevenDoors, problem_data, quiet_trainer, spec, trace_data
from tests.test_tracking import Unreliable, free_port, kill_server, start_server, unreliable  # noqa: F401


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def make_logger(uri: str, folder: Path, name: str = "a run", **options: Any) -> MLflowLogger:
    return MLflowLogger("story", name, uri, save_dir=str(folder), **{"system_seconds": 0.0, **options})


def run_of(logger: MLflowLogger) -> Run:
    return MlflowClient(logger.tracking_uri).get_run(str(logger.run_id))


def fit(
    logger: MLflowLogger, more: Sequence[Callback] = (), init_from: Sequence[str] = (), data: Any = None, **options: Any
) -> Path:
    """Two steps of SFT; the last checkpoint."""
    callbacks = [ModelCheckpoint(save_last=True), Lineage("lace fit --data.api_key=hush"), *more]
    trainer = quiet_trainer(2, callbacks, logger=logger, enable_checkpointing=True, log_every_n_steps=1, **options)
    module = SupervisedFinetuning(spec(), validation=DECODING, init_from=init_from)
    trainer.fit(module, datamodule=data or trace_data())
    return Path(trainer.checkpoint_callback.last_model_path)  # type: ignore[union-attr]


def validate(logger: MLflowLogger, checkpoint: Path, more: Sequence[Callback] = ()) -> None:
    trainer = quiet_trainer(2, [Lineage("lace validate"), *more], logger=logger, limit_val_batches=1)
    module = SupervisedFinetuning(spec(), validation=DECODING)
    trainer.validate(module, datamodule=trace_data(), ckpt_path=str(checkpoint), verbose=False, weights_only=True)


# ---------------------------------------------------------------- lineage


def test_a_validation_leads_to_the_checkpoint_config_and_commit_that_it_is_of(uri: str, tmp_path: Path) -> None:
    trained, validated = make_logger(uri, tmp_path, "trained"), make_logger(uri, tmp_path, "validated")
    checkpoint = fit(trained)
    validate(validated, checkpoint)
    client, run = MlflowClient(uri), run_of(validated)
    [used] = run.inputs.model_inputs
    model = client.get_logged_model(used.model_id)
    assert model.source_run_id == trained.run_id == run.data.tags["lace.weights_of"]
    assert model.tags["checkpoint"] == str(checkpoint) and Path(model.tags["config"]).parent == checkpoint.parents[1]
    assert model.tags["git.commit"] == run_of(trained).data.tags["git.commit"]
    [output] = run_of(trained).outputs.model_outputs
    assert output.model_id == model.model_id
    # metrics of both runs are shown with the weights, and the validation's value is its run's own
    found = {metric.key: (metric.value, metric.run_id) for metric in model.metrics}
    assert found["train/loss"] == (run_of(trained).data.metrics["train/loss"], trained.run_id)
    assert found["val/acc"] == (run.data.metrics["val/acc"], validated.run_id)


def test_weights_name_the_task_the_traces_and_their_card(uri: str, tmp_path: Path) -> None:
    logger, traces = make_logger(uri, tmp_path), tmp_path / "synth" / "traces.jsonl"
    traces.parent.mkdir()
    write_traces([UnevenDoors().trace(index, 3) for index in range(4)], traces)
    (traces.parent / "card.md").write_text("# A card")
    fit(logger, data=trace_data(traces=str(traces)))
    client = MlflowClient(uri)
    [output] = run_of(logger).outputs.model_outputs
    tags = client.get_logged_model(output.model_id).tags
    assert tags["data.task"] == "UnevenDoors" and tags["data.traces"] == str(traces)
    assert tags["data.card"] == f"runs:/{logger.run_id}/data/card.md"
    assert Path(client.download_artifacts(str(logger.run_id), "data/card.md")).read_text() == "# A card"


def test_an_evaluation_of_one_model_is_shown_with_its_weights(uri: str, tmp_path: Path) -> None:
    trained = make_logger(uri, tmp_path)
    fit(trained)
    for is_of_one in (True, False):
        other = make_logger(uri, tmp_path)
        other.use_weights([str(trained.run_id)], evaluates=is_of_one)
        other.log_metrics({f"eval/doors/lace/acc{is_of_one}": 0.5})
        other.finalize("success")
    [output] = run_of(trained).outputs.model_outputs
    shown = {metric.key for metric in MlflowClient(uri).get_logged_model(output.model_id).metrics}
    assert "eval/doors/lace/accTrue" in shown and "eval/doors/lace/accFalse" not in shown


def test_linking_metrics_to_weights_adds_nothing_to_the_runs_history(uri: str, tmp_path: Path) -> None:
    logger = make_logger(uri, tmp_path)
    fit(logger)
    history = MlflowClient(uri).get_metric_history(str(logger.run_id), "train/loss")
    assert sorted(metric.step for metric in history) == [0, 1]


def test_a_stage_names_the_run_it_starts_from_and_what_differs(uri: str, tmp_path: Path) -> None:
    first, second = make_logger(uri, tmp_path, "first"), make_logger(uri, tmp_path, "second")
    first.log_hyperparams({"model": {"lr": 0.1, "width": 8}, "trainer": {"logger": "a"}})
    second.log_hyperparams({"model": {"lr": 0.2, "width": 8}, "trainer": {"logger": "b"}})
    checkpoint = fit(first)
    fit(second, init_from=[str(checkpoint)])
    note = run_of(second).data.tags[NOTE]
    assert f"Starts from the weights of run [first](#/experiments/{run_of(first).info.experiment_id}/runs/" in note
    assert "- `model.lr`: `0.1` there, `0.2` here" in note and "width" not in note and "logger" not in note
    assert f"lace fit --data.api_key={HIDDEN}" in note and "hush" not in note
    assert "finished after" in note and "`train/loss`" in note


def test_a_setting_of_one_run_only_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == {"c": (None, "3"), "a": ("1", None)}


@pytest.mark.parametrize(
    ("error", "words"), [(KeyboardInterrupt(), "was stopped after"), (ValueError("no\nway"), "ValueError: no")]
)
def test_a_run_that_ends_early_says_so(uri: str, tmp_path: Path, error: BaseException, words: str) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise error

    logger = make_logger(uri, tmp_path)
    with pytest.raises((SystemExit, ValueError)):
        fit(logger, [Fails()])
    assert words in run_of(logger).data.tags[NOTE]


def test_weights_and_links_wait_for_a_dead_server_and_arrive_once(
    uri: str,
    tmp_path: Path,
    unreliable: Unreliable,  # noqa: F811
) -> None:
    logger = make_logger(uri, tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    unreliable.fail = "before"
    logger.log_weights(3, {"checkpoint": "x.ckpt"})
    logger.use_weights([str(logger.run_id)])
    logger.finalize("success")
    assert run_of(logger).outputs.model_outputs == []
    unreliable.fail = None
    for _ in range(2):
        assert sync.run([str(tmp_path)]) == 0
        run = run_of(logger)
        assert len(run.outputs.model_outputs) == len(run.inputs.model_inputs) == 1
        (Path(logger.log_dir) / "spool/offset").unlink()  # as if the note of what was sent had been lost


# ---------------------------------------------------------------- recipes


def test_runs_inside_a_recipe_are_its_children_and_it_ends_as_they_do(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no"), recipe("r", "two stages", "lace demo", "story", uri) as parent:
        child = make_logger(uri, tmp_path)
        child.describe("a stage")
        child.finalize("success")
        raise ValueError("no")
    assert PARENT_RUN not in os.environ
    assert run_of(child).data.tags["mlflow.parentRunId"] == parent.run_id
    assert "Belongs to run [r](" in run_of(child).data.tags[NOTE]
    assert run_of(parent).info.status == "FAILED" and "ValueError: no" in run_of(parent).data.tags[NOTE]


# ---------------------------------------------------------------- traces


def test_validation_groups_are_traces_with_a_span_per_thread(uri: str, tmp_path: Path) -> None:
    trained, logger = make_logger(uri, tmp_path), make_logger(uri, tmp_path)
    validate(logger, fit(trained), [GroupTraces(max_groups=2)])
    client = MlflowClient(uri)
    experiment = run_of(logger).info.experiment_id
    traces = client.search_traces(locations=[experiment], run_id=logger.run_id, filter_string="tag.phase = 'val'")
    assert len(traces) == 2
    root, *spans = sorted(traces[0].data.spans, key=lambda span: span.parent_id is not None)
    assert len(spans) == 3 and {span.parent_id for span in spans} == {root.span_id}
    for span in spans:
        assert 0 < span.attributes["gate_mean"] < 1
        assert span.attributes["tokens"] > 0 and span.attributes["verdict"] in ("correct", "wrong", "unparsable")
        assert root.start_time_ns < span.end_time_ns <= root.end_time_ns
    assert traces[0].info.tags["problem"] in root.name


def test_rollouts_are_traces_with_the_parts_of_their_reward(uri: str, tmp_path: Path) -> None:
    logger = make_logger(uri, tmp_path)
    rewards = [AccuracyReward(), DiversityReward(NgramEmbedder(), weight=0.1)]
    module: ThreadedModule = LatticeGRPO(spec(), rollout=DECODING, groups_per_problem=2, rewards=rewards)
    trainer = quiet_trainer(1, [GroupTraces(max_groups=1, every_n_steps=1)], logger=logger)
    trainer.fit(module, datamodule=problem_data())
    client = MlflowClient(uri)
    [trace] = client.search_traces(locations=[run_of(logger).info.experiment_id], run_id=logger.run_id)
    numbers = trace.data.spans[0].attributes
    assert trace.info.tags["phase"] == "train"
    assert numbers["reward/total"] == pytest.approx(numbers["reward/accuracy"] + 0.1 * numbers["reward/diversity"])


def test_an_exchange_that_records_no_gates_has_traces_without_them(uri: str, tmp_path: Path) -> None:
    logger = make_logger(uri, tmp_path)
    module: ThreadedModule = LatticeGRPO(spec(SameStepConfig(width=8, heads=2)), rollout=DECODING, groups_per_problem=2)
    trainer = quiet_trainer(1, [GroupTraces(max_groups=1, every_n_steps=1)], logger=logger)
    trainer.fit(module, datamodule=problem_data())
    client = MlflowClient(uri)
    [trace] = client.search_traces(locations=[run_of(logger).info.experiment_id], run_id=logger.run_id)
    assert {span.attributes.get("gate_mean") for span in trace.data.spans[1:]} == {None}


def test_a_trace_that_is_sent_twice_is_there_once(uri: str, tmp_path: Path) -> None:
    logger = make_logger(uri, tmp_path)
    logger.log_trace(trace_of(judged([("8", Verdict.WRONG), ("7", Verdict.CORRECT)], number=5), {"step": "3"}))
    logger.finalize("success")
    (Path(logger.log_dir) / "spool/offset").unlink()
    assert sync.run([str(tmp_path)]) == 0
    client, experiment = MlflowClient(uri), run_of(logger).info.experiment_id
    found = client.search_traces(locations=[experiment], filter_string="tag.outcome = 'found but not chosen'")
    assert [(trace.info.tags["step"], len(trace.data.spans)) for trace in found] == [("3", 3)]
    assert found[0].data.spans[0].outputs["outcome"] == "found but not chosen"


def test_an_older_server_gets_its_spans_as_an_artifact(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store has no place for spans, and says so."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("mlflow.tracing.client.TracingClient.log_spans", refuse)
    logger = make_logger(uri, tmp_path)
    logger.log_trace(trace_of(judged([("7", Verdict.CORRECT)], number=6), {"step": "4"}))
    logger.finalize("success")
    [trace] = MlflowClient(uri).search_traces(locations=[run_of(logger).info.experiment_id], run_id=logger.run_id)
    assert trace.info.tags["step"] == "4" and len(trace.data.spans) == 2


@pytest.mark.slow
def test_a_real_server_takes_weights_links_and_traces(tmp_path: Path) -> None:
    port = free_port()
    server = start_server(tmp_path, port)
    try:
        logger = make_logger(f"http://127.0.0.1:{port}", tmp_path / "runs")
        logger.log_metrics({"loss": 1.0}, 0)
        logger.log_weights(3, {"checkpoint": "x.ckpt"})
        logger.log_trace(trace_of(judged([("7", Verdict.CORRECT)], number=5)))
        logger.finalize("success")
        run, client = run_of(logger), MlflowClient(logger.tracking_uri)
        [output] = run.outputs.model_outputs
        assert client.get_logged_model(output.model_id).tags["checkpoint"] == "x.ckpt"
        [trace] = client.search_traces(locations=[run.info.experiment_id], run_id=logger.run_id)
        assert len(trace.data.spans) == 2 and not SpoolReader(Path(logger.log_dir, "spool")).pending()
    finally:
        kill_server(server)


# ---------------------------------------------------------------- system metrics


def test_the_machine_is_measured_through_the_spool_until_the_run_ends(uri: str, tmp_path: Path) -> None:
    logger = make_logger(uri, tmp_path, system_seconds=0.2)
    logger.log_metrics({"loss": 1.0}, 0)
    time.sleep(1.5)
    logger.finalize("success")
    client = MlflowClient(uri)

    def steps() -> list[int]:
        name = "system/cpu_utilization_percentage"
        return sorted(metric.step for metric in client.get_metric_history(str(logger.run_id), name))

    before = steps()
    assert before == list(range(len(before))) and before
    time.sleep(0.5)
    assert steps() == before and not SpoolReader(Path(logger.log_dir, "spool")).pending()
    assert "system" not in run_of(logger).data.tags.get(NOTE, "")


def test_a_fork_of_the_process_does_not_measure_too(uri: str, tmp_path: Path) -> None:
    seen: list[int] = []
    before = set(threading.enumerate())
    metrics = SystemMetrics(lambda values, step: seen.append(step), 0.05)
    metrics.start()
    child = os.fork()
    if child == 0:  # the threads of a process do not come along, and none is started
        metrics.start()
        os._exit(1 if any(t.name == "system-metrics" for t in threading.enumerate()) else 0)
    assert os.waitpid(child, 0)[1] == 0
    metrics.stop()
    assert not any(t.name == "system-metrics" for t in set(threading.enumerate()) - before)


def test_negative_seconds_are_an_error() -> None:
    with pytest.raises(ValueError, match="system_seconds=-1"):
        MLflowLogger(tracking_uri="sqlite:///x.db", system_seconds=-1)


# ---------------------------------------------------------------- pages and commands


def test_a_remote_store_is_named_as_the_page_to_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@tracker:5000")
    assert ui.run([]) == 0
    assert "https://tracker:5000" in (printed := capsys.readouterr().out) and "hush" not in printed


def test_what_comes_next_is_told_on_stderr(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make_logger(uri, tmp_path)
    logger.finalize("success")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert sync.run([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err.endswith("\n    lace ui\n") and "next" not in printed.out

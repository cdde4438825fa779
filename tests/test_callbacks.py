"""Callbacks on real, tiny runs: when they log, what, and under which names."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lace_lightning.callbacks import (
    DiversityMonitor,
    GateMonitor,
    GroupWriter,
    SampleGroups,
    TagMonitor,
    ValidationTable,
)
from lace_lightning.callbacks import gates as gates_file
from lace_lightning.datamodules.problems import ProblemData
from lace_lightning.datamodules.traces import TraceData
from lace_lightning.diversity import edit_diversity, embedding_diversity
from lace_lightning.embedding import NgramEmbedder
from lace_lightning.exchange import Isolated, LatticeAttentionConfig, SameStepConfig
from lace_lightning.metrics import DESCRIPTIONS, EvaluationSummary, ReadingMetrics
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules import DecodingSpec, LatticeGRPO, SupervisedFinetuning
from lace_lightning.policy_loss import PolicyLoss
from lace_lightning.puzzles import Doors
from lace_lightning.rewards import AccuracyReward, DiversityReward
from lace_lightning.traces.template import Segment
from lace_lightning.tracking import MLflowLogger
from tests.viewer_helpers import island

NUM_THREADS = 3
QWEN = dict(
    model_type="qwen3", hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
LATTICE = LatticeAttentionConfig(scope="causal", width=8, heads=2)
IN_NAMES = {"<i>": r"\d+"} | dict.fromkeys(["<name>", "<statistic>", "<benchmark>", "<method>"], r"\w+")


class Recorder(MLflowLogger):
    """Our logger, of which nothing reaches a store."""

    def __init__(self, folder: Path) -> None:
        super().__init__(tracking_uri=f"sqlite:///{folder}/none.db", save_dir=str(folder / "runs"))
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[str, int]] = []
        self.tables: dict[str, list[list]] = {}
        self.texts: dict[str, list[str]] = {}

    version = "run-1"
    experiment = None

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_image(self, name, image, step=0):
        self.images.append((name, step))

    def log_table(self, rows, name):
        json.dumps(rows)
        self.tables.setdefault(name, []).append(rows)

    def log_text(self, text, artifact_file):
        self.texts.setdefault(artifact_file, []).append(text)

    def finalize(self, status):
        pass

    def steps_of(self, metric: str) -> list[int]:
        return [step for step, metrics in self.metrics if metric in metrics]

    def last(self, metric: str) -> float:
        return next(metrics[metric] for _, metrics in reversed(self.metrics) if metric in metrics)

    @property
    def names(self) -> set[str]:
        return {name for _, metrics in self.metrics for name in metrics} - {"epoch"}


@dataclass
class Run:
    """A finished run: its logger, trainer, module and what it printed."""

    logger: Recorder
    trainer: Trainer
    module: LatticeGRPO | SupervisedFinetuning
    printed: str = ""


def spec_of(exchange=LATTICE) -> ModelSpec:
    return ModelSpec(architecture=QWEN, exchange=exchange, num_threads=NUM_THREADS)


def problems(**options) -> ProblemData:
    settings = dict(num_train_problems=4, num_problems=5, batch_size=1, val_batch_size=2, max_length=32)
    return ProblemData(Doors(doors=(4,)), num_threads=NUM_THREADS, **settings | options)


def run(folder, callbacks, do="fit", exchange=LATTICE, module=None, data=None, logger=True, **options) -> Run:
    """Run GRPO on doors: 4 training batches, and 5 problems in validation batches of 2."""
    recorder = Recorder(folder)
    torch.manual_seed(0)
    decoding = DecodingSpec(max_new_tokens=12)
    if module is None:
        module = LatticeGRPO(spec_of(exchange), validation=decoding, rollout=decoding, groups_per_problem=2)
    trainer = Trainer(
        **dict(
            accelerator="cpu", max_epochs=1, logger=recorder if logger else False, callbacks=callbacks,
            default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=2, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )
        | options
    )  # fmt: skip
    printed = io.StringIO()
    with redirect_stdout(printed):
        getattr(trainer, do)(module, datamodule=data or problems())
    return Run(recorder, trainer, module, printed.getvalue())


def is_described(name: str) -> bool:
    patterns = (re.sub("<.*?>", lambda match: IN_NAMES[match.group()], key) for key in DESCRIPTIONS)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("every", "trainers", "steps"), [(1, 1, [0, 1, 2, 3]), (2, 1, [1, 3]), (3, 1, [2]), (9, 1, [])]
)
def test_training_metrics_come_every_n_steps(tmp_path, every, trainers, steps):
    callbacks = [DiversityMonitor(every), TagMonitor(every), SampleGroups(1, every)]
    logger = run(tmp_path, callbacks, log_every_n_steps=trainers, limit_val_batches=0).logger
    assert logger.steps_of("diversity/embedding") == logger.steps_of("train/tags/fmt") == steps
    assert len(logger.texts.get("samples/train.html", [])) == len(steps)
    assert [len(rows) for rows in logger.tables.get("samples_train", [])] == [NUM_THREADS] * len(steps)


@pytest.mark.parametrize(("trainers", "steps"), [(2, [1, 3]), (4, [3]), (0, [])])
def test_the_interval_defaults_to_that_of_the_trainer(tmp_path, trainers, steps):
    callbacks = [DiversityMonitor(), TagMonitor()]
    logger = run(tmp_path, callbacks, log_every_n_steps=trainers, limit_val_batches=0).logger
    assert logger.steps_of("diversity/edit") == logger.steps_of("train/tags/one_tag") == steps
    assert [step for step in logger.steps_of("reward/total")] == steps  # they share the modules' steps


def test_nothing_is_computed_when_nothing_is_due(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("computed though not due")

    for name in (
        "diversity.embedding_diversity",
        "diversity.edit_diversity",
        "tags.TagConfusion",
        "samples.viewer_page",
    ):
        monkeypatch.setattr(f"lace_lightning.callbacks.{name}", fail)
    run(tmp_path, [DiversityMonitor(9), TagMonitor(9), SampleGroups(1, 9)], limit_val_batches=0)
    run(tmp_path, [DiversityMonitor(1), TagMonitor(1)], logger=False, limit_val_batches=0)


def test_the_sanity_check_leaves_no_trace(tmp_path):
    callbacks = [GateMonitor(), TagMonitor(9), SampleGroups(2, 9), ValidationTable(during_fit=True)]
    done = run(tmp_path, callbacks, check_val_every_n_epoch=2)  # the sanity check is the only validation
    assert not done.logger.images and not done.logger.tables and not done.logger.texts and not done.printed
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize("num_batches", [1, 2, 9])
def test_gates_are_read_on_the_first_validation_batches(tmp_path, monkeypatch, num_batches):
    seen = []
    original = GateMonitor._read
    monkeypatch.setattr(GateMonitor, "_read", lambda *a: (seen.append(len(a[-1].input_ids)), original(*a))[1])
    run(tmp_path, [GateMonitor(num_batches)], do="validate")
    assert seen == [2, 2, 1][:num_batches]


# ---------------------------------------------------------------- what is logged


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """One fit with everything on: two epochs, so two validations."""
    callbacks = [GateMonitor(2), DiversityMonitor(), TagMonitor(), SampleGroups(3), ValidationTable(during_fit=True)]
    decoding = DecodingSpec(max_new_tokens=12)
    module = LatticeGRPO(
        spec_of(), validation=decoding, rollout=decoding, groups_per_problem=2, loss=PolicyLoss(kl_weight=0.1),
        rewards=[AccuracyReward(), DiversityReward(NgramEmbedder(), 1.0, name="spread")],
    )  # fmt: skip
    return run(tmp_path_factory.mktemp("fit"), callbacks, module=module, max_epochs=2)


def test_every_logged_metric_of_a_grpo_run_is_in_the_one_list(fitted):
    assert {name for name in fitted.logger.names if not is_described(name)} == set()
    families = {name.rpartition("/")[0] for name in fitted.logger.names}
    assert families == {
        *("val", "tags", "reward", "policy", "rollout", "time", "gate", "cross_ratio", "diversity", "train/tags")
    }
    assert {name for name in fitted.trainer.callback_metrics if not is_described(name)} == set()


def test_every_logged_metric_of_a_trace_run_and_a_test_is_in_the_one_list(tmp_path):
    module = SupervisedFinetuning(spec_of(), validation=DecodingSpec(max_new_tokens=8))
    data = TraceData(Doors(doors=(4,)), num_threads=NUM_THREADS, num_traces=4, num_problems=2, batch_size=2)
    callbacks = [GateMonitor(), DiversityMonitor(1), TagMonitor(1), SampleGroups(every_n_steps=1)]
    logger = run(tmp_path, callbacks, module=module, data=data).logger
    assert "train/loss" in logger.names and "gate/thought" in logger.names
    assert not any(name.startswith(("diversity/", "train/tags")) for name in logger.names)  # no rollouts
    assert list(logger.texts) == ["samples/val.html"]
    tested = run(tmp_path, [TagMonitor(), SampleGroups()], do="test", module=module, data=data).logger
    assert {"test/acc", "test/tags/fmt"} <= tested.names
    assert {name for name in logger.names | tested.names if not is_described(name)} == set()
    assert [name for name, _ in tested.images] == ["test/tags/confusion"]
    assert set(tested.tables) == {"test/tags", "samples_test"} and list(tested.texts) == ["samples/test.html"]


def test_validation_pictures_and_tables_come_once_per_validation_at_its_step(fitted):
    steps = fitted.logger.steps_of("val/acc")
    assert len(steps) == 2
    for name in ("gate/map", "cross_ratio/threads", "tags/confusion"):
        assert [step for image, step in fitted.logger.images if image == name] == steps
    for name in ("tags", "samples_val", "val_summary"):
        assert len(fitted.logger.tables[name]) == 2
    assert [rows[0]["num_groups"] for rows in fitted.logger.tables["val_summary"]] == [5, 5]  # not 5 and 10


def test_a_second_evaluation_starts_afresh(tmp_path):
    path = tmp_path / "summary.json"
    callbacks = [SampleGroups(9), ValidationTable(str(path))]
    for do in ("test", "test", "validate", "validate"):
        done = run(tmp_path, callbacks, do=do)
        phase = {"test": "test", "validate": "val"}[do]
        assert json.loads(path.read_text())["num_groups"] == 5
        assert len(done.logger.tables[f"samples_{phase}"][0]) == 5 * NUM_THREADS


def test_training_diversity_and_tags_are_those_of_the_batch(tmp_path, monkeypatch):
    seen = []
    step = LatticeGRPO.training_step
    monkeypatch.setattr(LatticeGRPO, "training_step", lambda *a: (seen.append(step(*a)), seen[-1])[1])
    done = run(tmp_path, [DiversityMonitor(), TagMonitor()], limit_val_batches=0)
    sampled = seen[-1]["sampled"]
    embedder = done.module.evaluation_metrics("val")[0].embedder
    assert done.logger.last("diversity/embedding") == pytest.approx(
        embedding_diversity(sampled.groups, embedder).mean()
    )
    edit = sum(map(edit_diversity, sampled.groups)) / len(sampled.groups)
    assert done.logger.last("diversity/edit") == pytest.approx(edit) and edit > 0
    one_tag = [thread.tag is not None for group in sampled.groups for thread in group.threads]
    assert done.logger.last("train/tags/one_tag") == pytest.approx(sum(one_tag) / len(one_tag))


def test_the_confusion_table_counts_every_thread_of_the_validation(fitted):
    rows = fitted.logger.tables["tags"][-1]
    assert [row["verdict"] for row in rows] == ["correct", "wrong", "unparsable"]
    assert list(rows[0]) == ["verdict", "[[best]]", "[[success]]", "[[fail]]", "none"]
    assert sum(value for row in rows for value in list(row.values())[1:]) == 5 * NUM_THREADS
    counts = fitted.module.evaluation_metrics("val")[1].compute()["confusion"]
    assert [list(row.values())[1:] for row in rows] == counts.tolist()


def test_gates_are_counted_for_every_token_that_the_threads_wrote(tmp_path, monkeypatch):
    seen, threads = [], []
    step, update = LatticeGRPO.validation_step, ReadingMetrics.update

    def step_and_keep(*args):
        outputs = step(*args)
        threads.extend(thread for group in outputs["sampled"].groups for thread in group.threads)
        return outputs

    def update_and_keep(metrics, readings, segments):
        update(metrics, readings, segments)
        seen.append(segments.flatten())

    monkeypatch.setattr(LatticeGRPO, "validation_step", step_and_keep)
    monkeypatch.setattr(ReadingMetrics, "update", update_and_keep)
    run(tmp_path, [GateMonitor(9)], do="validate", num_sanity_val_steps=0)
    counts = torch.cat(seen).bincount(minlength=6).tolist()
    assert counts[Segment.PROMPT] == 0
    assert counts[Segment.ENVIRONMENT] == sum(sum(thread.forced) for thread in threads) > 0
    assert sum(counts[Segment.THOUGHT :]) == sum(thread.num_tokens for thread in threads)


def test_gate_scalars_do_not_depend_on_how_the_batch_was_split(tmp_path, monkeypatch):
    whole = run(tmp_path, [GateMonitor(9)], do="validate").logger
    monkeypatch.setattr(gates_file, "_MAX_PAIRS", 1)  # one group at a time
    split = run(tmp_path, [GateMonitor(9)], do="validate").logger
    names = {name for name in whole.names if name.startswith(("gate/", "cross_ratio/"))}
    assert {"gate/layer_1", "gate/thought", "gate/environment", "cross_ratio/mean"} <= names
    assert {name: split.last(name) for name in names} == pytest.approx({name: whole.last(name) for name in names})


@pytest.mark.parametrize("exchange", [Isolated(), SameStepConfig(width=8, heads=2)])
def test_without_gates_the_monitor_says_so_once_and_logs_nothing(tmp_path, caplog, exchange):
    with caplog.at_level("INFO"):
        module = SupervisedFinetuning(spec_of(exchange), validation=DecodingSpec(max_new_tokens=4))
        data = TraceData(Doors(), num_threads=NUM_THREADS, num_traces=2, num_problems=2, batch_size=2)
        logger = run(tmp_path, [GateMonitor()], module=module, data=data, max_epochs=3).logger
    assert sum("GateMonitor: no gates to watch" in record.message for record in caplog.records) == 1
    assert not logger.images and not any(name.startswith(("gate", "cross")) for name in logger.names)


def test_sample_groups_are_the_first_ones_in_table_page_and_folder(fitted):
    table, page = fitted.logger.tables["samples_val"][-1], fitted.logger.texts["samples/val.html"][-1]
    assert [row["problem"] for row in table[::NUM_THREADS]] == [f"doors-test-{number}" for number in range(3)]
    assert [row["thread"] for row in table] == [*range(NUM_THREADS)] * 3
    assert [row["id"] for row in island(page)["rows"]] == [row["problem"] for row in table[::NUM_THREADS]]
    written = Path(fitted.logger.save_dir, "lace", "run-1", "samples", "val.html")
    assert written.read_text() == page


def test_sample_texts_of_the_table_are_bounded():
    from lace_lightning.callbacks.samples import sample_rows
    from tests.hand_built import BEST, RIGHT, group, thread

    (row,) = sample_rows([(group([thread("9" * 9999, BEST, "x" * 9999)]), [RIGHT])])
    assert len(row["text"]) == len(row["answer"]) == 4000
    assert row["chosen"] and row["tag"] == "[[best]]" and row["verdict"] == "correct"


def test_samples_are_written_without_a_logger_too(tmp_path):
    run(tmp_path, [SampleGroups(2), TagMonitor(), GateMonitor()], do="validate", logger=False)
    (page,) = tmp_path.rglob("val.html")
    assert len(island(page.read_text())["rows"]) == 2


# ---------------------------------------------------------------- validation table


def test_the_validation_table_prints_and_writes_what_the_metrics_say(tmp_path):
    path = tmp_path / "new" / "summary.json"
    done = run(tmp_path, [ValidationTable(str(path))], do="validate")
    summary = json.loads(path.read_text())
    groups, tags = done.module.evaluation_metrics("val")
    expected = {name: value.item() for name, value in groups.compute().items()}
    assert summary["metrics"] == pytest.approx(expected | {"one_tag": tags.compute()["one_tag"].item()})
    assert {name: tuple(pair) for name, pair in summary["intervals"].items()} == groups.intervals()
    assert summary["num_groups"] == 5
    assert summary["ceiling"] == pytest.approx(1 - (1 - 2 / 4) ** NUM_THREADS)
    for shown in ("metric", "95 % interval", "ceiling", "0.875", "best_at_n", f"{expected['tokens']:.1f}"):
        assert shown in done.printed
    (rows,) = done.logger.tables["val_summary"]
    assert rows[0] == {
        "metric": "acc", "value": expected["acc"], "low": summary["intervals"]["acc"][0],
        "high": summary["intervals"]["acc"][1], "num_groups": 5,
    }  # fmt: skip
    assert rows[-1] == {"metric": "ceiling", "value": 0.875, "low": None, "high": None, "num_groups": 5}
    assert not list(path.parent.glob(".*"))


def test_the_ceiling_is_the_mean_over_the_evaluated_problems_and_only_if_all_have_one(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    ceilings = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.1, None, 0.3, 0.4, 0.5])
    monkeypatch.setattr(Doors, "success_ceiling", lambda *a: next(ceilings))
    run(tmp_path, [ValidationTable(str(path))], do="validate")
    assert json.loads(path.read_text())["ceiling"] == pytest.approx(0.3)
    assert "ceiling" not in run(tmp_path, [ValidationTable(str(path))], do="test").printed
    assert json.loads(path.read_text())["ceiling"] is None


def test_a_fit_prints_the_table_only_if_asked_to(tmp_path, fitted):
    assert fitted.printed.count("95 % interval") == 2
    assert "95 %" not in run(tmp_path, [ValidationTable()]).printed


def test_numbers_that_are_not_finite_become_null_in_json():
    nan = float("nan")
    summary = EvaluationSummary({"acc": nan}, {"acc": (nan, nan)}, 0, None)
    assert summary.as_json() == {
        "metrics": {"acc": None},
        "intervals": {"acc": [None, None]},
        "num_groups": 0,
        "ceiling": None,
    }
    assert summary.rows() == [{"metric": "acc", "value": None, "low": None, "high": None, "num_groups": 0}]
    json.dumps(summary.as_json(), allow_nan=False)


# ---------------------------------------------------------------- group writer


def test_predicted_groups_are_written_line_by_line_as_they_were_decoded(tmp_path, monkeypatch):
    path = tmp_path / "new" / "groups.jsonl"
    lines_after_batch, batches = [], []
    predict = LatticeGRPO.predict_step

    def predict_and_look(*args):
        lines_after_batch.append(len(path.read_text().splitlines()))
        batches.append(predict(*args))
        return batches[-1]

    monkeypatch.setattr(LatticeGRPO, "predict_step", predict_and_look)
    run(tmp_path, [GroupWriter(str(path))], do="predict", logger=False)
    assert lines_after_batch == [0, 2, 4]  # flushed after every batch
    groups = [
        (group, verdicts) for batch in batches for group, verdicts in zip(batch.groups, batch.verdicts, strict=True)
    ]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(groups) == 5
    for record, (group, verdicts) in zip(records, groups, strict=True):
        assert (record["problem"], record["answer"], record["seed"]) == (
            group.problem.id,
            group.problem.answer,
            group.seed,
        )
        assert (record["best"] is None) == (group.best is None)
        for written, thread, verdict in zip(record["threads"], group.threads, verdicts, strict=True):
            assert (written["text"], written["answer"]) == (thread.text, thread.answer)
            assert (written["tag"], written["verdict"], written["finished"]) == (thread.tag, verdict, thread.finished)
            assert (written["token_ids"], written["columns"]) == (list(thread.token_ids), list(thread.columns))
            assert [index in written["forced"] for index in range(thread.num_tokens)] == list(thread.forced)


def test_predictions_of_before_are_only_replaced_on_request(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text("precious\n")
    with pytest.raises(ValueError, match="groups.jsonl.*overwrite: true"):
        run(tmp_path, [GroupWriter(str(path))], do="predict", logger=False)
    assert path.read_text() == "precious\n"
    run(tmp_path, [GroupWriter(str(path), overwrite=True)], do="predict", logger=False)
    assert len(path.read_text().splitlines()) == 5 and "precious" not in path.read_text()


def test_other_stages_leave_the_file_of_predictions_alone(tmp_path):
    path = tmp_path / "groups.jsonl"
    run(tmp_path, [GroupWriter(str(path))], do="validate", logger=False)
    assert not path.exists()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateMonitor(0), "num_batches=0"),
        (lambda: DiversityMonitor(0), "every_n_steps=0"),
        (lambda: TagMonitor(-1), "every_n_steps=-1"),
        (lambda: SampleGroups(num_groups=0), "num_groups=0"),
        (lambda: SampleGroups(every_n_steps=0), "every_n_steps=0"),
        (lambda: ValidationTable("."), "path='.'"),
        (lambda: GroupWriter("."), "path='.'"),
    ],
)
def test_bad_arguments_are_named_before_anything_starts(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_modules_of_other_kinds_are_refused_with_a_reason(tmp_path):
    from tests.tracking_helpers import TinyModel, tiny_trainer

    with pytest.raises(TypeError, match="stages of lace_lightning.modules, not TinyModel"):
        tiny_trainer(tmp_path, callbacks=[TagMonitor()]).validate(TinyModel())

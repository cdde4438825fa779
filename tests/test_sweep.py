"""Sweeps: plans, shared stages, bookkeeping, statistics. Commands are replaced by quick ones; nothing is trained."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from mlflow.tracking import MlflowClient
from rich.console import Console

from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.sweep import _again
from lace_lightning.evaluation.store import Store as EvaluationStore
from lace_lightning.evaluation.store import StoreError
from lace_lightning.sweep import process as process_module
from lace_lightning.sweep import runner as runner_module
from lace_lightning.sweep import study as study_module
from lace_lightning.sweep import worker as worker_module
from lace_lightning.sweep.figure import figure, kind_of
from lace_lightning.sweep.outcome import OUTCOMES, measure, value_of
from lace_lightning.sweep.plan import PlannedStage, data_of, difference, plan
from lace_lightning.sweep.points import _draw, planned_points
from lace_lightning.sweep.process import CommandFailed, Room, Stopped
from lace_lightning.sweep.reading import read_sweep
from lace_lightning.sweep.report import as_csv, markdown, table
from lace_lightning.sweep.runner import Runner, RunOptions
from lace_lightning.sweep.spec import (
    Axis,
    Change,
    EvaluationSettings,
    Limits,
    StageSpec,
    SweepError,
    SweepSpec,
    Tracking,
)
from lace_lightning.sweep.store import Store
from lace_lightning.sweep.study import Ledger
from lace_lightning.sweep.table import Measured, Result, compare, crossed, measured_rows, over_seeds, sign_flip
from lace_lightning.sweep.units import Unit
from lace_lightning.sweep.worker import is_dead, this_worker
from lace_lightning.tracking.note import NOTE
from tests.viewer_helpers import outcome, passage


def make_sweep(tmp_path, **changes) -> SweepSpec:
    base = {
        "name": "quick",
        "stages": {
            "backbone": StageSpec(["configs/demo/base.yaml", "configs/demo/pretrain.yaml"]),
            "sft": StageSpec(["configs/demo/base.yaml", "configs/demo/sft.yaml"], after=["backbone"]),
        },
        "applies_to": ["sft"],
        "evaluation": EvaluationSettings(["configs/sweeps/ground/doors_eval.yaml"]),
        "search": "grid",
        "axes": {"jitter": Axis(key="data.init_args.jitter", values=[0, 1])},
        "seeds": [0, 1],
        "output": str(tmp_path / "sweeps" / "quick"),
    }
    return SweepSpec(**{**base, **changes})


JITTER = Axis(key="data.init_args.jitter", values=[0])


# ---------------------------------------------------------------- plans


def test_a_grid_is_the_product_and_random_draws_stay_in_their_ranges(tmp_path):
    axes = {"a": Axis(key="x", values=[1, 2]), "b": Axis(key="y", values=[0.5, 3, 4])}
    points = planned_points(make_sweep(tmp_path, axes=axes))
    assert [tuple(point.values.values()) for point in points] == [*product([1, 2], [0.5, 3, 4])]
    assert points[0].label == "a=1, b=0.5" and points[0].changes[1].set == {"y": 0.5}
    axes = {"lr": Axis(key="x", range=[1e-4, 1e-1], log=True), "n": Axis(key="y", range=[2, 5], integer=True)}
    sweep = make_sweep(tmp_path, search="random", axes=axes, limits=Limits(trials=50))
    drawn = planned_points(sweep)
    assert drawn == planned_points(sweep)
    assert all(1e-4 <= point.values["lr"] <= 1e-1 and point.values["n"] in (2, 3, 4, 5) for point in drawn)
    assert 0.2 < np.mean([point.values["lr"] < 10**-2.5 for point in drawn]) < 0.8  # even on a logarithmic scale


def test_random_whole_numbers_are_drawn_alike_also_at_the_ends_of_their_range(tmp_path):
    axis, generator = Axis(key="x", range=[1, 3], integer=True), random.Random(0)
    drawn = Counter(_draw(axis, generator) for _ in range(3000))
    assert set(drawn) == {1, 2, 3} and all(900 < count < 1100 for count in drawn.values())


def test_stages_with_equal_settings_seed_and_data_are_one_and_others_are_not(tmp_path):
    trials = plan(make_sweep(tmp_path))
    backbones = {trial.stages[0].digest: trial.seed for trial in trials}
    assert len(backbones) == 2 and len({trial.stages[1].digest for trial in trials}) == 4
    data = tmp_path / "traces.jsonl"
    sft = StageSpec(["configs/demo/base.yaml", "configs/demo/sft.yaml"], set={"data.init_args.traces": str(data)})
    digests = []
    for content in ("one", "two", "one"):
        data.write_text(content)
        digests.append(plan(make_sweep(tmp_path, stages={"sft": sft}))[0].stages[0].digest)
    assert digests[0] == digests[2] != digests[1]


def test_a_stage_is_another_one_after_another_stage_and_the_same_with_other_workers(tmp_path):
    def digests(backbone=(), sft=()):
        stages = dict(make_sweep(tmp_path).stages)
        stages |= {
            name: replace(stages[name], set=dict(own)) for name, own in {"backbone": backbone, "sft": sft}.items()
        }
        (trial,) = plan(make_sweep(tmp_path, stages=stages, axes={"x": JITTER}, seeds=[7]))
        assert trial.evaluation["seeds"] == [7]
        return [stage.digest for stage in trial.stages]

    before = digests()
    assert digests(sft={"data.init_args.num_workers": 3, "trainer.enable_progress_bar": False}.items()) == before
    other = digests(backbone={"trainer.max_steps": 7}.items())
    assert other[0] != before[0] and other[1] != before[1]


def test_the_digest_of_a_folder_is_of_what_its_files_hold(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("one")
    before = data_of({"spec": [str(tmp_path / "model")]})
    (tmp_path / "model" / "weights").write_text("two")  # as many bytes
    assert data_of({"spec": [str(tmp_path / "model")]}) != before
    monkeypatch.chdir(tmp_path / "model")
    texts = [".", "..", str(tmp_path), "no file", "x" * 300, "a\0b", ""]  # nor does a long prompt break it
    assert data_of(texts) == {}


def test_a_stage_starts_from_stages_before_it(tmp_path):
    stages = {"sft": StageSpec(["a.yaml"], after=["backbone"]), "backbone": StageSpec(["b.yaml"])}
    with pytest.raises(SweepError, match="stages.sft.after names 'backbone', and the stages before it are none"):
        make_sweep(tmp_path, stages=stages)


def test_the_plan_tells_what_differs_from_the_base_and_nothing_else(tmp_path):
    base, other = plan(make_sweep(tmp_path, seeds=[3]))
    assert list(difference(other, base)) == ["sft: data.init_args.jitter: 0 -> 1"]
    assert base.stages[1].settings["seed_everything"] == 3


def test_values_that_name_classes_import_nothing(tmp_path):
    path = tmp_path / "sweep.yaml"
    value = "{class_path: antigravity.Rocket}"
    path.write_text(
        f"extends: {SHIPPED}/sweeps/ground/doors.yaml\nname: x\nsearch: grid\n"
        f"axes:\n  a: {{choices: {{one: {{set: {{key: {value}}}}}}}}}\n  b: {{key: key, values: [{value}]}}\n"
    )
    sweep = read_sweep(str(path))
    assert (
        sweep.axes["a"].choices["one"].set["key"] == sweep.axes["b"].values[0] == {"class_path": "antigravity.Rocket"}
    )
    assert "antigravity" not in sys.modules


def test_a_file_that_extends_itself_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nname: x\n")
    (tmp_path / "b.yaml").write_text("extends: [a.yaml]\n")
    with pytest.raises(SweepError, match="a.yaml lies beneath itself"):
        read_sweep(str(tmp_path / "a.yaml"))


# ---------------------------------------------------------------- shared stages


def a_stage(digest="a" * 40):
    return PlannedStage("sft", {}, (), digest)


def test_a_chain_hands_on_weights_goes_on_where_it_was_cut_off_and_begins_anew_after_a_failure(tmp_path, monkeypatch):
    calls, ending = [], {}

    def run(room, arguments, log):
        calls.append((log.parent.name.partition("-")[0], arguments[2:]))
        if arguments[0] == "fit":
            (log.parent / "checkpoints").mkdir(exist_ok=True)
            (log.parent / "checkpoints" / "last.ckpt").touch()
        if calls[-1][0] in ending:
            raise ending.pop(calls[-1][0])

    monkeypatch.setattr(Room, "run", run)
    stages = dict(make_sweep(tmp_path).stages)
    stages["more"] = StageSpec(stages["sft"].configs, after=["backbone", "sft"])
    (trial,) = plan(make_sweep(tmp_path, stages=stages, axes={"x": JITTER}, seeds=[0]))
    store = Store(tmp_path, Room(), tell=lambda _: None)
    ending |= {"sft": Stopped("sft"), "more": CommandFailed("more")}
    for error in (Stopped, CommandFailed):
        with pytest.raises(error):
            store.run(trial)
    folder = store.run(trial)
    backbone, sft, more = (str(tmp_path / stage.folder / "checkpoints" / "last.ckpt") for stage in trial.stages)
    resumed = [f"--ckpt_path={sft}"]
    assert calls == [
        ("backbone", []), ("sft", []), ("sft", resumed), ("more", []), ("more", []), ("eval", []),
    ]  # fmt: skip
    settings = yaml.safe_load((tmp_path / trial.stages[2].folder / "stage.yaml").read_text())
    assert settings["model"]["init_args"]["init_from"] == [backbone, sft]
    settings = yaml.safe_load((folder / "evaluation.yaml").read_text())
    assert settings["policies"]["trained"]["init_from"] == [backbone, sft, more]


def test_two_workers_that_want_one_stage_train_it_once(tmp_path):
    done = []

    def work(folder):
        time.sleep(0.3)
        done.append(folder)

    store = Store(tmp_path, Room(), tell=lambda _: None)
    threads = [threading.Thread(target=store._once, args=("stage", work)) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(done) == 1 and store.is_done("stage")


def test_waiting_for_anothers_stage_does_not_count_against_the_trials_time(tmp_path):
    (tmp_path / "stage").mkdir()
    with (tmp_path / "stage" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        room = Room(deadline=time.monotonic() + 0.3)
        work = threading.Thread(target=Store(tmp_path, room, tell=lambda _: None)._once, args=("stage", Path.exists))
        work.start()
        time.sleep(1)
        assert work.is_alive()
    work.join(5)
    assert (tmp_path / "stage" / "done.json").exists()
    room.check("lace fit")  # some of its 0.3 seconds is left


def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path):
    (tmp_path / "stage").mkdir()
    hold = "import fcntl,sys,time;f=open(sys.argv[1],'a');fcntl.flock(f,2);print('held',flush=True);time.sleep(9)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "stage" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    done = []
    store = Store(tmp_path, Room(), tell=lambda _: None)
    waiting = threading.Thread(target=store._once, args=("stage", done.append))
    waiting.start()
    time.sleep(0.5)
    assert not done
    holder.kill()
    waiting.join(5)
    assert len(done) == 1


def test_a_command_that_fails_hangs_or_is_stopped_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the demo writes there
    log = tmp_path / "log"
    with pytest.raises(CommandFailed, match="lace nonsense ended with code 2"):
        Room().run(["nonsense"], log)
    with pytest.raises(CommandFailed, match="took longer"):
        Room(deadline=time.monotonic() + 0.2).run(["demo"], log)
    room = Room()
    room.stop.set()
    with pytest.raises(Stopped):
        room.run(["demo"], log)


def test_a_command_may_save_before_it_ends_and_is_killed_if_it_does_not_end(monkeypatch):
    monkeypatch.setattr(process_module, "GRACE_SECONDS", 1.0)
    for handler, code in [("sys.exit(7)", 7), ("None", -signal.SIGKILL)]:
        program = f"import signal,sys,time;signal.signal(15,lambda *_:{handler});print(1,flush=True);time.sleep(9)"
        process = subprocess.Popen(
            [sys.executable, "-c", program + ";time.sleep(9)"], stdout=subprocess.PIPE, start_new_session=True
        )
        process.stdout.readline()
        process_module._end(process)
        assert process.returncode == code


def test_the_reason_of_a_failure_is_from_this_attempt(tmp_path):
    log = tmp_path / "log"
    log.write_text("MemoryError: of the attempt before\n")
    with pytest.raises(CommandFailed, match="give one model") as caught:
        Room().run(["generate", "two words"], log)
    assert "MemoryError" not in str(caught.value) and "$ lace generate 'two words'" in log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_command_does_not_outlive_a_sweep_that_is_killed(tmp_path):
    parent = (
        "import subprocess,sys,os;c=subprocess.Popen([sys.executable,'-c','import lace_lightning.sweep.child as c,time;"
        "c._end_with('+str(os.getpid())+');print(1,flush=True);time.sleep(60)']); print(c.pid,flush=True); c.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


# ---------------------------------------------------------------- bookkeeping


def test_finished_trials_stay_failed_ones_wait_for_a_retry_and_lost_ones_go_on(tmp_path):
    units = [Unit(str(i), f"row {i}", (0,)) for i in range(3)]
    ledger = Ledger(f"sqlite:///{tmp_path}/study.db", "s", "maximize")
    claims = [ledger.claim(units) for _ in range(3)]
    assert [claim.unit.key for claim in claims] == ["0", "1", "2"] and ledger.claim(units) is None
    assert ledger.finish(claims[0], 0.5, {}) and ledger.fail(claims[1], "it broke") and ledger.give_back(claims[2])
    again = Ledger(f"sqlite:///{tmp_path}/study.db", "s", "maximize")
    lost = again.claim(units)
    assert lost.unit.key == "2" and again.claim(units) is None
    retried = again.claim(units, frozenset([claims[1].number]))
    assert retried.unit.key == "1" and again.claim(units, frozenset([claims[1].number])) is None
    assert again.finish(retried, 0.7, {}) and not again.finish(claims[1], 0.1, {})
    assert {key: state for key, (state, _) in again.states().items()} == {
        "0": "finished", "1": "finished", "2": "running",
    }  # fmt: skip


def test_a_trial_gives_signs_of_life_while_it_runs(tmp_path, monkeypatch):
    ledger = Ledger(f"sqlite:///{tmp_path}/study.db", "s", "maximize", heartbeat=1)
    claim = ledger.claim([Unit("0", "row", (0,))])
    signs = []
    monkeypatch.setattr(ledger._storage, "record_heartbeat", signs.append)
    with ledger.alive(claim):
        time.sleep(1.5)
    assert signs == [claim.trial_id]


def test_the_trial_of_a_process_that_died_here_is_free_at_once(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    program = f"""
from lace_lightning.sweep.study import Ledger
from lace_lightning.sweep.units import Unit
Ledger({url!r}, "s", "maximize").claim([Unit("0", "row", (0,))])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert Ledger(url, "s", "maximize").claim([Unit("0", "row", (0,))]) is not None


def test_nothing_is_known_of_processes_of_another_machine_of_the_same_name(tmp_path, monkeypatch):
    program = "import json;from lace_lightning.sweep.worker import this_worker as w;print(json.dumps(w()))"
    ended = json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)
    assert is_dead(ended) and not is_dead(this_worker())
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(worker_module, "_BOOT", tmp_path / "boot")
    assert not is_dead(ended)


def test_storage_that_cannot_be_used_is_named_without_its_password(tmp_path):
    with pytest.raises(SweepError, match="neither sqlite"):
        Ledger("mysql://me@host/db", "s", "maximize")
    pytest.importorskip("psycopg")
    with pytest.raises(SweepError, match="cannot be used") as caught:
        Ledger("postgresql://me:secret@127.0.0.1:1/db", "s", "maximize")
    assert "secret" not in str(caught.value)


def test_another_search_in_a_storage_is_named_without_its_password(tmp_path, monkeypatch):
    class Memory:
        alone, optuna = nullcontext, optuna.storages.InMemoryStorage()

    monkeypatch.setattr(study_module, "Storage", lambda *_: Memory)
    Ledger("postgresql://me:secret@host/db", "s", "maximize", search="acc")
    with pytest.raises(SweepError, match="s in postgresql://host/db is another search"):
        Ledger("postgresql://me:secret@host/db", "s", "maximize", search="fmt")


# ---------------------------------------------------------------- whole sweeps, with quick commands


@pytest.fixture
def ran(monkeypatch):
    """What was run: each command of a trial writes what it should; jitter 1 is better by 0.5."""
    commands = []

    def run(room, arguments, log):
        folder = log.parent
        commands.append(folder.name)
        if folder.name in ran_state["failing"]:
            raise CommandFailed("out of memory")
        if arguments[0] == "fit":
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()

    def measure(sweep, folder):
        jitter = ran_state["values"][folder.name]
        numbers = [jitter / 2 + problem % 2 / 2 for problem in range(10)]
        return {"lace": {"problems": list(range(10)), "values": {"acc": numbers}}}

    ran_state = {"failing": set(), "values": {}}
    monkeypatch.setattr(Room, "run", run)
    monkeypatch.setattr(runner_module, "measure", measure)
    return commands, ran_state


def start(sweep, ran, **options) -> Runner:
    runner = Runner(sweep, RunOptions("quick.yaml", **options), tell=lambda _: None)
    ran[1]["values"] |= {trial.folder: trial.point.values["jitter"] for trial in runner.trials.values()}
    return runner


def test_a_failed_trial_is_recorded_the_rest_go_on_and_a_retry_does_only_what_is_missing(tmp_path, ran):
    commands, state = ran
    sweep = make_sweep(tmp_path, columns=[])
    runner = start(sweep, ran, workers=2)
    broken = [*runner.trials.values()][1].stages[1].folder
    state["failing"] = {broken}
    result = runner.run()
    assert [label for label, _ in result.failures] == ["jitter=1, seed 0"] and result.num_open == 0
    assert "out of memory" in (tmp_path / "sweeps/quick/report.md").read_text()
    assert sorted(commands) == sorted(set(commands)) and len(commands) == 2 + 4 + 3  # backbones, sft, evaluations
    commands.clear()
    state["failing"] = set()
    assert start(sweep, ran).run().failures and not commands  # not asked to
    result = start(sweep, ran, retry_failed=True).run()
    assert commands == [broken, [*runner.trials.values()][1].folder] and not result.failures
    assert [row.metric.value for row in result.rows] == [0.25, 0.75]
    assert result.rows[1].difference.value == 0.5 and [*result.rows[1].measured.by_seed] == [0, 1]
    assert (tmp_path / "sweeps/quick/report.png").stat().st_size > 1000


def test_a_metric_without_any_number_fails_its_trial_and_a_damaged_evaluation_too(tmp_path, ran, monkeypatch):
    sweep = make_sweep(tmp_path, columns=[])
    runner = start(sweep, ran)
    broken = [trial.folder for trial in runner.trials.values()]

    def measure(sweep, folder):
        if folder.name == broken[0]:
            raise StoreError("line 3 is no outcome")
        return {"lace": {"problems": [0], "values": {"acc": [None if folder.name == broken[1] else 1.0]}}}

    monkeypatch.setattr(runner_module, "measure", measure)
    result = runner.run()
    assert [reason.partition(" for method")[0] for _, reason in result.failures] == [
        "line 3 is no outcome", "metric='acc' has no number on any problem",
    ]  # fmt: skip
    assert len(result.rows) == 2 and result.num_open == 0
    told = json.loads((tmp_path / "sweeps/quick/report.json").read_text(), parse_constant=pytest.fail)
    assert set(told["means"].values()) == {1.0}


def test_rows_with_equal_settings_share_a_trial_and_are_both_in_the_table(tmp_path, ran):
    rows = {"base": Change(), "same": Change(set={"data.init_args.jitter": 0})}
    sweep = make_sweep(tmp_path, search="list", axes={}, rows=rows, columns=[])
    runner = Runner(sweep, RunOptions("quick.yaml"), tell=lambda _: None)
    ran[1]["values"] = {trial.folder: 0 for trial in runner.trials.values()}
    result = runner.run()
    assert [row.measured.label for row in result.rows] == ["base", "same"] and result.num_open == 0
    assert result.rows[1].difference.value == 0 and len(ran[0]) == 2 * 3  # of two seeds: backbone, sft, evaluation
    assert runner.outcomes_of("same") == runner.outcomes_of("base")


def test_another_benchmark_or_column_is_measured_from_what_was_evaluated(tmp_path, ran, monkeypatch):
    def measure(sweep, folder):
        values = {name: [1.0 if sweep.benchmark else 0.0] for name in ["acc", *sweep.columns]}
        return {"lace": {"problems": [0], "values": values}}

    monkeypatch.setattr(runner_module, "measure", measure)
    start(make_sweep(tmp_path, columns=[]), ran).run()
    ran[0].clear()
    result = start(make_sweep(tmp_path, columns=["fmt"], benchmark="doors"), ran).run()
    assert [(row.metric.value, row.columns["fmt"]) for row in result.rows] == [(1.0, 1.0)] * 2 and not ran[0]


def test_nothing_is_compared_with_another_row_while_the_base_has_no_result(tmp_path, ran):
    axes = {"jitter": Axis(key="data.init_args.jitter", values=[0, 1, 2])}
    sweep = make_sweep(tmp_path, axes=axes, seeds=[0], columns=[], tracking=Tracking(uri=f"sqlite:///{tmp_path}/ml.db"))
    runner = start(sweep, ran)
    ran[1]["failing"] = {[*runner.trials.values()][0].folder}
    result = runner.run()
    assert [row.measured.label for row in result.rows] == ["jitter=1", "jitter=2"]
    assert np.isnan([row.difference.value for row in result.rows]).all()
    assert "| base |" not in markdown(result) and "nan" not in markdown(result)
    note = MlflowClient(sweep.tracking.uri).get_run(runner.parent).data.tags[NOTE]
    assert "Best acc: jitter=2, 1.250. " in f"{note} "


def test_methods_and_benchmarks_come_in_the_order_of_the_evaluation(tmp_path):
    records = [
        replace(outcome(passage(0, ["x"])), benchmark=benchmark, method=method, statistics={"acc": acc})
        for benchmark, method, acc in [("b", "second", 0.0), ("a", "second", 0.25), ("a", "first", 1.0)]
    ]
    display = {"reference": "first", "methods": ["first", "second"], "benchmarks": ["a", "b"]}
    with EvaluationStore(tmp_path / OUTCOMES, {"methods": {}}, display) as store:
        store.add(records)
    sweep = make_sweep(tmp_path, columns=[])
    found = measure(sweep, tmp_path)
    assert [*found] == ["first", "second"] and value_of(sweep, [found]) == 1.0
    assert [*measure(replace(sweep, benchmark="b"), tmp_path)] == ["second"]


def test_the_parent_run_says_what_it_is_how_to_repeat_it_and_how_it_went(tmp_path, ran):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = make_sweep(tmp_path, columns=[], description="Jitter helps.", tracking=Tracking(uri=uri))
    commands, state = ran
    runner = start(sweep, ran)
    broken = [*runner.trials.values()][-1].folder
    state["failing"] = {broken}
    runner.run()
    client = MlflowClient(uri)
    failed = client.get_run(runner.parent)
    assert failed.info.status == "FAILED" and "1 trials failed" in failed.data.tags[NOTE]
    state["failing"] = set()
    again = start(sweep, ran, retry_failed=True)
    again.run()
    assert again.parent == runner.parent
    run = client.get_run(runner.parent)
    note = run.data.tags[NOTE]
    assert run.info.status == "FINISHED" and run.data.tags["lace.stage"] == "sweep"
    assert "**Sweep** `quick`. Jitter helps." in note and "```\nlace sweep quick.yaml\n```" in note
    assert "2 rows are measured. Best acc: jitter=1, 0.750 (+0.500 to the base)." in note and "finished after" in note
    assert run.data.metrics["acc/jitter_1"] == 0.75 and run.data.metrics["acc_difference/jitter_1"] == 0.5
    files = {file.path for file in client.list_artifacts(runner.parent)}
    assert files == {"report.md", "report.csv", "report.json", "report.png", "sweep.yaml"}


def test_a_store_that_is_away_at_the_end_takes_no_table_with_it(tmp_path, ran):
    told = []
    sweep = make_sweep(tmp_path, columns=[], tracking=Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    runner = start(sweep, ran)
    runner.tell, runner.parent = told.append, "0" * 32  # MLflow does not know such a run
    assert [row.metric.value for row in runner.run().rows] == [0.25, 0.75]
    assert "not in MLflow; the same command sends it again." in told[-1] and "not found" in told[-1]


def test_the_end_of_the_time_is_told_once(tmp_path, ran, monkeypatch):
    told = []
    sweep = make_sweep(tmp_path, columns=[], limits=Limits(total_minutes=1e-3))

    def run(room, arguments, log):
        room.stop.wait(5)
        time.sleep(0.5)
        room.check("lace fit")

    monkeypatch.setattr(Room, "run", run)
    runner = Runner(sweep, RunOptions("quick.yaml"), tell=told.append)
    result = runner.run()
    assert result.num_open == 4 and not result.failures  # what was cut off goes on with the next call
    assert sum("total_minutes" in line for line in told) == 1


def test_workers_get_the_gpus_in_turn_and_share_the_cores(tmp_path, ran, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runner = start(make_sweep(tmp_path), ran, workers=3, gpus=["3", "5"])
    assert [runner._environment(index)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == ["3", "5", "3"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(runner._environment(0)["OMP_NUM_THREADS"]) == max(1, cores // 3)
    assert "CUDA_VISIBLE_DEVICES" not in start(make_sweep(tmp_path), ran)._environment(0)


def test_tpe_suggests_as_many_trials_as_the_limit_and_each_runs_all_seeds(tmp_path, ran, monkeypatch):
    axes = {"jitter": Axis(key="data.init_args.jitter", range=[0, 3], integer=True)}
    sweep = make_sweep(tmp_path, search="tpe", axes=axes, limits=Limits(trials=4), columns=[])

    def measure(sweep, folder):
        return {"lace": {"problems": [0, 1], "values": {"acc": [0.0, 1.0]}}}

    monkeypatch.setattr(runner_module, "measure", measure)
    result = Runner(sweep, RunOptions("quick.yaml"), tell=lambda _: None).run()
    assert result.num_open == 0 and all(len(row.measured.by_seed) == 2 for row in result.rows)
    assert len(Runner(sweep, RunOptions("quick.yaml")).ledger.states()) == 4
    for change in ({"seeds": [5]}, {"direction": "minimize"}, {"method": "vote"}, {"applies_to": []}):
        with pytest.raises(SweepError, match="another search"):
            Runner(make_sweep(tmp_path, **{"search": "tpe", "axes": axes, "columns": [], **change}), RunOptions("q"))


# ---------------------------------------------------------------- statistics


def test_the_interval_over_seeds_is_students():
    from scipy import stats

    values = [np.full(4, mean) for mean in (0.2, 0.5, 0.35)]
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=0.35, scale=stats.sem([0.2, 0.5, 0.35]))
    assert (found.value, found.low, found.high) == pytest.approx((0.35, low, high))
    means = np.random.default_rng(0).random(31)
    found = over_seeds([np.full(4, mean) for mean in means])
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 30, means.mean(), stats.sem(means)))


def test_a_seed_without_a_number_counts_neither_in_the_mean_nor_in_the_difference(tmp_path):
    def measured(label, *by_seed):
        own = {seed: {"problems": [0, 1], "values": {"acc": values}} for seed, values in enumerate(by_seed)}
        return Measured(label, label, {"row": label}, "lace", own)

    rows = [
        measured("base", [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]),
        measured("other", [1.0, 1.0], [None, None], [1.0, None]),
    ]
    sweep = make_sweep(tmp_path, columns=[])
    _, other = compare(sweep, rows)
    assert other.metric.value == 1.0 and other.difference.value == 0.5  # problem 0 of seeds 0 and 2
    empty = compare(sweep, [rows[0], measured("none", [None, None], [None, None])])[1]
    assert np.isnan([empty.metric.value, empty.difference.value, empty.p_value]).all()


def test_methods_of_a_single_row_are_compared_with_the_base_method_also_if_the_base_row_is_named(tmp_path):
    numbers = {"problems": [0, 1], "values": {"acc": [0.0, 1.0]}}
    sweep = make_sweep(
        tmp_path, columns=[], search="list", axes={}, rows={"a: b": Change()}, base="a: b", method="vote"
    )
    rows = compare(sweep, measured_rows({"a: b": {}}, {"a: b": {0: {"lace": numbers, "vote": numbers}}}), "a: b")
    assert [row.measured.label for row in rows] == ["lace", "vote"]
    assert rows[0].difference.value == 0.0 and rows[1].difference is None


def test_the_sign_flip_test_equals_the_exact_binomial_on_ties_and_wins():
    from scipy import stats

    gaps = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 20)
    assert sign_flip(gaps) == pytest.approx(stats.binomtest(9, 11).pvalue, abs=0.01)
    assert sign_flip(np.zeros(5)) == 1.0


def test_differences_are_paired_by_seed_and_problem(tmp_path):
    generator = np.random.default_rng(0)

    def measured(label, shift, order):
        noise = np.random.default_rng(1).normal(0, 5, (2, 40))  # the same problems are hard for both
        own = {seed: {"problems": list(order), "values": {"acc": list(noise[seed][order] + shift)}} for seed in (0, 1)}
        return Measured(label, label, {"row": label}, "lace", own)

    rows = [measured("base", 0.0, np.arange(40)), measured("other", 0.1, generator.permutation(40))]
    base, other = compare(make_sweep(tmp_path, columns=[]), rows)
    assert base.difference is None
    assert (other.difference.low, other.difference.high) == pytest.approx((0.1, 0.1))
    assert other.p_value < 0.001


def test_the_bootstrap_over_seeds_and_problems_covers_both_sources():
    only_seeds = crossed(np.array([[0.0] * 50, [1.0] * 50]))
    assert (only_seeds.low, only_seeds.value, only_seeds.high) == pytest.approx((0.0, 0.5, 1.0))
    gaps = np.random.default_rng(0).normal(0, 1, (1, 400))
    width = crossed(gaps).high - crossed(gaps).low
    assert width == pytest.approx(2 * 1.96 * gaps.std() / 20, rel=0.1)


def test_figures_fit_the_rows_and_reports_hold_them(tmp_path):
    def rows(axes):
        numbers = {0: {"problems": [0, 1], "values": {"acc": [0.0, 1.0]}}}
        return [
            Measured(str(values), str(values), dict(zip(axes, values, strict=True)), "lace", numbers)
            for values in product(*axes.values())
        ]

    sweep = make_sweep(tmp_path, columns=[], name="[b]quick $a $b^{")
    kinds = {}
    for name, axes in {
        "lines": {"n": [1, 2, 4]},
        "bars": {"row": ["a|b\n$x^{$ y", "c"]},
        "heat map": {"r": [1, 2], "h": ["x", "y"]},
    }.items():
        result = Result(sweep, compare(sweep, rows(axes)), [("row, seed 0", "it said\n# `<b>`")], 1)
        kinds[name] = kind_of(result.rows)
        figure(result).savefig(tmp_path / "figure.png")
        text = markdown(result)
        assert "not complete" in text and len(as_csv(result).splitlines()) == len(result.rows) + 1
        assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")} == {6}
        assert "- row, seed 0: `it said # '<b>'`\n" in text
        Console(file=(printed := StringIO()), width=120).print(table(result))
        assert "[b]quick" in printed.getvalue()
    assert all(name == kind for name, kind in kinds.items())


def test_the_next_command_goes_on_with_the_same_study_and_shows_no_password():
    options = RunOptions("my sweep.yaml", "postgresql://me:hunter22@host/sweeps", 8, ["0", "1"])
    assert _again(options) == "lace sweep 'my sweep.yaml' --storage postgresql://host/sweeps --workers 8 --gpus 0,1"
    assert _again(RunOptions("sweep.yaml")) == "lace sweep sweep.yaml"

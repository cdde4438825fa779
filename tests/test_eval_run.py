"""Running, storing, resuming and reporting evaluations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.tracking import MlflowClient

from lace_lightning.cli.eval_config import merge, parse, read_settings
from lace_lightning.cli.main import main
from lace_lightning.decoding import group_seed
from lace_lightning.embedding import NgramEmbedder
from lace_lightning.evaluation.inspection import Inspection
from lace_lightning.evaluation.judged_json import from_json, to_json
from lace_lightning.evaluation.parquet import write_parquet
from lace_lightning.evaluation.runner import Job, Runner
from lace_lightning.evaluation.spec import TrackingSpec
from lace_lightning.evaluation.statistics import with_statistics
from lace_lightning.evaluation.store import Store, StoreError, read_failures, read_outcomes
from lace_lightning.evaluation.summary import summarise_folder
from lace_lightning.tasks import Verdict
from lace_lightning.tracking.outcome_traces import chosen_for_traces, log_evaluation
from lace_lightning.viewer.folder import write_viewer
from tests.eval_helpers import Guessing, Solo, judged, problem
from tests.viewer_helpers import four, island

PROBLEMS = [problem(number) for number in range(10)]
MEANINGS = {"policies": {"any": {"size": 1}}, "methods": {"solo": {}}, "benchmarks": {"toy": {}}}
DISPLAY = {"reference": "solo", "methods": ["solo"], "benchmarks": ["toy"]}


def run(folder, policy, problems=PROBLEMS, batch_size=4, seed=0, meanings=MEANINGS, method=None):
    job = Job("toy", "solo", method or Solo(), seed, problems)
    with Store(folder, meanings, DISPLAY) as store:
        Runner(store, batch_size).run(job, policy, job.pending(store.finished()))


def stored(folder):
    """Outcomes by key, without their seconds."""
    return {one.key: replace(one, cost=replace(one.cost, seconds=0.0), statistics={}) for one in read_outcomes(folder)}


# ---------------------------------------------------------------- what is stored


def test_outcomes_hold_what_was_played_and_how_it_was_judged(tmp_path):
    run(tmp_path, Guessing())
    played = Guessing().play(PROBLEMS, [group_seed("evaluation", 0, p.id) for p in PROBLEMS])
    for group, one in zip(played.groups, sorted(read_outcomes(tmp_path), key=lambda one: one.key), strict=True):
        assert one.problem == group.problem and one.chosen == 0 and one.cost == played.costs[0]
        assert [path.passage.thread for path in one.paths] == list(group.threads)
        assert [path.verdict for path in one.paths] == Guessing().task.judge([(one.problem, t) for t in group.threads])
        assert one.statistics["acc"] == (group.threads[0].answer == "7")


def test_an_outcome_reads_back_as_it_was_written():
    one = judged([("8", Verdict.WRONG), (None, Verdict.UNPARSABLE)], chosen=None, confidence=0.25)
    reads = (((1, 0, 0.5), (2, 0, 0.25)), ((1, 1, 1.0),), ())
    inspection = Inspection(1, ("so", " 8", "<eos>"), "tag", (0.25, 0.5, 0.125), reads)
    one = replace(one, passages=(replace(one.passages[0], inspection=inspection), one.passages[1]), notes={"a": [1]})
    (one,) = with_statistics([one], NgramEmbedder())
    assert from_json(json.loads(json.dumps(to_json(one)))) == one
    assert one.passages[0].mean_gate == pytest.approx(0.875 / 3) and one.passages[1].mean_gate is None


WRONG_TYPES = {
    "a method that is a number": lambda row: row.update(method=3),
    "a choice beyond the passages": lambda row: row.update(chosen=99),
    "a problem without a text": lambda row: row["problem"].update(text=None),
    "a text for a number": lambda row: row.update(statistics={"acc": "1"}),
    "an answer that is a number": lambda row: row["passages"][0].update(answer=5),
    "a text for token ids": lambda row: row["passages"][0].update(token_ids="abc"),
    "a segment that there is not": lambda row: row["passages"][0]["inspection"].update(segments="z" * 9),
    "fewer gates than tokens": lambda row: row["passages"][0]["inspection"].update(gates=[0.5]),
    "a thread below 0": lambda row: row["passages"][0]["inspection"].update(reads=[[[-5, 0, 1.0]]] * 9),
    "a read that is none": lambda row: row["passages"][0]["inspection"].update(reads=[[["a", 0, 1]]] * 9),
}


@pytest.mark.parametrize("change", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_an_outcome_of_other_types_is_named_before_anything_is_made_of_it(change, tmp_path):
    with Store(tmp_path, MEANINGS, DISPLAY) as store:
        store.add([four()])
    assert [one.key for one in read_outcomes(tmp_path)] == [four().key]
    row = json.loads((tmp_path / "outcomes.jsonl").read_bytes())
    change(row)
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(StoreError, match=r"outcomes\.jsonl:1 is not of .*remove the line"):
        write_viewer(tmp_path)


def test_parquet_holds_every_outcome(tmp_path):
    run(tmp_path, Guessing())
    write_parquet(read_outcomes(tmp_path), tmp_path / "groups.parquet")
    rows = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    for row, one in zip(rows, read_outcomes(tmp_path), strict=True):
        assert row["problem"]["id"] == one.problem.id and json.loads(row["problem"]["facts"]) == one.problem.facts
        assert [p["verdict"] for p in row["passages"]] == [path.verdict for path in one.paths]
        assert [p["token_ids"] for p in row["passages"]] == [list(p.passage.thread.token_ids) for p in one.passages]
        assert json.loads(row["statistics"]) == one.statistics


def test_problems_of_like_length_share_batches(tmp_path):
    policy = Guessing()
    run(tmp_path, policy, batch_size=4)
    lengths = {p.id: len(p.text) for p in PROBLEMS}
    flat = [lengths[name] for call in policy.calls for name in call]
    assert flat == sorted(flat) and [len(call) for call in policy.calls] == [4, 4, 2]


# ---------------------------------------------------------------- resuming and failing


def test_a_rerun_does_only_what_is_missing(tmp_path):
    run(tmp_path, Guessing(), PROBLEMS[:6])
    policy = Guessing()
    run(tmp_path, policy)
    assert sorted(sum(policy.calls, [])) == [p.id for p in PROBLEMS[6:]]
    run(tmp_path / "whole", Guessing())
    assert stored(tmp_path) == stored(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_line_that_a_killed_process_left_unfinished_is_done_again(cut, tmp_path):
    run(tmp_path, Guessing())
    lines = (tmp_path / "outcomes.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "outcomes.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    assert len(stored(tmp_path)) == 9
    run(tmp_path, Guessing())
    run(tmp_path / "whole", Guessing())
    assert stored(tmp_path) == stored(tmp_path / "whole")


def test_a_problem_that_fails_takes_no_other_with_it_and_is_tried_again(tmp_path):
    run(tmp_path, Guessing(poison=frozenset({"p3", "p5"})))
    assert sorted(key.problem for key in stored(tmp_path)) == [p.id for p in PROBLEMS if p.id not in ("p3", "p5")]
    failures = {failure.problem: failure for failure in read_failures(tmp_path)}
    assert failures.keys() == {"p3", "p5"}
    assert (failures["p3"].type, failures["p3"].message) == ("ArithmeticError", "cannot play p3")
    assert "tests/eval_helpers.py" in failures["p3"].traceback
    run(tmp_path, Guessing(poison=frozenset({"p5"})))
    assert [failure.problem for failure in read_failures(tmp_path)] == ["p5"]
    run(tmp_path, Guessing())
    run(tmp_path / "whole", Guessing())
    assert read_failures(tmp_path) == [] and stored(tmp_path) == stored(tmp_path / "whole")


def test_a_disk_that_is_full_ends_the_evaluation_and_is_no_failure_of_a_problem(tmp_path, monkeypatch):
    def full(self, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, Guessing())
    assert (tmp_path / "errors.jsonl").read_text() == ""


class Forgetful(Solo):
    def solve(self, policy, problems, seeds):
        return super().solve(policy, problems, seeds)[1:]


def test_a_method_that_returns_too_few_outcomes_is_told_so(tmp_path):
    run(tmp_path, Guessing(), PROBLEMS[:1], method=Forgetful())
    (failure,) = read_failures(tmp_path)
    assert "Forgetful returned 0 outcomes for 1 problems" in failure.message


def test_outcomes_of_other_settings_never_mix(tmp_path):
    run(tmp_path, Guessing(), PROBLEMS[:2])
    changed = MEANINGS | {"policies": {"any": {"size": 2}}}
    with pytest.raises(StoreError, match=r"another policies 'any': size was 1 and is 2"):
        run(tmp_path, Guessing(), meanings=changed)
    run(tmp_path, Guessing(), meanings=MEANINGS | {"methods": {"solo": {}, "new": {}}})  # new names may come
    with pytest.raises(StoreError, match="problem 'p0' .* has another text"):
        run(tmp_path, Guessing(), [replace(PROBLEMS[0], text="Another?")])


def test_two_processes_never_write_into_one_folder(tmp_path):
    with Store(tmp_path, MEANINGS, DISPLAY), pytest.raises(StoreError, match="another `lace eval` works in"):
        Store(tmp_path, MEANINGS, DISPLAY)
    Store(tmp_path, MEANINGS, DISPLAY).__exit__()


# ---------------------------------------------------------------- the command


QWEN = dict(
    model_type="qwen3", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.5,
)  # fmt: skip


def settings(output: Path, method: str = "tests.eval_helpers.Solo", **options) -> dict:
    lattice = {"class_path": "lace_lightning.exchange.LatticeAttentionConfig", "init_args": {"width": 8, "heads": 2}}
    model = {"architecture": QWEN, "exchange": lattice, "num_threads": 2, "layers": [0, 1]}
    policy = {"spec": model, "max_length": 24, "decoding": {"max_new_tokens": 8}, "device": "cpu"}
    doors = {"class_path": "lace_lightning.puzzles.Doors", "init_args": {"doors": [4], "tries": [1]}}
    return {
        "output": str(output),
        "policies": {"lace": policy},
        "methods": {"solo": {"class_path": method, "init_args": {"policy": "lace"}}},
        "benchmarks": {"doors": {"task": doors, "num_problems": 12}},
        "batch_size": 2,
    } | options


def config(folder: Path, **options) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(settings(folder / "out", **options)))
    return str(path)


@pytest.fixture
def seeded(monkeypatch):
    """Models with random weights get the same ones in each build."""
    import torch

    from lace_lightning.model_spec import ModelSpec

    build = ModelSpec.build
    monkeypatch.setattr(ModelSpec, "build", lambda self, *args: torch.manual_seed(0) and build(self, *args))


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_to_the_same_end(tmp_path, seeded):
    """kill -9 in mid-run, in another process; then once more to the end."""
    killed = config(tmp_path / "killed", method="tests.eval_helpers.Slow")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from lace_lightning.cli.main import main\n"
        "from lace_lightning.model_spec import ModelSpec\n"
        "build = ModelSpec.build\n"
        "ModelSpec.build = lambda self, *args: torch.manual_seed(0) and build(self, *args)\n"
        f"sys.exit(main(['eval', '--config', {killed!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    outcomes = tmp_path / "killed/out/outcomes.jsonl"
    deadline = time.monotonic() + 120
    while not (outcomes.exists() and outcomes.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    before = set(stored(tmp_path / "killed/out"))
    assert 0 < len(before) < 12
    assert main(["eval", "--config", killed]) == 0
    assert main(["eval", "--config", config(tmp_path / "whole", method="tests.eval_helpers.Slow")]) == 0
    resumed = [one.key for one in read_outcomes(tmp_path / "killed/out")]
    assert len(resumed) == len(set(resumed)) == 12
    assert stored(tmp_path / "killed/out") == stored(tmp_path / "whole/out")


def test_the_command_writes_tables_that_report_writes_again_without_a_model(tmp_path, capsys, monkeypatch):
    path = config(tmp_path, sweeps={"solo": {"num_threads": [1, 3]}}, seeds=[0, 1], gates=True)
    assert main(["eval", "--config", path, "--reference=solo@3", "--benchmarks.doors.num_problems", "3"]) == 0
    shown, out = capsys.readouterr().out, tmp_path / "out"
    assert "doors: quality" in shown and "solo@1" in shown and "solo@3 minus others" in shown
    files = {name: (out / name).read_bytes() for name in ("report.md", "summary.json")}
    assert len(stored(out)) == 2 * 2 * 3
    for one in read_outcomes(out):
        assert len(one.paths) == int(one.method[-1])
        for path_ in one.paths:
            assert len(path_.gates) == path_.passage.thread.num_tokens and all(0 < gate < 1 for gate in path_.gates)
    assert [row["id"] for row in island((out / "viewer.html").read_text())["rows"]] == [
        one.problem.id for one in sorted(read_outcomes(out), key=lambda one: one.problem.id)
    ]
    monkeypatch.setattr("lace_lightning.model_spec.ModelSpec.build", None)
    for name in files:
        (out / name).unlink()
    assert main(["eval", "report", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in files} == files
    (summary,) = json.loads(files["summary.json"])
    assert [method["num_outcomes"] for method in summary["methods"]] == [6, 6]
    assert summarise_folder(out, "solo@1")[0].reference == "solo@1"


def test_a_failing_outcome_shows_in_the_exit_code(tmp_path, capsys):
    path = config(tmp_path, method="tests.test_eval_run.Forgetful")
    assert main(["eval", "--config", path, "--benchmarks.doors.num_problems=2"]) == 1
    assert "2 outcomes failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods.solo.init_args.policy=lance"], "methods.solo.policy='lance' is none of the policies lace"),
        (["--reference=vote"], "reference='vote' is none of the methods solo"),
        (["--policies.lace.spec.num_thread=2"], "does not accept option 'num_thread'"),
        (["--benchmarks.doors.problems=none.jsonl"], "benchmarks.doors.problems='none.jsonl': no such file"),
        (["--policies.lace.init_from=[none.ckpt]"], "init_from names none.ckpt"),
        (["--sweeps.vote.num_threads=[1]"], "sweeps.vote: there is no method 'vote'"),
        (["--sweeps.solo=[1]"], "give one option with a list of values"),
        (["--batch_size=0"], "batch_size=0 must be at least 1"),
        (["what"], "what: options are --config FILE, and --name.of.setting=value"),
        (["--seeds"], "--seeds: options are"),
        (["--seeds=[0,0]"], "a seed is named twice"),
    ],
)
def test_mistakes_are_named_before_any_model_is_made(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lace_lightning.model_spec.ModelSpec.build", None)
    assert main(["eval", "--config", config(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_later_settings_win_key_by_key_and_other_classes_replace():
    base = {"a": {"x": 1, "y": {"class_path": "A", "init_args": {"k": 1}}}}
    assert merge(base, {"a": {"x": 2}}) == {"a": {"x": 2, "y": base["a"]["y"]}}
    assert merge(base, {"a": {"y": {"class_path": "B"}}})["a"]["y"] == {"class_path": "B"}
    assert merge(base, {"a": {"y": {"init_args": {"j": 2}}}})["a"]["y"]["init_args"] == {"k": 1, "j": 2}


def test_weights_are_known_by_content_not_by_path(tmp_path):
    """Another checkpoint under the same path is another policy."""
    checkpoint = tmp_path / "a.ckpt"
    meanings = []
    for content in (b"one", b"two"):
        checkpoint.write_bytes(content)
        given = settings(tmp_path)
        given["policies"]["lace"]["init_from"] = [str(checkpoint)]
        meanings.append(parse(given)[1]["policies"]["lace"])
    assert meanings[0] != meanings[1] and meanings[0] | meanings[1] == meanings[1]


def test_sweeps_give_one_method_per_value(tmp_path):
    path = config(tmp_path, sweeps={"solo": {"num_threads": [2, 4]}})
    methods = read_settings([path], [])["methods"]
    assert {name: method["init_args"] for name, method in methods.items()} == {
        "solo@2": {"policy": "lace", "num_threads": 2},
        "solo@4": {"policy": "lace", "num_threads": 4},
    }


def test_help_and_a_report_of_nothing_are_readable(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert "lace eval report FOLDER" in capsys.readouterr().out
    assert main(["eval", "report", str(tmp_path)]) == 2
    assert "evaluation.json is missing: give the folder" in capsys.readouterr().err


# ---------------------------------------------------------------- MLflow


def test_traces_show_first_what_was_found_and_not_chosen():
    missed = judged([("8", Verdict.WRONG), ("7", Verdict.CORRECT)], number=5)
    others = [judged([("8", Verdict.WRONG)], number=number) for number in range(4)]
    right = judged([("7", Verdict.CORRECT)], number=6)
    assert chosen_for_traces([*others, right, missed], 3) == [missed, right, others[0]]
    assert chosen_for_traces(others, 0) == []


@pytest.mark.slow
def test_a_tracked_evaluation_has_tables_and_a_trace_per_group_that_tags_find(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    path = config(tmp_path, tracking={"uri": uri, "max_traces": 2, "experiment": "toy"}, gates=True)
    assert main(["eval", "--config", path, "--benchmarks.doors.num_problems=4"]) == 0
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("toy").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.data.metrics["eval/doors/solo/tokens"] > 0 and found.info.status == "FINISHED"
    note = found.data.tags["mlflow.note.content"]
    assert f"```\nlace eval --config {path} --benchmarks.doors.num_problems=4\n```" in note
    assert f"`eval/doors/solo/acc` {found.data.metrics['eval/doors/solo/acc']:.4g}" in note
    mlflow.set_tracking_uri(uri)
    page = mlflow.artifacts.load_text(f"{found.info.artifact_uri}/viewer.html")
    assert len(island(page)["rows"]) == 4 and page == (tmp_path / "out/viewer.html").read_text()
    traces = mlflow.search_traces(
        locations=[experiment], filter_string="tags.method = 'solo' AND tags.benchmark = 'doors'", return_type="list"
    )
    assert len(traces) == 2
    outcomes = {one.problem.id: one for one in read_outcomes(tmp_path / "out")}
    for trace in traces:
        one = outcomes[trace.info.tags["problem"]]
        assert trace.info.tags["outcome"] == one.found
        spans = [span for span in trace.data.spans if span.parent_id]
        assert [span.get_attribute("verdict") for span in spans] == [path.verdict for path in one.passages]
        assert [span.get_attribute("tokens") for span in spans] == [p.passage.thread.num_tokens for p in one.passages]
        assert [span.get_attribute("chosen") for span in spans] == [True, False]
        assert spans[0].get_attribute("gate_mean") == pytest.approx(one.passages[0].mean_gate)


def test_an_evaluation_whose_logging_breaks_off_is_a_failed_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, Guessing())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(FileNotFoundError):  # nobody has made the viewer's page
        log_evaluation(tmp_path, summarise_folder(tmp_path), TrackingSpec("toy", uri=uri), {})
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert found.info.status == "FAILED" and "FileNotFoundError" in found.data.tags["mlflow.note.content"]

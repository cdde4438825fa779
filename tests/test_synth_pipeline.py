"""The pipeline as a whole: killed and resumed, cut into shards and merged, done once, and refused early."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
import yaml

from lace_lightning.cli.main import main
from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.synth import build
from lace_lightning.synthesis import work_folder
from lace_lightning.synthesis.chat import ChatReply
from lace_lightning.synthesis.pipeline import STAGES
from lace_lightning.traces.reading import read_traces
from lace_lightning.traces.schema import Tag
from tests.synth_helpers import LedgerChat, files_of, write_problems

CHAT = "tests.synth_helpers.LedgerChat"


def config(folder: Path, name: str = "out", count: int = 30, seconds: float = 0.0, **options) -> Path:
    """A config of the whole pipeline over a chat model with a ledger; returns its file."""
    source = write_problems(folder / "problems.jsonl", count)
    chat = {"class_path": CHAT, "init_args": {"ledger": str(folder / f"{name}.ledger"), "seconds": seconds}}
    settings = {
        "folder": str(folder / name),
        "task": {"class_path": "lace_lightning.verification.MathTask"},
        "teacher": {
            "class_path": "lace_lightning.synthesis.teachers.LanguageTeacher",
            "init_args": {"chat": chat},
        },
        "solver": {"class_path": "lace_lightning.synthesis.solver.ChatSolver", "init_args": {"chat": chat}},
        "problems": {"source": str(source)},
        "difficulty": {"samples": 4, "at_most": 0.75},
        "sampling": {"solutions": 3, "max_attempts": 6},
        "compression": {"above": 40, "below": 30},
        "assembly": {"num_threads": 3},
        "width": 4,
    } | options
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def synth(*arguments: str | Path) -> int:
    return main(["synth", *map(str, arguments)])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert synth("--config", config(folder)) == 0
    return folder


def test_every_stage_has_something_to_do_in_these_tests(uninterrupted):
    card = json.loads((uninterrupted / "out/card.json").read_text())
    assert all(0 < card["stages"][name]["kept"] for name in STAGES)
    assert card["stages"]["difficulty"]["removed"] and card["compression"]["rewritten"] > 0
    assert card["judging"]["ranked_twice"] > 0 and card["judging"]["disagree_on_best"] > 0
    traces = read_traces(uninterrupted / "out/traces.jsonl")
    assert all([t.tag for t in trace.threads].count(Tag.BEST) == 1 for trace in traces)
    assert card["traces"]["num_traces"] == len(traces) == card["stages"]["assembly"]["kept"]


def run_and_kill(path: Path, ledger: Path, point: int, rng: Random) -> int | None:
    """Run the pipeline in a process of its own and kill -9 it a moment after so many requests were paid; exit code."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(synth("--config", path)))
    process.start()
    while process.is_alive() and (not ledger.exists() or ledger.read_bytes().count(b"\n") < point):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.join()
    return process.exitcode


def test_killed_at_ten_random_points_it_gives_the_same_files_and_pays_no_request_twice(uninterrupted, tmp_path):
    path, rng = config(tmp_path, seconds=0.004), Random(7)
    once = LedgerChat(str(uninterrupted / "out.ledger")).keys()
    stages_seen = set()
    for point in sorted(rng.sample(range(len(once) - 15), 10)):
        assert run_and_kill(path, tmp_path / "out.ledger", point, rng) == -signal.SIGKILL
        stages_seen |= {file.name.split(".")[0] for file in (tmp_path / "out").glob("*.partial.jsonl")}
    assert {"difficulty", "sampling"} <= stages_seen
    assert synth("--config", path) == 0
    files, expected = files_of(tmp_path / "out"), files_of(uninterrupted / "out")
    assert set(files) == set(expected)
    for name in expected:
        if name not in ("problems.json", "card.json"):  # these name the source by its path
            assert files[name] == expected[name], name
    ledger = LedgerChat(str(tmp_path / "out.ledger")).keys()
    assert len(ledger) == len(set(ledger)) and set(ledger) == set(once)


@pytest.mark.parametrize("stage", ["difficulty", "sampling", "compression", "judging"])
def test_a_line_torn_by_a_kill_is_written_again(uninterrupted, tmp_path, stage, monkeypatch):
    """Half of the third row of a stage reaches the file, then power is gone."""
    path = config(tmp_path)
    whole = work_folder.append_lines

    def torn(file, line):
        if f"{stage}.partial" in file.name and json.loads(line)["position"] % 7 == 5:
            file.write(line[:40].encode())
            raise KeyboardInterrupt
        whole(file, line)

    monkeypatch.setattr(work_folder, "append_lines", torn)
    assert synth("--config", path) == 130
    assert not (tmp_path / f"out/{stage}.partial.jsonl").read_bytes().endswith(b"\n")
    monkeypatch.undo()
    assert synth("--config", path) == 0
    assert (tmp_path / "out/assembly.jsonl").read_bytes() == (uninterrupted / "out/assembly.jsonl").read_bytes()
    keys = LedgerChat(str(tmp_path / "out.ledger")).keys()
    assert len(keys) == len(set(keys))


def test_merged_shards_are_the_unsharded_run(uninterrupted, tmp_path):
    path = config(tmp_path)
    for index in (2, 0, 1):
        assert synth("--config", path, "--shard", f"{index}/3") == 0
    assert synth("merge", "--config", path) == 0
    files, expected = files_of(tmp_path / "out"), files_of(uninterrupted / "out")
    assert set(files) == set(expected)
    assert all(files[name] == expected[name] for name in expected if name not in ("problems.json", "card.json"))
    merged, whole = (json.loads(found["card.json"]) for found in (files, expected))
    assert merged | {"made_with": None} == whole | {"made_with": None}
    before = LedgerChat(str(tmp_path / "out.ledger")).keys()
    assert synth("--config", path) == 0  # merged stages count as done
    assert LedgerChat(str(tmp_path / "out.ledger")).keys() == before


def test_merging_refuses_missing_unfinished_and_foreign_shards(tmp_path, capsys):
    path = config(tmp_path, count=4)
    assert synth("merge", "--config", path) == 2 and "no shardings" in capsys.readouterr().err
    assert synth("--config", path, "--shard", "0/2") == 0
    assert synth("merge", "--config", path) == 2 and "lacks shard-1-of-2" in capsys.readouterr().err
    assert synth("--config", path, "--shard", "1/2", "--stage", "sampling") == 0
    assert synth("merge", "--config", path) == 2 and "'compression' has not been finished" in capsys.readouterr().err
    assert synth("--config", path, "--shard", "1/2", "--seed", "1") == 0
    assert synth("merge", "--config", path) == 2 and "other settings" in capsys.readouterr().err


def test_a_stage_is_done_again_only_if_its_options_or_its_rows_changed(tmp_path):
    path = config(tmp_path, count=12)
    chat = LedgerChat(str(tmp_path / "out.ledger"))
    assert synth("--config", path) == 0
    marks = {name: (tmp_path / f"out/{name}.json").stat().st_mtime_ns for name in STAGES}
    time.sleep(0.01)
    assert synth("--config", path, "--width", "2") == 0  # nothing that matters
    assert marks == {name: (tmp_path / f"out/{name}.json").stat().st_mtime_ns for name in STAGES}
    paid = len(chat.keys())
    assert synth("--config", path, "--assembly.min_failed", "1") == 0
    now = {name: (tmp_path / f"out/{name}.json").stat().st_mtime_ns for name in STAGES}
    assert [name for name in STAGES if now[name] != marks[name]] == ["assembly"] and len(chat.keys()) == paid
    assert synth("--config", path, "--sampling.min_edit_distance", "0.6") == 0
    last = {name: (tmp_path / f"out/{name}.json").stat().st_mtime_ns for name in STAGES}
    assert [name for name in STAGES if last[name] != now[name]][0] == "sampling"


def test_a_stage_ends_where_it_is_told_to(tmp_path):
    assert synth("--config", config(tmp_path, count=4), "--stage", "sampling") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "sampling.jsonl" in names and not {"compression.jsonl", "traces.jsonl", "card.md"} & names


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--stage", "dreaming"], "stage='dreaming': there is problems, difficulty"),
        (["--shard", "3"], "--shard 3: give i/n"),
        (["--shard", "3/3"], "shard=3/3"),
        (["--sampling.solutions", "2"], "assembly.num_threads=3"),
        (["--sampling.style", "song"], "song"),
        (["--problems.source", "nowhere.jsonl"], "problems.source='nowhere.jsonl': no such file"),
        (["--teacher.init_args.prompts", "v99"], "prompts='v99' is neither a shipped version (v1) nor a folder"),
        (["--difficulty.at_most", "-1"], "at_most"),
    ],
)
def test_mistakes_are_told_before_any_request_is_paid(tmp_path, capsys, arguments, told):
    assert synth("--config", config(tmp_path, count=2), *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.ledger").exists()


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, capsys):
    path = config(tmp_path, count=2)
    with work_folder.WorkFolder(tmp_path / "out").alone():
        assert synth("--config", path) == 2
    assert "another lace synth is at work" in capsys.readouterr().err


def test_a_dead_endpoint_ends_the_run_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    path = config(tmp_path)
    assert synth("--config", path, "--stage", "difficulty") == 0
    with monkeypatch.context() as patch:
        dead = ChatReply("", "error", error="refused")
        patch.setattr(LedgerChat, "ask", lambda self, requests: [dead] * len(requests))
        assert synth("--config", path) == 2
    assert "none of 4 requests to ledger chat was answered (refused)" in capsys.readouterr().err
    assert synth("--config", path) == 0
    rows = (tmp_path / "out/sampling.jsonl").read_text()
    assert '"outcome":"error"' not in rows


@pytest.mark.parametrize("name", ["countdown", "gsm8k"])
def test_shipped_config_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--problems.limit", "6"]
    if name == "gsm8k":
        more += ["--problems.source", str(write_problems(tmp_path / "sums.jsonl", 6))]
    assert synth("--config", SHIPPED / f"synth/{name}.yaml", *more) == 0
    traces = read_traces(tmp_path / f"runs/synth/{name}/traces.jsonl")
    assert all(len(trace.threads) == 4 for trace in traces)


def test_the_endpoint_config_parses_and_asks_nobody(tmp_path, monkeypatch):
    pytest.importorskip("lace_lightning.synthesis.chats")
    monkeypatch.chdir(tmp_path)
    synthesis, _ = build(["--config", str(SHIPPED / "synth/endpoint.yaml")])
    assert "v1/solve.txt" in synthesis.teacher.identity and synthesis.compression.above == 8000


def test_the_card_reaches_mlflow(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert synth("--config", config(tmp_path, count=8), "--tracking_uri", uri) == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lace-synth")
    [logged] = client.search_runs([experiment.experiment_id])
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert logged.data.metrics["traces"] == card["traces"]["num_traces"] and logged.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(logged.info.run_id)} == {"card.md", "card.json"}


def test_parsing_reads_no_model_and_print_config_shows_all_options(capsys, tmp_path):
    synthesis, given = build(["--config", str(config(tmp_path, count=2))])
    assert synthesis.sampling.max_attempts == 6 and given.shard is None
    with pytest.raises(SystemExit):
        synth("--config", config(tmp_path, count=2), "--print_config")
    assert "min_embedding_distance" in capsys.readouterr().out


def test_a_stage_killed_again_and_again_is_handed_only_the_rows_that_are_not_done(tmp_path, monkeypatch):
    """Each time two rows are done and the third is torn in the middle of its line."""
    folder, rows, handed = work_folder.WorkFolder(tmp_path), [{"position": n} for n in range(7)], []
    whole = work_folder.append_lines

    def torn_third(file, line):
        if len(handed[-1]) > 2 and json.loads(line)["position"] == handed[-1][2]:
            file.write(line[:5].encode())
            raise OSError("disk full")
        whole(file, line)

    def work(todo):
        handed.append([row["position"] for row in todo])
        return ({**row, "done": True} for row in todo)

    monkeypatch.setattr(work_folder, "append_lines", torn_third)
    for _ in range(3):
        with pytest.raises(OSError, match="disk full"):
            folder.stage("sampling", "settings", rows, work)
    outcome = folder.stage("sampling", "settings", rows, work)
    assert handed == [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [4, 5, 6], [6]]
    assert outcome.kept == [{**row, "done": True} for row in rows]
    folder.stage("judging", "settings", rows[:2], work)
    assert handed[-1] == [0, 1]


def test_a_journal_that_we_did_not_write_is_named_and_kept(tmp_path):
    folder, rows = work_folder.WorkFolder(tmp_path), [{"position": 0}]
    with pytest.raises(OSError, match="broke off"):
        folder.stage("sampling", "settings", rows, broken_off)
    journal = next(tmp_path.glob("*partial*"))
    journal.write_text(journal.read_text() + '{"no": "position"}\n')
    before = journal.read_bytes()
    with pytest.raises(ValueError, match=f"{journal.name}.*no position"):
        folder.stage("sampling", "settings", rows, broken_off)
    assert journal.read_bytes() == before


def broken_off(todo):
    raise OSError("broke off")
    yield

"""Full disks and damaged files: what was whole stays whole, the message names the file, and nothing is run from it."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from lace_lightning.checkpoint_io import AtomicCheckpointIO
from lace_lightning.evaluation.parquet import write_parquet
from lace_lightning.evaluation.store import Failure, Store, StoreError, read_failures, read_outcomes
from lace_lightning.model_spec import ModelSpec
from lace_lightning.puzzles import Doors
from lace_lightning.synthesis.work_folder import WorkFolder
from lace_lightning.tasks import Verdict
from lace_lightning.traces.reading import read_traces
from lace_lightning.traces.sources import BadDataError
from lace_lightning.traces.writing import write_traces
from lace_lightning.tracking import MLflowLogger, TrackingError, replay, sender
from lace_lightning.tracking.sender import drain
from lace_lightning.tracking.spool import Spool, alone
from lace_lightning.tracking.spool_reader import SpoolReader
from lace_lightning.whole_file import append_lines, open_lines, write_text
from tests.eval_helpers import judged
from tests.helpers import EXCHANGES, tiny_backbone, tiny_lm
from tests.storage_helpers import contents, fill, flipped, small_disk, wait_until
from tests.test_checkpoints import Bomb

MEANINGS: dict[str, Any] = {"policies": {}, "methods": {}, "benchmarks": {}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 4) as folder:
        yield folder


# ---------------------------------------------------------------- a full disk: whole files


def adapter(folder: Path, scale: int) -> None:
    model = tiny_lm(EXCHANGES["causal"])
    with torch.no_grad():
        next(model.exchanges.parameters()).fill_(scale)
    model.save_exchange(folder / "adapter")


def outcomes(folder: Path, scale: int) -> None:
    paths = [(os.urandom(100).hex(), Verdict.WRONG)] * 4
    write_parquet((judged(paths, number=n) for n in range(100 * scale)), folder / "groups.parquet")


def traces_as(suffix: str) -> Callable[[Path, int], None]:
    return lambda folder, scale: write_traces(
        [Doors().trace(index, 8) for index in range(150 * scale)], folder / f"t{suffix}"
    )


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "checkpoint": lambda folder, scale: AtomicCheckpointIO().save_checkpoint(
        {"state_dict": {"weight": torch.zeros(20_000 * scale)}}, folder / "last.ckpt"
    ),
    "text": lambda folder, scale: write_text(folder / "report.md", "line\n" * 5_000 * scale),
    "adapter": adapter,
    "outcomes": outcomes,
    "jsonl": traces_as(".jsonl"),
    "jsonl.gz": traces_as(".jsonl.gz"),
    "parquet": traces_as(".parquet"),
}


@pytest.mark.parametrize("leave", [0, 12_000])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_the_disk_has_no_room_for_leaves_the_earlier_one_and_nothing_else(disk, kind, leave) -> None:
    write = WRITERS[kind]
    write(disk, 1)
    before = contents(disk)
    ballast = fill(disk, leave)
    name = next(iter(before)).split("/")[-1].removesuffix(".sha256").split(".")[0]
    with pytest.raises(OSError, match=rf"No space left on device: .*{name}.* could not be written, with 0\.0 MB free"):
        write(disk, 9)
    assert contents(disk) == before
    ballast.unlink()
    write(disk, 3)
    assert contents(disk).keys() == before.keys() and contents(disk) != before


@contextmanager
def file_size_limit(megabytes: float) -> Iterator[None]:
    """No file of this process may grow beyond it: what a quota does, for those who may not mount."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_above_the_users_limit_leaves_the_earlier_one(tmp_path: Path) -> None:
    WRITERS["checkpoint"](tmp_path, 1)
    before = contents(tmp_path)
    with file_size_limit(0.2), pytest.raises(OSError, match=r"File too large: .*last\.ckpt could not be written"):
        WRITERS["checkpoint"](tmp_path, 10)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- a full disk: files that grow


def test_lines_that_do_not_fit_are_not_there_in_part(disk: Path) -> None:
    with open_lines(disk / "rows.jsonl") as file:
        append_lines(file, "first\n")
        ballast = fill(disk)
        with pytest.raises(OSError, match=r"rows\.jsonl could not be written"):
            append_lines(file, "x" * 10_000 + "\n")
        assert (disk / "rows.jsonl").read_text() == "first\n"
        ballast.unlink()
        append_lines(file, "second\n")
    assert (disk / "rows.jsonl").read_text() == "first\nsecond\n"


def test_an_evaluation_keeps_whole_outcomes_and_goes_on_when_there_is_room(disk: Path) -> None:
    one, other = (judged([("x" * 5_000, Verdict.WRONG)], number=n) for n in range(2))
    with Store(disk, MEANINGS, {}) as store:
        store.add([one])
        ballast = fill(disk)
        with pytest.raises(OSError, match=r"outcomes\.jsonl could not be written"):
            store.add([other])
    assert list(read_outcomes(disk)) == [one]
    ballast.unlink()
    with Store(disk, MEANINGS, {}) as store:
        assert len(store.finished()) == 1
        store.add([other])
    assert list(read_outcomes(disk)) == [one, other]


def test_a_stage_of_synthesis_goes_on_with_the_row_that_found_no_room(disk: Path) -> None:
    folder, rows, handed = WorkFolder(disk), [{"position": n} for n in range(6)], []
    boxes = [disk / "ballast"]

    def work(todo):
        handed.append([row["position"] for row in todo])
        for row in todo:
            if row["position"] == 3 and len(handed) == 1:
                boxes[0] = fill(disk)
            yield {**row, "text": "x" * 3_000}

    with pytest.raises(OSError, match=r"sampling\.partial\.jsonl could not be written"):
        folder.stage("sampling", "settings", rows, work)
    boxes[0].unlink()
    outcome = folder.stage("sampling", "settings", rows, work)
    assert [row["position"] for row in outcome.kept] == list(range(6))
    assert handed[1] in ([3, 4, 5], [4, 5])  # the page that was begun may have had room for row 3


def records_of(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spool / "records.jsonl").read_text().splitlines()]


def test_what_is_logged_while_the_disk_is_full_waits_and_is_written_in_order(disk: Path, caplog) -> None:
    spool = Spool(disk / "spool", "id", "uri")
    spool.append({"kind": "tag", "key": "a", "value": "0"})
    ballast = fill(disk)
    for number in range(1, 9):
        spool.append({"kind": "tag", "key": "a", "value": str(number) * 2_000})
        spool.add_file(b"%d" % number * 10_000, f"picture-{number}.png")
    written = len(records_of(disk / "spool"))
    assert written < 8 and spool.settle() == 17 - written
    ballast.unlink()
    spool.append({"kind": "tag", "key": "a", "value": "9"})
    spool.close()
    records = records_of(disk / "spool")
    assert [record["value"][0] for record in records if record["kind"] == "tag"] == list("0123456789")
    files = [record for record in records if record["kind"] == "artifact"]
    assert [(disk / "spool" / record["file"]).read_bytes() for record in files] == [
        b"%d" % number * 10_000 for number in range(1, 9)
    ]
    assert caplog.text.count("could not be written") == 1 and caplog.text.count("is written again") == 1


def test_a_run_whose_disk_stays_full_sends_from_memory_at_its_end_and_says_what_is_lost(disk, tmp_path, caplog) -> None:
    logger = MLflowLogger("full", "a run", f"sqlite:///{tmp_path}/mlflow.db", save_dir=str(disk), system_seconds=0)
    logger.log_metrics({"loss": 0.0}, 0)
    fill(disk)
    for step in range(1, 100):
        logger.log_metrics({"loss": float(step), "x" * 100: step}, step)
    logger.log_text("a page", "page.html")
    logger.finalize("success")
    client = MlflowClient(logger.tracking_uri)
    steps = [metric.step for metric in client.get_metric_history(str(logger.run_id), "loss")]
    assert sorted(steps) == list(range(100))
    assert client.get_run(str(logger.run_id)).info.status == "FINISHED"
    assert "could not be written" in caplog.text and "1 records of this run are lost" in caplog.text


def test_a_store_on_a_full_disk_gets_everything_once_there_is_room(disk, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.2)
    logger = MLflowLogger("store", "a run", f"sqlite:///{disk}/mlflow.db", save_dir=str(tmp_path), system_seconds=0)
    logger.log_metrics({"loss": 0.0}, 0)
    ballast = fill(disk)
    for step in range(1, 2_000):
        logger.log_metrics({"loss": float(step)}, step)
    logger.log_text("x" * 50_000, "note.txt")
    wait_until(lambda: "does not take records" in caplog.text)
    ballast.unlink()
    wait_until(lambda: "takes records again" in caplog.text)
    logger.finalize("success")
    client = MlflowClient(logger.tracking_uri)
    steps = [metric.step for metric in client.get_metric_history(str(logger.run_id), "loss")]
    assert sorted(steps) == list(range(2_000))
    note = client.download_artifacts(str(logger.run_id), "note.txt", str(tmp_path))
    assert Path(note).read_text() == "x" * 50_000
    assert not list(tmp_path.rglob("refused.jsonl"))


@pytest.mark.parametrize("state", ["full", "foreign", "cut"])
def test_a_store_that_cannot_be_used_is_an_error_at_once_that_names_it(disk: Path, state: str) -> None:
    path = disk / f"{state}.db"
    if state == "foreign":
        path.write_bytes(b"no database " * 1_000)
    elif state == "cut":
        with sqlite3.connect(path) as db:
            db.executescript("CREATE TABLE t (a); " + "INSERT INTO t VALUES (zeroblob(3000)); " * 9)
        os.truncate(path, 5_000)
    else:
        fill(disk, 65_536)
    with pytest.raises(
        TrackingError, match=rf"{state}\.db.*cannot be used: (?s:.*)Make room.*move a damaged file away"
    ):
        MLflowLogger(tracking_uri=f"sqlite:///{path}", save_dir=str(disk)).log_metrics({"a": 1.0})


# ---------------------------------------------------------------- damaged files


def test_a_flipped_bit_in_an_adapter_is_noticed_or_harmless(tmp_path: Path) -> None:
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    saved, other, refused = load_file(tmp_path / "exchange.safetensors"), tiny_lm(EXCHANGES["causal"]), 0
    before = {key: torch.zeros_like(value) for key, value in saved.items()}
    for name, count in (("exchange.safetensors", 60), ("exchange.json", 60)):
        whole = (tmp_path / name).read_bytes()
        for damaged in flipped(whole, count):
            (tmp_path / name).write_bytes(damaged)
            other.exchanges.load_state_dict(before)
            try:
                other.load_exchange(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error)
                refused += 1
                expected = before
            else:
                expected = saved
            assert all(torch.equal(value, expected[key]) for key, value in other.exchanges.state_dict().items())
        (tmp_path / name).write_bytes(whole)
    assert refused > 60


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("has_checksum", [True, False])
def test_a_flipped_bit_in_traces_is_noticed(tmp_path: Path, suffix: str, has_checksum: bool) -> None:
    """Without the file beside them JSON lines are checked by their schema only, Parquet and gzip by their own sums."""
    path = tmp_path / f"t{suffix}"
    write_traces([Doors().trace(index, 4) for index in range(20)], path)
    whole, traces = path.read_bytes(), read_traces(path)
    if not has_checksum:
        (tmp_path / f"t{suffix}.sha256").unlink()
    missed = 0
    for damaged in flipped(whole, 100):
        path.write_bytes(damaged)
        try:
            missed += read_traces(path, option="data.traces") != traces
        except BadDataError as error:
            assert str(error).startswith(f"data.traces={str(path)!r}")
    assert missed == 0 or (not has_checksum and (suffix == ".jsonl" or missed < 2))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_traces_that_lost_their_end_are_refused_wherever_they_are_cut(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    write_traces([Doors().trace(index, 4) for index in range(5)], path)
    whole = path.read_bytes()
    for length in (0, 1, whole.find(b"\n") + 1 or 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadDataError, match=rf"data\.traces=.*t{suffix}.*has another checksum.*or delete that file"):
            read_traces(path, option="data.traces")


def test_traces_changed_on_purpose_are_read_once_their_checksum_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_traces([Doors().trace(index, 4) for index in range(5)], path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    (tmp_path / "t.jsonl.sha256").unlink()
    assert len(read_traces(path)) == 3


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_a_pickle_in_the_place_of_traces_is_not_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(BadDataError, match=name):
        read_traces(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_in_the_place_of_an_adapter_is_not_run(tmp_path: Path) -> None:
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "exchange.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        tiny_lm(EXCHANGES["causal"]).load_exchange(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_in_a_backbones_folder_is_not_run(tmp_path: Path) -> None:
    """transformers still reads the old file name where there are no safetensors."""
    tiny_backbone().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.?only"):
        ModelSpec(backbone=str(tmp_path)).build(Doors().tokenizer())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"problem": 3}'])
def test_a_damaged_line_of_an_evaluation_is_named(tmp_path: Path, line: bytes) -> None:
    with Store(tmp_path, MEANINGS, {}) as store:
        store.add([judged([("7", Verdict.CORRECT)])])
        store.add_failure(Failure("toy", "lace", 0, "p0", "ValueError", "no"))
    whole = (tmp_path / "outcomes.jsonl").read_bytes()
    (tmp_path / "outcomes.jsonl").write_bytes(whole + line + b"\n")
    with pytest.raises(StoreError, match=r"outcomes\.jsonl:2 is .*remove the line"):
        list(read_outcomes(tmp_path))
    with pytest.raises(StoreError, match=r"outcomes\.jsonl:2 is"), Store(tmp_path, MEANINGS, {}) as store:
        store.finished()
    (tmp_path / "outcomes.jsonl").write_bytes(whole)
    (tmp_path / "errors.jsonl").write_bytes(line + b"\n")
    with pytest.raises(StoreError, match=r"errors\.jsonl:1 is .*remove the line"):
        read_failures(tmp_path)


def test_a_damaged_row_of_a_stage_is_named(tmp_path: Path) -> None:
    folder, rows = WorkFolder(tmp_path), [{"position": n} for n in range(3)]
    folder.stage("sampling", "settings", rows, lambda todo: todo)
    path = tmp_path / "sampling.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"position":1', b'{"position"1', 1))
    with pytest.raises(ValueError, match=r"sampling\.jsonl:2 is damaged .*remove the file"):
        folder.stage("sampling", "settings", rows, lambda todo: todo)


# ---------------------------------------------------------------- damaged spools


class Recording:
    """An MLflow client that remembers what it was sent."""

    def __init__(self) -> None:
        self.tags: list[str] = []

    def log_batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        self.tags += [tag.key for tag in tags]


def refused_because(code: str, message: str, cause: Exception | None = None) -> bool:
    error = MlflowException(message, error_code=ErrorCode.Value(code))
    error.__cause__ = cause
    return sender._is_refusal(error)


def test_only_what_can_never_be_accepted_counts_as_refused() -> None:
    down = MlflowException("500", error_code=ErrorCode.Value("INTERNAL_ERROR"))
    assert refused_because("INVALID_PARAMETER_VALUE", "Changing param values is not allowed")
    assert refused_because("BAD_REQUEST", "(psycopg2.errors.StringDataRightTruncation) value too long")
    assert not refused_because("INVALID_PARAMETER_VALUE", "Failed to get logged model", down)
    assert not refused_because("INVALID_PARAMETER_VALUE", "Failed to get logged model", ConnectionError())
    assert not refused_because("BAD_REQUEST", "QueuePool limit of size 5 overflow 10 reached")
    assert not refused_because("BAD_REQUEST", "(sqlite3.DatabaseError) database disk image is malformed")


def spool_of_tags(folder: Path, names: str) -> Path:
    spool = Spool(folder / "spool", "id", "sqlite:///none.db")
    for name in names:
        spool.append({"kind": "tag", "key": name, "value": ""})
    spool.close()
    return folder / "spool"


@pytest.mark.parametrize("line", ['{"kind": "tag", "k', '{"kind": "tag"}', '{"kind": "gat"}', "3", "\ufffd"])
def test_a_damaged_record_is_set_aside_and_blocks_nothing(tmp_path: Path, line: str) -> None:
    folder, client = spool_of_tags(tmp_path, "abc"), Recording()
    lines = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text("\n".join([lines[0], line, lines[2], ""]))
    drain(client, SpoolReader(folder))  # type: ignore[arg-type]
    assert client.tags == ["a", "c"]
    assert json.loads((folder / "refused.jsonl").read_text())["line"].rstrip("\n") == line


@pytest.mark.parametrize("text", ["", "x", "-5", "\x00\x00"])
def test_a_damaged_note_of_what_was_sent_sends_everything_again(tmp_path: Path, text: str) -> None:
    folder, client = spool_of_tags(tmp_path, "abc"), Recording()
    (folder / "offset").write_text(text)
    drain(client, SpoolReader(folder))  # type: ignore[arg-type]
    assert client.tags == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "a"}'])
def test_a_damaged_header_is_named_and_other_runs_are_sent(tmp_path: Path, text: str) -> None:
    folder = spool_of_tags(tmp_path, "a")
    (folder / "run.json").write_text(text)
    assert "run.json is damaged" in replay(folder).problem


def test_two_at_once_do_not_send_one_spool(tmp_path: Path) -> None:
    folder = spool_of_tags(tmp_path, "a")
    with alone(folder):
        assert "still" in replay(folder).problem


def test_a_sender_that_ends_after_its_run_lets_go_of_the_spool(tmp_path: Path, monkeypatch) -> None:
    """The last request hangs for longer than the end of the run waits."""
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.05)
    folder, asked, answered = tmp_path / "spool", threading.Event(), threading.Event()

    class Hanging(Recording):
        def log_batch(self, *args: Any, **kwargs: Any) -> None:
            asked.set()
            answered.wait(20)

    spool = Spool(folder, "id", "uri")
    spool.append({"kind": "tag", "key": "a", "value": ""})
    sending = sender.Sender(Hanging(), SpoolReader(folder), "uri", on_end=spool.close)  # type: ignore[arg-type]
    sending.start()
    assert asked.wait(20) and sending.close(0.1) == 1
    assert "still" in replay(folder).problem
    answered.set()
    wait_until(lambda: not sending.is_busy)
    with alone(folder):
        assert SpoolReader(folder).pending() == 0


def test_a_run_goes_on_while_lace_sync_holds_its_spool(tmp_path: Path) -> None:
    folder = spool_of_tags(tmp_path, "a")
    spool = Spool(folder, "id", "uri")
    with alone(folder):
        spool.append({"kind": "tag", "key": "b", "value": ""})
        assert len(records_of(folder)) == 1
    spool.append({"kind": "tag", "key": "c", "value": ""})
    spool.close()
    assert [record["key"] for record in records_of(folder)] == ["a", "b", "c"]


def test_a_note_of_what_was_sent_that_finds_no_room_stops_nothing(disk: Path) -> None:
    folder, client = spool_of_tags(disk, "abc"), Recording()
    fill(disk)
    reader = SpoolReader(folder)
    drain(client, reader)  # type: ignore[arg-type]
    assert client.tags == ["a", "b", "c"] and reader.pending() == 0


def test_a_file_of_groups_has_whole_lines_only(disk: Path) -> None:
    """What ``GroupWriter`` writes with."""
    with FileIO(disk / "groups.jsonl", "w") as file:
        append_lines(file, "{}\n")
        fill(disk)
        with pytest.raises(OSError, match=r"groups\.jsonl could not be written"):
            append_lines(file, "x" * 9_000)
    assert (disk / "groups.jsonl").read_text() == "{}\n"

"""Reading and writing: every row is checked, and a bad one is named by file, line and reason."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from lace_lightning.traces.reading import read_problems, read_traces
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
from lace_lightning.traces.sources import BadDataError
from lace_lightning.traces.writing import write_traces

DATA = Path(__file__).parents[2] / "shared" / "data" / "math"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_row(number: int = 0) -> dict[str, Any]:
    thread = {"text": "try 3: wrong", "answer": "3", "tag": "[[fail]]", "forced": [[0, 3], [7, 12]]}
    best = {"text": "try 4", "answer": "4", "tag": "[[best]]", "strategy": "guess", "origin": "oracle"}
    return {"id": f"p{number}", "problem": "2+2?", "answer": "4", "source": "toy", "threads": [thread, best]}


def write_lines(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


def make_traces(count: int, seed: int = 0) -> list[Trace]:
    rng = random.Random(seed)
    texts = ["", "a\nb", "ünï ⊢ 数\u2028x", '"quoted" \\boxed{1}', "emoji 🚪 door"]

    def thread() -> TraceThread:
        text = rng.choice(texts)
        forced = ((0, 1), (2, 3)) if len(text) > 2 else ()
        return TraceThread(text, rng.choice(texts), rng.choice(list(Tag)), rng.choice(texts), "o", forced)

    facts: list[dict[str, Any]] = [{}, {"doors": 8, "tries": [1, 2]}, {"name": "x", "deep": {"a": [None, 0.5]}}]
    return [
        Trace(
            Problem(f"id-{i}", rng.choice(texts[1:]), "4", rng.choice(facts), rng.choice(["", "toy"])),
            tuple(thread() for _ in range(rng.randrange(1, 4))),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_written_traces_are_read_back_equal(tmp_path: Path, suffix: str) -> None:
    traces = make_traces(20)
    write_traces(iter(traces), tmp_path / f"t{suffix}")
    assert read_traces(tmp_path / f"t{suffix}") == traces


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    write_traces(make_traces(3), path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(old) == {path.name, f"{path.name}.sha256"}
    bad = replace(make_traces(1)[0], problem=Problem("x", "y", "z", {"no": {1, 2}}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_traces([*make_traces(9, seed=1), bad], path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_a_write_that_ends_before_its_checksum_is_there_leaves_rows_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, traces = tmp_path / "t.jsonl", make_traces(2, seed=1)
    write_traces(make_traces(3), path)

    def end(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lace_lightning.traces.writing.write_checksum", end)
    with pytest.raises(KeyboardInterrupt):
        write_traces(traces, path)
    assert read_traces(path) == traces, "the earlier rows' checksum would call these damaged"


def damage(change: Callable[[dict[str, Any]], object]) -> str:
    row = make_row()
    change(row)
    return json.dumps(row)


def set_thread(**fields: object) -> str:
    return damage(lambda row: row["threads"][0].update(fields))


BAD_TRACES = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    (b'{"id": "\xff"}', "not JSON: .*utf-8"),
    ("[1]", "row must be an object, not list"),
    (damage(lambda row: row.pop("id")), "missing field 'id'"),
    (damage(lambda row: row.update(id=7.5)), "field 'id' must be a string, not float"),
    (damage(lambda row: row.update(answer=True)), "field 'answer' must be a string, not bool"),
    (damage(lambda row: row.update(problem=" ")), "field 'problem' is empty"),
    (damage(lambda row: row.update(facts=[1])), "field 'facts' must be a JSON object"),
    (damage(lambda row: row.update(facts="{")), "field 'facts' must be a JSON object: not JSON"),
    (damage(lambda row: row.pop("threads")), "field 'threads' must be a list, not null"),
    (damage(lambda row: row.update(threads=[])), "field 'threads' is empty"),
    (damage(lambda row: row.update(threads=["x"])), r"threads\[0\]: thread must be an object, not str"),
    (damage(lambda row: row["threads"][1].pop("tag")), r"threads\[1\]: missing field 'tag'"),
    (set_thread(answer=3), r"threads\[0\]: field 'answer' must be a string, not int"),
    (set_thread(tag="[[good]]"), r"threads\[0\]: unknown tag '\[\[good\]\]': use \[\[best\]\], "),
    (set_thread(text="so [[best]]", forced=None), r"threads\[0\]: field 'text' contains a tag"),
    (set_thread(answer="4 [[fail]]"), r"threads\[0\]: field 'answer' contains a tag"),
    (set_thread(text="\ud83d"), r"threads\[0\]: field 'text' holds half a surrogate pair"),
    (set_thread(forced="0-3"), r"threads\[0\]: field 'forced' must be a list of \[start, end\], not str"),
    (set_thread(forced=[[0, 1, 2]]), r"threads\[0\]: field 'forced' must be .* integers, not \[0, 1, 2\]"),
    (set_thread(forced=[[False, True]]), r"threads\[0\]: field 'forced' must be .* integers"),
    (set_thread(forced=[[3, 3]]), r"threads\[0\]: forced span \[3, 3\] is empty or outside"),
    (set_thread(forced=[[8, 13]]), r"threads\[0\]: forced span \[8, 13\] is empty or outside the text of 12"),
    (set_thread(forced=[[-1, 2]]), r"threads\[0\]: forced span \[-1, 2\] is empty or outside"),
    (set_thread(forced=[[0, 3], [2, 5]]), r"threads\[0\]: forced span \[2, 5\] overlaps"),
    (set_thread(forced=[[7, 9], [0, 3]]), r"threads\[0\]: forced span \[0, 3\] overlaps .* not in ascending order"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_TRACES, ids=[reason for _, reason in BAD_TRACES])
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    good = [json.dumps(make_row(number)) for number in range(2)]
    path = write_lines(tmp_path / "t.jsonl", [good[0], "", line, good[1]])
    where = rf"{path}:3: {reason}"
    with pytest.raises(BadDataError, match=rf"(?s)traces='{path}': 1 of 3 rows are bad.*on_bad='skip'.*\n{where}"):
        read_traces(path)
    with pytest.warns(UserWarning, match=rf"(?s)traces='{path}': 1 of 3 rows are bad and left out.*\n{where}"):
        traces = read_traces(path, on_bad="skip")
    assert [trace.problem.id for trace in traces] == ["p0", "p1"]


def test_every_bad_row_is_counted_and_the_first_ten_are_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ["{"] * 12 + [json.dumps(make_row())])
    with pytest.raises(BadDataError, match="12 of 13 rows") as caught:
        read_traces(path)
    assert [f"{path}:{line}:" in str(caught.value) for line in range(1, 13)] == [True] * 10 + [False] * 2


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [make_row(number) for number in range(3)]
    rows[1]["threads"][0]["tag"] = "[[good]]"
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(BadDataError, match=rf"{tmp_path}/t.parquet:row 2: threads\[0\]: unknown tag"):
        read_traces(tmp_path / "t.parquet")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert len(read_traces(tmp_path / "t.parquet", on_bad="skip")) == 2


def test_adapt_has_the_last_word_on_each_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [json.dumps(make_row(number)) for number in range(3)])

    def adapt(trace: Trace) -> Trace:
        if trace.problem.id == "p1":
            raise ValueError("too long")
        return replace(trace, problem=replace(trace.problem, text="reworded"))

    with pytest.raises(BadDataError, match=f"{path}:2: too long"):
        read_traces(path, adapt=adapt)
    with pytest.warns(UserWarning, match="too long"):
        assert [t.problem.text for t in read_traces(path, on_bad="skip", adapt=adapt)] == ["reworded"] * 2
    with pytest.raises(BadDataError, match=f"{path}:1: missing field 'target'"):
        read_problems(path, adapt=lambda problem: replace(problem, answer=problem.facts["target"]))


def test_whole_numbers_as_id_and_answer_become_their_digits(tmp_path: Path) -> None:
    """Rows as of HuggingFaceH4/aime_2024, the default of configs/real/aime24.yaml, and answers as of its kin."""
    row = {"id": 60, "problem": "x?", "solution": "so", "answer": 204, "url": "u", "year": "2024"}
    path = write_lines(tmp_path / "p.jsonl", [json.dumps(row)])
    facts = {"solution": "so", "url": "u", "year": "2024"}
    assert read_problems(path) == [Problem("60", "x?", "204", facts)]


def test_extra_keys_of_a_problem_become_facts_and_ids_must_differ(tmp_path: Path) -> None:
    row = {"id": "a", "problem": "x?", "answer": "", "numbers": [1, 2], "target": 3, "subject": None}
    path = write_lines(tmp_path / "p.jsonl", [json.dumps(row), json.dumps(row)])
    with pytest.warns(UserWarning, match=f"{path}:2: id 'a' repeats {path}:1"):
        assert read_problems(path, on_bad="skip") == [Problem("a", "x?", "", {"numbers": [1, 2], "target": 3})]


@pytest.mark.parametrize("read", [read_problems, read_traces])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "no such file; check the path"),
        ("data/none.parquet", None, "no such file"),
        ("../none", None, r"unsupported kind of file; use .jsonl, .jsonl.gz, .parquet"),
        ("t.csv", b"id\n", "unsupported kind of file"),
        ("t.jsonl", b"", "no rows in it"),
        ("t.jsonl", b"\n\n", "no rows in it"),
        ("t.jsonl.gz", gzip.compress(b"{}\n" * 9999, mtime=0)[:-20], "cannot be read .*is the file whole"),
        ("t.jsonl.gz", b"{}\n", "cannot be read .*is the file whole"),
        ("t.parquet", b"PAR1 no", "cannot be read as Parquet .*is the file whole"),
        (".", None, "is a folder; give one .jsonl"),
    ],
)
def test_an_unusable_source_is_named_with_its_option_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Any], name: str, content: bytes, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(BadDataError, match=rf"(?s)data.source='{name}': {reason}"):
        read(name, option="data.source", on_bad="skip" if content == b"" else "error")


def test_skipping_every_row_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ["{", "{"])
    with pytest.raises(BadDataError, match="(?s)2 of 2 rows are bad, so none is left.*t.jsonl:1: not JSON"):
        read_traces(path, on_bad="skip")
    with pytest.raises(ValueError, match="on_bad='ignore': use 'error' or 'skip'"):
        read_traces(path, on_bad="ignore")  # type: ignore[arg-type]


def test_a_hub_name_goes_to_datasets_without_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: object, **options: object) -> object:
        calls.append((args, options))
        return datasets.Dataset.from_list([make_row(0), make_row(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [trace.problem.id for trace in read_traces("someone/traces", split="dev")] == ["p0", "p1"]
    assert calls == [(("someone/traces", None), {"split": "dev"})]

    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadDataError, match="problems='someone/none': is no file here.*split 'test'.*no route"):
        read_problems("someone/none", split="test")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("aime2024.jsonl", 30),
        ("countdown_cd3.jsonl", 256),
        ("gsm8k_train.jsonl.gz", 7473),
        ("livebench_math.jsonl", 367),
    ],
)
def test_real_files_are_read_whole(name: str, count: int) -> None:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there")
    problems = read_problems(DATA / name)
    assert len(problems) == count
    opened = gzip.open(DATA / name, "rt") if name.endswith(".gz") else (DATA / name).open()
    with opened as file:
        last = json.loads(list(file)[-1])
    extra = {key: value for key, value in last.items() if key not in ("id", "problem", "answer", "source")}
    assert problems[-1] == Problem(last["id"], last["problem"], last["answer"], extra, last["source"])

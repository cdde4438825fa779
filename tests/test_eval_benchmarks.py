"""Benchmarks: the columns of public data sets, the shipped configs, and every file of real problems."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from lace_lightning.cli.eval_config import parse, read_settings
from lace_lightning.cli.main import main
from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.evaluation.store import read_failures, read_outcomes
from lace_lightning.traces.columns import Columns
from lace_lightning.traces.reading import read_problems
from lace_lightning.traces.sources import BadDataError

DATA = Path(__file__).parents[2] / "shared/data"
FILES = {
    "aime24": "aime2024.jsonl",
    "aime25": "aime2024.jsonl",  # no file of 2025 is there; its config reads the same schema
    "amc23": "amc23.jsonl",
    "countdown": "countdown_cd3.jsonl",
    "gsm8k": "gsm8k_test_dev.jsonl",
    "livebench_math": "livebench_math.jsonl",
    "livebench_reasoning": "livebench_reasoning.jsonl",
    "math500": "math500_dev.jsonl",
    "olympiadbench": "olympiadbench_maths_en.jsonl",
}
TRAINING = {"dapo_math_17k.jsonl.gz": "aime24", "gsm8k_train.jsonl.gz": "gsm8k"}
"""Files that are no benchmarks, by the config that reads them all the same."""
PUZZLES = ("doors", "find")
BENCHMARKS = sorted(path.stem for path in (SHIPPED / "eval/benchmarks").glob("*.yaml"))

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")


def parsed(benchmark: str, *options: str):
    base = "puzzles" if benchmark in (*PUZZLES, "countdown") else "tiny"
    paths = [str(SHIPPED / f"eval/{base}.yaml"), str(SHIPPED / f"eval/benchmarks/{benchmark}.yaml")]
    return parse(read_settings(paths, options))[0]


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (  # GSM8K
            {"question": "How many?", "answer": "1 + 1,233\n#### 1,234"},
            Columns(id=None, problem="question", extract="after_hashes"),
            ("3", "How many?", "1234"),
        ),
        (  # MATH-500
            {"problem": "What is $x$?", "solution": "…", "answer": r"\frac{1}{2}", "unique_id": "test/algebra/1.json"},
            Columns(id="unique_id"),
            ("test/algebra/1.json", "What is $x$?", r"\frac{1}{2}"),
        ),
        (  # OlympiadBench
            {"id": 1606, "question": "Find $k$", "final_answer": ["2"], "solution": ["…"]},
            Columns(problem="question", answer="final_answer"),
            ("1606", "Find $k$", "2"),
        ),
        (  # LiveBench
            {"question_id": "a1", "turns": ["Compute."], "ground_truth": "033", "task": "math_comp"},
            Columns(id="question_id", problem="turns", answer="ground_truth"),
            ("a1", "Compute.", "033"),
        ),
        (  # AMC, with answers as floating-point numbers
            {"id": 0, "question": "Where?", "answer": 27.0},
            Columns(problem="question"),
            ("0", "Where?", "27"),
        ),
        (  # a solution with a box
            {"id": "x", "problem": "?", "solution": r"so \boxed{\frac{1}{2}}."},
            Columns(answer="solution", extract="boxed"),
            ("x", "?", r"\frac{1}{2}"),
        ),
        (  # a converted file, read with the hub's names
            {"id": "gsm8k-1", "problem": "How many?", "answer": "3"},
            Columns(id=None, problem="question", extract="after_hashes"),
            ("gsm8k-1", "How many?", "3"),
        ),
    ],
)
def test_rows_of_public_data_sets_are_read_by_their_own_names(row, columns, expected, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + json.dumps(row) + "\n")  # the third line
    (found,) = read_problems(path, columns=columns)
    assert (found.id, found.text, found.answer) == expected


def test_rows_without_the_named_columns_say_what_is_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "How many?", "result": "3"}\n[1]\n')
    with pytest.raises(
        BadDataError, match=r"rows\.jsonl:1: missing field 'answer'(.|\n)*rows\.jsonl:2: row must be an"
    ):
        read_problems(path, columns=Columns(id=None, problem="question"))
    with pytest.raises(ValueError, match="extract='boxes': choose one of whole, after_hashes, boxed"):
        Columns(extract="boxes")  # type: ignore[arg-type]


HUB = {
    "aime24": ("HuggingFaceH4/aime_2024", None, {"id": 60, "problem": "P", "answer": "204", "year": "2024"}),
    "aime25": ("math-ai/aime25", None, {"problem": "P", "answer": "70", "id": "0"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"problem": "P", "answer": "3", "unique_id": "u", "level": 2}),
    "gsm8k": ("openai/gsm8k", "main", {"question": "P", "answer": "9 * 2 = 18\n#### 18"}),
    "amc23": ("math-ai/amc23", None, {"id": 0, "question": "P", "answer": 27.0, "url": "u"}),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", {"id": 1, "question": "P", "final_answer": ["2"]}),
    "livebench_math": ("livebench/math", None, {"question_id": "q", "turns": ["P"], "ground_truth": "A"}),
    "livebench_reasoning": ("livebench/reasoning", None, {"question_id": "q", "turns": ["P"], "ground_truth": "yes"}),
}


@pytest.mark.parametrize("benchmark", HUB)
def test_a_config_reads_the_rows_of_its_hub_data_set(benchmark, monkeypatch):
    name, subset, row = HUB[benchmark]
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,) = parsed(benchmark).benchmarks[benchmark].read(benchmark)
    assert asked[0][0] == (name, subset)
    assert found.text == "P" and found.answer and "####" not in found.answer


# ---------------------------------------------------------------- shipped configs


def test_every_benchmark_is_tested_here():
    assert set(BENCHMARKS) == {*FILES, *PUZZLES} and set(HUB) | {"countdown"} == set(FILES)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_shipped_config_parses(benchmark):
    spec = parsed(benchmark)
    assert list(spec.benchmarks) == [benchmark] and (spec.reference or "lace") in spec.methods


@pytest.mark.parametrize("benchmark", [*PUZZLES, "countdown"])
def test_puzzles_run_from_their_configs_without_a_file(benchmark, tmp_path):
    paths = [f"configs/eval/{name}.yaml" for name in ("puzzles", f"benchmarks/{benchmark}")]
    options = [f"--output={tmp_path}", f"--benchmarks.{benchmark}.num_problems=2", "--sweeps=null"]
    options += ["--reference=lace", "--policies.lace.device=cpu"]
    assert main(["eval", *(f"--config={path}" for path in paths), *options]) == 0
    assert len(list(read_outcomes(tmp_path))) == 2 * 2


# ---------------------------------------------------------------- real problems


@needs_data
@pytest.mark.parametrize(("benchmark", "file"), [*FILES.items(), *((b, f) for f, b in TRAINING.items())])
def test_every_file_of_real_problems_is_read_by_its_config(benchmark, file):
    spec = parsed(benchmark, f"--benchmarks.{benchmark}.problems={DATA / 'math' / file}", *whole(benchmark))
    problems = spec.benchmarks[benchmark].read(benchmark)
    import gzip

    opened = gzip.open if file.endswith(".gz") else open
    with opened(DATA / "math" / file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert [p.id for p in problems] == [row["id"] for row in rows]
    assert [p.answer for p in problems] == [row["answer"] for row in rows]
    if benchmark != "countdown":
        assert [p.text for p in problems] == [row["problem"] for row in rows]


def whole(benchmark: str) -> list[str]:
    return [f"--benchmarks.{benchmark}.num_problems=null"]


@needs_data
@pytest.mark.slow
def test_every_file_of_real_problems_goes_through_the_command(tmp_path):
    """A small model of random weights, all files at once, three problems of each and few tokens."""
    real = [name for name in FILES if name != "countdown"]
    configs = ["configs/eval/tiny.yaml", *(f"configs/eval/benchmarks/{name}.yaml" for name in real)]
    options = {f"benchmarks.{name}.problems": DATA / "math" / FILES[name] for name in real}
    options |= {f"benchmarks.{name}.num_problems": 3 for name in real}
    options |= {"policies.tiny.tokenizer": DATA / "tokenizer", "policies.tiny.decoding.max_new_tokens": 4}
    options |= {"output": tmp_path, "sweeps.vote.num_threads": "[2]", "policies.tiny.device": "cpu"}
    arguments = [*(f"--config={path}" for path in configs), *(f"--{name}={value}" for name, value in options.items())]
    assert main(["eval", *arguments]) == 0
    assert read_failures(tmp_path) == []
    assert len({one.key for one in read_outcomes(tmp_path)}) == len(real) * 2 * 3

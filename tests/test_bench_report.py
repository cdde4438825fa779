"""What `lace bench plot` makes of results: targets judged, newest cells shown, figures drawn, the page kept whole."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lace_lightning.bench.clock import spread
from lace_lightning.bench.record import Record, read_records
from lace_lightning.bench.report import MARKER, TABLES, TARGETS, Results, update
from lace_lightning.cli.bench import _parser
from lace_lightning.cli.main import main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
RATE = {"median": 4e12, "samples": [4e12]}
OPTIONS = {"engine": "auto", "backend": "auto", "width": 128, "layers": None, "dtype": "auto"}
PLACE = {"threads": 4, "groups": 1, "prompt": 50, "lattice_time": 0, "columns": 100}


def case(step: float, **more: Any) -> dict[str, Any]:
    figures = {"floor": {"ms": 0.8}, "times_floor": step / 0.8, "prefill_ms": spread([9.0]), "tokens_per_second": 5.0}
    figures["kv"] = {"prompt_once_bytes": 2e9, "prompt_per_thread_bytes": 8e9, "own_bytes": 3e6}
    return {"step_ms": spread([step])} | figures | more


def decode_cell(off: float, causal: float, aligned: float, **place: Any) -> dict[str, Any]:
    ratios = {"causal": {"median": causal / off}, "aligned": {"median": aligned / off}}
    return (
        PLACE
        | place
        | {"cases": {"off": case(off), "causal": case(causal), "aligned": case(aligned)}, "ratios": ratios}
    )


def record(*cells: dict, theme="decode", shape="qwen3-1.7b", date="2026-11-22", **options: Any) -> dict[str, Any]:
    versions = {"torch": "2.11", "transformers": "5.17"}
    git = {"commit": "0123456789", "dirty": True}
    machine = {"name": "H200", "versions": versions, "git": git, "bandwidth": RATE, "matrix_rate": RATE}
    return {
        "schema": 1, "theme": theme, "shape": shape, "date": date, "command": ["lace", "bench", theme],
        "options": OPTIONS | options, "machine": machine, "cells": list(cells), "file": f"{theme}.json",
    }  # fmt: skip


def row_of(results: Results, text: str) -> tuple[str, ...]:
    [row] = [target.row(results) for target in TARGETS if target.text == text]
    return row


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "causal, aligned, verdict", [(1.2, 1.3, "reached"), (1.2, 1.31, "**missed**"), (1.31, 1.0, "**missed**")]
)
def test_a_target_is_reached_if_every_scope_reaches_it(causal, aligned, verdict):
    row = row_of(Results([record(decode_cell(1.1, causal, aligned))]), TARGETS[0].text)
    assert row[2:] == ("≤ 1.300", f"causal {causal:.3f}, aligned {aligned:.3f}", verdict)


def test_a_share_is_reached_from_its_bound_on():
    def verdict(share: float) -> str:
        cell = {"groups": 32, "threads": 4, "prompt": 50, "new_tokens": 512, "ratios": {}}
        cell["cases"] = {"causal": {"share_of_limit": share}}
        return row_of(Results([record(cell, theme="rollout")]), TARGETS[-1].text)[-1]

    assert [verdict(0.49), verdict(0.5), verdict(0.9)] == ["**missed**", "reached", "reached"]


def test_prefill_is_compared_between_numbers_of_threads():
    one, many = (decode_cell(1.0, 1.0, 1.0, prompt=2048, threads=threads) for threads in (1, 128))
    many["cases"]["causal"]["prefill_ms"] = spread([9.9])
    [target] = [target for target in TARGETS if target.number == 3]
    found = target.find(Results([record(one, many)]))
    assert found == {"off": 1.0, "causal": pytest.approx(1.1), "aligned": 1.0}


def test_training_is_judged_in_its_fastest_setting_which_is_named():
    def cell(step: float, **setting: bool) -> dict[str, Any]:
        cases = {"off": case(step, matrix_share=4 / step), "causal": case(1.01 * step, matrix_share=4 / step)}
        place = {"groups": 2, "threads": 4, "length": 2048}
        return place | setting | {"cases": cases, "ratios": {"causal": {"median": 1.01}}}

    slow, fast = cell(10.0, checkpointing=True, compile=True), cell(8.0, checkpointing=False, compile=True)
    results = Results([record(fast, theme="train"), record(slow, theme="train")])
    ratio, _, share = (target.row(results) for target in TARGETS if target.number == 5)
    assert ratio[3:] == ("causal (compile) 1.010", "reached")
    assert share[3:] == ("off (compile) 50.0%, causal (compile) 50.0%", "reached")


def test_what_was_not_measured_or_failed_is_never_reached():
    failed = PLACE | {"cases": {"causal": {"error": "OOM"}}, "ratios": {}}
    for results in (Results([]), Results([record(failed)])):
        assert all(target.row(results)[-2:] == ("–", "not measured") for target in TARGETS)


def test_targets_are_judged_by_the_newest_run_with_the_usual_options_and_never_by_the_tiny_shape():
    old, new = record(decode_cell(1.0, 2.0, 2.0)), record(decode_cell(1.0, 1.2, 1.2))
    other = record(decode_cell(1.0, 9.0, 9.0), engine="plain")
    tiny = record(decode_cell(1.0, 7.0, 7.0), shape="tiny")
    results = Results([old, new, other, tiny])
    assert row_of(results, TARGETS[0].text)[-1] == "reached"
    table = TABLES["decode"](results)
    assert "| qwen3-1.7b, engine plain | 4 |" in table and "9.000" in table
    assert "2.000" not in table and "7.000" not in table


# ---------------------------------------------------------------- the page


def test_every_marked_table_of_the_page_exists_and_every_table_is_shown(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    names = update(page, Results([]))
    assert sorted(names) == sorted([*TABLES, "steps-figures", "growth-figures"])
    assert MARKER.sub("", page.read_text()) == MARKER.sub("", PAGE.read_text())
    assert "Not measured yet." in page.read_text()


def test_a_marker_that_names_no_table_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: moods -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no table is called 'moods'"):
        update(page, Results([]))


def test_tables_have_a_cell_for_every_heading(tmp_path):
    peers = {"dynamic": {"step_ms": spread([59.0])}, "continuous": {"error": "TypeError:\n no | such option"}}
    results = Results([record(decode_cell(1.0, 1.2, 1.1), PLACE | {"peers": peers})])
    for name in ("targets", "standing", "prefill", "runs", "decode"):
        lines = TABLES[name](results).splitlines()
        assert len(lines) > 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "HF generate, dynamic cache | 59.00" in TABLES["standing"](results)
    assert "TypeError: no | such option" in TABLES["failures"](results)
    assert "| 2.00 GB | 8.00 GB | 3.00 MB |" in TABLES["prefill"](results)
    assert "0123456 and changes" in TABLES["runs"](results)


def test_plot_draws_what_was_measured_and_links_it_the_same_bytes_every_time(tmp_path, capsys):
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.md").write_text(PAGE.read_text())
    options = ["--device", "cpu", "--repeats", "1", "--out", str(results)]
    assert main("bench growth --threads 1 2 --sweep threads width memory --widths 8 --columns 3".split() + options) == 0
    assert main("bench decode --prompt 5 --columns 3 --peers dynamic".split() + options) == 0
    for path in results.glob("*.json"):  # as if it were no test
        path.write_text(path.read_text().replace('"shape": "tiny"', '"shape": "somewhere/model.json"'))
    drawn = []
    for _ in range(2):
        assert main(["bench", "plot", "--results", str(results), "--docs", str(docs)]) == 0
        drawn.append({path.name: path.read_bytes() for path in (docs / "figures").iterdir()})
    assert set(drawn[0]) == {"growth_model.svg", "steps_model.svg"} and drawn[0] == drawn[1]
    page = (docs / "performance.md").read_text()
    assert all(f"](figures/{name})" in page for name in drawn[0])
    assert "2 results" in capsys.readouterr().out


def test_plot_without_results_says_what_to_do(tmp_path, capsys):
    assert main(["bench", "plot", "--results", str(tmp_path / "gone")]) == 2
    assert "measure first" in capsys.readouterr().err


def test_a_record_is_named_by_theme_shape_and_hardware(tmp_path):
    machine = {"name": "NVIDIA H200", "git": None}
    for shape, name in (("qwen3-1.7b", "qwen3-1.7b"), ("a/My Model/config.json", "my-model"), ("b.json", "b")):
        written = Record(tmp_path, "decode", [], {}, machine, shape)
        written.add({"threads": 1})
        assert written.path.name.startswith(f"decode_{name}_nvidia-h200_20")
    assert not list(tmp_path.glob(".*"))
    assert all(json.loads(path.read_text())["cells"] == [{"threads": 1}] for path in tmp_path.iterdir())
    assert len(read_records(tmp_path)) == 3


# ---------------------------------------------------------------- the script


def test_every_command_of_the_script_and_of_the_page_is_one_that_exists():
    script = (ROOT / "benchmarks/performance.sh").read_text()
    commands = re.findall(
        r"^ *(?:\w+\(\) \{ )?lace ((?:decode|memory|rollout|train|growth) [^;\n]*)", script, re.MULTILINE
    )
    commands += re.findall(r"^lace bench (\w+ --[^#\n|]*)$", PAGE.read_text(), re.MULTILINE)
    themes = [_parser().parse_args(shlex.split(command)).theme for command in commands]
    assert set(themes) == {"decode", "memory", "rollout", "train", "growth"} and len(themes) >= 11
    [default] = re.findall(r"\|\| set -- ([\w ]+)\n", script)
    assert all(f"\n{step}() {{" in script for step in default.split())

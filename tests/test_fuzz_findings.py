"""What fuzzing found, as it found it: each once broke a reader."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lace_lightning.cli.eval_config import read_settings
from lace_lightning.sweep.reading import read_sweep
from lace_lightning.sweep.spec import SweepError
from lace_lightning.tracking.redact import redact_lines
from lace_lightning.tracking.spool_reader import SpoolReader


@pytest.mark.parametrize("line", [b"5", b"null", b"[]", b'"kind"', b"{}", b'{"kind": 3}', b"[" * 10_000])
def test_a_damaged_line_of_a_spool_that_is_still_json_is_one_unreadable_record(tmp_path, line):
    (tmp_path / "run.json").write_text('{"run_id": "x", "tracking_uri": "sqlite:///x"}')
    (tmp_path / "records.jsonl").write_bytes(line + b"\n")
    reader = SpoolReader(tmp_path)
    records, end = reader.read()
    assert [record["kind"] for record in records] == ["unreadable"]
    reader.acknowledge(records, end)
    assert reader.pending() == 0


@pytest.mark.parametrize("text", ["[" * 1500, "a: 0001-99-99"])
def test_yaml_that_is_too_deep_or_holds_no_date_is_refused_in_words(tmp_path, text):
    path = Path(tmp_path, "settings.yaml")
    path.write_text(text)
    with pytest.raises(ValueError, match="is no YAML"):
        read_settings([str(path)], [])
    with pytest.raises(SweepError, match="is no YAML"):
        read_sweep(str(path))
    with pytest.raises(ValueError, match="is no YAML"):
        read_settings([], [f"--a={text}"])


@pytest.mark.parametrize("text", ["methods:\n  - ", "methods: x", "sweeps: [1]"])
def test_methods_and_sweeps_that_are_no_mappings_are_refused_in_words(tmp_path, text):
    path = Path(tmp_path, "settings.yaml")
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a mapping"):
        read_settings([str(path)], [])


@pytest.mark.parametrize("below", ["null", "5", "[5]", "{a: b}"])
def test_a_sweep_that_extends_no_file_is_refused_in_words(tmp_path, below):
    path = Path(tmp_path, "sweep.yaml")
    path.write_text(f"extends: {below}\n")
    with pytest.raises(SweepError, match="extends=.* must be a file or a list of files"):
        read_sweep(str(path))


@pytest.mark.parametrize("text", ['extends: "\\0"', 'extends: ["\\0"]', 'evaluation: "\\0"', 'limits: "\\0"'])
def test_a_null_byte_in_a_sweep_is_refused_in_words(tmp_path, text):
    path = Path(tmp_path, "sweep.yaml")
    path.write_text(text)
    with pytest.raises(SweepError):
        read_sweep(str(path))


HOSTILE = ["-" * 100_000, "a_" * 50_000, "://" * 30_000, "a://b:" * 20_000, "?x-" * 30_000, "eyJ-" * 30_000]
HOSTILE += ["--a.token " * 10_000, "password" + " " * 100_000, "-----BEGIN PRIVATE KEY-----" * 4_000]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_redaction_of_a_hostile_text_takes_time_in_proportion_to_its_length(text):
    """The first of them took minutes."""
    start = time.process_time()
    redact_lines(text)
    assert time.process_time() - start < 10

"""All outcomes as one Parquet file, a row each, for analysis elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lace_lightning.evaluation.judged import JudgedOutcome
from lace_lightning.evaluation.judged_json import to_json
from lace_lightning.whole_file import whole_file

ROWS_PER_GROUP = 256
_JSON = ("facts", "inspection", "notes", "statistics")
"""Fields of no fixed form: the JSON text of an object."""


def _schema() -> pa.Schema:
    text, number, real = pa.string(), pa.int64(), pa.float64()
    passage = {
        "role": text, "group": number, "verdict": text, "text": text, "thought": text, "answer": text, "tag": text,
        "observations": pa.list_(text), "token_ids": pa.list_(number), "columns": pa.list_(number),
        "logprobs": pa.list_(real), "forced": pa.list_(pa.bool_()), "finished": text, "inspection": text,
    }  # fmt: skip
    problem = dict.fromkeys(("id", "text", "answer", "facts", "source"), text)
    cost = {"prompt_tokens": number, "tokens": number, "columns": number, "seconds": real}
    columns = {
        "benchmark": text, "method": text, "seed": number, "problem": pa.struct(problem),
        "passages": pa.list_(pa.struct(passage)), "chosen": number, "found": text, "confidence": real,
        "cost": pa.struct(cost), "notes": text, "statistics": text,
    }  # fmt: skip
    return pa.schema(columns)


def write_parquet(records: Iterable[JudgedOutcome], path: str | Path) -> None:
    """Write the outcomes; the file appears whole or not at all."""
    schema, rows = _schema(), map(_row, records)
    with whole_file(Path(path)) as file, pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        while chunk := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def _row(record: JudgedOutcome) -> dict[str, Any]:
    row = to_json(record)
    row["problem"] = dict(_texts(row["problem"]))
    row["passages"] = [dict(_texts(passage)) for passage in row["passages"]]
    return dict(_texts(row))


def _texts(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        yield name, json.dumps(value, default=str) if name in _JSON else value

"""Traces into files: JSONL, gzipped JSONL or Parquet, with a checksum beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lace_lightning.traces.checksum import checksum_file, write_checksum
from lace_lightning.traces.schema import Trace
from lace_lightning.traces.sources import BATCH_ROWS, suffix_of
from lace_lightning.whole_file import whole_file


def write_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Write traces as JSONL, gzipped JSONL or Parquet, chosen by suffix; the file appears whole or not at all.

    Its checksum is kept beside it, in ``<path>.sha256``, and checked by whoever reads it here.

    Raises:
        BadDataError: unsupported suffix.
        OSError: the disk is full; an earlier file is as it was.
    """
    path = Path(path)
    suffix = suffix_of(path, "path")
    rows = (_row(trace) for trace in traces)
    with whole_file(path) as unfinished:
        if suffix == ".parquet":
            _write_parquet(rows, unfinished)
        else:
            _write_jsonl(rows, unfinished, compress=suffix == ".jsonl.gz")
        checksum_file(path).unlink(missing_ok=True)  # the earlier file's
    write_checksum(path)


def _row(trace: Trace) -> dict[str, Any]:
    problem = trace.problem
    return {
        "id": problem.id,
        "problem": problem.text,
        "answer": problem.answer,
        "source": problem.source,
        "facts": problem.facts,
        "threads": [
            {
                "text": thread.text,
                "answer": thread.answer,
                "tag": str(thread.tag),
                "strategy": thread.strategy,
                "origin": thread.origin,
                "forced": [list(span) for span in thread.forced],
            }
            for thread in trace.threads
        ],
    }


def _write_jsonl(rows: Iterable[dict[str, Any]], path: Path, compress: bool) -> None:
    with gzip.open(path, "wt", encoding="utf-8") if compress else path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    texts = [(name, pa.string()) for name in ("text", "answer", "tag", "strategy", "origin")]
    threads = pa.list_(pa.struct([*texts, ("forced", pa.list_(pa.list_(pa.int64())))]))
    columns = [(name, pa.string()) for name in ("id", "problem", "answer", "source", "facts")]
    schema = pa.schema([*columns, ("threads", threads)])
    listed = ({**row, "facts": json.dumps(row["facts"], ensure_ascii=False)} for row in rows)
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        while batch := list(islice(listed, BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))

"""Where rows come from: JSONL, gzipped JSONL and Parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lace_lightning.traces.checksum import checksum_file, has_other_checksum

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
BATCH_ROWS = 256
"""Rows of a Parquet file that are in memory at once."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class BadDataError(ValueError):
    """A source that cannot be used; the message names the option, the place and the reason."""


def rows_of(source: str, split: str, option: str, subset: str | None) -> Iterator[tuple[str, object]]:
    """(place, row) of every row: the bytes of a JSONL line, or a decoded object. Lines and rows count from 1.

    Arguments as of :func:`lace_lightning.traces.reading.read_problems`.

    Raises:
        BadDataError: the source is missing, of an unknown kind or damaged; on the way, it cannot be read to its end.
    """
    path = Path(source)
    if not path.exists() and _HUB_NAME.fullmatch(source) and not source.startswith(".") and not _has_suffix(path):
        return _numbered(_load_hub(source, split, option, subset), f"{source}[{split}]")
    if path.is_dir():
        raise BadDataError(f"{option}={source!r}: is a folder; give one {', '.join(SUFFIXES)} file")
    suffix = suffix_of(path, option)
    if not path.exists():
        raise BadDataError(f"{option}={source!r}: no such file; check the path (it is relative to {os.getcwd()})")
    if has_other_checksum(path):
        raise BadDataError(
            f"{option}={source!r}: it is damaged or was changed: {checksum_file(path)} has another checksum; make or "
            "copy it anew, or delete that file if you changed the rows yourself"
        )
    if suffix == ".parquet":
        return _numbered(_load_parquet(path, option), source)
    return _lines(path, option, compressed=suffix == ".jsonl.gz")


def _lines(path: Path, option: str, compressed: bool) -> Iterator[tuple[str, bytes]]:
    try:
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise BadDataError(f"{option}={str(path)!r}: cannot be read ({error}); is the file whole?") from error


def _numbered(rows: Iterable[object], name: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}:row {number}", row


def _load_parquet(path: Path, option: str) -> Iterator[object]:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadDataError(
            f"{option}={str(path)!r}: cannot be read as Parquet ({error}); is the file whole?"
        ) from error


def _load_hub(name: str, split: str, option: str, subset: str | None) -> Iterable[object]:
    import datasets  # slow to import

    try:
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadDataError(
            f"{option}={name!r}: is no file here, and the hub has no such data set with split {split!r} "
            f"within reach ({error}); give a path, or check name, split and network"
        ) from error


def _has_suffix(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def suffix_of(path: Path, option: str) -> str:
    """Which of :data:`SUFFIXES` a path has.

    Raises:
        BadDataError: none of them.
    """
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise BadDataError(f"{option}={str(path)!r}: unsupported kind of file; use {', '.join(SUFFIXES)}")

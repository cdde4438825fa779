"""The checksum beside a data file, as ``sha256sum`` writes and checks it: JSON lines have none of their own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lace_lightning.whole_file import write_text


def checksum_file(path: Path) -> Path:
    """Where the checksum of a data file lies: ``traces.jsonl.sha256`` beside ``traces.jsonl``."""
    return path.with_name(f"{path.name}.sha256")


def write_checksum(path: Path) -> None:
    """Keep the checksum of a file."""
    write_text(checksum_file(path), f"{file_digest(path)}  {path.name}\n")


def has_other_checksum(path: Path) -> bool:
    """Whether a checksum lies beside the file that is not the file's own."""
    kept = checksum_file(path)
    return kept.is_file() and kept.read_text(errors="replace").split()[:1] != [file_digest(path)]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

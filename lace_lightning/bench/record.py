"""Results as JSON: one file per run, complete after every cell."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lace_lightning.whole_file import write_text

SCHEMA = 1
"""Version of the files' layout: `table.py` and `report.py` read this one."""


class Record:
    """The file of one run, named by theme, shape, hardware and time.

    Args:
        folder: made if it is missing.
        theme: the command.
        command: the whole command line.
        options: every option, defaults included.
        machine: hardware, versions, git state and rates.
        shape: the model's shape, for the file's name.
    """

    def __init__(
        self,
        folder: Path,
        theme: str,
        command: Sequence[str],
        options: dict[str, Any],
        machine: dict[str, Any],
        shape: str,
    ) -> None:
        now = datetime.now(UTC)
        name = "_".join([theme, shape_name(shape), _slug(machine["name"]), now.strftime("%Y-%m-%d_%H%M%S")])
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.json"
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "theme": theme,
            "shape": shape,
            "date": now.isoformat(timespec="seconds"),
            "command": list(command),
            "options": options,
            "machine": machine,
            "cells": [],
        }

    def add(self, cell: dict[str, Any]) -> None:
        """Append a finished cell and write the file: a run that is stopped keeps what it has."""
        self.content["cells"].append(cell)
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Contents of every result in the folder, oldest first.

    Raises:
        ValueError: a file is no result of this version.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if content.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {content.get('schema')!r}, and this version reads {SCHEMA}: move it away"
            )
        records.append(content | {"file": path.name})
    return sorted(records, key=lambda record: record["date"])


def shape_name(shape: str) -> str:
    """A shape as part of a file name: its own name, or that of its file, or of the folder of its ``config.json``."""
    return _slug(Path(shape.removesuffix("/config.json")).name.removesuffix(".json"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")

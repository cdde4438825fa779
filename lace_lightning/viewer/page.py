"""Outcomes as one HTML page that needs nothing else: no network, no server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lace_lightning.evaluation.inspection import SEGMENTS
from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.printable import printable
from lace_lightning.viewer.block import block_of, tokens_of

MAX_BYTES = 15_000_000
"""Of the page, unless asked otherwise."""
_PROBLEM, _ANSWER, _PIECE = 8_000, 400, 20_000
"""Characters of each that are shown."""


class Table:
    """Texts that occur often, by number.

    Args:
        room: bytes that all of them may take; texts that come later are shown as an ellipsis.
    """

    def __init__(self, room: int) -> None:
        self.texts = ["…"]
        self._numbers: dict[str, int] = {}
        self._room = room

    def __call__(self, text: str) -> int:
        if text not in self._numbers:
            shown = clip(text, _PIECE)
            size = len(_island(shown)) + 1
            fits = size <= self._room
            self._numbers[text] = len(self.texts) if fits else 0
            if fits:
                self._room -= size
                self.texts.append(shown)
        return self._numbers[text]


def viewer_page(title: str, records: Iterable[JudgedOutcome], max_bytes: int = MAX_BYTES) -> str:
    """A page that lists the outcomes and shows the threads of each; whatever a model wrote stands there as plain text.

    Args:
        title: heading of the page.
        records: outcomes; those of one problem are listed together, problems in the order in which they came.
        max_bytes: the page's UTF-8 size; outcomes of the last problems are left out to keep to it.
    """
    pieces = Table(max_bytes // 2)
    rows: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    for record in records:
        row = (_row(record), block_of(record.passages, pieces))
        rows.setdefault((record.benchmark, record.problem.id), []).append(row)
    listed = [row for group in rows.values() for row in group]
    head = {"title": clip(title, _ANSWER), "pieces": pieces.texts}
    room = max_bytes - len(_rendered(head | {"rows": [], "blocks": [], "left_out": len(listed)}).encode())
    shown = _fitting(listed, room)
    return _rendered(
        head
        | {
            "rows": [row for row, _ in listed[:shown]],
            "blocks": [block for _, block in listed[:shown]],
            "left_out": len(listed) - shown,
        }
    )


def clip(text: str, most: int) -> str:
    """At most so many characters, all of them printable."""
    return printable(text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)")


def _fitting(listed: Sequence[tuple[dict[str, Any], str]], room: int) -> int:
    """How many of the rows fit into so many bytes."""
    for count, (row, block) in enumerate(listed):
        room -= len(_island(row).encode()) + len(block) + len(',"",')
        if room < 0:
            return count
    return len(listed)


def _row(record: JudgedOutcome) -> dict[str, Any]:
    """What the page says about an outcome besides its tokens."""
    paths = record.paths
    together = len(paths) > 1 and len({path.passage.group for path in paths}) == 1
    return {
        "benchmark": clip(record.benchmark, _ANSWER),
        "method": clip(record.method, _ANSWER),
        "seed": record.seed,
        "id": clip(record.problem.id, _ANSWER),
        "problem": clip(record.problem.text, _PROBLEM),
        "reference": clip(record.problem.answer, _ANSWER),
        "found": record.found,
        "tags_invalid": together and not record.group().has_valid_tags,
        "chosen": record.chosen,
        "threads": [_thread(passage) for passage in record.passages],
    }


def _thread(record: JudgedPassage) -> dict[str, Any]:
    thread, inspection = record.passage.thread, record.inspection
    return {
        "role": clip(record.passage.role, _ANSWER),
        "group": record.passage.group,
        "index": None if inspection is None else inspection.thread,
        "verdict": record.verdict,
        "tag": None if thread.tag is None else thread.tag.strip("[]"),
        "answer": None if thread.answer is None else clip(thread.answer, _ANSWER),
        "finished": thread.finished,
        "tokens": thread.num_tokens,
        "shown": len(tokens_of(record)[0]),
        "has_gates": inspection is not None and inspection.gates is not None,
        "has_reads": inspection is not None and inspection.reads is not None,
    }


def _island(value: Any) -> str:
    """JSON in ASCII that can stand inside of a script element: nothing in it ends the element or starts a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rendered(data: dict[str, Any]) -> str:
    style, script = _shipped("viewer.css"), _shipped("viewer.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    parts = {
        "policy": f"{policy}; form-action 'none'",
        "style": style,
        "script": script,
        "data": _island(data | {"segments": SEGMENTS}),
    }
    before, *rest = _shipped("viewer.html").split("{{")  # one pass: what is put in is not looked at again
    return before + "".join(parts[name] + tail for name, tail in (part.split("}}", 1) for part in rest))


def _hash(source: str) -> str:
    """The source as a content security policy names it: nothing else may run or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def _shipped(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")

"""Decoded groups as one self-contained HTML page: threads side by side, aligned in lattice time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lace_lightning.printable import printable
from lace_lightning.traces.template import Segment

if TYPE_CHECKING:
    from jinja2 import Template

    from lace_lightning.decoding.group import Group, Thread
    from lace_lightning.decoding.segments import Segmenter
    from lace_lightning.tasks import Verdict

Spell = Callable[[list[int]], str]
"""Token ids as text."""

_CONTEXT = 8  # tokens before a run that are spelled with it, for the spaces and characters that tokens share
_PARTIAL = "\ufffd"  # how tokenizers spell a character of which only some bytes have come
_MAX_CHARACTERS = 2000  # of a problem; answers get a tenth
_SIZES = ((32, 1), (512, 16))  # lattices of at most so many columns get rows of so many columns
_LARGE = 64


class Run(NamedTuple):
    """Consecutive tokens of one thread that belong to the same segment, as text."""

    text: str
    segment: str


@dataclass(frozen=True)
class Row:
    """Some consecutive columns of the lattice: from lattice time ``time`` on, the runs of each of the N threads."""

    time: int
    threads: list[list[Run]]


def lattice_rows(group: Group, segmenter: Segmenter, spell: Spell) -> list[Row]:
    """The tokens of a group after the prompt, in rows of equal lattice time.

    Lattices of up to 32 columns get a row per column, longer ones rows of 16 or 64 columns.
    """
    num_columns = 1 + max((thread.columns[-1] for thread in group.threads if thread.columns), default=-1)
    width = next((width for most, width in _SIZES if num_columns <= most), _LARGE)
    rows = [Row(time, [[] for _ in group.threads]) for time in range(0, num_columns, width)]
    for index, thread in enumerate(group.threads):
        for row, run in _runs(thread, segmenter.thread(thread.token_ids, thread.forced), width, spell):
            rows[row].threads[index].append(run)
    return rows


def groups_page(
    title: str,
    groups: Sequence[Group],
    verdicts: Sequence[Sequence[Verdict]],
    segmenter: Segmenter,
    spell: Spell,
    max_bytes: int = 1_000_000,
) -> str:
    """The groups as an HTML page without scripts or links; whatever the model wrote stands there as plain text.

    Args:
        title: heading of the page.
        groups: B groups.
        verdicts: (B, N) on their threads.
        segmenter: tells what the environment wrote, the assessment and the tag apart.
        spell: the tokenizer's ``decode``.
        max_bytes: the page's UTF-8 size; to keep to it, the ends of long threads are left out first, then whole groups.
    """
    lattices = [lattice_rows(group, segmenter, spell) for group in groups]
    samples = [_sample(*sample) for sample in zip(groups, verdicts, strict=True)]
    longest, shown = max(map(len, lattices), default=0), len(groups)
    while True:
        lattice = [(rows[:longest], len(rows) - longest) for rows in lattices[:shown]]
        page = _template().render(
            title=title, samples=list(zip(samples[:shown], lattice, strict=True)), left_out=len(groups) - shown
        )
        if len(page.encode()) <= max_bytes or not shown:
            return page
        longest, shown = (longest // 2, shown) if longest > 1 else (longest, shown - 1)


def _runs(thread: Thread, segments: Sequence[Segment], width: int, spell: Spell) -> list[tuple[int, Run]]:
    """(row, run) of a thread, in order. A run's text is what it adds to the text of the tokens before it.

    A character whose bytes are spread over two runs stands in the second.
    """
    ids = list(thread.token_ids)
    places = [(column // width, segment) for column, segment in zip(thread.columns, segments, strict=True)]
    runs = []
    for (row, segment), tokens in groupby(range(len(ids)), key=places.__getitem__):
        start, *rest = tokens
        end = rest[-1] + 1 if rest else start + 1
        context = max(0, start - _CONTEXT)
        before = spell(ids[context:start]).rstrip(_PARTIAL)
        text = spell(ids[context:end])[len(before) :]
        text = text if end == len(ids) else text.rstrip(_PARTIAL)
        runs.append((row, Run(text, segment.name.lower())))
    return runs


def _sample(group: Group, verdicts: Sequence[Verdict]) -> dict[str, object]:
    """What the page says about a group besides its tokens."""
    best = group.best
    return {
        "id": _clip(group.problem.id, _MAX_CHARACTERS // 10),
        "problem": _clip(group.problem.text, _MAX_CHARACTERS),
        "reference": _clip(group.problem.answer, _MAX_CHARACTERS // 10),
        "has_valid_tags": group.has_valid_tags,
        "threads": [
            {
                "tag": thread.tag.strip("[]") if thread.tag else None,
                "verdict": str(verdict),
                "answer": _clip(thread.answer or "", _MAX_CHARACTERS // 10),
                "is_best": thread is best,
                "finished": thread.finished,
                "num_tokens": thread.num_tokens,
            }
            for thread, verdict in zip(group.threads, verdicts, strict=True)
        ],
    }


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


@cache
def _template() -> Template:
    """The page; every value passes through ``printable`` and is then escaped."""
    from jinja2 import Environment

    def finalize(value: object) -> object:
        return printable(value) if type(value) is str else value

    environment = Environment(autoescape=True, finalize=finalize, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("groups.html").read_text(encoding="utf-8"))

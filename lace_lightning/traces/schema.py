"""The words of the data: problems, threads and traces (LACE.md §2, §5).

Plain frozen records without behaviour beyond their own consistency; reading files is
:mod:`lace_lightning.traces.reading`, writing them :mod:`lace_lightning.traces.writing`, turning traces into token
tensors :mod:`lace_lightning.traces.collate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Tag(StrEnum):
    """The self-assessment that closes a thread, spelled as it stands in the text (LACE.md §2)."""

    BEST = "[[best]]"
    SUCCESS = "[[success]]"
    FAIL = "[[fail]]"


@dataclass(frozen=True)
class Problem:
    """One problem as the threads see it.

    Args:
        id: unique inside its source.
        text: the statement, before any prompt template.
        answer: the reference answer; may be empty where ``facts`` decide (Countdown).
        facts: what a verifier or an environment needs and the threads must not see (the prize's door, the target).
        source: name of the data set.
    """

    id: str
    text: str
    answer: str
    facts: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class TraceThread:
    """One annotated thread of a trace: its reasoning, then (rendered by the template) its answer and tag.

    Args:
        text: the reasoning, without answer and tag.
        answer: the thread's own final answer.
        tag: its self-assessment.
        strategy: short name of the method that the thread follows; for diversity statistics only.
        origin: where the thread came from (teacher, solver, seed).
        forced: half-open character spans ``(start, end)`` of ``text`` that an environment wrote; never a target.
    """

    text: str
    answer: str
    tag: Tag
    strategy: str = ""
    origin: str = ""
    forced: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Trace:
    """One training example: a problem with its N annotated threads, in lattice order n = 0 … N-1."""

    problem: Problem
    threads: tuple[TraceThread, ...]

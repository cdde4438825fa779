"""Solutions with verdicts: the task judges what a teacher or a solver wrote, as it judges decoded threads."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.decoding.group import Thread
from lace_lightning.tasks import Task, Verdict
from lace_lightning.traces.schema import Problem


def as_thread(text: str, answer: str | None) -> Thread:
    """A thread that was not decoded: nothing is known of its tokens."""
    return Thread(text, text, answer, None, (), (), (), (), (), finished="eos")


def judge(
    task: Task, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
) -> list[Verdict]:
    """One verdict per solution, in order."""
    solutions = zip(problems, texts, answers, strict=True)
    return task.judge([(problem, as_thread(text, answer)) for problem, text, answer in solutions])

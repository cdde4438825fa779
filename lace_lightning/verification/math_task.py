"""Problems with one final answer in free text: AIME, MATH, GSM8K, OlympiadBench, LiveBench, Countdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lace_lightning.tasks import Task, Verdict
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.template import Template
from lace_lightning.verification.reference import reference_of
from lace_lightning.verification.verifier import Verifier

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Thread


class MathTask(Task):
    r"""Judges each thread by its parsed answer, compared with the problem's reference as its kind asks.

    Args:
        prompt: format string around the problem's ``{text}``.
        opening: what opens a thread's closing assessment.
        num_workers: number of verification processes.
        time_limit: seconds to verify one answer.

    Raises:
        ValueError: ``prompt`` is no format string with the field ``{text}``, or a verification option is out of range.
    """

    def __init__(
        self,
        prompt: str = Template.prompt,
        opening: str = Template.opening,
        num_workers: int = 2,
        time_limit: float = 5.0,
    ) -> None:
        _check_prompt(prompt)
        self.template = Template(prompt=prompt, opening=opening)
        self.verifier = Verifier(num_workers, time_limit)

    def adapt(self, problem: Problem) -> Problem:
        """The problem itself.

        Raises:
            ValueError: it has no reference answer, or facts that make none.
        """
        reference_of(problem)
        return problem

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        return self.verifier.verify([(reference_of(problem), thread.answer) for problem, thread in items])


def _check_prompt(prompt: str) -> None:
    probe = "a problem"
    try:
        is_usable = probe in prompt.format(text=probe)
    except (LookupError, ValueError):
        is_usable = False
    if not is_usable:
        raise ValueError(
            f"prompt={prompt!r} must be a format string with the field {{text}}: write literal braces as {{{{ and }}}}"
        )

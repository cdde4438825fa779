"""Problems with one final answer in free text: AIME, MATH, GSM8K, OlympiadBench, LiveBench, Countdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lace_lightning.tasks import FollowUp, Task, Verdict
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.template import Template
from lace_lightning.verification.follow_ups import read_wordings, word
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
        time_limit: seconds of processor time to verify one answer.
        follow_ups: version of the wordings of follow-up questions (``follow_ups_v1.yaml`` beside this file).

    Raises:
        ValueError: ``prompt`` is no format string with the field ``{text}``, a verification option is out of range, or
            there is no such version.
    """

    def __init__(
        self,
        prompt: str = Template.prompt,
        opening: str = Template.opening,
        num_workers: int = 2,
        time_limit: float = 5.0,
        follow_ups: str = "v1",
    ) -> None:
        _check_prompt(prompt)
        self.template = Template(prompt=prompt, opening=opening)
        self.verifier = Verifier(num_workers, time_limit)
        self._wordings = read_wordings(follow_ups)

    def adapt(self, problem: Problem) -> Problem:
        """The problem itself.

        Raises:
            ValueError: it has no reference answer, or facts that make none.
        """
        reference_of(problem)
        return problem

    def follow_up(self, kind: FollowUp, problem: Problem, texts: Sequence[str]) -> str:
        """The wording of the version chosen, with the problem's text and ``texts`` filled in."""
        return word(self._wordings, kind, problem.text, texts)

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

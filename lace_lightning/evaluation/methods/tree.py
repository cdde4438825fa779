"""Tree of thoughts: a beam over steps that the model proposes and rates itself (Yao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lace_lightning.evaluation.method import Method, Outcome, Policy
from lace_lightning.evaluation.methods.choice import parse_rating
from lace_lightning.evaluation.methods.record import Question, Record, answer_of, ask, check_at_least, records
from lace_lightning.tasks import FollowUp
from lace_lightning.traces.schema import Problem


@dataclass(frozen=True)
class State:
    """A partial solution.

    Args:
        steps: texts of its steps.
        passage: index of the passage of the last one; None at the root.
        is_done: the last step gave an answer.
        rating: 0 … 1, the model's own.
    """

    steps: tuple[str, ...] = ()
    passage: int | None = None
    is_done: bool = False
    rating: float = 0.0


class TreeOfThoughts(Method):
    """Breadth-first search: every state is continued by ``samples`` proposed steps, and the best rated are kept.

    Steps that say the same after the same steps count once. Finished states are rated too and compete with the others;
    the best rated finished state of the last beam is the answer. A rating that cannot be read is 0.

    Args:
        policy: name of the policy that it asks.
        breadth: states that are kept.
        samples: steps proposed for each of them.
        depth: most steps.

    Raises:
        ValueError: an option is below 1.
    """

    def __init__(self, policy: str, breadth: int = 4, samples: int = 4, depth: int = 8) -> None:
        super().__init__(policy)
        check_at_least(1, breadth=breadth, samples=samples, depth=depth)
        self.breadth = breadth
        self.samples = samples
        self.depth = depth

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        beams = [[State()] for _ in owners]
        for _ in range(self.depth):
            children = self._propose(policy, owners, beams)
            if not any(children):
                break
            rated = _rate(policy, owners, children)
            beams = [self._keep(beam, new) for beam, new in zip(beams, rated, strict=True)]
        return [_outcome(record, beam) for record, beam in zip(owners, beams, strict=True)]

    def _propose(self, policy: Policy, owners: Sequence[Record], beams: Sequence[Sequence[State]]) -> list[list[State]]:
        """New states of each record."""
        parents = [(number, state) for number, beam in enumerate(beams) for state in beam if not state.is_done]
        questions = [
            Question(owners[number], "step", FollowUp.STEP, state.steps, self.samples) for number, state in parents
        ]
        children: list[dict[tuple[str, ...], State]] = [{} for _ in owners]
        for (number, parent), replies in zip(parents, ask(policy, questions), strict=True):
            for index in replies:
                if child := _child(parent, owners[number], index):
                    children[number].setdefault(child.steps, child)
        return [[*own.values()] for own in children]

    def _keep(self, beam: Sequence[State], children: Sequence[State]) -> list[State]:
        """The best rated, earlier ones first among equals; a beam that found nothing new keeps what is finished."""
        finished = [state for state in beam if state.is_done]
        return sorted([*finished, *children], key=lambda state: -state.rating)[: self.breadth]


def _child(parent: State, record: Record, index: int) -> State | None:
    """The state that a proposed step leads to; None if nothing was said."""
    thread = record.thread(index)
    is_done = bool(answer_of(thread))
    step = record.text(index) if is_done else thread.thought.strip()
    return State((*parent.steps, step), index, is_done) if step else None


def _rate(policy: Policy, owners: Sequence[Record], children: Sequence[Sequence[State]]) -> list[list[State]]:
    questions = [
        Question(record, "rating", FollowUp.RATE, state.steps)
        for record, own in zip(owners, children, strict=True)
        for state in own
    ]
    replies = iter(ask(policy, questions))
    return [
        [replace(state, rating=parse_rating(record.thread(next(replies)[0])) or 0.0) for state in own]
        for record, own in zip(owners, children, strict=True)
    ]


def _outcome(record: Record, beam: Sequence[State]) -> Outcome:
    best = next((state for state in beam if state.is_done), None)
    return record.outcome(None, None) if best is None else record.outcome(best.passage, best.rating)

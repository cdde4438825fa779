"""Stage 5: the judge ranks the correct solutions of each problem, twice, and all get their tags (LACE.md §5)."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from lace_lightning.decoding.random import group_seed
from lace_lightning.synthesis.rounds import converse
from lace_lightning.synthesis.rows import Row, problem_of
from lace_lightning.synthesis.teacher import Contest, Ranking, Teacher, Usage
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Tag


@dataclass(frozen=True)
class JudgingOptions:
    """How often to ask.

    Args:
        passes: rankings per problem, each of another random order; 2 show how much the order sways the judge.

    Raises:
        ValueError: fewer than one pass.
    """

    passes: int = 2

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"judging.passes={self.passes} must be at least 1")


def rank(rows: Sequence[Row], teacher: Teacher, options: JudgingOptions, seed: int, width: int) -> Iterator[Row]:
    """Rows with a ``tag`` for each solution and ``judging``: the rankings, their disagreement, errors and usage."""
    return converse((_compare(row, options, seed) for row in rows), teacher.rank, width)


def assign_tags(is_correct: Sequence[bool], ranking: Sequence[int]) -> list[Tag]:
    """Tags that are always valid: the first of the ranking is best, other correct ones success, wrong ones fail.

    If none is correct, thread 0 says best, as in the puzzles: a group must choose one.

    Args:
        is_correct: by verification, of each thread.
        ranking: indices of all correct threads, most elegant first.

    Raises:
        ValueError: the ranking does not name exactly the correct threads.
    """
    correct = [index for index, right in enumerate(is_correct) if right]
    if sorted(ranking) != correct:
        raise ValueError(f"the ranking {list(ranking)} must name each correct thread {correct} exactly once")
    tags = [Tag.SUCCESS if right else Tag.FAIL for right in is_correct]
    tags[ranking[0] if ranking else 0] = Tag.BEST
    return tags


def combined(rankings: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """One order from several: by mean place; ties go to the shorter solution, then to the earlier.

    Args:
        rankings: each an order of all of 0 … K-1; without any, length decides.
        lengths: (K,) of each solution.
    """
    places = [sum(order.index(index) for order in rankings) for index in range(len(lengths))]
    return sorted(range(len(lengths)), key=lambda index: (places[index], lengths[index], index))


def disagreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of pairs that two orders of the same K >= 2 things put the other way round (Kendall), 0 … 1."""
    place = {thing: position for position, thing in enumerate(second)}
    pairs = [(a, b) for position, a in enumerate(first) for b in first[position + 1 :]]
    return sum(place[a] > place[b] for a, b in pairs) / len(pairs)


def _compare(row: Row, options: JudgingOptions, seed: int) -> Generator[Contest, Ranking, Row]:
    problem, solutions = problem_of(row), row["solutions"]
    is_correct = [solution["verdict"] == Verdict.CORRECT for solution in solutions]
    correct = [index for index, right in enumerate(is_correct) if right]
    rankings: list[list[int]] = []
    errors: list[str] = []
    usage = Usage()
    for number in range(options.passes if len(correct) > 1 else 0):
        own_seed = group_seed("judging", seed, problem.id, number)
        shown = _shown(len(correct), seed, problem.id, number)
        texts = tuple(solutions[correct[k]]["text"] for k in shown)
        reply = yield Contest(problem, own_seed, texts)
        usage += reply.usage
        if reply.error or sorted(reply.order) != list(range(len(shown))):
            errors.append(reply.error or f"{list(reply.order)} is no order of {len(shown)} solutions")
        else:
            rankings.append([shown[k] for k in reply.order])
    order = [correct[k] for k in combined(rankings, [len(solutions[index]["text"]) for index in correct])]
    tags = assign_tags(is_correct, order)
    tagged = [solution | {"tag": str(tag)} for solution, tag in zip(solutions, tags, strict=True)]
    return row | {"solutions": tagged, "judging": _report(order, correct, rankings, errors, usage)}


def _shown(count: int, seed: int, problem: str, number: int) -> list[int]:
    """The order of one pass: random, and in every second pass the one before it backwards, so never the same twice."""
    order = list(range(count))
    Random(f"judging {seed} {problem} {number // 2}").shuffle(order)
    return order[::-1] if number % 2 else order


def _report(
    order: list[int], correct: list[int], rankings: list[list[int]], errors: list[str], usage: Usage
) -> dict[str, Any]:
    pairs = list(zip(rankings, rankings[1:], strict=False))
    return {
        "order": order,
        "rankings": [[correct[k] for k in ranking] for ranking in rankings],
        "disagree_on_best": any(first[0] != second[0] for first, second in pairs),
        "disagreement": max((disagreement(*pair) for pair in pairs), default=None),
        "errors": errors,
        "usage": asdict(usage),
    }

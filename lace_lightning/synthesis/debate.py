"""Stage 3 in another style: threads that write in rounds and read what the others wrote in the rounds before."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from lace_lightning.decoding.random import group_seed
from lace_lightning.synthesis.judged import judge
from lace_lightning.synthesis.rounds import converse
from lace_lightning.synthesis.rows import Row, problem_of
from lace_lightning.synthesis.sampling import SamplingOptions, outcome_of, record, unusable
from lace_lightning.synthesis.teacher import Solution, Teacher, Turn
from lace_lightning.tasks import Task


def debate(
    rows: Sequence[Row], teacher: Teacher, task: Task, options: SamplingOptions, seed: int, width: int
) -> Iterator[Row]:
    """Rows with ``attempts``, the threads of one debate each, in their order: what refers to "thread 2" means that one.

    Nothing is rejected for likeness. A debate in which a thread fails (an error, no answer at the end) is removed
    whole, because the others refer to it.
    """
    talks = (_hold(row, task, options, seed) for row in rows)
    return converse(talks, lambda questions: _ask(teacher, questions), width)


def _hold(row: Row, task: Task, options: SamplingOptions, seed: int) -> Generator[list[Turn], list[Solution], Row]:
    problem, numbers = problem_of(row), range(1, options.solutions + 1)
    seeds = {n: group_seed("debate", seed, problem.id, n) for n in numbers}
    told: dict[int, tuple[Solution, ...]] = {n: () for n in numbers}
    for round_index in range(options.rounds):
        texts = {n: tuple(part.text for part in parts) for n, parts in told.items()}
        parts = yield [
            Turn(
                problem,
                group_seed(seeds[n], round_index),
                texts[n],
                {other: texts[other] for other in numbers if other != n},
                is_last=round_index == options.rounds - 1,
            )
            for n in numbers
        ]
        told = {n: (*told[n], part) for n, part in zip(numbers, parts, strict=True)}
        if any(part.error for part in parts):
            break
    threads = [_joined(told[n]) for n in numbers]
    verdicts = judge(task, [problem] * len(threads), [t.text for t in threads], [t.answer for t in threads])
    opening = task.template.opening.strip()
    outcomes = [unusable(thread, opening) for thread in threads]
    why = next(filter(None, outcomes), "")
    attempts = [
        record(thread, verdict, seeds[n], outcome or (why and "other thread failed") or "accepted")
        for n, thread, verdict, outcome in zip(numbers, threads, verdicts, outcomes, strict=True)
    ]
    return outcome_of(row, attempts, why or "enough", options.style)


def _joined(parts: Sequence[Solution]) -> Solution:
    """One thread: its parts one after the other, the answer and the method of the last."""
    usage = parts[0].usage
    for part in parts[1:]:
        usage += part.usage
    last = parts[-1]
    return replace(
        last, text="\n\n".join(part.text for part in parts), method=last.method or parts[0].method, usage=usage
    )


def _ask(teacher: Teacher, questions: Sequence[list[Turn]]) -> list[list[Solution]]:
    replies = iter(teacher.debate([turn for turns in questions for turn in turns]))
    return [[next(replies) for _ in turns] for turns in questions]

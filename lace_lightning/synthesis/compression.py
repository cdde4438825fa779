"""Stage 4: long solutions are cut into steps and rewritten shorter, and verified again (LACE.md §5)."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from lace_lightning.decoding.random import group_seed
from lace_lightning.synthesis.judged import judge
from lace_lightning.synthesis.rounds import converse
from lace_lightning.synthesis.rows import Row, problem_of
from lace_lightning.synthesis.sampling import accepted_of, unusable
from lace_lightning.synthesis.teacher import Draft, Solution, Teacher, Usage
from lace_lightning.tasks import Task, Verdict
from lace_lightning.traces.schema import Problem

_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:Step\s+)?\d+[.):]\s)")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+(?=\S)")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class CompressionOptions:
    """What is too long, and what then happens.

    Args:
        above: solutions with more tokens are rewritten.
        below: a new wording must have fewer tokens.
        tries: how often to ask.
        on_failure: ``drop`` a solution without a valid shorter wording, or ``keep`` it long.
        tokenizer: hub name or folder of the tokenizer that counts; null: words and signs are counted.

    Raises:
        ValueError: an option is out of range.
    """

    above: int = 8000
    below: int = 3000
    tries: int = 2
    on_failure: Literal["drop", "keep"] = "drop"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.below <= self.above or self.tries < 1:
            raise ValueError(
                f"compression: below={self.below} must be positive and at most above={self.above}, "
                f"and tries={self.tries} at least 1"
            )


class TokenCounter:
    """Counts tokens.

    Args:
        tokenizer: hub name or folder; None counts words and signs, about as many as a tokenizer for English does.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self.name = tokenizer

    def count(self, text: str) -> int:
        if self.name is None:
            return len(_WORD.findall(text))
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)


def steps_of(text: str) -> list[str]:
    """The steps of a solution: its paragraphs and numbered lines; a text without either is cut into sentences.

    >>> steps_of("1. Add.\\n2. Halve.\\n\\nSo it is 3.")
    ['1. Add.', '2. Halve.', 'So it is 3.']
    """
    steps = [step.strip() for step in _PARAGRAPH.split(text.strip())]
    if len(steps) == 1:
        steps = [step.strip() for step in _SENTENCE.split(text.strip())]
    return [step for step in steps if step]


def compress(
    rows: Sequence[Row], teacher: Teacher, task: Task, options: CompressionOptions, seed: int, width: int
) -> Iterator[Row]:
    """Rows with ``solutions`` (the accepted attempts, long ones rewritten or gone) and ``compressions`` (the tries).

    A new wording counts only if it is short enough, can be a thread, and the task judges it as it judged the old one,
    with the same answer: the same text, or equal to it where the old answer is taken for the reference.
    """
    counter = TokenCounter(options.tokenizer)
    talks = (_shorten(row, task, counter, options, seed) for row in rows)
    return converse(talks, teacher.compress, width)


def _shorten(
    row: Row, task: Task, counter: TokenCounter, options: CompressionOptions, seed: int
) -> Generator[Draft, Solution, Row]:
    problem = problem_of(row)
    solutions, tried = [], []
    for index, attempt in enumerate(accepted_of(row)):
        old = {key: attempt[key] for key in ("text", "answer", "method", "seed", "verdict")}
        old["tokens"] = counter.count(old["text"])
        if old["tokens"] <= options.above:
            solutions.append(old)
            continue
        new, entry = yield from _rewrite(problem, index, old, task, counter, options, seed)
        tried.append(entry)
        if new is not None:
            solutions.append(new)
        elif options.on_failure == "keep":
            solutions.append(old)
    done = row | {"solutions": solutions, "compressions": tried}
    return done if solutions else done | {"removed": "no solution short enough"}


def _rewrite(
    problem: Problem,
    index: int,
    old: dict[str, Any],
    task: Task,
    counter: TokenCounter,
    options: CompressionOptions,
    seed: int,
) -> Generator[Draft, Solution, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """The new solution, or None, and what to remember of the tries."""
    reasons, usage, steps = [], Usage(), tuple(steps_of(old["text"]))
    for number in range(options.tries):
        own_seed = group_seed("compression", seed, problem.id, index, number)
        solution = yield Draft(problem, own_seed, steps, old["answer"], options.below)
        usage += solution.usage
        tokens = counter.count(solution.text)
        reason = _why_not(problem, old, solution, tokens, task, options)
        reasons.append(reason or "accepted")
        if not reason:
            new = old | {"text": solution.text, "answer": solution.answer, "tokens": tokens}
            return new, _entry(index, old["tokens"], tokens, reasons, usage)
    return None, _entry(index, old["tokens"], None, reasons, usage)


def _entry(index: int, before: int, after: int | None, outcomes: list[str], usage: Usage) -> dict[str, Any]:
    return {"solution": index, "before": before, "after": after, "outcomes": outcomes, "usage": asdict(usage)}


def _why_not(
    problem: Problem, old: dict[str, Any], new: Solution, tokens: int, task: Task, options: CompressionOptions
) -> str:
    if reason := unusable(new, task.template.opening.strip()):
        return reason
    if tokens >= options.below:
        return "too long"
    [verdict] = judge(task, [problem], [new.text], [new.answer])
    if verdict != old["verdict"]:
        return "other verdict"
    return "" if _is_same_answer(problem, old["answer"], new, task) else "other answer"


def _is_same_answer(problem: Problem, answer: str, new: Solution, task: Task) -> bool:
    if new.answer is not None and new.answer.strip() == answer.strip():
        return True
    return judge(task, [replace(problem, answer=answer)], [new.text], [new.answer]) == [Verdict.CORRECT]

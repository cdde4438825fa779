"""Stand-ins for what synthesis asks: a chat model with a ledger of what was paid, and a teacher with a script."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from lace_lightning.synthesis.chat import ChatModel, ChatReply, ChatRequest
from lace_lightning.synthesis.teacher import Contest, Draft, Query, Ranking, Solution, Teacher, Turn
from lace_lightning.tasks import Task, Verdict
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.template import Template

WORDS = "add halve count share split double join order sort bound guess check swap fold list".split()


class LedgerChat(ChatModel):
    """Replies are a function of the request. Each is paid for by one line in a file, which is also its cache.

    Args:
        ledger: the file.
        seconds: that a reply takes.
    """

    identity = "ledger chat"

    def __init__(self, ledger: str, seconds: float = 0.0) -> None:
        self.ledger = Path(ledger)
        self.seconds = seconds

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        self.ledger.touch()
        paid = {key: text for key, text in map(json.loads, self.ledger.read_text().splitlines())}
        return [self._reply(request, paid) for request in requests]

    def _reply(self, request: ChatRequest, paid: dict[str, str]) -> ChatReply:
        key = hashlib.sha256(repr(request).encode()).hexdigest()
        is_cached = key in paid
        if not is_cached:
            time.sleep(self.seconds)
            paid[key] = written(request.messages[-1][1], Random(key))
            with self.ledger.open("ab", buffering=0) as file:  # one write: paid and kept, or neither
                file.write(json.dumps([key, paid[key]]).encode() + b"\n")
        return ChatReply(paid[key], "stop", 10, len(paid[key].split()), is_cached=is_cached)

    def keys(self) -> list[str]:
        return [json.loads(line)[0] for line in self.ledger.read_text().splitlines()]


def written(prompt: str, rng: Random) -> str:
    """What a model might write: right half of the time where the problem says what it adds."""
    if "Ranking" in prompt:
        order = list(range(1, prompt.count("\nSolution ") + prompt.startswith("Solution ") + 1))
        rng.shuffle(order)
        return f"They differ.\nRanking: {', '.join(map(str, order))}"
    if found := re.search(r"same final answer, (\d+),", prompt):
        return f"Short: {rng.choice(WORDS)} {rng.choice(WORDS)}.\n\n\\boxed{{{found[1]}}}"
    first, second = map(int, re.findall(r"(\d+) \+ (\d+)", prompt)[-1])
    answer = first + second + rng.choice([0, 0, 1, 2])
    steps = [" ".join(rng.choices(WORDS, k=6)) + "." for _ in range(rng.choice([2, 3, 12]))]
    return f"Method: {rng.choice(WORDS)} and {rng.choice(WORDS)}\n\n" + "\n\n".join([*steps, f"\\boxed{{{answer}}}"])


class ScriptedTeacher(Teacher):
    """Gives prepared solutions in turn, the last one for ever, and remembers what it was asked."""

    identity = "scripted"

    def __init__(
        self,
        solutions: Sequence[Solution] = (),
        shorter: Sequence[Solution] = (),
        order: Callable[[Sequence[str]], Sequence[int]] | None = None,
    ) -> None:
        self._solutions, self._shorter, self._order = list(solutions), list(shorter), order
        self.queries: list[Query] = []
        self.drafts: list[Draft] = []
        self.contests: list[Contest] = []
        self.turns: list[list[Turn]] = []

    def solve(self, queries: Sequence[Query]) -> list[Solution]:
        self.queries += queries
        return [_next(self._solutions) for _ in queries]

    def debate(self, turns: Sequence[Turn]) -> list[Solution]:
        self.turns.append(list(turns))
        return [
            Solution(f"part {len(turn.own)} of seed {turn.seed}", "5" if turn.is_last else None, "m") for turn in turns
        ]

    def compress(self, drafts: Sequence[Draft]) -> list[Solution]:
        self.drafts += drafts
        return [_next(self._shorter) for _ in drafts]

    def rank(self, contests: Sequence[Contest]) -> list[Ranking]:
        self.contests += contests
        if self._order is None:
            return super().rank(contests)
        return [Ranking(tuple(self._order(contest.texts))) for contest in contests]


class SumTask(Task):
    """The answer must be the reference, to the letter; anything that is no number is unparsable."""

    template = Template()

    def judge(self, items):
        return [_verdict(problem, thread.answer) for problem, thread in items]


def _verdict(problem: Problem, answer: str | None) -> Verdict:
    if answer is None or not answer.strip().isdigit():
        return Verdict.UNPARSABLE
    return Verdict.CORRECT if answer.strip() == problem.answer else Verdict.WRONG


def _next(items: list[Solution]) -> Solution:
    return items.pop(0) if len(items) > 1 else items[0]


def row(text: str = "2 + 3", answer: str = "5", position: int = 0, **more: object) -> dict:
    facts: dict = {}
    problem = {"id": f"p{position}", "text": text, "answer": answer, "facts": facts, "source": "s"}
    return {"position": position, "problem": problem, **more}


def write_problems(path: Path, count: int) -> Path:
    """Sums, each worded so that no two are near-copies."""
    rng = Random(0)
    with path.open("w") as file:
        for index in range(count):
            story = " ".join(rng.choices(WORDS, k=8))
            problem = f"{story}: what is {index + 3} + {2 * index + 1}?"
            print(json.dumps({"id": f"sum-{index}", "problem": problem, "answer": 3 * index + 4}), file=file)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run left behind, shards and locks aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}

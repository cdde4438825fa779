"""A language model as teacher: prompts from versioned templates, and replies read with distrust."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lace_lightning.synthesis.chat import ChatModel, ChatReply, ChatRequest
from lace_lightning.synthesis.prompts import Prompts
from lace_lightning.synthesis.teacher import Contest, Draft, Query, Ranking, Solution, Teacher, Turn, Usage
from lace_lightning.traces.tags import parse_answer

MAX_METHOD = 200
"""Longest method summary in characters; the rest is cut."""

_METHOD = re.compile(r"\s*\**Method:?\**:?[ \t]*(.+)", re.IGNORECASE)
_RANKING = re.compile(r"Ranking:?\**\s*([0-9][0-9,\s>]*)", re.IGNORECASE)
_THINKING = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_GO_ON = "Write your next part: at most one paragraph of new work. Do not give a final answer yet."
_CONCLUDE = "Write your last part: come to a conclusion, and end with the final answer in \\boxed{}."


class LanguageTeacher(Teacher):
    r"""Asks a chat model.

    A solution's answer is the last ``\boxed{…}`` of the reply; its text is the reply without its ``Method:`` line, and
    without its last line if that only boxes the answer. What a model puts between ``<think>`` tags is left out.

    Args:
        chat: the model.
        prompts: version of the prompt templates, or a folder of your own.
        max_tokens: most tokens of a reply; a solution that was cut there is an error.
        temperature: of solutions and debates.
        judge_temperature: of rewriting and ranking.
    """

    def __init__(
        self,
        chat: ChatModel,
        prompts: str = "v1",
        max_tokens: int = 16384,
        temperature: float = 1.0,
        judge_temperature: float = 0.3,
    ) -> None:
        self.chat = chat
        self._prompts = Prompts(prompts)
        self.prompts = self._prompts.versions
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.judge_temperature = judge_temperature
        settings = f"max_tokens={max_tokens}, temperature={temperature}/{judge_temperature}"
        self.identity = f"LanguageTeacher({chat.identity}, {'; '.join(self.prompts.values())}; {settings})"

    def solve(self, queries: Sequence[Query]) -> list[Solution]:
        replies = self._ask([(self._question(query), query.seed) for query in queries], self.temperature)
        return [_solution(reply) for reply in replies]

    def debate(self, turns: Sequence[Turn]) -> list[Solution]:
        replies = self._ask([(self._turn(turn), turn.seed) for turn in turns], self.temperature)
        return [
            _solution(reply) if turn.is_last else replace(_solution(reply, needs_answer=False), answer=None)
            for turn, reply in zip(turns, replies, strict=True)
        ]

    def compress(self, drafts: Sequence[Draft]) -> list[Solution]:
        replies = self._ask([(self._draft(draft), draft.seed) for draft in drafts], self.judge_temperature)
        return [_solution(reply) for reply in replies]

    def rank(self, contests: Sequence[Contest]) -> list[Ranking]:
        replies = self._ask([(self._contest(contest), contest.seed) for contest in contests], self.judge_temperature)
        return [_ranking(reply, len(contest.texts)) for contest, reply in zip(contests, replies, strict=True)]

    def _ask(self, questions: Sequence[tuple[str, int]], temperature: float) -> list[ChatReply]:
        requests = [ChatRequest((("user", text),), seed, self.max_tokens, temperature) for text, seed in questions]
        replies = self.chat.ask(requests)
        if len(replies) > 1 and all(reply.finish == "error" for reply in replies):
            raise ConnectionError(
                f"none of {len(replies)} requests to {self.chat.identity} was answered ({replies[0].error}); what is "
                "done is kept: mend the endpoint and run the same command again"
            )
        return replies

    def _question(self, query: Query) -> str:
        if not query.avoid:
            return self._prompts.fill("solve", problem=query.problem.text)
        methods = "\n".join(f"- {method}" for method in query.avoid)
        return self._prompts.fill("avoid", problem=query.problem.text, methods=methods)

    def _turn(self, turn: Turn) -> str:
        others = [f"Thread {n}:\n{_paragraphs(parts)}" for n, parts in sorted(turn.others.items())]
        return self._prompts.fill(
            "debate",
            problem=turn.problem.text,
            own=_paragraphs(turn.own),
            others="\n\n".join(others) or "(there are none)",
            task=_CONCLUDE if turn.is_last else _GO_ON,
        )

    def _draft(self, draft: Draft) -> str:
        steps = "\n\n".join(f"{number}. {step}" for number, step in enumerate(draft.steps, start=1))
        told = {"problem": draft.problem.text, "answer": draft.answer, "max_tokens": draft.max_tokens}
        return self._prompts.fill("compress", steps=steps, **told)

    def _contest(self, contest: Contest) -> str:
        solutions = [f"Solution {number}:\n{text}" for number, text in enumerate(contest.texts, start=1)]
        told = {"problem": contest.problem.text, "count": len(solutions)}
        return self._prompts.fill("rank", solutions="\n\n".join(solutions), **told)


def _solution(reply: ChatReply, needs_answer: bool = True) -> Solution:
    usage = _usage(reply)
    if reply.finish == "error":
        return Solution("", None, usage=usage, error=reply.error or "no reply")
    if reply.finish == "length":
        return Solution("", None, usage=usage, error="reply cut at max_tokens")
    text = _THINKING.sub("", reply.text)
    found = _METHOD.match(text)
    body = text[found.end() :] if found else text
    answer = parse_answer(body) if "\\boxed{" in body else None
    if needs_answer:
        body = _without_verdict(body)
    method = " ".join((found[1] if found else body).split())[:MAX_METHOD]
    return Solution(body.strip(), answer, method, usage)


def _without_verdict(body: str) -> str:
    """The text without a last line that boxes the answer; a solution of one line stays as it is."""
    above, _, last = body.rstrip().rpartition("\n")
    return above if "\\boxed{" in last and above.strip() else body


def _ranking(reply: ChatReply, count: int) -> Ranking:
    usage = _usage(reply)
    if reply.finish != "stop":
        return Ranking((), usage, reply.error or "reply cut at max_tokens")
    found = _RANKING.findall(_THINKING.sub("", reply.text))
    order = tuple(int(number) - 1 for number in re.findall(r"[0-9]{1,4}", found[-1])) if found else ()
    if sorted(order) != list(range(count)):
        return Ranking((), usage, f"no ranking of {count} solutions in the reply")
    return Ranking(order, usage)


def _usage(reply: ChatReply) -> Usage:
    return Usage(1, reply.prompt_tokens, reply.completion_tokens)


def _paragraphs(parts: Sequence[str]) -> str:
    return "\n\n".join(parts) or "(nothing yet)"

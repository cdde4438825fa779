"""Stage 2's interface: the model to be trained tries problems, so that its success rate is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lace_lightning.synthesis.chat import ChatModel, ChatRequest
from lace_lightning.synthesis.prompts import Prompts
from lace_lightning.synthesis.teacher import Query, Solution, Teacher, Usage
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.tags import parse_answer


class Solver(ABC):
    """Tries problems by itself.

    Attributes:
        identity: what its answers depend on besides problem and seed.
    """

    identity: str

    @abstractmethod
    def attempt(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Solution]:
        """One attempt per problem and seed, in order; deterministic in both, whatever else is in the batch."""


class ChatSolver(Solver):
    """A chat model, asked with the template ``attempt.txt``.

    Args:
        chat: the model.
        prompts: version of the prompt templates, or a folder of your own.
        max_tokens: most tokens of an attempt.
        temperature: of the sampling.
    """

    def __init__(self, chat: ChatModel, prompts: str = "v1", max_tokens: int = 4096, temperature: float = 1.0) -> None:
        self.chat = chat
        self.prompts = Prompts(prompts)
        self.max_tokens = max_tokens
        self.temperature = temperature
        wording = self.prompts.versions["attempt"]
        self.identity = f"ChatSolver({chat.identity}, {wording}, max_tokens={max_tokens}, temperature={temperature})"

    def attempt(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Solution]:
        replies = self.chat.ask([self._request(*pair) for pair in zip(problems, seeds, strict=True)])
        return [
            Solution(
                reply.text,
                parse_answer(reply.text) if "\\boxed{" in reply.text else None,
                usage=Usage(1, reply.prompt_tokens, reply.completion_tokens),
                error=reply.error,
            )
            for reply in replies
        ]

    def _request(self, problem: Problem, seed: int) -> ChatRequest:
        message = self.prompts.fill("attempt", problem=problem.text)
        return ChatRequest((("user", message),), seed, self.max_tokens, self.temperature)


class TeacherSolver(Solver):
    """A teacher in the place of the model, asked without a history. For runs where no model is at hand.

    Args:
        teacher: who tries.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.identity = f"TeacherSolver({teacher.identity})"

    def attempt(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Solution]:
        return self.teacher.solve([Query(*pair) for pair in zip(problems, seeds, strict=True)])

"""Groups built by hand, for tests that work metrics out on paper."""

from collections.abc import Sequence

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Tag

BEST, SUCCESS, FAIL = Tag.BEST, Tag.SUCCESS, Tag.FAIL
RIGHT, WRONG, UNPARSABLE = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSABLE


def thread(answer: str | None = "1", tag: Tag | None = None, thought: str = "x", num_tokens: int = 1) -> Thread:
    return Thread(
        text=thought,
        thought=thought,
        answer=answer,
        tag=tag,
        observations=(),
        token_ids=(0,) * num_tokens,
        columns=tuple(range(num_tokens)),
        logprobs=(0.0,) * num_tokens,
        forced=(False,) * num_tokens,
        finished="eos",
    )


def group(threads: Sequence[Thread], answer: str = "1") -> Group:
    return Group(Problem("p", "text", answer), tuple(threads), seed=0)


def tagged(*tags: Tag | None) -> Group:
    return group([thread(tag=tag) for tag in tags])

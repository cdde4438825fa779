"""What the puzzle tests share: a decoded thread made by hand."""

from __future__ import annotations

from lace_lightning.decoding.group import Thread


def decoded_thread(answer: str | None, observations: tuple[str, ...] = ()) -> Thread:
    """A thread of which a judge sees only the answer and what the environment wrote."""
    return Thread(
        text="", thought="", answer=answer, tag=None, observations=observations, token_ids=(), columns=(), logprobs=(),
        forced=(), finished="eos",
    )  # fmt: skip


# Nothing a model may write can make a judge raise, hang or believe.
HOSTILE_ANSWERS = [
    None,
    "",
    " ",
    ";",
    "hit",
    "9**9**9",
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 200 + "1" + ")" * 50,
    "9" * 1_000_000,
    "1+" * 500_000 + "1",
    "٣",  # Arabic-Indic three: str.isdigit() and int() accept it
    "³",
    "3\x00",
    "\x00",
    "3\n",
    "+3",
    "3.0",
    "1e3",
    "1_0",
    "__import__('os').system('true')",
    "[[best]]",
    "\ud800",
]

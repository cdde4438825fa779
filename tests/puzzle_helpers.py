"""What tests on puzzles share: a decoded thread made by hand, and the gates of a decoded group."""

from __future__ import annotations

import torch

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.tasks import Puzzle
from lace_lightning.threaded_lm import ThreadedLM


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


def gates_of(model: ThreadedLM, puzzle: Puzzle, group: Group) -> list[list[float]]:
    """The mean gate at each token, from one pass over threads that are laid out by hand."""
    prompt = puzzle.template.encode_prompt(group.problem.text, model.tokenizer)
    columns = 1 + max(thread.columns[-1] for thread in group.threads)
    ids = torch.zeros(1, len(group.threads), len(prompt) + columns, dtype=torch.long)
    ids[..., : len(prompt)] = torch.tensor(prompt)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[..., : len(prompt)] = True
    for n, thread in enumerate(group.threads):
        at = [len(prompt) + column for column in thread.columns]
        ids[0, n, at], mask[0, n, at] = torch.tensor(thread.token_ids), True
    gate = torch.stack([reading.gate for reading in model.read(ids, mask, len(prompt))]).mean(0)[0]
    return [gate[n, list(thread.columns)].tolist() for n, thread in enumerate(group.threads)]

"""What the built-in puzzles have in common: a closed vocabulary, reproducible randomness, a fixed split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from lace_lightning.puzzles.vocabulary import word_tokenizer
from lace_lightning.tasks import Puzzle
from lace_lightning.traces.schema import Tag
from lace_lightning.traces.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HIT, MISS = "hit", "miss"
SPLITS = ("train", "test")
TEST_SHARE = 0.2


class WordPuzzle(Puzzle):
    """A puzzle whose prompts and threads consist of the words of a small closed vocabulary.

    A thread reads ``prompt : thought ; answer tag``; every piece has as many tokens as words.

    Args:
        words: the puzzle's own words; those that all puzzles use are added.
        seed: problems and traces are a function of (seed, split, index).
    """

    template = Template(prompt="{text} :", opening=";", answer="{answer}", separator=" ")

    def __init__(self, words: list[str], seed: int) -> None:
        self.words = [":", ";", HIT, MISS, *map(str, Tag), *words]
        self.seed = seed

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(self.words)

    def _random(self, split: str, index: int, num_threads: int | None = None) -> Random:
        """The random stream of one problem or, with ``num_threads``, of one trace; all are independent of each other.

        Raises:
            ValueError: an unknown split, or fewer than one thread.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} of a puzzle must be one of {SPLITS}")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads={num_threads} of a trace must be at least 1")
        # a string seeds through SHA-512 in every version of Python, so streams are the same everywhere
        return Random(f"{type(self).__name__} {self.seed} {split} {index} {num_threads}")


def split_of(key: str) -> str:
    """The split that a problem with this key always belongs to, whatever the seed; ``TEST_SHARE`` of all are test."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return "test" if number < TEST_SHARE * 2**64 else "train"


def check_sizes(option: str, sizes: Sequence[int], low: int, high: int) -> None:
    """Raise ValueError unless ``sizes`` holds at least one int and only ints in low … high."""
    if not sizes or any(type(size) is not int or not low <= size <= high for size in sizes):
        raise ValueError(f"{option}={list(sizes)} must list at least one whole number, each from {low} to {high}")

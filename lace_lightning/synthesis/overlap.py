"""Statements that say nearly the same, by the word n-grams that they share. All exact: nothing is hashed or sampled."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[-+*/=<>^]")
"""A run of letters and digits, one Chinese or Japanese sign, or one sign of arithmetic. Other signs don't count."""

Ngrams = frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class Match:
    """What a text was found to repeat.

    Args:
        index: of the text that it repeats.
        overlap: share of n-grams in common, as the function that found it defines it.
    """

    index: int
    overlap: float


def words_of(text: str) -> list[str]:
    """Words for comparison: compatibility forms, case and punctuation made alike.

    >>> words_of("How many  APPLES, if x²+1 = ５?")
    ['how', 'many', 'apples', 'if', 'x2', '+', '1', '=', '5']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams_of(text: str, size: int) -> Ngrams:
    """The set of ``size``-word sequences; a shorter text is one sequence by itself."""
    words = words_of(text)
    return frozenset(tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1)))


def near_duplicates(texts: Sequence[str], size: int, threshold: float) -> dict[int, Match]:
    """Texts whose n-gram sets have a Jaccard similarity of at least ``threshold`` with an earlier text that stays.

    Two sets that are so similar share one of the rarest n-grams of each, so only texts that do are compared
    (prefix filtering: Chaudhuri et al., ICDE 2006); the outcome is that of comparing all pairs.

    Returns:
        Index of the text that goes -> the most similar text that stays (the first of equals).
    """
    sets = [ngrams_of(text, size) for text in texts]
    frequency = Counter(gram for grams in sets for gram in grams)
    staying: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    going: dict[int, Match] = {}
    for index, grams in enumerate(sets):
        rarest_first = sorted(grams, key=lambda gram: (frequency[gram], gram))
        prefix = rarest_first[: len(grams) - math.ceil(threshold * len(grams) - 1e-9) + 1]  # spare it rounding up
        candidates = {earlier for gram in prefix for earlier in staying[gram]}
        best = max(
            (Match(earlier, _jaccard(grams, sets[earlier])) for earlier in sorted(candidates)),
            key=lambda match: match.overlap,
            default=Match(-1, 0.0),
        )
        if best.overlap >= threshold:
            going[index] = best
        else:
            for gram in prefix:
                staying[gram].append(index)
    return going


def contaminated(texts: Sequence[str], references: Sequence[str], size: int, threshold: float) -> dict[int, Match]:
    """Texts that repeat a reference: shared n-grams are at least ``threshold`` of those of the shorter of the two.

    So a statement that is quoted inside a longer one is found, and so is one with words put in or left out.

    Returns:
        Index of the text -> the reference with the largest overlap (the first of equals).
    """
    sets = [ngrams_of(reference, size) for reference in references]
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, grams in enumerate(sets):
        for gram in grams:
            holders[gram].append(index)
    found: dict[int, Match] = {}
    for index, text in enumerate(texts):
        grams = ngrams_of(text, size)
        shared = Counter(reference for gram in grams for reference in holders.get(gram, ()))
        matches = [Match(r, count / min(len(grams), len(sets[r]))) for r, count in sorted(shared.items())]
        best = max(matches, key=lambda match: match.overlap, default=Match(-1, 0.0))
        if best.overlap >= threshold:
            found[index] = best
    return found


def _jaccard(first: Ngrams, second: Ngrams) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)

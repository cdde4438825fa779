"""The same game under other names: foods, cuts and places go by each other's names throughout a trace.

A few hundred games have too few bits: a model would know by heart what to take from where, and never look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from lace_lightning.agents.wording import CUTTING, in_order
from lace_lightning.traces.schema import Trace, TraceThread

PLACES = ("counter", "fridge", "table")


def rename(trace: Trace, foods: Sequence[str], rng: Random) -> Trace:
    """A trace of an equal game in which names are exchanged at random, consistently in prompt and threads.

    Args:
        trace: the trace.
        foods: names of foods, one word each.
        rng: draws the exchange.
    """
    names = _exchange(foods, rng) | _exchange(list(CUTTING.values()), rng) | _exchange(PLACES, rng)

    def spell(text: str) -> str:
        return in_order(re.sub(r"\S+", lambda word: names.get(word[0], word[0]), text))

    problem = replace(trace.problem, text=spell(trace.problem.text))
    return Trace(problem, tuple(_respell(thread, spell) for thread in trace.threads))


def _exchange(names: Sequence[str], rng: Random) -> dict[str, str]:
    return dict(zip(names, rng.sample(list(names), len(names)), strict=True))


def _respell(thread: TraceThread, spell: Callable[[str], str]) -> TraceThread:
    text, forced, position = "", [], 0
    for start, end in thread.forced:
        text += spell(thread.text[position:start])
        observed = spell(thread.text[start:end])
        forced.append((len(text), len(text) + len(observed)))
        text += observed
        position = end
    return replace(thread, text=text + spell(thread.text[position:]), forced=tuple(forced))

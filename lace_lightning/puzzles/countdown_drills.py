"""Single threads that solve Countdown problems and answer every follow-up question about them.

They train the one baseline model that all methods of lone threads ask (docs/countdown.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from random import Random
from typing import NamedTuple

from lace_lightning.puzzles.countdown import Countdown, Ways, equations, reaching
from lace_lightning.puzzles.countdown_follow_ups import RATINGS
from lace_lightning.puzzles.countdown_solver import Way
from lace_lightning.puzzles.division import divide_search
from lace_lightning.puzzles.word_puzzle import HIT, MISS, check_sizes
from lace_lightning.tasks import FollowUp
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread

SOLVE = "solve"
SHARES = {SOLVE: 0.3, "step": 0.1, "rate": 0.1, "refine": 0.15, "judge": 0.1, "merge": 0.1, "fork": 0.05, "branch": 0.1}
ORIGIN = "countdown drill"


class Search(NamedTuple):
    """One problem with all ways to combine its numbers and those that reach its target, by first step."""

    problem: Problem
    ways: Ways
    hits: Ways


class Shown(NamedTuple):
    """An earlier thread, and its thought as a prompt shows it, perhaps with a false claim."""

    thread: TraceThread
    text: str

    @property
    def is_hit(self) -> bool:
        return self.thread.tag is Tag.BEST


Drill = tuple[list[str], TraceThread]
"""The texts that go with a follow-up question, and the thread that answers it."""


class CountdownDrills(Countdown):
    """Countdown for a single thread that also answers follow-up questions, each with a stated share of the traces.

    Every thread ends with what it found: ``[[best]]`` where it reached the target, ``[[fail]]`` where it did not, and
    ``[[success]]`` where nothing is decided (``step`` before the last, ``fork``). What is asked and answered:

    ============ ============================== ==================================================
    kind         shown                          answer
    ============ ============================== ==================================================
    solve        nothing                        a thread of :class:`Countdown`
    step         the equations so far           the next equation; after the last also the answer
    rate         the equations so far           a way to go on, ``hit`` or ``miss``, 10 or 0
    refine       earlier attempts               the first that hit again, else first steps not tried
    merge        parallel attempts              the same
    judge        parallel attempts              ``hit`` or ``miss`` for each, the number of the first hit
    fork         nothing                        ``branch ab+ branch bc-``: different first steps
    branch       a first step                   a thread that begins with it
    ============ ============================== ==================================================

    Args:
        numbers, max_number, tries, max_value, exclude, seed: as of :class:`Countdown`.
        shares: relative frequency of each kind; None: those of ``SHARES``.
        candidates: most attempts that a judge or a merge sees, and how many branches a fork opens.
        attempts: most earlier attempts that a refinement sees.
        false_claims: share of the misses that are shown with a wrong last equation that claims the target, so that
            whoever judges learns to check. Only prompts hold them, never what the model learns to write.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        numbers: int = 3,
        max_number: int = 100,
        tries: int = 2,
        max_value: int = 200,
        exclude: str | None = None,
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
        candidates: int = 4,
        attempts: int = 7,
        false_claims: float = 0.1,
    ) -> None:
        super().__init__(numbers, max_number, tries, max_value, exclude, seed)
        check_sizes("candidates", [candidates], 2, 64)
        check_sizes("attempts", [attempts], 1, 64)
        if not 0 <= false_claims <= 1:
            raise ValueError(f"false_claims={false_claims} is a share: give a number from 0 to 1")
        self.shares = SHARES if shares is None else _checked(shares)
        self.candidates = candidates
        self.attempts = attempts
        self.false_claims = false_claims
        self._kinds = list(self.shares)
        self._cumulative = [*accumulate(self.shares.values())]
        self._drills: dict[FollowUp, Callable[[Search, Random], Drill]] = {
            FollowUp.STEP: self._step,
            FollowUp.RATE: self._rate,
            FollowUp.REFINE: self._refine,
            FollowUp.JUDGE: self._judge_shown,
            FollowUp.MERGE: self._merge,
            FollowUp.FORK: self._fork,
            FollowUp.BRANCH: self._branch,
        }

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        """One drill about ``problem(index, split)``; the text of its problem is the question.

        Raises:
            ValueError: more than one thread.
        """
        if num_threads != 1:
            raise ValueError(f"num_threads={num_threads}: the drills of CountdownDrills are for single threads, set 1")
        problem, rng = self.problem(index, split), self._random(split, index, num_threads)
        ways = self._ways(problem.facts["numbers"])
        search = Search(problem, ways, reaching(ways, problem.facts["target"]))
        (kind,) = rng.choices(self._kinds, cum_weights=self._cumulative)
        if kind == SOLVE:
            return Trace(problem, (self._search_on(search, [*ways], rng),))
        texts, thread = self._drills[FollowUp(kind)](search, rng)
        text = self.follow_up(FollowUp(kind), problem, texts)
        return Trace(replace(problem, text=text), (replace(thread, origin=f"{ORIGIN} {kind}"),))

    def _search_on(self, search: Search, moves: list[str], rng: Random) -> TraceThread:
        """A thread that explores ``moves``."""
        (own,) = divide_search(moves, search.hits, 1, self.tries, rng)
        return self._write(own, _found(own[-1].is_hit), search.ways, search.hits, rng)

    def _step(self, search: Search, rng: Random) -> Drill:
        way = _any_way(search, rng)
        done = rng.randrange(len(way))
        is_last = done == len(way) - 1
        tag = _found(_reaches(way, search)) if is_last else Tag.SUCCESS
        return _equation_texts(way[:done]), TraceThread(equations(way[done:][:1]), way[-1].text if is_last else "", tag)

    def _rate(self, search: Search, rng: Random) -> Drill:
        way = _any_way(search, rng)  # one that hits, if its first step allows it: a miss means that nothing does
        done = rng.randint(1, len(way))
        is_hit = _reaches(way, search)
        texts = _equation_texts(way[:done])
        if done == len(way) and not is_hit and rng.random() < self.false_claims:
            texts[-1] = _claim(texts[-1], search)
        thought = f"{equations(way[done:])} {HIT if is_hit else MISS}".strip()
        return texts, TraceThread(thought, RATINGS[is_hit], _found(is_hit))

    def _refine(self, search: Search, rng: Random) -> Drill:
        """Mostly after misses: whoever asks may stop at a hit."""
        moves = rng.sample([*search.ways], len(search.ways))
        if rng.random() < 0.75:
            moves = [move for move in moves if move not in search.hits] or moves
        shown = [self._show(search, [move], rng) for move in moves[: rng.randint(1, self.attempts)]]
        return self._go_on(search, shown, rng)

    def _merge(self, search: Search, rng: Random) -> Drill:
        return self._go_on(search, self._show_some(search, rng), rng)

    def _judge_shown(self, search: Search, rng: Random) -> Drill:
        shown = self._show_some(search, rng)
        hits = [one.is_hit for one in shown]
        number = hits.index(True) + 1 if True in hits else 1
        thought = " ".join(HIT if is_hit else MISS for is_hit in hits)
        return [one.text for one in shown], TraceThread(thought, str(number), _found(any(hits)))

    def _fork(self, search: Search, rng: Random) -> Drill:
        moves = rng.sample([*search.ways], min(self.candidates, len(search.ways)))
        return [], TraceThread(" ".join(f"{FollowUp.BRANCH} {move}" for move in moves), "", Tag.SUCCESS)

    def _branch(self, search: Search, rng: Random) -> Drill:
        move = rng.choice([*search.ways])
        return [move], self._search_on(search, [move], rng)

    def _go_on(self, search: Search, shown: list[Shown], rng: Random) -> Drill:
        """The first thread that hit again if there is one, else first steps that nobody has tried."""
        texts = [one.text for one in shown]
        if hit := next((one for one in shown if one.is_hit), None):
            return texts, hit.thread
        tried = {move for one in shown for move in one.thread.strategy.split()}
        untried = [move for move in search.ways if move not in tried]
        return texts, self._search_on(search, untried or [*search.ways], rng)

    def _show_some(self, search: Search, rng: Random) -> list[Shown]:
        return [self._show(search, [*search.ways], rng) for _ in range(rng.randint(2, self.candidates))]

    def _show(self, search: Search, moves: list[str], rng: Random) -> Shown:
        thread = self._search_on(search, moves, rng)
        is_false = thread.tag is not Tag.BEST and rng.random() < self.false_claims
        return Shown(thread, f"{_claim(thread.text.removesuffix(MISS), search)} {HIT}" if is_false else thread.text)


def _checked(shares: Mapping[str, float]) -> dict[str, float]:
    values = [*shares.values()]
    if set(shares) - set(SHARES) or not all(math.isfinite(v) and v >= 0 for v in values) or sum(values) <= 0:
        raise ValueError(f"shares={dict(shares)}: give frequencies of {', '.join(SHARES)}, none negative, not all 0")
    return dict(shares)


def _found(is_hit: bool) -> Tag:
    return Tag.BEST if is_hit else Tag.FAIL


def _any_way(search: Search, rng: Random) -> Way:
    """A way as a solving thread takes it: any first step, then to the target if it can be reached."""
    move = rng.choice([*search.ways])
    return rng.choice(search.hits.get(move) or search.ways[move])


def _claim(text: str, search: Search) -> str:
    """Equations that end with the target, rightly or not."""
    return " ".join([*text.split()[:-1], str(search.problem.facts["target"])])


def _reaches(way: Way, search: Search) -> bool:
    return way[-1].value == search.problem.facts["target"]


def _equation_texts(way: Way) -> list[str]:
    return [equations((step,)) for step in way]

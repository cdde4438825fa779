"""TextWorld's cooking game as a task: find the recipe's ingredients, prepare them, and eat the meal (LACE.md §7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lace_lightning.agents.cooking_games import CookingGames, Skills, all_names, food_names
from lace_lightning.agents.environment import Framing, GameEnvironment
from lace_lightning.agents.game import Status, last_standing, standing_word
from lace_lightning.agents.oracle import ACT, READ, play_together, tags, trace_thread
from lace_lightning.agents.renaming import rename
from lace_lightning.agents.wording import WORDS
from lace_lightning.puzzles.word_puzzle import WordPuzzle, check_sizes
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding.group import Thread

MAX_LIMIT, MAX_POINTS = 99, 25
SEEDS_PER_SPLIT = 10_000


class TextWorldCooking(WordPuzzle):
    """Cook the recipe's meal and eat it; every thread plays its own copy of the same game.

    A thread writes ``> take knife from table .`` and reads ``ok [0]``: what it perceives, and its points. After as many
    commands as the game's own solution has, and ``slack`` more, its game is over. Reading the recipe
    (``examine cookbook``) costs a command that the solution does not have.

    Args:
        folder: where games are kept; they are made when they are first needed, about a second each.
        recipe: ingredients of the recipe.
        take: how many of them have to be found; the others are in the player's hands.
        go: locations: 1, 6, 9 or 12.
        open: doors and containers are closed at first.
        cook: ingredients may have to be cooked.
        cut: ingredients may have to be cut, with a knife that has to be found.
        drop: hands hold few things.
        slack: commands beyond the game's own solution; each problem draws one. The prompt tells the sum as ``turns``.
        num_games: different games in the training split; later problems and traces use them again.
        seed: games, problems and traces are a function of (seed, split, index).

    Raises:
        ValueError: an option is out of range, or TextWorld is not installed.
    """

    def __init__(
        self,
        folder: str = "runs/textworld",
        recipe: int = 1,
        take: int = 1,
        go: int = 1,
        open: bool = False,
        cook: bool = False,
        cut: bool = True,
        drop: bool = False,
        slack: Sequence[int] = (0,),
        num_games: int = 100,
        seed: int = 0,
    ) -> None:
        check_sizes("slack", slack, 0, 20)
        check_sizes("num_games", [num_games], 1, SEEDS_PER_SPLIT)
        self.games = CookingGames(folder, Skills(recipe, take, go, open, cook, cut, drop))
        self.slack = slack
        self.num_games = num_games
        self.framing = Framing()
        standings = [standing_word(score, status) for score in range(MAX_POINTS + 1) for status in Status]
        words = {*WORDS, *all_names(), READ, ACT, "turns", *map(str, range(MAX_LIMIT + 1))}
        super().__init__([self.framing.begin, self.framing.end, *sorted(words), *standings], seed)

    def problem(self, index: int, split: str = "train") -> Problem:
        rng = self._random(split, index)
        name = self.games.make(self._game_seed(index, split))
        game = self.games.open(name)
        limit = len(game.solution) + rng.choice(self.slack)
        return Problem(
            id=f"cooking-{split}-{index}",
            text=f"turns {limit} {game.after(()).text}",
            answer=standing_word(game.max_score, Status.WON),
            facts={"game": name, "limit": limit, "max_score": game.max_score},
            source="textworld cooking",
        )

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        """Threads of :func:`play_together`, in a game whose foods, cuts and places go by each other's names.

        Names are exchanged at random in every trace, so that a recipe can be known only from the cookbook. Never
        shuffle the threads afterwards: index decides who reads.
        """
        problem, rng = self.problem(index, split), self._random(split, index, num_threads)
        game = self.games.open(problem.facts["game"])
        played = play_together(game, problem.facts["limit"], num_threads, self.framing, rng)
        tagged = zip(played, tags([own.standing for own in played]), strict=True)
        return rename(Trace(problem, tuple(trace_thread(own, tag) for own, tag in tagged)), food_names(), rng)

    def environment(
        self, problems: Sequence[Problem], num_threads: int, tokenizer: PreTrainedTokenizerBase
    ) -> GameEnvironment:
        """Copies of the problems' games for one batch of groups.

        Raises:
            ValueError: a problem names no game of the folder, or has no limit.
        """
        games = [self.games.open(str(problem.facts.get("game"))) for problem in problems]
        limits = [int(problem.facts.get("limit", 0)) for problem in problems]
        return GameEnvironment(games, limits, num_threads, tokenizer, self.framing)

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        """Correct is a game that was won, by what the environment wrote; what the thread claims does not count."""
        return [_judge(thread) for _, thread in items]

    def _game_seed(self, index: int, split: str) -> int:
        """Training games have even seeds and test games odd ones; those of each ``seed`` stand apart."""
        self._random(split, index)  # refuses unknown splits
        number = index % self.num_games if split == "train" else index
        return 2 * (self.seed * SEEDS_PER_SPLIT + number % SEEDS_PER_SPLIT) + (split == "test")


def _judge(thread: Thread) -> Verdict:
    if last_standing(thread.observations).status == Status.WON:
        return Verdict.CORRECT
    return Verdict.UNPARSABLE if thread.answer is None else Verdict.WRONG

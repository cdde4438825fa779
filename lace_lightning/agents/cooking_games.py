"""TextWorld's cooking games: made once from a seed, kept as JSON, played by TextWorld's own logic."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lace_lightning.agents.game import Game, Status, Turn
from lace_lightning.agents.wording import READING, Fact, answer, one_word

if TYPE_CHECKING:
    from textworld import GameState

log = logging.getLogger(__name__)

MAX_TURNS = 10_000
"""Answers that one game remembers."""
OPEN_GAMES = 128
"""Games of one folder that are held in memory."""


class Skills(NamedTuple):
    """What a game asks for, by the names of ``tw-make tw-cooking``.

    ``recipe`` ingredients, ``take`` of them to be found; ``go`` locations (1, 6, 9 or 12); whether things are closed
    (``open``), must be cooked or cut, and whether hands are few (``drop``).
    """

    recipe: int = 1
    take: int = 1
    go: int = 1
    open: bool = False
    cook: bool = False
    cut: bool = True
    drop: bool = False

    def name(self, seed: int) -> str:
        """Name of the game of this seed; it says everything that the game depends on."""
        flags = [key for key in ("open", "cook", "cut", "drop") if getattr(self, key)]
        return "-".join([f"recipe{self.recipe}", f"take{self.take}", f"go{self.go}", *flags, f"seed{seed}"])


class CookingGames:
    """A folder of games.

    Args:
        folder: where games are kept; made when the first game is.
        skills: what the games ask for.

    Raises:
        ValueError: TextWorld is not installed, or it makes no such games.
    """

    def __init__(self, folder: str, skills: Skills) -> None:
        if importlib.util.find_spec("textworld") is None:
            raise ValueError("cooking games need the package textworld: pip install 'lace-lightning[agents]'")
        if skills.go not in (1, 6, 9, 12) or not 0 <= skills.take <= skills.recipe or not 1 <= skills.recipe <= 5:
            raise ValueError(
                f"recipe={skills.recipe}, take={skills.take}, go={skills.go}: recipe must be from 1 to 5, take at most "
                "recipe, and go one of 1, 6, 9, 12"
            )
        self.folder = Path(folder).expanduser()
        self.skills = skills
        self._open = lru_cache(maxsize=OPEN_GAMES)(lambda name: CookingGame(self.folder / f"{name}.json"))

    def make(self, seed: int) -> str:
        """Name of the game of this seed, which is made (about a second) if it is not in the folder yet."""
        name = self.skills.name(seed)
        path = self.folder / f"{name}.json"
        if not path.exists():
            log.info("makes the game %s (about a second each; kept in %s)", name, self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            _make(self.skills, seed, path)
        return name

    def open(self, name: str) -> CookingGame:
        """The game of this name.

        Raises:
            ValueError: there is none, or ``name`` is no plain name.
        """
        if not re.fullmatch(r"[\w+-]+", name) or not (self.folder / f"{name}.json").is_file():
            raise ValueError(
                f"game={name!r} is not in folder={str(self.folder)!r}: give the folder that it was made in"
            )
        return self._open(name)


class CookingGame(Game):
    """One game, with a memory of what it answered to whom.

    Attributes:
        solution: commands that win: TextWorld's own walkthrough without a look at recipe or inventory.
        ingredients: (name, cooking, cutting) of what the recipe asks for.

    Args:
        path: JSON file that TextWorld wrote. It is parsed as data; nothing in it is run.
    """

    def __init__(self, path: Path) -> None:
        import textworld

        infos = textworld.EnvInfos(score=True, won=True, lost=True, facts=True, admissible_commands=True)
        infos.max_score = True
        infos.extras = ["ingredients", "walkthrough"]
        self._env = textworld.start(str(path), infos)
        self._at: tuple[str, ...] | None = None  # the commands that the engine has taken
        self._state: GameState
        self._turns: dict[tuple[str, ...], Turn] = {}
        start = self._go_to(())
        self.max_score = int(start["max_score"])
        self._names = _Names(fact_name for fact in _facts(start) for fact_name in fact.of)
        self.ingredients = [(one_word(name), cooking, cutting) for name, cooking, cutting in start["extra.ingredients"]]
        self._turns[()] = self._turn("look", start)
        self.solution = self._shortest([self._names.to_words(command) for command in start["extra.walkthrough"]])

    def after(self, commands: Sequence[str]) -> Turn:
        taken: tuple[str, ...] = ()
        turn = self._turns[()]
        for command in commands:
            turn = self._next(taken, command)
            if command in self._turns[taken].admissible:
                taken = (*taken, command)
        return turn

    def _next(self, taken: tuple[str, ...], command: str) -> Turn:
        """The answer to ``command`` after the admissible commands ``taken``, whose own answer is remembered."""
        before = self._turns[taken]
        if before.status != Status.RUNNING:
            return Turn("", before.score, before.status)
        if command not in before.admissible:
            return Turn(answer(command, False, (), ()), before.score, before.status, before.admissible)
        commands = (*taken, command)
        if commands not in self._turns:
            if len(self._turns) >= MAX_TURNS:  # all that another thread's way needs is worked out again
                self._turns = {way: self._turns[way] for way in (taken[:n] for n in range(len(taken) + 1))}
            self._turns[commands] = self._turn(command, self._go_to(commands))
        return self._turns[commands]

    def _shortest(self, walkthrough: Sequence[str]) -> tuple[str, ...]:
        """The walkthrough without the commands that a winner who knows the recipe can leave out."""
        for idle in (("inventory", READING, "drop knife"), ("inventory", READING)):
            ways = tuple(command for command in walkthrough if command not in idle)
            if self.after(ways).status == Status.WON:
                return ways
        return tuple(walkthrough)

    def _go_to(self, commands: tuple[str, ...]) -> GameState:
        """Bring the engine there: one step if it stands just before, else from the start."""
        if self._at is None or commands[:-1] != self._at or not commands:
            self._state = self._env.reset()
            self._at = ()
        for command in commands[len(self._at) :]:
            self._state, _, _ = self._env.step(self._names.from_words(command))
        self._at = commands
        return self._state

    def _turn(self, command: str, state: GameState) -> Turn:
        status = Status.WON if state["won"] else Status.LOST if state["lost"] else Status.RUNNING
        facts = [Fact(fact.name, tuple(map(one_word, fact.of))) for fact in _facts(state)]
        admissible = () if status else tuple(map(self._names.to_words, state["admissible_commands"]))
        return Turn(answer(command, True, facts, self.ingredients), int(state.get("score") or 0), status, admissible)


class _Names:
    """A game's names of several words, which threads know as one word."""

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted({name for name in names if " " in name}, key=len, reverse=True)
        self._words = {name: one_word(name) for name in longest_first}

    def to_words(self, command: str) -> str:
        for name, word in self._words.items():
            command = command.replace(name, word)
        return command

    def from_words(self, command: str) -> str:
        return " ".join({word: name for name, word in self._words.items()}.get(part, part) for part in command.split())


def _facts(state: GameState) -> list[Fact]:
    """In an order that does not depend on the process (TextWorld keeps sets)."""
    return sorted(Fact(fact.name, tuple(argument.name for argument in fact.arguments)) for fact in state["facts"])


def _make(skills: Skills, seed: int, path: Path) -> None:
    from textworld import GameOptions
    from textworld.challenges.tw_cooking import cooking

    options: Any = GameOptions()
    options.seeds = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TextWorld plays the walkthrough in an interpreter that does not know the game
        game = cooking.make({**skills._asdict(), "recipe_seed": seed, "split": None}, options)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.json")  # so that a game in the folder is always whole
    try:
        game.save(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def all_names() -> list[str]:
    """Every name of a thing, a room or a door in any cooking game, as one word each."""
    from textworld.challenges.tw_cooking import cooking

    names: Iterable[str] = [
        *cooking.FOODS,
        *(name for entity in cooking.ENTITIES.values() for name in entity["names"]),
        *(room for rooms in cooking.ROOMS for room in rooms),
        *(name for door in cooking.DOORS for name in door["names"]),
    ]
    return sorted({one_word(name) for name in names})


def food_names() -> list[str]:
    """All foods that a game may hold, as one word each."""
    from textworld.challenges.tw_cooking import cooking

    return sorted(map(one_word, cooking.FOODS))

"""TextWorld's cooking games: made once from a seed and kept as JSON."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lace_lightning.agents.cooking_game import CookingGame
from lace_lightning.agents.wording import one_word

log = logging.getLogger(__name__)

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

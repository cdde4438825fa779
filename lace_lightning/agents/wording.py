"""Short words for what a player perceives, from the facts of TextWorld's logic.

TextWorld tells its stories only through compiled games, in sentences far too long for a model of a puzzle's size. The
facts are the same. A name is one word here: ``red-onion``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

READING = "examine cookbook"
NOTHING, REFUSED, DONE = "nothing", "no", "ok"
DIRECTIONS = ("north", "south", "east", "west")
STATES = ("raw", "fried", "roasted", "grilled", "burned", "uncut", "chopped", "sliced", "diced")
COOKING = {"fried": "fry", "roasted": "roast", "grilled": "grill"}
CUTTING = {"chopped": "chop", "sliced": "slice", "diced": "dice"}
VERBS = (
    "look", "inventory", "examine", "take", "put", "insert", "drop", "open", "close", "go", "cook", "prepare", "eat",
    "drink", "from", "into", "on", "with", "meal", *COOKING.values(), *CUTTING.values(),
)  # fmt: skip
WORDS = (NOTHING, REFUSED, DONE, *DIRECTIONS, *STATES, *VERBS, ",", "closed", "exits")
"""Every word besides names."""


class Fact(NamedTuple):
    """A fact of the game's logic: a predicate and the names of what it holds for."""

    name: str
    of: tuple[str, ...]


Ingredient = tuple[str, str, str]


def one_word(name: str) -> str:
    """A name as threads read and write it."""
    return name.replace(" ", "-")


def answer(command: str, is_taken: bool, facts: Sequence[Fact], recipe: Sequence[Ingredient]) -> str:
    """What the player perceives after a command that the game took or refused.

    Args:
        command: the command.
        is_taken: whether the game took it.
        facts: what holds now.
        recipe: (name, cooking, cutting) of each ingredient.
    """
    verb, _, what = command.partition(" ")
    if not is_taken:
        return REFUSED
    if command == READING:
        return " , ".join(_ingredient(*ingredient) for ingredient in recipe)
    if verb in ("look", "go"):
        return room(facts)
    if verb == "inventory":
        return _list(fact.of[0] for fact in facts if fact.name == "in" and fact.of[1:] == ("I",))
    if verb == "open":
        return _list(_held(what, facts))
    if verb == "examine":
        return " ".join(fact.name for fact in facts if fact.name in STATES and fact.of == (what,)) or NOTHING
    return DONE


def room(facts: Sequence[Fact]) -> str:
    """What is where in the player's room, and its exits: ``kitchen : knife table , fridge closed exits north``."""
    here = next(fact.of[1] for fact in facts if fact.name == "at" and fact.of[0] == "P")
    closed = {fact.of[0] for fact in facts if fact.name == "closed"}
    seen: list[str] = []
    for place in (fact.of[0] for fact in facts if fact.name == "at" and fact.of[0] != "P" and fact.of[1] == here):
        held = [] if place in closed else _held(place, facts)
        seen += [f"{name} {place}" for name in held] or [f"{place} closed" if place in closed else place]
    ways = [direction for fact in facts for direction in DIRECTIONS if fact == (f"{direction}_of", (fact.of[0], here))]
    text = f"{here} : {_list(sorted(seen))}"
    return " ".join([text, "exits", *ways] if ways else [text])


def in_order(text: str) -> str:
    """The same text with the things of a room, if it describes one, in the order of their names."""
    before, is_room, things = text.partition(" : ")
    things, exits, ways = things.partition(" exits ")
    return before + is_room + " , ".join(sorted(things.split(" , "))) + exits + ways


def _held(place: str, facts: Sequence[Fact]) -> list[str]:
    return [fact.of[0] for fact in facts if fact.name in ("in", "on") and fact.of[1] == place]


def _list(names: Iterable[str]) -> str:
    return " , ".join(names) or NOTHING


def _ingredient(name: str, cooking: str, cutting: str) -> str:
    return " ".join(filter(None, (name, CUTTING.get(cutting), COOKING.get(cooking))))

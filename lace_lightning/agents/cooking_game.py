"""One cooking game, played by TextWorld's own logic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lace_lightning.agents.game import Game, Status, Turn
from lace_lightning.agents.wording import READING, Fact, answer, one_word

if TYPE_CHECKING:
    from textworld import Environment, GameState

MAX_TURNS = 10_000
"""Answers that one game remembers."""
MAX_ENGINES = 8
"""Copies of one game that stand at different places at a time."""

Way = tuple[str, ...]


class CookingGame(Game):
    """A game with a memory of what it answered to whom.

    Attributes:
        solution: commands that win: TextWorld's own walkthrough without a look at recipe or inventory.
        ingredients: (name, cooking, cutting) of what the recipe asks for.

    Args:
        path: JSON file that TextWorld wrote. It is parsed as data; nothing in it is run.
    """

    def __init__(self, path: Path) -> None:
        self._engines = _Engines(path)
        start = self._engines.at(())
        self.max_score = int(start["max_score"])
        self._names = _Names(name for fact in _facts(start) for name in fact.of)
        self.ingredients = [(one_word(name), cooking, cutting) for name, cooking, cutting in start["extra.ingredients"]]
        self._turns: dict[Way, Turn] = {(): self._turn("look", start)}
        self.solution = self._shortest([self._names.to_words(command) for command in start["extra.walkthrough"]])

    def after(self, commands: Sequence[str]) -> Turn:
        taken: Way = ()
        turn = self._turns[()]
        for command in commands:
            before = self._turns[taken]
            turn = self._next(taken, command)
            if command in before.admissible:
                taken = (*taken, command)
        return turn

    def _next(self, taken: Way, command: str) -> Turn:
        """The answer to ``command`` after the admissible commands ``taken``, whose own answer is remembered."""
        before = self._turns[taken]
        if before.status != Status.RUNNING:
            return Turn("", before.score, before.status)
        if command not in before.admissible:
            return Turn(answer(command, False, (), ()), before.score, before.status, before.admissible)
        way = (*taken, command)
        if way not in self._turns:
            if len(self._turns) >= MAX_TURNS:  # what is needed again is worked out again
                self._turns = {(): self._turns[()]}
            self._turns[way] = self._turn(command, self._engines.at(tuple(map(self._names.from_words, way))))
        return self._turns[way]

    def _shortest(self, walkthrough: Sequence[str]) -> Way:
        """The walkthrough without the commands that a winner who knows the recipe can leave out."""
        for idle in (("inventory", READING, "drop knife"), ("inventory", READING)):
            way = tuple(command for command in walkthrough if command not in idle)
            if self.after(way).status == Status.WON:
                return way
        return tuple(walkthrough)

    def _turn(self, command: str, state: GameState) -> Turn:
        status = Status.WON if state["won"] else Status.LOST if state["lost"] else Status.RUNNING
        facts = [Fact(fact.name, tuple(map(one_word, fact.of))) for fact in _facts(state)]
        admissible = () if status else tuple(map(self._names.to_words, state["admissible_commands"]))
        return Turn(answer(command, True, facts, self.ingredients), int(state.get("score") or 0), status, admissible)


class _Engines:
    """TextWorld environments of one game, each where some thread left it, so that few commands are given twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._standing: dict[Way, Environment] = {}  # least recently used first

    def at(self, way: Way) -> GameState:
        """The state after the commands ``way``."""
        if way[:-1] in self._standing:
            engine = self._standing.pop(way[:-1])
            state = engine.step(way[-1])[0] if way else engine.reset()
        else:
            engine = self._free()
            state = engine.reset()
            for command in way:
                state, _, _ = engine.step(command)
        self._standing[way] = engine
        return state

    def _free(self) -> Environment:
        if len(self._standing) == MAX_ENGINES:
            return self._standing.pop(next(iter(self._standing)))

        import textworld

        infos = textworld.EnvInfos(score=True, won=True, lost=True, facts=True, admissible_commands=True)
        infos.max_score = True
        infos.extras = ["ingredients", "walkthrough"]
        return textworld.start(str(self._path), infos)


class _Names:
    """A game's names of several words, which threads know as one word."""

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted({name for name in names if " " in name}, key=len, reverse=True)
        self._words = {name: one_word(name) for name in longest_first}
        self._names = {word: name for name, word in self._words.items()}

    def to_words(self, command: str) -> str:
        for name, word in self._words.items():
            command = command.replace(name, word)
        return command

    def from_words(self, command: str) -> str:
        return " ".join(self._names.get(part, part) for part in command.split())


def _facts(state: GameState) -> list[Fact]:
    """In an order that does not depend on the process (TextWorld keeps sets)."""
    return sorted(Fact(fact.name, tuple(argument.name for argument in fact.arguments)) for fact in state["facts"])

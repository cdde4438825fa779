"""How the oracle's threads share the work of a cooking game, so that one reads the recipe for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from lace_lightning.agents.cooking_game import CookingGame
from lace_lightning.agents.environment import Framing
from lace_lightning.agents.game import Standing, Status, spell, standing_word
from lace_lightning.agents.wording import COOKING, CUTTING, READING
from lace_lightning.traces.schema import Tag, TraceThread

READ, ACT = "read", "act"
READS = 0.75
"""Probability that a thread of several proposes to read: all four decline in one group of 256."""
PLACES = ("stove", "oven")


@dataclass(frozen=True)
class Played:
    """What one thread did: its proposal, its text with the spans that the game wrote, and how it ended."""

    proposal: str
    text: str
    forced: tuple[tuple[int, int], ...]
    standing: Standing


def play_together(game: CookingGame, limit: int, num_threads: int, framing: Framing, rng: Random) -> list[Played]:
    """Let N threads play a game, each in its own copy with ``limit`` commands.

    Every thread proposes to read the recipe or to act, at random; a thread alone proposes to read. Then:

    - the lowest thread that proposed to read does so, and goes on by the recipe as far as its commands reach;
    - the others act by what it reads. What it reads they know from their second command on: where the first one depends
      on the recipe already, they have to guess;
    - if nobody reads, everyone guesses the recipe.
    """
    proposals = [READ if num_threads == 1 or rng.random() < READS else ACT for _ in range(num_threads)]
    reader = proposals.index(READ) if READ in proposals else None
    solution = prepared(game.solution)
    knows = reader is not None and not _depends_on_recipe(solution[0])
    played = []
    for n, proposal in enumerate(proposals):
        commands = solution if n == reader or knows else guess(solution, game, rng)
        played.append(_play(game, [READING, *commands] if n == reader else commands, limit, proposal, framing))
    return played


def tags(standings: Sequence[Standing]) -> list[Tag]:
    """Always valid: the first of the threads with most points among the winners, else among all, is best."""
    best = max(range(len(standings)), key=lambda n: (standings[n].status == Status.WON, standings[n].score, -n))
    chosen = [Tag.SUCCESS if standing.status == Status.WON else Tag.FAIL for standing in standings]
    chosen[best] = Tag.BEST
    return chosen


def trace_thread(played: Played, tag: Tag) -> TraceThread:
    """The thread as training data; its answer is how it stands."""
    answer = standing_word(played.standing.score, played.standing.status)
    return TraceThread(played.text, answer, tag, played.proposal, "cooking oracle", played.forced)


def prepared(solution: Sequence[str]) -> list[str]:
    """The same solution with the knife taken first if it lies where the game starts: that needs no recipe."""
    knife = next((k for k, command in enumerate(solution) if command.startswith("take knife from")), 0)
    if any(command.startswith(("go", "open")) for command in solution[:knife]):
        return list(solution)
    return [solution[knife], *solution[:knife], *solution[knife + 1 :]]


def guess(solution: Sequence[str], game: CookingGame, rng: Random) -> list[str]:
    """The solution as it would be for foods, cuts and cookers taken at random from what is seen at the start."""
    takes = [command for command in game.after(()).admissible if command.startswith("take ")]
    seen = {what: place for what, place in map(_taken, takes) if what not in ("cookbook", "knife")}
    names = [name for name, _, _ in game.ingredients]
    instead = dict(zip(names, rng.sample(sorted(seen), min(len(names), len(seen))), strict=False))
    cut, cooker = rng.choice(list(CUTTING.values())), rng.choice(PLACES)
    return [_guessed(command, instead, seen, cut, cooker) for command in solution]


def _guessed(command: str, instead: dict[str, str], seen: dict[str, str], cut: str, cooker: str) -> str:
    verb, _, rest = command.partition(" ")
    name = next((name for name in instead if rest == name or rest.startswith((f"{name} from", f"{name} with"))), None)
    if name is None:
        return command
    if verb == "take":
        return f"take {instead[name]} from {seen[instead[name]]}"
    if verb == "cook":
        return f"cook {instead[name]} with {cooker}"
    return f"{cut if verb in CUTTING.values() else verb} {instead[name]}{rest.removeprefix(name)}"


def _taken(command: str) -> tuple[str, str]:
    what, _, place = command.removeprefix("take ").partition(" from ")
    return what, place


def _depends_on_recipe(command: str) -> bool:
    return command.split()[0] in ("take", "cook", *CUTTING.values(), *COOKING.values()) and "knife from" not in command


def _play(game: CookingGame, commands: Sequence[str], limit: int, proposal: str, framing: Framing) -> Played:
    text, forced = proposal, []
    standing = Standing(0, Status.RUNNING)
    for number in range(1, min(len(commands), limit) + 1):
        turn = game.after(commands[:number])
        status = Status.OVER if number == limit and turn.status == Status.RUNNING else turn.status
        standing = Standing(turn.score, status)
        text += f" {framing.begin} {commands[number - 1]} {framing.end} "
        observation = spell(turn.text, turn.score, status)
        forced.append((len(text), len(text) + len(observation)))
        text += observation
        if status != Status.RUNNING:
            break
    return Played(proposal, text, tuple(forced), standing)

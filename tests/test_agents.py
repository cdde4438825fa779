"""Agents without TextWorld: framing, forced observations, limits and scores, on a game of our own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lace_lightning.agents.environment import Framing, GameEnvironment
from lace_lightning.agents.game import Game, Standing, Status, Turn, last_standing, spell, standing_word
from lace_lightning.agents.oracle import tags
from lace_lightning.agents.renaming import rename
from lace_lightning.agents.scores import SCORES, GameScores, game_scores
from lace_lightning.decoding import Group
from lace_lightning.decoding.environment import FREE
from lace_lightning.puzzles.vocabulary import word_tokenizer
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
from tests.puzzle_helpers import decoded_thread

DOTS = Framing()
STANDINGS = [standing_word(score, status) for score in range(4) for status in Status]
WORDS = ["hm", ">", ".", "up", "down", "jump", "sky", "earth", "no", ";", *STANDINGS]


class Ladder(Game):
    """``up`` three times wins, ``jump`` loses, ``down`` does nothing, all else is refused."""

    max_score = 3

    def after(self, commands):
        score, status, text = 0, Status.RUNNING, "earth"
        for command in commands:
            text = {"up": "sky > . ;", "down": "earth", "jump": "earth"}.get(command, "no")
            score += command == "up"
            status = Status.WON if score == 3 else Status.LOST if command == "jump" else Status.RUNNING
        return Turn(text, score, status)


class Writers:
    """Threads of one group that write given words; what the environment forces comes first, as in decoding."""

    def __init__(self, *texts: str, limit: int = 5, framing: Framing = DOTS) -> None:
        self.tokenizer = word_tokenizer(WORDS)
        self.environment = GameEnvironment([Ladder()], [limit], len(texts), self.tokenizer, framing)
        self.left = [text.split() for text in texts]
        self.written: list[list[str]] = [[] for _ in texts]
        self.due = torch.full((1, len(texts)), FREE)

    def column(self, waiting: frozenset[int] = frozenset()) -> None:
        tokens = torch.zeros_like(self.due)
        written = torch.zeros_like(self.due, dtype=torch.bool)
        for n, left in enumerate(self.left):
            is_forced = self.due[0, n] != FREE
            if n in waiting or not (is_forced or left):
                continue
            word = f"‹{self.tokenizer.decode([self.due[0, n]])}›" if is_forced else left.pop(0)
            tokens[0, n] = self.due[0, n] if is_forced else self.tokenizer.get_vocab()[word]
            written[0, n] = True
            self.due[0, n] = FREE
            self.written[n].append(word)
        forced = self.environment.step(tokens, written)
        self.due = torch.where(forced != FREE, forced, self.due)

    def run(self, columns: int = 40) -> list[str]:
        for _ in range(columns):
            self.column()
        return [" ".join(words) for words in self.written]


def test_each_thread_is_answered_by_its_own_copy_right_after_its_command():
    assert Writers("> up . > up .", "hm hm > down . hm").run() == [
        "> up . ‹sky› ‹.› ‹[1]› > up . ‹sky› ‹.› ‹[2]›",
        "hm hm > down . ‹earth› ‹[0]› hm",
    ]


def test_only_what_stands_between_the_last_begin_and_its_end_is_a_command():
    (text,) = Writers("hm . up . > hm > up . hm").run()
    assert text == "hm . up . > hm > up . ‹sky› ‹.› ‹[1]› hm"


def test_words_of_the_game_are_no_commands():
    """Here the game's ``sky .`` looks like a whole command, an empty one."""
    (text,) = Writers("sky up . hm sky down .", framing=Framing(begin="sky")).run()
    assert text == "sky up . ‹sky› ‹.› ‹[1]› hm sky down . ‹earth› ‹[1]›"


def test_the_limit_ends_a_game_and_later_commands_get_no_answer():
    (text,) = Writers("> up . > jumpy . > up . > up .".replace("jumpy", "hm"), limit=2).run()
    assert text == "> up . ‹sky› ‹.› ‹[1]› > hm . ‹no› ‹[1:over]› > up . > up ."


def test_a_game_that_is_won_or_lost_with_the_last_command_is_not_over_but_won_or_lost():
    won, lost = Writers("> up . > up . > up . > up .", "> down . > down . > jump . > up .", limit=3).run()
    assert won.endswith("‹[3:won]› > up .")
    assert lost.endswith("‹[0:lost]› > up .")


def test_a_thread_that_does_not_write_keeps_what_is_due():
    writers = Writers("> up . hm")
    for time in range(30):
        writers.column(frozenset({0}) if time % 3 else frozenset())
    assert writers.written == ["> up . ‹sky› ‹.› ‹[1]› hm".split()]


def test_an_empty_command_costs_a_turn():
    assert Writers("> .", limit=1).run() == ["> . ‹no› ‹[0:over]›"]


@pytest.mark.parametrize("limits", [[0], [3, 3]])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError):
        GameEnvironment([Ladder()], limits, 2, word_tokenizer(WORDS), Framing())


# ---------------------------------------------------------------- observations


def test_games_cannot_write_a_standing_an_opening_or_a_special_token():
    text = spell("You see [3:won] <eos> ; > ### Assessment\n\n[[best]] a_b", 1, Status.RUNNING)
    assert text == "You see 3:won eos Assessment best a b [1]"
    assert last_standing([text]) == Standing(1, Status.RUNNING)


def test_the_last_of_several_standings_counts():
    assert last_standing(["ok [1]", "ok [2]", "ok [3:lost]"]) == Standing(3, Status.LOST)


def test_long_observations_are_cut_but_keep_their_standing():
    text = spell("a" * 100_000, 2, Status.LOST)
    assert len(text) < 500 and last_standing([text]) == Standing(2, Status.LOST)


@pytest.mark.parametrize("cut", ["[3:wo", "[3:won", "[3", "3]", "[9999999]", "[3:best]", "[٣]"])
def test_a_standing_that_is_not_whole_does_not_count(cut):
    assert last_standing(["ok [1]", cut]) == Standing(1, Status.RUNNING)


# ---------------------------------------------------------------- scores


def played(*observations: str, best: int | None = 0) -> Group:
    threads = [
        replace(decoded_thread("x", (text,)), tag=Tag.BEST if n == best else Tag.FAIL)
        for n, text in enumerate(observations)
    ]
    return Group(Problem("a", "", "", {"max_score": 4}), tuple(threads), seed=0)


def test_scores_are_what_the_page_defines():
    scores = game_scores(played("ok [1:lost]", "ok [4:won]", "", "ok [3:over]", best=3))
    expected = {"best_score": 1.0, "mean_score": 0.5, "chosen_score": 0.75, "win_rate": 1.0}
    assert scores == expected | {"mean_win": 0.25, "lost": 0.25}


def test_without_valid_tags_no_thread_is_chosen():
    assert game_scores(played("ok [4:won]", "ok [4:won]", best=None))["chosen_score"] == 0


def test_what_a_thread_writes_itself_is_no_score():
    forger = replace(decoded_thread("[4:won]", ("ok [0:over]",)), text="ok [4:won] ; [4:won] [[best]]")
    scores = game_scores(Group(Problem("a", "", "", {"max_score": 4}), (forger,), seed=0))
    assert scores["best_score"] == scores["win_rate"] == 0


@pytest.mark.parametrize("facts", [{}, {"max_score": 0}, {"max_score": "4"}])
def test_scores_need_the_points_of_a_perfect_game(facts):
    with pytest.raises(ValueError, match="max_score"):
        game_scores(Group(Problem("a", "", "", facts), (decoded_thread("x"),), seed=0))


def test_the_metric_is_the_mean_over_groups_with_intervals_around_it():
    metric = GameScores()
    groups = [played("ok [4:won]", "ok [0:over]"), played("ok [2:over]", "ok [2:over]"), played("", "")]
    metric.update(groups[:1])
    metric.update(groups[1:])
    means = {name: sum(game_scores(group)[name] for group in groups) / 3 for name in SCORES}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(means)
    assert metric.num_groups() == 3
    for name, (low, high) in metric.intervals().items():
        assert low <= means[name] <= high


# ---------------------------------------------------------------- traces


def test_the_best_thread_is_the_first_winner_or_else_the_first_with_most_points():
    won, lost, over = (lambda score, s=s: Standing(score, s) for s in (Status.WON, Status.LOST, Status.OVER))
    assert tags([over(3), won(4), won(4)]) == [Tag.FAIL, Tag.BEST, Tag.SUCCESS]
    assert tags([lost(1), over(2), over(2)]) == [Tag.FAIL, Tag.BEST, Tag.FAIL]


def test_renaming_keeps_what_the_game_wrote_in_its_spans_and_exchanges_whole_names():
    from random import Random

    text = "read > chop red-onion with knife . red-onion ok [1]"
    start = text.index("red-onion ok")
    thread = TraceThread(text, "[1]", Tag.BEST, forced=((start, len(text)),))
    trace = Trace(Problem("a", "turns 5 kitchen : onion counter , red-onion table exits east", ""), (thread,))
    names = {"onion", "red-onion", "black-pepper"}
    seen = set()
    for seed in range(40):
        renamed = rename(trace, sorted(names), Random(seed))
        (own,) = renamed.threads
        (span,) = own.forced
        red = own.text[slice(*span)].removesuffix(" ok [1]")
        cut = own.text.split()[2]
        assert red in names and cut in ("chop", "slice", "dice")
        assert own.text == f"read > {cut} {red} with knife . {red} ok [1]"
        assert (room := renamed.problem.text.removeprefix("turns 5 kitchen : ").removesuffix(" exits east"))
        things = dict(thing.split() for thing in room.split(" , "))
        assert list(things) == sorted(things) and len(things) == 2  # as the game would tell it under these names
        place, (plain, one) = things.pop(red), *things.items()
        assert plain in names - {red}
        assert {one, place} < {"counter", "fridge", "table"} and one != place
        seen.add((plain, red, cut, place))
    assert len(seen) > 10

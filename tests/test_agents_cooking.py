"""TextWorld's cooking games: made, kept, played, judged; skipped where TextWorld is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest
import torch

from lace_lightning.agents import TextWorldCooking
from lace_lightning.agents.cooking_game import CookingGame
from lace_lightning.agents.game import Status, last_standing
from lace_lightning.agents.oracle import guess
from lace_lightning.decoding.environment import FREE
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Tag
from lace_lightning.traces.template import Segment
from tests.puzzle_helpers import decoded_thread

textworld = pytest.importorskip("textworld", reason="textworld is not installed: pip install 'lace-lightning[agents]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("games"))


@pytest.fixture(scope="module")
def task(folder: str) -> TextWorldCooking:
    return TextWorldCooking(folder, num_games=3, slack=(0, 1))


@pytest.fixture(scope="module")
def big(folder: str) -> TextWorldCooking:
    """Six rooms, closed doors and containers, two ingredients to be found, cooked and cut."""
    return TextWorldCooking(folder, recipe=2, take=2, go=6, open=True, cook=True, cut=True, num_games=1)


def game_of(task: TextWorldCooking, problem: Problem):
    return task.games.open(problem.facts["game"])


@pytest.mark.parametrize("kind", ["task", "big"])
def test_the_solution_wins_all_points_and_nothing_shorter_along_it_does(kind, request):
    task = request.getfixturevalue(kind)
    problem = task.problem(0)
    game = game_of(task, problem)
    turns = [game.after(game.solution[:n]) for n in range(len(game.solution) + 1)]
    assert turns[-1].status == Status.WON and turns[-1].score == game.max_score == problem.facts["max_score"]
    assert all(turn.status == Status.RUNNING for turn in turns[:-1])
    assert sorted(turn.score for turn in turns) == [turn.score for turn in turns]


@pytest.mark.parametrize(("kind", "room"), [("task", 1000), ("task", 2), ("big", 1000)])
def test_answers_are_those_of_textworld_played_from_the_start_whatever_was_played_between(
    kind, room, request, monkeypatch
):
    """Random ways through the game, refused commands among them, each compared with a fresh TextWorld environment."""
    monkeypatch.setattr("lace_lightning.agents.cooking_game.MAX_TURNS", room)
    monkeypatch.setattr("lace_lightning.agents.cooking_game.MAX_ENGINES", min(room, 3))
    task = request.getfixturevalue(kind)
    name = task.problem(0).facts["game"]
    game = CookingGame(task.games.folder / f"{name}.json")
    path = task.games.folder / f"{task.problem(0).facts['game']}.json"
    infos = textworld.EnvInfos(won=True, lost=True, admissible_commands=True)
    rng = Random(0)
    for _ in range(6):
        fresh, commands = textworld.start(str(path), infos), []
        state, score = fresh.reset(), 0
        while len(commands) < 8 and not (state["won"] or state["lost"]):
            plain = rng.choice([*state["admissible_commands"], "dance"])
            state, score, _ = fresh.step(plain)
            commands.append(
                next(
                    c
                    for c in (*game.after(commands).admissible, "dance")
                    if c.replace("-", " ") == plain.replace("-", " ")
                )
            )
            turn = game.after(commands)
            assert (turn.score, turn.status == Status.WON, turn.status == Status.LOST) == (
                score, state["won"], state["lost"],
            )  # fmt: skip
            if turn.status == Status.RUNNING:
                assert [c.replace("-", " ") for c in turn.admissible] == [
                    c.replace("-", " ") for c in state["admissible_commands"]
                ]


def test_a_wrong_cut_loses_the_game(task):
    game = game_of(task, task.problem(0))
    right = game.ingredients[0][2]
    wrong = next(verb for state, verb in (("chopped", "chop"), ("sliced", "slice")) if state != right)
    cut = next(n for n, command in enumerate(game.solution) if command.endswith("with knife"))
    food = game.solution[cut].split()[1]
    turn = game.after([*game.solution[:cut], f"{wrong} {food} with knife"])
    assert turn.status == Status.LOST and turn.admissible == ()
    assert game.after([*game.solution[:cut], f"{wrong} {food} with knife", "look"]).status == Status.LOST


def test_only_the_cookbook_tells_the_recipe(task):
    """What a player sees at first is the same for every recipe; the cookbook names ingredient and cut."""
    game = game_of(task, task.problem(0))
    food, _, cut = game.ingredients[0]
    recipe = game.after(["examine cookbook"]).text.split()
    assert recipe[0] == food and recipe[1] in ("chop", "slice", "dice") and recipe[1][:2] == cut[:2]
    assert not {"chop", "slice", "dice"} & set(game.after(()).text.split())


def test_games_are_made_once_and_stay_the_same(task, folder):
    name = task.problem(1).facts["game"]
    path = task.games.folder / f"{name}.json"
    written = path.stat().st_mtime_ns
    again = TextWorldCooking(folder, num_games=3, slack=(0, 1))
    assert again.problem(1) == task.problem(1) and again.trace(1, 4) == task.trace(1, 4)
    assert path.stat().st_mtime_ns == written
    assert not list(task.games.folder.glob(".*"))


@pytest.mark.slow
def test_another_process_makes_the_same_game_and_the_same_traces(task, tmp_path):
    program = f"""
from lace_lightning.agents import TextWorldCooking
print(repr(TextWorldCooking({str(tmp_path)!r}, num_games=3, slack=(0, 1)).trace(0, 4)))"""
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == repr(task.trace(0, 4)), done.stderr


def test_training_and_test_games_differ(task):
    train = {task.problem(n).facts["game"] for n in range(6)}
    assert len(train) == 3 and task.problem(0, "test").facts["game"] not in train


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "recipe1-take1-go1-cut-seed999999", "None", ""])
def test_a_problem_can_name_only_a_game_of_the_folder(task, name):
    (task.games.folder.parent / "secret.json").write_text("{}")
    problem = Problem("a", "", "", {"game": name, "limit": 5})
    with pytest.raises(ValueError, match="game="):
        task.environment([problem], 1, task.tokenizer())


# ---------------------------------------------------------------- traces


def replay(task: TextWorldCooking, problem: Problem, texts: list[str]) -> list[tuple[list[str], list[bool]]]:
    """What threads that choose exactly the words given would read; everything through the real environment."""
    tokenizer = task.tokenizer()
    ids = tokenizer.get_vocab()
    environment = task.environment([problem], len(texts), tokenizer)
    left = [text.split() for text in texts]
    words: list[list[str]] = [[] for _ in texts]
    forced: list[list[bool]] = [[] for _ in texts]
    due = [FREE] * len(texts)
    while any(left) or any(token != FREE for token in due):
        tokens = [due[n] if due[n] != FREE else ids[left[n].pop(0)] if left[n] else FREE for n in range(len(texts))]
        for n, token in enumerate(tokens):
            if token != FREE:
                words[n].append(tokenizer.convert_ids_to_tokens(token))
                forced[n].append(due[n] != FREE)
        column = torch.tensor([tokens])
        due = environment.step(column.clamp_min(0), column != FREE)[0].tolist()
    return list(zip(words, forced, strict=True))


@pytest.mark.parametrize("kind", ["task", "big"])
def test_the_environment_answers_a_trace_with_what_the_trace_shows(kind, request, monkeypatch):
    """Decode = train: ids and forced positions of traces are those that the environment gives to the same choices."""
    monkeypatch.setattr("lace_lightning.agents.cooking.rename", lambda trace, foods, rng: trace)
    task = request.getfixturevalue(kind)
    tokenizer = task.tokenizer()
    for index in range(3):
        trace = task.trace(index, 4)
        encoded = [task.template.encode_thread(thread, tokenizer) for thread in trace.threads]
        own = [
            " ".join(
                tokenizer.convert_ids_to_tokens(id_)
                for id_, segment in zip(thread.ids, thread.segments, strict=True)
                if segment == Segment.THOUGHT
            )
            for thread in encoded
        ]
        for thread, (words, forced) in zip(encoded, replay(task, trace.problem, own), strict=True):
            body = thread.ids[: thread.assessment_start]
            assert tokenizer.convert_tokens_to_ids(words) == body and tokenizer.unk_token_id not in body
            assert forced == [segment == Segment.ENVIRONMENT for segment in thread.segments[: len(body)]]


def test_one_thread_of_a_group_reads_and_is_a_command_short_where_there_is_no_slack(folder):
    for slack, wins in ((0, False), (1, True)):
        task = TextWorldCooking(folder, num_games=3, slack=(slack,))
        for index in range(12):
            threads = task.trace(index, 4).threads
            readers = [thread for thread in threads if "examine cookbook" in thread.text]
            assert len(readers) == ("read" in [thread.strategy for thread in threads])
            assert readers == [thread for thread in threads if thread.strategy == "read"][:1]
            assert all(("won" in reader.answer) == wins for reader in readers)
            assert not readers or all("won" in thread.answer for thread in threads if thread not in readers)
            assert [thread.tag for thread in threads].count(Tag.BEST) == 1
        (alone,) = task.trace(0, 1).threads
        assert "examine cookbook" in alone.text and ("won" in alone.answer) == wins


def test_guesses_are_commands_of_the_same_kind_for_what_is_in_sight(task):
    game = game_of(task, task.problem(0))
    guesses = {tuple(guess(game.solution, game, Random(seed))) for seed in range(60)}
    assert tuple(game.solution) in guesses and len(guesses) > 2
    takes = {way[0] if "knife" not in way[0] else way[1] for way in guesses}
    assert takes <= set(game.after(()).admissible)


def test_prompts_hold_no_unknown_word_and_fit_the_vocabulary(task, big):
    for puzzle in (task, big):
        tokenizer = puzzle.tokenizer()
        for index in range(2):
            ids = puzzle.template.encode_prompt(puzzle.trace(index, 4).problem.text, tokenizer)
            assert tokenizer.unk_token_id not in ids


# ---------------------------------------------------------------- judging and options


def test_only_a_game_that_the_environment_called_won_is_correct(task):
    problem = task.problem(0)
    claims = [
        decoded_thread("[4:won]", ("ok [3]", "ok [4:won]")),
        decoded_thread(None, ("ok [4:won]",)),
        decoded_thread("[4:won]", ("ok [3:over]",)),
        replace(decoded_thread("[4:won]"), text="ok [4:won]"),
        decoded_thread(None, ("no [0:over]",)),
    ]
    assert task.judge([(problem, claim) for claim in claims]) == [
        Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, Verdict.UNPARSABLE,
    ]  # fmt: skip
    assert last_standing(claims[0].observations).score == 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"go": 2}, "go=2"),
        ({"recipe": 0, "take": 0}, "recipe=0"),
        ({"take": 2}, "take=2"),
        ({"slack": [-1]}, "slack="),
        ({"slack": []}, "slack="),
        ({"num_games": 0}, "num_games="),
    ],
)
def test_options_out_of_range_are_refused_by_name(folder, options, match):
    with pytest.raises(ValueError, match=match):
        TextWorldCooking(folder, **options)


def test_a_missing_textworld_is_named_with_its_remedy(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lace-lightning\[agents\]'"):
        TextWorldCooking(folder)


def test_game_files_are_json(task):
    path = task.games.folder / f"{task.problem(0).facts['game']}.json"
    assert json.loads(path.read_text())["metadata"]["max_score"] == task.problem(0).facts["max_score"]

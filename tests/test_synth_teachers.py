"""Teachers: how replies are read, what prompts say, and that programs do what they claim."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
import torch

from lace_lightning.checkpoints import FROZEN, TRAINED
from lace_lightning.model_spec import ModelSpec
from lace_lightning.puzzles import Countdown
from lace_lightning.puzzles.expression import parse_expression
from lace_lightning.synthesis.chat import ChatModel, ChatReply
from lace_lightning.synthesis.judged import judge
from lace_lightning.synthesis.prompts import NAMES, Prompts
from lace_lightning.synthesis.solver import ChatSolver
from lace_lightning.synthesis.teacher import Contest, Draft, Query, Turn, Usage
from lace_lightning.synthesis.teachers import ArithmeticTeacher, LanguageTeacher, PuzzleTeacher
from lace_lightning.synthesis.threaded_solver import ThreadedSolver
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem
from lace_lightning.verification import MathTask

SUM = Problem("p", "Ann has 48 clips, costs $1 each. Bob has half as many. How many have both?", "72")


class Parrot(ChatModel):
    """Says what it is told to, and keeps the requests."""

    identity = "parrot"

    def __init__(self, *replies: str | ChatReply) -> None:
        self.replies = [r if isinstance(r, ChatReply) else ChatReply(r, "stop", 3, 4) for r in replies]
        self.requests: list = []

    def ask(self, requests):
        self.requests += requests
        return [self.replies[k % len(self.replies)] for k in range(len(requests))]


def solved(reply: str | ChatReply):
    return LanguageTeacher(Parrot(reply)).solve([Query(SUM, 1)])[0]


# ---------------------------------------------------------------- language models


@pytest.mark.parametrize(
    "reply, text, answer, method",
    [
        ("Method: halve and add\n\n48/2=24.\n\nSo\n\\boxed{72}", "48/2=24.\n\nSo", "72", "halve and add"),
        ("**Method:** halve\nIt is \\boxed{72}.", "It is \\boxed{72}.", "72", "halve"),
        (
            "<think>long [[best]] thoughts \\boxed{1}</think>\nMethod: m\nx\n\\boxed{\\frac{1}{2}}",
            "x",
            "\\frac{1}{2}",
            "m",
        ),
        (
            "no method\n\\boxed{5}\nthen \\boxed{6}",
            "no method\n\\boxed{5}",
            "6",
            "no method \\boxed{5}",  # without a method line the beginning stands for it
        ),
        ("Method: m\nnever says", "never says", None, "m"),
        ("Method: m\n\\boxed{open", "\\boxed{open", None, "m"),
    ],
)
def test_a_reply_is_taken_apart_into_method_text_and_answer(reply, text, answer, method):
    found = solved(reply)
    assert (found.text, found.answer, found.method, found.error) == (text, answer, method, "")
    assert found.usage == Usage(1, 3, 4)


@pytest.mark.parametrize(
    "text", ["", "\0", "\\boxed{" * 10_000, "x" * 1_000_000, "\ud800", "Method:", "<think>" * 9999]
)
def test_no_reply_whatever_makes_a_teacher_raise_or_hang(text):
    teacher = LanguageTeacher(Parrot(text))
    assert len(teacher.solve([Query(SUM, 1)])) == len(teacher.rank([Contest(SUM, 1, ("a", "b"))])) == 1


def test_cut_and_failed_replies_are_errors():
    assert solved(ChatReply("half a thou", "length")).error == "reply cut at max_tokens"
    assert solved(ChatReply("", "error", error="HTTP 500")).error == "HTTP 500"


@pytest.mark.parametrize(
    "reply, order",
    [
        ("B is nicer.\nRanking: 2, 1, 3", (1, 0, 2)),
        ("Ranking: 1, 2, 3\nNo:\nRanking: 3 > 1 > 2", (2, 0, 1)),
        ("**Ranking:** 3,2,1", (2, 1, 0)),
        ("Ranking: 1, 2", ()),
        ("Ranking: 1, 1, 2", ()),
        ("I like 2, 1, 3", ()),
    ],
)
def test_a_ranking_counts_only_if_it_names_every_solution_once(reply, order):
    [found] = LanguageTeacher(Parrot(reply)).rank([Contest(SUM, 1, ("a", "b", "c"))])
    assert found.order == order and bool(found.error) == (not order)


def test_prompts_say_what_they_must():
    chat = Parrot("Method: m\nx\n\\boxed{72}")
    teacher = LanguageTeacher(chat, temperature=0.9, judge_temperature=0.1, max_tokens=77)
    teacher.solve([Query(SUM, 5), Query(SUM, 6, ("halving", "a table"))])
    teacher.compress([Draft(SUM, 7, ("first", "second"), "72", 3000)])
    teacher.rank([Contest(SUM, 8, ("this way", "that way"))])
    teacher.debate([Turn(SUM, 9, ("mine",), {2: ("theirs",), 3: ("hers",)}, False), Turn(SUM, 9, ("mine",), {}, True)])
    solve, avoid, compress, rank, talk, last = (request.messages[-1][1] for request in chat.requests)
    assert all(SUM.text in prompt for prompt in (solve, avoid, compress, rank, talk, last))  # its $ as it stands
    assert "- halving\n- a table" in avoid and "halving" not in solve
    assert "1. first\n\n2. second" in compress and "3000" in compress and "answer, 72, in \\boxed{}" in compress
    assert "Solution 1:\nthis way\n\nSolution 2:\nthat way" in rank
    assert "Thread 2:\ntheirs\n\nThread 3:\nhers" in talk and "mine" in talk and "\\boxed{}" not in talk
    assert "\\boxed{}" in last
    assert [request.seed for request in chat.requests] == [5, 6, 7, 8, 9, 9]
    assert [request.temperature for request in chat.requests] == [0.9, 0.9, 0.1, 0.1, 0.9, 0.9]
    assert {request.max_tokens for request in chat.requests} == {77}


def test_a_changed_template_changes_the_identity_of_teacher_and_solver(tmp_path):
    for name, names in NAMES.items():
        (tmp_path / f"{name}.txt").write_text(" ".join(f"${key}" for key in names))
    own, shipped = (LanguageTeacher(Parrot("x"), prompts=version) for version in (str(tmp_path), "v1"))
    assert own.identity != shipped.identity and set(own.prompts) == set(NAMES)
    (tmp_path / "solve.txt").write_text("Now: $problem")
    assert LanguageTeacher(Parrot("x"), prompts=str(tmp_path)).identity != own.identity
    assert ChatSolver(Parrot("x"), prompts=str(tmp_path)).identity != ChatSolver(Parrot("x")).identity
    (tmp_path / "solve.txt").write_text("Nothing to solve, for $5")
    with pytest.raises(ValueError, match=r"solve\.txt must use exactly \$problem"):
        Prompts(str(tmp_path))
    (tmp_path / "solve.txt").unlink()
    with pytest.raises(ValueError, match=r"solve\.txt is missing"):
        Prompts(str(tmp_path))


def test_a_chat_solver_takes_boxed_answers_only():
    chat = Parrot("it is \\boxed{72}", "it is 72", ChatReply("", "error", error="dead"))
    found = ChatSolver(chat).attempt([SUM] * 3, [1, 2, 3])
    assert [s.answer for s in found] == ["72", None, None] and [s.error for s in found] == ["", "", "dead"]


# ---------------------------------------------------------------- the model to be trained


def test_a_threaded_solver_attempts_alike_whatever_is_in_the_batch_and_reads_its_checkpoint(tmp_path):
    puzzle = Countdown()
    problems = [puzzle.problem(index) for index in range(5)]
    architecture = dict(
        model_type="qwen3", hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    spec = ModelSpec(architecture=architecture, num_threads=1)
    torch.manual_seed(1)
    weights = {f"model.{name}": value for name, value in spec.build(puzzle.tokenizer()).state_dict().items()}
    saved = tmp_path / "stage.ckpt"
    torch.save({"state_dict": weights, TRAINED: sorted(weights), FROZEN: {}}, saved)
    found = []
    for batch_size in (5, 2):
        solver = ThreadedSolver(puzzle, spec, [str(saved)], max_new_tokens=12, batch_size=batch_size)
        found.append(solver.attempt(problems, range(5)))
    assert found[0] == found[1] and all(s.text and s.usage.completion_tokens <= 12 for s in found[0])
    assert len({solution.text for solution in found[0]}) == 5
    other = ThreadedSolver(puzzle, spec, [str(saved)], max_new_tokens=11)
    assert other.identity != ThreadedSolver(puzzle, spec, [str(saved)], max_new_tokens=12).identity


# ---------------------------------------------------------------- programs


def test_countdown_threads_avoid_every_first_step_of_the_history_until_none_is_left():
    puzzle = Countdown()
    teacher, problem = PuzzleTeacher(puzzle), puzzle.problem(3)
    used: list[str] = []
    verdicts = []
    for seed in range(20):
        [found] = teacher.solve([Query(problem, seed, tuple(used))])
        if found.error:
            break
        assert not set(found.method.split()) & {move for method in used for move in method.split()}
        expression = parse_expression(found.answer)
        assert sorted(expression.numbers) == sorted(problem.facts["numbers"])
        [verdict] = judge(puzzle, [problem], [found.text], [found.answer])
        assert (verdict == Verdict.CORRECT) == found.text.endswith("hit")
        verdicts.append(verdict)
        used.append(found.method)
    assert found.error == "no method left" and {Verdict.CORRECT, Verdict.WRONG} <= set(verdicts)


def test_countdown_threads_speak_the_puzzles_words():
    puzzle = Countdown()
    known = set(puzzle.tokenizer().get_vocab())
    for index in range(20):
        thread = puzzle.attempt(puzzle.problem(index), [], Random(index))
        assert set(thread.text.split()) | set(thread.answer.split()) <= known


def value_of(equation: str) -> tuple[Fraction, Fraction]:
    left, right = equation.removesuffix(".").split(" = ")
    first, sign, second = left.split()
    a, b = Fraction(first), Fraction(second)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else Fraction(0)}[sign], Fraction(right)


def test_arithmetic_threads_compute_right_and_hit_the_answer_as_often_as_they_are_asked_to():
    task, teacher = MathTask(), ArithmeticTeacher(share_right=1.0)
    found = teacher.solve([Query(SUM, seed) for seed in range(40)])
    for solution in found:
        for line in solution.text.split("\n\n")[1:]:
            computed, said = value_of(line.partition(": ")[2])
            assert computed == said
        assert said == Fraction(solution.answer)
    verdicts = judge(task, [SUM] * 40, [s.text for s in found], [s.answer for s in found])
    assert set(verdicts) == {Verdict.CORRECT}
    never = ArithmeticTeacher(share_right=0.0).solve([Query(SUM, seed) for seed in range(40)])
    assert "72" not in {solution.answer for solution in never}


def test_arithmetic_threads_avoid_the_shapes_of_the_history():
    teacher, used = ArithmeticTeacher(), []
    for seed in range(12):
        [found] = teacher.solve([Query(SUM, seed, tuple(used))])
        assert found.method not in used
        used.append(found.method)


def test_a_blind_arithmetic_teacher_does_not_look_at_the_answer():
    blind = ArithmeticTeacher(knows_answer=False)
    other = Problem(SUM.id, SUM.text, "1000")
    queries = [[Query(problem, seed) for seed in range(20)] for problem in (SUM, other)]
    assert blind.solve(queries[0]) == blind.solve(queries[1])
    assert "blindly" in blind.note and "told the reference answer" in ArithmeticTeacher().note


def test_arithmetic_debaters_name_the_thread_whose_step_they_go_on_from():
    teacher = ArithmeticTeacher()
    parts = {n: teacher.debate([Turn(SUM, n, (), {}, False)])[0].text for n in (2, 3)}
    others = {n: (part,) for n, part in parts.items()}
    for seed in range(10):
        [last] = teacher.debate([Turn(SUM, seed, ("I try 48 + 2 = 50.",), others, True)])
        thread = int(last.text.split()[1])
        step = last.text.partition("found ")[2].partition(". From")[0]
        assert step in parts[thread] and last.answer

"""Reference answers of the real data sets: read by math-verify, right by themselves, and not by each other."""

import random
from pathlib import Path

import pytest
from math_verify import parse

from lace_lightning.tasks import Verdict
from lace_lightning.traces.reading import read_problems
from lace_lightning.traces.schema import Problem
from lace_lightning.verification import Kind, MathTask, Reference, Verifier, reference_of
from lace_lightning.verification.spelling import split_values, tidy
from lace_lightning.verification.worker import compare, read
from tests.hand_built import RIGHT, WRONG, thread

DATA = Path(__file__).parents[2] / "shared/data/math"
MATHEMATICS = (Kind.EXPRESSION, Kind.VALUES)

# What docs/verification.md lists.
# As our worker reads answers: a left side it can't (of a reference the right side counts), a slip of the source, prose.
UNREAD_MATHEMATICS = {"olympiadbench-1782", "olympiadbench-2045", "olympiadbench-1965"}
UNREAD_BY_MATH_VERIFY = {
    "olympiadbench_maths_en.jsonl": {"olympiadbench-1782", "olympiadbench-2045"},
    "livebench_reasoning.jsonl": {
        f"livebench-{number}"
        for number in (
            "a168a29cf1565ab7", "27eb08badf45383a", "bcb1f6fe1bb7acd2", "9c7c693083342fc0", "fe37c4db2b25d85e",
            "ed015ab9a9b9c84e", "4d307a56c0beed06", "166194b4cca44608", "b586145899a38241", "35482db2d155259f",
        )
    },
}  # fmt: skip
KINDS = {
    "aime2024.jsonl": {"expression": 30},
    "amc23.jsonl": {"expression": 40},
    "countdown_cd3.jsonl": {"countdown": 256},
    "dapo_math_17k.jsonl.gz": {"expression": 16782},
    "gsm8k_test_dev.jsonl": {"expression": 660},
    "gsm8k_train.jsonl.gz": {"expression": 7473},
    "livebench_math.jsonl": {"expression": 178, "choice": 117, "text": 72},
    "livebench_reasoning.jsonl": {"text": 200},
    "math500_dev.jsonl": {"expression": 247, "values": 1, "choice": 1, "text": 1},
    "olympiadbench_maths_en.jsonl": {"expression": 582, "values": 93},
}
SAMPLE = 25


@pytest.fixture(scope="module")
def task():
    task = MathTask()
    yield task
    task.verifier.close()


def problems_of(name: str) -> list[Problem]:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here")
    return read_problems(DATA / name, adapt=MathTask().adapt)


def counted(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


@pytest.mark.parametrize("name", KINDS)
def test_every_problem_gets_the_comparison_that_its_data_set_asks_for(name):
    assert counted([reference_of(problem).kind for problem in problems_of(name)]) == KINDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_every_reference_is_right_by_itself_however_it_is_wrapped(task, name):
    problems = problems_of(name)
    wrappers = ["{}", "${}$", " {} ", "{}.", "= {}", "**{}**", r"\[{}\]", r"\boxed{{{}}}", "The answer is ${}$"]
    answers = [wrappers[i % len(wrappers)].format(problem.answer) for i, problem in enumerate(problems)]
    verdicts = task.judge([(problem, thread(answer)) for problem, answer in zip(problems, answers, strict=True)])
    assert [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict != RIGHT] == []


@pytest.mark.parametrize("name", KINDS)
def test_sampled_mathematics_is_read_and_equal_to_itself(name):
    check_self_equality(random.Random(0).sample(problems_of(name), SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_all_mathematics_is_read_and_equal_to_itself(name):
    check_self_equality(problems_of(name))


def check_self_equality(problems: list[Problem]) -> None:
    """By math-verify, which the verifier does without where texts are the same; several values in opposite order."""
    references = {reference_of(problem): problem.id for problem in problems}
    split = {key: values_of(reference) for reference, key in references.items() if reference.kind in MATHEMATICS}
    split = {key: values for key, values in split.items() if key not in UNREAD_MATHEMATICS}
    assert {key for key, values in split.items() if not all(map(is_read, values))} == set()
    assert {key for key, values in split.items() if compare(values, values[::-1]) != RIGHT} == set()


def values_of(reference: Reference) -> list[str]:
    text = tidy(reference.answer)
    return split_values(text) if reference.kind == Kind.VALUES else [text]


def is_read(value: str) -> bool:
    return any(not isinstance(reading, str) for reading in read(value))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_math_verify_alone_reads_all_but_twelve_listed_answers(name):
    """The way that the data's own page recommends; the verifier compares ten of the twelve as text."""
    readings = {problem.id: parse(f"${problem.answer}$", parsing_timeout=None) for problem in problems_of(name)}
    unread = {key for key, found in readings.items() if all(isinstance(reading, str) for reading in found)}
    assert unread == UNREAD_BY_MATH_VERIFY.get(name, set())


@pytest.mark.parametrize("name", ["math500_dev.jsonl", "olympiadbench_maths_en.jsonl", "livebench_math.jsonl"])
def test_the_answer_to_another_problem_is_wrong_and_not_unparsable(task, name):
    """Of mathematics; pairs whose texts differ but mean the same are rare enough to be excluded by value."""
    problems = [problem for problem in problems_of(name) if reference_of(problem).kind == Kind.EXPRESSION]
    problems = [problem for problem in random.Random(1).sample(problems, 40) if is_read(tidy(problem.answer))]
    pairs = [(problem, thread(other.answer)) for problem, other in zip(problems, problems[1:], strict=False)]
    verdicts = task.judge([pair for pair in pairs if compare([pair[0].answer], [pair[1].answer]) != RIGHT])
    assert set(verdicts) == {WRONG} and len(verdicts) >= 35


def test_every_file_is_listed_here():
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    assert {path.name for path in DATA.iterdir()} == set(KINDS)


def test_verdicts_of_a_whole_file_need_no_more_workers_than_asked_for():
    problems = problems_of("math500_dev.jsonl")
    with Verifier(num_workers=1) as verifier:
        verdicts = verifier.verify([(reference_of(problem), r"\frac{1}{7}") for problem in problems])
        assert verifier.counts.starts == 1 and verifier.counts.timeouts == verifier.counts.crashes == 0
    assert verdicts.count(Verdict.CORRECT) == 0

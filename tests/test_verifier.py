"""Verification: right verdicts, and no text or worker that can take more than its own item down."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem
from lace_lightning.verification import MathTask, Verifier
from lace_lightning.verification.pool import WorkerPool
from lace_lightning.verification.worker import compare
from tests.hand_built import RIGHT, UNPARSABLE, WRONG, thread

DATA = Path(__file__).parents[2] / "shared/data/math"

# Answers in upper case, unless a job tells it to misbehave; a path is a place where two workers meet.
SHOUTER = """
import json, os, sys
print('"ready"', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job == "hang":
        signals_are_no_use = 9**9**9
    if job == "die":
        os._exit(1)
    if os.path.isdir(job):
        open(os.path.join(job, str(os.getpid())), "w").close()
        while len(os.listdir(job)) < 2:
            pass
    print(json.dumps(job.upper()), flush=True)
"""


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


@pytest.fixture
def shouters():
    pool = WorkerPool([sys.executable, "-c", SHOUTER], num_workers=2, time_limit=1.0)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("25", "025", RIGHT),
        ("-3", "3", WRONG),
        ("1/2", r"\frac12", RIGHT),
        (r"\frac{1}{2}", "0.5", RIGHT),
        ("1000", "1,000", RIGHT),
        ("42", "$42$", RIGHT),
        ("42", "the answer is 42", RIGHT),
        (r"x^2+2x+1", "(x+1)^2", RIGHT),
        ("42", "42, 43", WRONG),  # hedging
        ("42", "41 or 42", WRONG),
        ("(1,2)", "(2,1)", WRONG),
        ("5", "x = 5", RIGHT),
        ("tetrahedron", "tetrahedron", RIGHT),
        ("tetrahedron", "cube", WRONG),
        ("42", None, UNPARSABLE),
        ("42", " ", UNPARSABLE),
        ("42", r"\frac{4", UNPARSABLE),
    ],
)
def test_answers_are_judged_by_what_they_mean(verifier, reference, answer, verdict):
    assert verifier.verify([(reference, answer)]) == [verdict]


def test_verdicts_keep_the_order_of_the_pairs_and_equal_pairs_agree(verifier):
    pairs = [("1/3", "2/6"), ("1/3", "1/4"), ("7", None), ("7", "7"), ("1/3", "2/6")] * 20
    assert verifier.verify(pairs) == [RIGHT, WRONG, UNPARSABLE, RIGHT, RIGHT] * 20


def test_integers_compared_at_sight_get_the_verdict_that_math_verify_gives():
    draw = random.Random(0)
    numbers = [draw.choice([1, -1]) * draw.randrange(10 ** draw.randint(1, 12)) for _ in range(40)]
    texts = [str(number) for number in numbers] + ["-0", "00", "-007", "999999999999", "-999999999999", "999999999998"]
    pairs = [(a, b) for a in texts for b in (a, a.replace("-", "-0")[:13], a.lstrip("-"), draw.choice(texts))]
    with Verifier() as verifier:
        verdicts = verifier.verify(pairs)
        assert not verifier._pool._workers, "integers must not need a worker"
    assert verdicts == [compare(*pair) for pair in pairs]
    assert {RIGHT, WRONG} <= set(verdicts)


@pytest.mark.parametrize("name", ["aime2024", "gsm8k_test_dev", "math500_dev"])
def test_every_reference_answer_verifies_against_itself(verifier, name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    verdicts = verifier.verify([(answer, answer) for answer in answers])
    assert [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict != RIGHT] == []


HOSTILE = [
    "9**9**9",
    "9^{9^{9^9}}",
    r"\boxed{" * 10_000 + "}" * 10_000,
    "1" * 1_000_000,
    "4\x002",
    "}{",
    "٤٢",  # the digits of 42 in Arabic
    "\ud800",
    "$" * 999,
    r"\sqrt" * 150,
    "1/0",
    "__import__('os').abort()",
    '"]\n["',
]


def test_hostile_answers_are_never_right_and_never_raise():
    with Verifier(time_limit=1.0) as verifier:
        verdicts = verifier.verify([("42", text) for text in HOSTILE])
        assert len(verdicts) == len(HOSTILE) and RIGHT not in verdicts
        assert verdicts[1:4] == [UNPARSABLE] * 3
        assert verifier.verify([("1/2", "0.5")]) == [RIGHT], "the workers must still be of use"


def test_overlong_text_reaches_no_parser():
    with Verifier() as verifier:
        padded = "42" + " " * 1000
        assert verifier.verify([("1/2", padded), (padded, "1/2"), ("42", "9" * 1_000_000)]) == [UNPARSABLE] * 3
        assert not verifier._pool._workers


def test_a_hung_or_dead_worker_loses_only_its_own_item(shouters):
    jobs = ["a", "hang", "b", "die", "c", "hang", "die", "d"]
    began = time.monotonic()
    assert shouters.map(jobs) == ["A", None, "B", None, "C", None, None, "D"]
    assert 1.0 < time.monotonic() - began < 10.0
    assert shouters.map(["e"]) == ["E"]


def test_hung_workers_are_dead_afterwards_and_replaced(shouters):
    shouters.map(["a", "b"])
    before = [worker._process for worker in shouters._workers]
    assert shouters.map(["hang", "hang", "c"]) == [None, None, "C"]
    assert len(before) == 2 and all(process.returncode == -signal.SIGKILL for process in before)


def test_workers_that_died_idle_or_starting_cost_no_item(shouters):
    shouters.map(["a", "b"])
    for worker in shouters._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    assert shouters.map(["c", "d", "e"]) == ["C", "D", "E"]


def test_workers_work_side_by_side(shouters, tmp_path):
    meeting = [str(tmp_path)] * 2  # a worker that comes alone waits until it is killed
    assert shouters.map(meeting) == [job.upper() for job in meeting]


def test_a_reply_that_comes_after_an_interrupted_call_is_not_taken_for_a_later_one(shouters, monkeypatch):
    shouters.map(["a"])
    with monkeypatch.context() as patch:
        patch.setattr("lace_lightning.verification.pool.wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shouters.map(["late"])
    assert shouters.map(["die"]) == [None]


def test_a_worker_program_that_does_not_start_is_an_error_that_names_it():
    pool = WorkerPool([sys.executable, "-c", "raise SystemExit"], num_workers=1, time_limit=1.0)
    with pytest.raises(RuntimeError, match="SystemExit"):
        pool.map(["a"])


def test_a_worker_that_hangs_after_its_parent_died_ends_itself():
    program = "from lace_lightning.verification.worker import serve\nserve(lambda *_: 9**9**9, 0.2)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b'"ready"\n'
        worker.stdin.write(b'["1", "1"]\n')
        worker.stdin.close()
        try:
            assert worker.wait(timeout=5) == -signal.SIGALRM
        finally:
            worker.kill()


def test_workers_end_with_the_verifier():
    with Verifier(num_workers=1) as verifier:
        verifier.verify([("1/2", "0.5")])
        [worker] = verifier._pool._workers
    assert worker._process.returncode is not None


def test_a_copied_verifier_has_workers_of_its_own():
    with Verifier(num_workers=1, time_limit=3.0) as verifier, copy.deepcopy(verifier) as twin:
        verifier.verify([("1/2", "0.5")])
        assert (twin.num_workers, twin.time_limit) == (1, 3.0)
        assert twin._pool is not verifier._pool and not twin._pool._workers


def test_plain_answers_reach_three_hundred_verdicts_a_second(verifier):
    pairs = [(f"{number}/7", rf"\frac{{{number}}}{{7}}") for number in range(300)]
    verifier.verify([("1/2", "0.5"), ("1/2", "0.50")])
    processes = [psutil.Process(), *(psutil.Process(worker._process.pid) for worker in verifier._pool._workers)]
    began = sum(sum(process.cpu_times()[:2]) for process in processes)
    assert set(verifier.verify(pairs)) == {RIGHT}
    cpu_seconds = sum(sum(process.cpu_times()[:2]) for process in processes) - began
    assert 300 / (cpu_seconds / 2) > 300, "on two cores; CPU time, because other tests may share them"


@pytest.mark.parametrize(("option", "value"), [("num_workers", 0), ("time_limit", 0), ("time_limit", float("inf"))])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        Verifier(**{option: value})


def test_math_task_judges_the_parsed_answer_against_the_problem():
    task = MathTask(num_workers=1)
    problem = Problem("p", "What is one half?", r"\frac{1}{2}")
    threads = [thread(answer="0.5"), thread(answer="2", thought="0.5"), thread(answer=None)]
    assert task.judge([(problem, item) for item in threads]) == [Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSABLE]
    task.verifier.close()


def test_math_task_rejects_a_problem_without_reference_as_it_is_read():
    with pytest.raises(ValueError, match="'p7' of gsm8k has no answer"):
        MathTask().adapt(Problem("p7", "text", " ", source="gsm8k"))


@pytest.mark.parametrize("prompt", ["no field", "{problem}", "{text} {0}", "{", "{text!x}"])
def test_math_task_rejects_a_prompt_that_cannot_hold_the_problem(prompt):
    with pytest.raises(ValueError, match="prompt="):
        MathTask(prompt=prompt)

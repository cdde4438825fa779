"""Verification: right verdicts, and no text or worker that can take more than its own item down."""

import copy
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem
from lace_lightning.verification import Kind, MathTask, Reference, Verifier
from lace_lightning.verification.pool import PoolCounts, WorkerPool, WorkersFailed
from lace_lightning.verification.worker import compare
from lace_lightning.verification.worker_process import WorkerProcess
from tests.hand_built import RIGHT, UNPARSABLE, WRONG, thread

# Answers in upper case, unless a job tells it to misbehave; a path is a place where two workers meet.
SHOUTER = """
import json, os, signal, sys
print('"ready"', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job == "hang":
        signals_are_no_use = 9**9**9
    if job.startswith(("kill", "stop")):
        accident, place = job.split()
        if not os.path.exists(place):
            if place.endswith("once"):
                open(place, "w").close()
            os.kill(os.getpid(), getattr(signal, "SIG" + accident.upper()))
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
    assert verdicts == [compare([reference], [answer]) for reference, answer in pairs]
    assert {RIGHT, WRONG} <= set(verdicts)


HOSTILE = [
    "9**9**9",
    "9^{9^{9^9}}",
    r"\boxed{" * 10_000 + "}" * 10_000,
    r"\boxed{" * 120 + "1" + "}" * 120,
    "1" * 1_000_000,
    "9" * 1000,
    "(" * 10**6 + ")" * 10**6,
    "(" * 490 + "1" + ")" * 490,
    "4\x002",
    "}{",
    r"\left(\right\}",
    "٤٢",  # the digits of 42 in Arabic, and below in full width
    "４２",
    "\ud800",
    "4\u200f2",  # a right-to-left mark
    "4\u200b2",  # a space of no width
    "$" * 999,
    r"\sqrt" * 150,
    "1/0",
    "0^{-1}",
    "100!!!!!",
    "9" + "!" * 300,
    "10^{10^{10^{10}}}",
    r"\binom{10^{9}}{5\cdot10^{8}}",
    r"\sum_{k=1}^{10^{18}}k^{-k}",
    r"\int_0^{9^9}\sin(x^x)dx",
    r"\input{/etc/passwd}",
    r"\write18{touch planted}",
    "import os; os.abort()",
    "__import__('os').abort()",
    "42; __import__('os').abort()",
    "lambda: 42",
    "a" * 400 + "!",
    "1" + ",1" * 480,
    ", and" * 190,
    "=" * 999,
    '"]\n["',
    '"}\n{"gold": ["1"], "target": ["1"]}',
]


def test_hostile_answers_are_never_right_never_raise_and_leave_the_workers_of_use():
    references = ["42", Reference("1,2", Kind.VALUES), Reference("0.5", tolerance=0.1)]
    with Verifier(time_limit=1.0) as verifier:
        began = time.monotonic()
        verdicts = verifier.verify([(references[0], text) for text in HOSTILE])
        assert time.monotonic() - began < 10 + len(HOSTILE) * (1.0 + 2.0) / 2, (
            "no longer than the limit and a new start"
        )
        assert len(verdicts) == len(HOSTILE) and RIGHT not in verdicts
        assert verdicts[HOSTILE.index("4\x002")] == verdicts[HOSTILE.index("٤٢")] == UNPARSABLE
        assert verdicts[HOSTILE.index("9**9**9")] == UNPARSABLE and verifier.counts.timeouts > 0
        cheap = [text for text, verdict in zip(HOSTILE, verdicts, strict=True) if verdict == WRONG]
        for reference in references[1:]:
            assert RIGHT not in verifier.verify([(reference, text) for text in cheap])
        assert verifier.verify([("1/2", "0.5")] * 2) == [RIGHT] * 2
        assert len(verifier._pool._workers) >= 1 and all(w._process.poll() is None for w in verifier._pool._workers)


@pytest.mark.parametrize("kind", [Kind.CHOICE, Kind.TEXT, Kind.COUNTDOWN])
def test_hostile_answers_to_other_kinds_are_judged_at_once_and_never_right(verifier, kind):
    reference = Reference("A", kind, numbers=(6, 7), target=42)
    starts, began = verifier.counts.starts, time.perf_counter()
    verdicts = verifier.verify([(reference, text) for text in HOSTILE])
    assert RIGHT not in verdicts and verifier.counts.starts == starts
    assert time.perf_counter() - began < 2


def test_answers_are_never_run(tmp_path):
    """Each answer would leave a file behind if anything evaluated it, in this process or in a worker."""
    planted = tmp_path / "planted"
    code = f"open({str(planted)!r},'w')"
    answers = [
        code,
        f"42*{code}.write('x')",
        f"${code}$",
        f"\\text{{{code}}}",
        f"exec({code!r})",
        f"__import__('os').system('touch {planted}')",
        f"{{{code}}}",
        f"\\operatorname{{exec}}({code!r})",
        f"\\write18{{touch {planted}}}",
        f"$(touch {planted})`touch {planted}`; touch {planted}",
        f'"]}}\n{{"gold": [{code!r}]}}',
    ]
    eval(code).close()  # what an evaluated answer would do
    assert planted.exists()
    planted.unlink()
    references = [Reference("42", kind, numbers=(6, 7), target=42) for kind in Kind]
    with Verifier(time_limit=2.0) as verifier:
        verdicts = verifier.verify([(reference, answer) for reference in references for answer in answers])
    assert RIGHT not in verdicts and not planted.exists()


def test_a_worker_that_eats_memory_dies_alone_and_is_counted():
    """The job wants 8 GiB under a limit of 2: it must fail in its own process, and the next job must not."""
    program = """
import sys
from lace_lightning.verification.worker import limit_memory, serve
limit_memory(2 * 1024**3)
serve(lambda size: str(len(b"x" * size)), 10.0)
"""
    pool = WorkerPool([sys.executable, "-c", program], num_workers=1, time_limit=5.0)
    assert pool.map([{"size": 8 * 1024**3}, {"size": 10}]) == [None, "10"]
    assert (pool.counts.crashes, pool.counts.timeouts, pool.counts.starts) == (1, 0, 2)
    pool.close()


def test_exhausted_memory_in_a_parser_is_unparsable_and_costs_no_worker(monkeypatch):
    def parse(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("lace_lightning.verification.worker.parse", parse)
    assert compare(["13579x"], ["24680x"]) == UNPARSABLE


def test_overlong_text_reaches_no_parser():
    with Verifier() as verifier:
        padded = "42" + " " * 1000
        assert verifier.verify([("1/2", padded), ("1" * 1001, "1/2"), ("42", "9" * 1_000_000)]) == [UNPARSABLE] * 3
        assert not verifier._pool._workers


def test_a_hung_or_dead_worker_loses_only_its_own_item(shouters):
    jobs = ["a", "hang", "b", "die", "c", "hang", "die", "d"]
    began = time.monotonic()
    assert shouters.map(jobs) == ["A", None, "B", None, "C", None, None, "D"]
    assert 1.0 < time.monotonic() - began < 10.0
    assert shouters.map(["e"]) == ["E"]
    assert shouters.counts == PoolCounts(timeouts=2, crashes=2, starts=shouters.counts.starts)
    assert 5 <= shouters.counts.starts <= 6, "two at first, and one for each that was lost with work left"


@pytest.mark.parametrize("accident", ["kill", "stop"])
def test_a_job_whose_worker_is_stopped_or_killed_by_others_is_done_all_the_same(
    shouters, accident, tmp_path, monkeypatch
):
    monkeypatch.setattr("lace_lightning.verification.worker_process.STANDSTILL", 0.5)
    jobs = ["a", f"{accident} {tmp_path}/once", "b"]
    assert shouters.map(jobs) == [job.upper() for job in jobs]
    assert (shouters.counts.timeouts, shouters.counts.crashes, shouters.counts.retries) == (0, 0, 1)


@pytest.mark.parametrize("accident", ["kill", "stop"])
def test_a_job_that_no_worker_is_left_alone_with_is_an_error_and_no_reply(shouters, accident, tmp_path, monkeypatch):
    monkeypatch.setattr("lace_lightning.verification.worker_process.STANDSTILL", 0.5)
    with pytest.raises(WorkersFailed, match="no reply.*memory"):
        shouters.map(["a", f"{accident} {tmp_path}/always", "b"])
    assert shouters.map(["c"]) == ["C"]


def test_a_job_pays_for_its_own_time_and_not_for_that_of_others(monkeypatch):
    """Its clock runs at a fifth, as on a machine that is busy with others: it gets five times as long."""
    used = WorkerProcess._used
    monkeypatch.setattr(WorkerProcess, "_used", lambda self: used(self) / 5)
    pool = WorkerPool([sys.executable, "-c", SHOUTER], num_workers=1, time_limit=0.3)
    pool.map(["a"])
    began = time.monotonic()
    assert pool.map(["hang"]) == [None]
    assert time.monotonic() - began > 1.4 and pool.counts.timeouts == 1
    pool.close()


def test_answers_that_cost_too_much_are_told_the_first_time_and_then_rarely(caplog):
    with Verifier(num_workers=1, time_limit=0.2) as verifier:
        for number in range(5):
            verifier.verify([("1/2", f"10^{{10^{{10^{{{number + 10}}}}}}}")])
    assert [record.args[0] for record in caplog.records] == [1, 2, 4]
    assert "time_limit=0.2" in caplog.text


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
    program = "from lace_lightning.verification.worker import serve\nserve(lambda **_: 9**9**9, 0.2)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b'"ready"\n'
        worker.stdin.write(b'{"gold": ["1"]}\n')
        worker.stdin.close()
        try:
            assert worker.wait(timeout=30) == -signal.SIGPROF
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

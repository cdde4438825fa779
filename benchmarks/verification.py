"""Verdicts per second on real references of GSM8K and MATH, with answers that are right, respelled and wrong.

    .venv/bin/python benchmarks/verification.py PATH_TO_MATH_FOLDER [--workers 2] [--rounds 3] [--seed 0]

The folder holds ``gsm8k_test_dev.jsonl`` and ``math500_dev.jsonl``. Half of the answers are right: the reference itself
or another spelling. Half are wrong as models are wrong: a digit, a sign or a factor off, or another problem's answer.
Each round has other draws. The workers are started before the clock runs, but the first rounds are slower: a parser
learns the grammar as it goes. After the last round, hostile answers hang and kill workers, and fresh answers are timed.

Where other processes share the cores, the last column still holds: verdicts per second of two cores' CPU time.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path

import psutil

from lace_lightning.tasks import Verdict
from lace_lightning.traces.reading import read_problems
from lace_lightning.verification import Reference, Verifier, reference_of

FILES = {"GSM8K": "gsm8k_test_dev.jsonl", "MATH": "math500_dev.jsonl"}
HOSTILE = [
    "9**9**9",
    "100!!!!!",
    r"\binom{10^{9}}{5\cdot10^{8}}",
    "9" + "!" * 300,
    r"\sqrt" * 150,
    "(" * 490 + ")" * 490,
]
Pairs = list[tuple[Reference | str, str | None]]


def respelled(answer: str, draw: random.Random) -> str:
    """The same answer as another model would write it."""
    return draw.choice(["${}$", "{}.", r"\boxed{{{}}}", "x = {}", "{}"]).format(answer.replace(r"\frac", r"\dfrac"))


def wrong(answer: str, others: list[str], draw: random.Random) -> str:
    """An answer that is off by a digit, a sign or a factor, or that belongs to another problem."""
    digits = [match.start() for match in re.finditer("[0-9]", answer)]
    if digits and draw.random() < 0.5:
        place = draw.choice(digits)
        return answer[:place] + str((int(answer[place]) + draw.randint(1, 9)) % 10) + answer[place + 1 :]
    changed = [f"-{answer}", f"2({answer})", rf"\frac{{{answer}}}{{2}}", draw.choice(others), draw.choice(others)]
    return draw.choice(changed)


def pairs_of(path: Path, seed: int) -> Pairs:
    """Every reference of a file with one answer."""
    draw, problems = random.Random(seed), read_problems(path)
    others = [problem.answer for problem in problems]
    pairs: Pairs = []
    for problem in problems:
        kinds = [problem.answer, respelled(problem.answer, draw)] + [wrong(problem.answer, others, draw)] * 2
        pairs.append((reference_of(problem), draw.choice(kinds)))
    return pairs


def timed(name: str, verifier: Verifier, pairs: Pairs) -> None:
    """Verify and print counts and rates."""
    began, cpu_began = time.perf_counter(), cpu_seconds()
    verdicts = verifier.verify(pairs)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    counts = ", ".join(f"{verdicts.count(verdict):4} {verdict}" for verdict in Verdict)
    rates = f"{seconds:6.2f} s {len(pairs) / seconds:6.0f} /s {2 * len(pairs) / cpu:6.0f} per 2 CPU-s"
    print(f"{name:24} {len(pairs):4} verdicts:{counts} {rates}")


def cpu_seconds() -> float:
    """Of this process and its workers, also those that were replaced."""
    own = psutil.Process()
    times = [own.cpu_times(), *(child.cpu_times() for child in own.children())]
    return sum(each.user + each.system for each in times) + times[0].children_user + times[0].children_system


def start(verifier: Verifier) -> None:
    verifier.verify([(f"{number}/7", f"{2 * number}/14") for number in range(2 * verifier.num_workers)])


def busy_processes() -> int:
    """Other processes that used more than a tenth of a core during one second."""
    others = [process for process in psutil.process_iter() if process.pid != psutil.Process().pid]
    for process in others:
        _share(process)
    time.sleep(1.0)
    return sum(_share(process) > 10 for process in others)


def _share(process: psutil.Process) -> float:
    try:
        return process.cpu_percent()
    except psutil.Error:  # it has ended
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{psutil.cpu_count()} cores, {busy_processes()} other busy processes, load {psutil.getloadavg()[0]:.1f}")
    with Verifier(args.workers, time_limit=1.0) as verifier:
        start(verifier)
        for round_ in range(args.rounds):
            for name, file in FILES.items():
                timed(f"{name}, round {round_ + 1}", verifier, pairs_of(args.folder / file, args.seed + round_))
        timed("hostile", verifier, [("42", text) for text in HOSTILE])
        start(verifier)
        for name, file in FILES.items():
            timed(f"{name}, after hostile", verifier, pairs_of(args.folder / file, args.seed + args.rounds))
        print(verifier.counts)
    print(f"{busy_processes()} other busy processes, load {psutil.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

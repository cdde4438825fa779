"""A million hostile cases and more against every reader of untrusted text, counted.

    PYTHONPATH=. .venv/bin/python benchmarks/fuzz.py [--cases 150000] [--texts 1500000] [--seed 0] [--out FILE.json]

What is tried and what must hold stands in tests/fuzz_targets.py. Hypothesis makes cases and shrinks what fails; readers
of one text also get random texts, which are made much faster. A failure is printed and counted, and the others go on.
Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from lace_lightning.whole_file import write_text
from tests.fuzz_targets import TARGETS, Target, random_text

BATCH = 10_000
"""Cases of one search of hypothesis, which remembers what it tried; each has a seed of its own."""


def fuzz(target: Target, cases: int, texts: int, start: int) -> dict[str, Any]:
    """Try so many cases of hypothesis and so many random texts on one reader; counts, seconds and failures."""
    before = time.perf_counter()
    tries = [searched(target, min(BATCH, cases - done), start + done) for done in range(0, cases, BATCH)]
    tries += [drawn(target, min(BATCH, texts - done), start + done) for done in range(0, texts, BATCH)]
    return {
        "reader": target.name,
        "cases": sum(tried.cases for tried in tries),
        "different": len(set().union(*(tried.seen for tried in tries))),
        "failures": [tried.failure for tried in tries if tried.failure],
        "seconds": round(time.perf_counter() - before, 1),
    }


@dataclass
class Tried:
    """A batch: how many cases, the hashes of the different ones, what failed."""

    cases: int = 0
    seen: set[int] = field(default_factory=set)
    failure: str = ""

    def check(self, target: Target, case: Any) -> None:
        self.cases += 1
        self.seen.add(hash(repr(case)))
        target.timed(case)


def searched(target: Target, count: int, first_seed: int) -> Tried:
    """Cases that hypothesis makes."""
    tried = Tried()

    @seed(first_seed)
    @settings(
        max_examples=count, deadline=None, database=None, print_blob=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.cases)
    def try_all(case: Any) -> None:
        tried.check(target, case)

    try:
        try_all()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        tried.failure = f"hypothesis, seed {first_seed}: {type(error).__name__}: {error} {notes}"[:2000]
    return tried


def drawn(target: Target, count: int, first_seed: int) -> Tried:
    """Random texts of a reader of one text; the first that fails ends the batch."""
    tried, draw = Tried(), Random(f"{target.name} {first_seed}")
    for _ in range(count if target.pieces else 0):
        text = random_text(draw, target.pieces)
        try:
            tried.check(target, text)
        except Exception as error:
            tried.failure = f"random text: {type(error).__name__}: {error}: {text[:300]!r}, {len(text)} characters"[
                :1000
            ]
            break
    return tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=150_000, help="of hypothesis, shared out by cost (150,000)")
    parser.add_argument("--texts", type=int, default=1_500_000, help="random texts, for readers of one (1,500,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of each reader (0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these readers only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the counts, written after each reader")
    given_options = parser.parse_args()
    reports: list[dict[str, Any]] = []
    for target in TARGETS:
        if given_options.only and target.name not in given_options.only:
            continue
        cases, texts = (max(1, n * target.millionths // 1_000_000) for n in (given_options.cases, given_options.texts))
        reports.append(fuzz(target, cases, texts, given_options.seed))
        print(json.dumps(reports[-1]), flush=True)
        if given_options.out:
            write_text(given_options.out, json.dumps(summary(reports, given_options.seed), indent=1) + "\n")
    return 1 if any(report["failures"] for report in reports) else 0


def summary(reports: list[dict[str, Any]], first_seed: int) -> dict[str, Any]:
    return {
        "seed": first_seed,
        "cases": sum(report["cases"] for report in reports),
        "different": sum(report["different"] for report in reports),
        "failures": sum(len(report["failures"]) for report in reports),
        "readers": reports,
    }


if __name__ == "__main__":
    sys.exit(main())

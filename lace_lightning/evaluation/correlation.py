r"""Correlated failures: how often threads of one outcome agree on the same wrong answer, against independent threads.

K threads, K = min(N, number of seeds), are drawn at random

- *together*: from the N paths of one outcome;
- *apart*: each from another seed's outcome of the same problem, where threads cannot have read each other.

In both cases the statistic is the chance that all K gave the same wrong answer. Both are unbiased: with k_a of an
outcome's N paths giving wrong answer a, together is Σ_a C(k_a, K) / C(N, K), and apart, with f_{s,a} = k_a / N of
seed s, is Σ_a e_K(f_{1,a}, …, f_{S,a}) / C(S, K), e_K the elementary symmetric polynomial. Independent threads have
equal expectations of both. One seed tells nothing: there is then no "apart".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lace_lightning.evaluation.statistics import Estimate, estimate, resampled
from lace_lightning.tasks import Verdict

Answers = tuple[tuple[str, Verdict], ...]
"""(answer, verdict) of each path of an outcome."""


@dataclass(frozen=True)
class SharedErrors:
    """Means over problems.

    Args:
        num_threads: K threads that are compared; 1 where nothing can be said.
        all_wrong: share of outcomes all of whose paths are wrong or unreadable.
        all_same_wrong: share of outcomes all of whose paths give the same wrong answer.
        together, apart: chance that K threads share a wrong answer, inside of outcomes and across seeds.
        excess: together minus apart; above 0: threads repeat each other's mistakes.
        num_problems: problems that ``together``, ``apart`` and ``excess`` rest on.
    """

    num_threads: int
    all_wrong: Estimate
    all_same_wrong: Estimate
    together: Estimate
    apart: Estimate
    excess: Estimate
    num_problems: int


def shared_errors(problems: Sequence[Sequence[Answers]], resamples: int = 2000, seed: int = 0) -> SharedErrors | None:
    """The statistics of one method on one benchmark.

    Args:
        problems: for each problem the paths of its outcomes, one per seed.
        resamples: bootstrap samples of problems.
        seed: of the bootstrap.

    Returns:
        None if no outcome has two paths.
    """
    problems = [[paths for paths in outcomes if len(paths) > 1] for outcomes in problems]
    problems = [outcomes for outcomes in problems if outcomes]
    if not problems:
        return None
    draws = resampled(len(problems), resamples, seed) / len(problems)
    wrong = np.array([np.mean([_all_wrong(paths) for paths in outcomes]) for outcomes in problems])
    same = np.array([np.mean([together(paths, len(paths)) for paths in outcomes]) for outcomes in problems])
    num_threads = min(min(len(paths) for outcomes in problems for paths in outcomes), max(map(len, problems)))
    usable = [outcomes for outcomes in problems if len(outcomes) >= num_threads] if num_threads > 1 else []
    pairs = np.array(
        [(np.mean([together(paths, num_threads) for paths in seeds]), apart(seeds, num_threads)) for seeds in usable]
    ).reshape(-1, 2)
    rows = np.concatenate([pairs, pairs[:, :1] - pairs[:, 1:]], axis=1)  # together, apart, excess
    inside, across, excess = _means(rows, resamples, seed)
    return SharedErrors(
        num_threads=num_threads,
        all_wrong=estimate(float(wrong.mean()), draws @ wrong),
        all_same_wrong=estimate(float(same.mean()), draws @ same),
        together=inside,
        apart=across,
        excess=excess,
        num_problems=len(usable),
    )


def together(paths: Answers, num_threads: int) -> float:
    """Chance that ``num_threads`` different paths of one outcome gave the same wrong answer."""
    subsets = math.comb(len(paths), num_threads)
    return sum(math.comb(count, num_threads) for count in _wrong_answers(paths).values()) / subsets


def apart(outcomes: Sequence[Answers], num_threads: int) -> float:
    """Chance that ``num_threads`` paths, each of another outcome of the problem, gave the same wrong answer."""
    shares = [{a: count / len(paths) for a, count in _wrong_answers(paths).items()} for paths in outcomes]
    answers = {answer for share in shares for answer in share}
    total = sum(_symmetric([share.get(answer, 0.0) for share in shares], num_threads) for answer in sorted(answers))
    return total / math.comb(len(outcomes), num_threads)


def _symmetric(values: Sequence[float], degree: int) -> float:
    """Elementary symmetric polynomial: the sum over all subsets of ``degree`` values of their product."""
    sums = [1.0] + [0.0] * degree
    for value in values:
        for k in range(degree, 0, -1):
            sums[k] += sums[k - 1] * value
    return sums[degree]


def _wrong_answers(paths: Answers) -> Counter[str]:
    """How many paths gave each wrong answer; what could not be read is no answer."""
    return Counter(answer for answer, verdict in paths if verdict == Verdict.WRONG)


def _all_wrong(paths: Answers) -> bool:
    return all(verdict != Verdict.CORRECT for _, verdict in paths)


def _means(rows: np.ndarray, resamples: int, seed: int) -> list[Estimate]:
    """An estimate of the mean of each column."""
    if not len(rows):
        return [Estimate(math.nan, math.nan, math.nan)] * rows.shape[1]
    draws = resampled(len(rows), resamples, seed) @ rows / len(rows)
    return [estimate(float(value), column) for value, column in zip(rows.mean(0), draws.T, strict=True)]

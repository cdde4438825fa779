"""Numbers of single outcomes (LACE.md §7), and their means over problems with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lace_lightning.diversity import embedding_diversity
from lace_lightning.embedding import Embedder
from lace_lightning.evaluation.judged import JudgedOutcome, Key
from lace_lightning.metrics.groups import group_statistics
from lace_lightning.tasks import Verdict

PATH_STATISTICS = ("best_at_n", "mean_at_n", "vote_at_n", "expl", "edit_distance", "fmt", "unparsable")
"""Of an outcome's paths, as docs/metrics.md defines them; they are missing where a method has no paths."""
COST_STATISTICS = ("tokens", "prompt_tokens", "columns", "seconds")
STATISTICS = ("acc", *PATH_STATISTICS, *COST_STATISTICS)
"""Columns of the table, in order."""


def with_statistics(records: Sequence[JudgedOutcome], embedder: Embedder) -> list[JudgedOutcome]:
    """The records with their numbers: those of ``STATISTICS`` that they have.

    ``acc`` is 1 where the method's answer is right, ``fmt`` exists where all paths were decoded as one group, and the
    statistics of paths where there are paths.
    """
    groups = [record.group() for record in records]
    exploration = embedding_diversity(groups, embedder).tolist()
    return [
        replace(record, statistics=_numbers(record, expl)) for record, expl in zip(records, exploration, strict=True)
    ]


def _numbers(record: JudgedOutcome, expl: float) -> dict[str, float]:
    cost = record.cost
    numbers = {"acc": float(record.is_right)}
    if paths := record.paths:
        verdicts = [path.verdict or Verdict.UNPARSABLE for path in paths]
        all_of_paths = group_statistics(record.group(), verdicts) | {"expl": expl}
        numbers |= {name: all_of_paths[name] for name in PATH_STATISTICS}
        if len({path.passage.group for path in paths}) > 1:
            del numbers["fmt"]  # threads that were never one group have no tags to agree on
    return numbers | {
        "tokens": float(cost.tokens),
        "prompt_tokens": float(cost.prompt_tokens),
        "columns": float(cost.columns),
        "seconds": cost.seconds,
    }


@dataclass(frozen=True)
class Sample:
    """Numbers of one method on one benchmark, seeds averaged inside of each problem.

    Args:
        problems: ids of the P problems that have an outcome, in the order of the benchmark.
        values: (P,) float64 by statistic; nan where a problem has none.
        num_outcomes: over all seeds.
    """

    problems: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    num_outcomes: int

    def at(self, problems: Sequence[str]) -> dict[str, np.ndarray]:
        """The values of these problems, each of which has an outcome."""
        index = {problem: row for row, problem in enumerate(self.problems)}
        rows = [index[problem] for problem in problems]
        return {name: values[rows] for name, values in self.values.items()}


def samples_of(numbers: Iterable[tuple[Key, Mapping[str, float]]]) -> dict[tuple[str, str], Sample]:
    """Sample by (benchmark, method). A problem's value is the mean over its seeds: seeds are no new problems."""
    by_method: dict[tuple[str, str], dict[str, list[Mapping[str, float]]]] = {}
    for key, statistics in numbers:
        problems = by_method.setdefault((key.benchmark, key.method), {})
        problems.setdefault(key.problem, []).append(statistics)
    return {name: _sample(problems) for name, problems in by_method.items()}


def _sample(problems: Mapping[str, Sequence[Mapping[str, float]]]) -> Sample:
    values = {
        name: np.array([_mean([one[name] for one in seeds if name in one]) for seeds in problems.values()])
        for name in STATISTICS
    }
    return Sample(tuple(problems), values, sum(map(len, problems.values())))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile bootstrap interval; nan where there is nothing to estimate it from."""

    value: float
    low: float
    high: float


def resampled(num_problems: int, resamples: int, seed: int) -> np.ndarray:
    """(R, P) float64 counts of how often each of P problems is drawn, P draws in each of R bootstrap samples."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=resamples).astype(float)


def estimate(value: float, draws: np.ndarray, level: float = 0.95) -> Estimate:
    """``value`` with the percentiles of its R bootstrap draws; those that are nan are left out."""
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or not len(draws):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def mean_estimate(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over the problems that have a value, with its interval."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    return estimate(float(values.mean()), resampled(len(values), resamples, seed) @ values / len(values))

"""Everything that an evaluation says, from its stored outcomes; no model is needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lace_lightning.evaluation.calibration import Calibration, calibrate
from lace_lightning.evaluation.comparison import (
    AtEqualCost,
    Difference,
    at_equal_cost,
    difference,
    families,
    family_of,
)
from lace_lightning.evaluation.correlation import Answers, SharedErrors, shared_errors
from lace_lightning.evaluation.judged import JudgedOutcome, Key
from lace_lightning.evaluation.statistics import STATISTICS, Estimate, Sample, mean_estimate, samples_of
from lace_lightning.evaluation.store import Failure, StoreError, read_failures, read_outcomes, read_settings
from lace_lightning.tasks import Verdict

COSTS = ("tokens", "seconds")
"""What methods are compared at equal amounts of."""


@dataclass(frozen=True)
class MethodSummary:
    """One method on one benchmark.

    Args:
        method: its name.
        num_problems: problems with an outcome.
        num_outcomes: over all seeds.
        num_failures: outcomes that are missing because something raised.
        statistics: means over problems, with intervals.
        found: share of outcomes by how they ended.
        shared_errors: None where no outcome has two paths.
        calibration: None where the method has no confidence.
    """

    method: str
    num_problems: int
    num_outcomes: int
    num_failures: int
    statistics: Mapping[str, Estimate]
    found: Mapping[str, float]
    shared_errors: SharedErrors | None
    calibration: Calibration | None


@dataclass(frozen=True)
class BenchmarkSummary:
    """All methods on one benchmark.

    Args:
        benchmark: its name.
        reference: the method that the others are compared with.
        methods: in the order of the configuration.
        differences: reference minus each other method.
        at_equal_cost: reference minus each other family, at equal tokens and at equal seconds.
    """

    benchmark: str
    reference: str
    methods: Sequence[MethodSummary]
    differences: Sequence[Difference]
    at_equal_cost: Sequence[AtEqualCost]


@dataclass
class _Collected:
    """What of the outcomes of one method on one benchmark is looked at together."""

    answers: dict[str, list[Answers]] = field(default_factory=dict)
    confidences: list[float] = field(default_factory=list)
    is_right: list[bool] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)

    def add(self, record: JudgedOutcome) -> None:
        paths = record.paths
        answers = tuple(((p.passage.thread.answer or "").strip(), p.verdict or Verdict.UNPARSABLE) for p in paths)
        self.answers.setdefault(record.problem.id, []).append(answers)
        self.found[record.found] += 1
        if record.confidence is not None:
            self.confidences.append(record.confidence)
            self.is_right.append(record.is_right)


def summarise_folder(folder: str | Path, reference: str | None = None) -> list[BenchmarkSummary]:
    """Summaries of a stored evaluation, by benchmark.

    Args:
        folder: what ``lace eval`` wrote.
        reference: compare with this method instead of the configured one.

    Raises:
        StoreError: the folder holds no outcomes, is damaged, or has no such method.
    """
    display = read_settings(folder)["display"]
    settings = read_settings(folder)
    if reference is not None and reference not in settings["methods"]:
        raise StoreError(f"reference {reference!r} is none of the methods {', '.join(settings['methods'])}")
    names = list(dict.fromkeys([*display["methods"], *settings["methods"]]))
    return summarise(read_outcomes(folder), read_failures(folder), reference or display["reference"], names)


def summarise(
    records: Iterable[JudgedOutcome], failures: Sequence[Failure], reference: str, names: Sequence[str]
) -> list[BenchmarkSummary]:
    """Summaries by benchmark, in the order in which their outcomes came; methods in the order of ``names``."""
    numbers: list[tuple[Key, Mapping[str, float]]] = []
    collected: dict[tuple[str, str], _Collected] = {}
    for record in records:
        numbers.append((record.key, record.statistics))
        collected.setdefault((record.benchmark, record.method), _Collected()).add(record)
    samples = samples_of(numbers)
    failed = Counter((failure.benchmark, failure.method) for failure in failures)
    return [
        _benchmark(
            benchmark,
            reference,
            {name: samples[benchmark, name] for name in names if (benchmark, name) in samples},
            {name: collected[benchmark, name] for name in names if (benchmark, name) in samples},
            {name: failed[benchmark, name] for name in names},
        )
        for benchmark in dict.fromkeys(benchmark for benchmark, _ in samples)
    ]


def _benchmark(
    benchmark: str,
    reference: str,
    samples: Mapping[str, Sample],
    collected: Mapping[str, _Collected],
    failed: Mapping[str, int],
) -> BenchmarkSummary:
    methods = [_method(name, sample, collected[name], failed[name]) for name, sample in samples.items()]
    if reference not in samples:
        return BenchmarkSummary(benchmark, reference, methods, [], [])
    ours = samples[reference]
    others = {name: sample for name, sample in samples.items() if name != reference}
    rivals = families({name: sample for name, sample in others.items() if family_of(name) != family_of(reference)})
    return BenchmarkSummary(
        benchmark,
        reference,
        methods,
        [difference(ours, name, sample) for name, sample in others.items()],
        [at_equal_cost(ours, family, points, cost) for family, points in rivals.items() for cost in COSTS],
    )


def _method(name: str, sample: Sample, collected: _Collected, num_failures: int) -> MethodSummary:
    return MethodSummary(
        method=name,
        num_problems=len(sample.problems),
        num_outcomes=sample.num_outcomes,
        num_failures=num_failures,
        statistics={statistic: mean_estimate(sample.values[statistic]) for statistic in STATISTICS},
        found={how: count / sample.num_outcomes for how, count in sorted(collected.found.items())},
        shared_errors=shared_errors(list(collected.answers.values())),
        calibration=calibrate(collected.confidences, collected.is_right),
    )


def as_json(summaries: Sequence[BenchmarkSummary]) -> list[dict[str, Any]]:
    """The same as JSON values; null stands for numbers that do not exist."""
    return [_plain(asdict(summary)) for summary in summaries]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

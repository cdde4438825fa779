"""What YAML says about an evaluation, and running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lace_lightning.embedding import Embedder
from lace_lightning.evaluation.benchmark import Benchmark
from lace_lightning.evaluation.method import Method
from lace_lightning.evaluation.policy import ModelPolicy, PolicySpec
from lace_lightning.evaluation.runner import Job, Runner
from lace_lightning.evaluation.store import Store
from lace_lightning.traces.schema import Problem


@dataclass(frozen=True)
class TrackingSpec:
    """What goes to MLflow, after the last outcome.

    Args:
        experiment: name of the experiment.
        run_name: name of the run; null: MLflow invents one.
        uri: of the tracking store; null: MLFLOW_TRACKING_URI, else ``sqlite:///runs/mlflow.db``.
        max_traces: most groups, per method and benchmark, that become a trace; those in which a right path was not
            chosen come first. 0 logs none.

    Raises:
        ValueError: ``max_traces`` is negative.
    """

    experiment: str = "evaluation"
    run_name: str | None = None
    uri: str | None = None
    max_traces: int = 32

    def __post_init__(self) -> None:
        if self.max_traces < 0:
            raise ValueError(f"tracking.max_traces={self.max_traces} must be at least 0")


@dataclass(frozen=True)
class EvaluationSpec:
    """An evaluation: every method on every benchmark with every seed.

    Args:
        output: folder of outcomes and reports; a run with the same output resumes.
        policies: models by name; methods ask them.
        methods: methods by name. Names that agree up to the last ``@`` are one method at several budgets.
        benchmarks: problems by name.
        seeds: each problem is done once with each.
        batch_size: problems that a method gets at once.
        reference: method that the others are compared with; null: the first one.
        embedder: of thoughts, for ``expl``; null: hashed word n-grams.
        gates: record the mean gate at every token of models with an exchange, by one more forward pass.
        reads: record too which tokens of other threads each token read most, for the thread viewer; that pass holds the
            attention weights of all layers, of one group at a time.
        tracking: what goes to MLflow; null: nothing.

    Raises:
        ValueError: a name that is used is not defined, or there is nothing to do.
    """

    output: str
    policies: dict[str, PolicySpec]
    methods: dict[str, Method]
    benchmarks: dict[str, Benchmark]
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int = 64
    reference: str | None = None
    embedder: Embedder | None = None
    gates: bool = False
    reads: bool = False
    tracking: TrackingSpec | None = None

    def __post_init__(self) -> None:
        for name in ("policies", "methods", "benchmarks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: an evaluation needs at least one")
        for name, method in self.methods.items():
            if method.policy not in self.policies:
                known = ", ".join(self.policies)
                raise ValueError(f"methods.{name}.policy={method.policy!r} is none of the policies {known}")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference={self.reference!r} is none of the methods {', '.join(self.methods)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: a seed is named twice")

    @property
    def display(self) -> dict[str, Any]:
        """What reports need besides outcomes."""
        return {
            "reference": self.reference or next(iter(self.methods)),
            "methods": list(self.methods),
            "benchmarks": list(self.benchmarks),
        }


Progress = Callable[[str, int], None]
"""Told the name of a job and how many of its problems have been dealt with since it was last told; 0 at its start."""


def evaluate(spec: EvaluationSpec, meanings: Mapping[str, Mapping[str, Any]], start: Callable[[int], Progress]) -> None:
    """Do all that is not done yet, and store it in ``spec.output``.

    Everything that can be checked is checked before the first model is loaded.

    Args:
        spec: what to do.
        meanings: the settings behind each name, for :class:`Store`.
        start: is told the number of outcomes to come, and returns what is told of each batch.

    Raises:
        ValueError: data, weights or settings cannot be used.
        StoreError: the output folder holds another evaluation.
    """
    for policy in spec.policies.values():
        policy.check()
    problems = {name: benchmark.read(name) for name, benchmark in spec.benchmarks.items()}
    with Store(spec.output, meanings, spec.display) as store:
        finished = store.finished()
        todo = [
            (benchmark, name, [(job, job.pending(finished)) for job in jobs])
            for benchmark, name, jobs in _by_policy(spec, problems)
        ]
        progress = start(sum(len(left) for _, _, jobs in todo for _, left in jobs))
        for benchmark, name, jobs in todo:
            if any(left for _, left in jobs):
                model = spec.policies[name].build(spec.benchmarks[benchmark].task, spec.gates, spec.reads)
                for job, left in jobs:
                    _run(job, left, model, spec, store, progress)


def _run(
    job: Job, pending: list[Problem], policy: ModelPolicy, spec: EvaluationSpec, store: Store, progress: Progress
) -> None:
    show = partial(progress, f"{job.benchmark} · {job.method_name} · seed {job.seed}")
    show(0)
    Runner(store, spec.batch_size, spec.embedder, show).run(job, policy, pending)


def _by_policy(spec: EvaluationSpec, problems: Mapping[str, list[Problem]]) -> Iterator[tuple[str, str, list[Job]]]:
    """The jobs of each (benchmark, policy): a model is loaded once for them, and is gone before the next."""
    for benchmark in spec.benchmarks:
        for policy in spec.policies:
            yield (
                benchmark,
                policy,
                [
                    Job(benchmark, name, method, seed, problems[benchmark])
                    for name, method in spec.methods.items()
                    if method.policy == policy
                    for seed in spec.seeds
                ],
            )

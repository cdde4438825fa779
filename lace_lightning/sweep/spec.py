"""What YAML says about a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Search = Literal["list", "grid", "random", "tpe"]
EVALUATION = "eval"
"""Name by which changes address the evaluation: ``eval:methods.lace.init_args.num_threads``."""


class SweepError(ValueError):
    """A sweep cannot be planned or run; the message names the setting, the value and the remedy."""


@dataclass(frozen=True)
class StageSpec:
    """One ``lace fit`` of the chain.

    Args:
        configs: files for ``--config``, in order.
        after: stages whose weights it starts from, in order, later ones winning.
        seeded: dotted keys that get the trial's seed besides ``seed_everything``.
        set: dotted keys and their values, on top of the configs.
    """

    configs: list[str]
    after: list[str] = field(default_factory=list)
    seeded: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSettings:
    """The ``lace eval`` at the end of every trial.

    Its policy ``trained`` is the trial's model: spec, weights, decoding and length limit come from the last stage.

    Args:
        configs: files for ``lace eval --config``, with methods and benchmarks, without policy ``trained`` and output.
        set: dotted keys and their values, on top of the configs.
    """

    configs: list[str]
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What a row does to the base.

    A key of ``set`` goes to all stages of ``applies_to``; ``sft:trainer.max_steps`` goes to stage ``sft`` alone,
    ``sft,grpo:…`` to both, and ``eval:…`` to the evaluation.

    Args:
        set: dotted keys and their values.
        configs: files put on top of the stages of ``applies_to``.
        skip: stages that are left out.
        stages: other configs in place of a stage's own.
    """

    set: dict[str, Any] = field(default_factory=dict)
    configs: list[str] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """A dimension of the search: values of one key, a range of numbers, or named changes.

    Args:
        key: dotted key (or list of keys that share the value) that gets ``values``, or numbers from ``range``.
        values: to try.
        range: lowest and highest number, for ``random`` and ``tpe``.
        log: draw from the range on a logarithmic scale.
        integer: draw whole numbers.
        choices: named changes, instead of a key.

    Raises:
        SweepError: not exactly one of ``values``, ``range`` and ``choices`` is given.
    """

    key: str | list[str] | None = None
    values: list[Any] = field(default_factory=list)
    range: list[float] | None = None
    log: bool = False
    integer: bool = False
    choices: dict[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(map(bool, (self.values, self.range, self.choices))) != 1 or bool(self.key) == bool(self.choices):
            raise SweepError("an axis has either key with values, key with range, or choices")
        if self.range is not None and (len(self.range) != 2 or self.range[0] >= self.range[1]):
            raise SweepError(f"range={self.range} of an axis must be [lowest, highest]")
        if self.log and self.range and self.range[0] <= 0:
            raise SweepError(f"range={self.range} of an axis with log: true must be positive")


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Args:
        trials: most trials of ``random`` and ``tpe``; a trial of ``tpe`` runs all seeds.
        trial_minutes: a trial that takes longer is ended and recorded as failed.
        total_minutes: of this command; trials that run then are ended and go on when it is called again.
    """

    trials: int = 20
    trial_minutes: float | None = None
    total_minutes: float | None = None


@dataclass(frozen=True)
class Tracking:
    """The parent run in MLflow, and its children.

    Args:
        experiment: name of the experiment.
        uri: of the tracking store; null: MLFLOW_TRACKING_URI, else ``sqlite:///runs/mlflow.db``.
        children: stages and evaluations are tracked too, under the parent.
    """

    experiment: str = "sweeps"
    uri: str | None = None
    children: bool = True


@dataclass(frozen=True)
class SweepSpec:
    """A sweep: a chain of stages, an evaluation, and what varies.

    Args:
        name: of the sweep.
        stages: the chain, in order.
        evaluation: what is measured at its end.
        description: one line for the report.
        applies_to: stages that changes without a prefix go to; empty: all.
        search: ``list`` runs ``rows``; ``grid`` all combinations of ``axes``; ``random`` draws from them; ``tpe`` lets
            Optuna's tree-structured Parzen estimator choose.
        rows: named changes, for ``list``; ``{}`` is the base as it is.
        axes: dimensions by name, for the other searches.
        base: label of the row that the others are compared with; null: the first one.
        seeds: every row runs with each.
        search_seed: of ``random`` and ``tpe``.
        metric: statistic of ``lace eval`` that is compared and searched for.
        direction: ``maximize`` or ``minimize``.
        benchmark: the one that counts; null: the first one of the evaluation.
        method: the one that ``tpe`` looks at, and whose base row the others are compared with; null: the first one.
        columns: further statistics in the table.
        limits: when to stop.
        output: folder of everything; null: ``runs/sweeps/<name>``.
        tracking: what goes to MLflow; null: nothing.
    """

    name: str
    stages: dict[str, StageSpec]
    evaluation: EvaluationSettings
    description: str = ""
    applies_to: list[str] = field(default_factory=list)
    search: Search = "list"
    rows: dict[str, Change] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    base: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    search_seed: int = 0
    metric: str = "acc"
    direction: Literal["maximize", "minimize"] = "maximize"
    benchmark: str | None = None
    method: str | None = None
    columns: list[str] = field(default_factory=lambda: ["best_at_n", "fmt", "tokens"])
    limits: Limits = field(default_factory=Limits)
    output: str | None = None
    tracking: Tracking | None = None

    def __post_init__(self) -> None:
        if bool(self.rows) == bool(self.axes) or (self.search == "list") != bool(self.rows):
            raise SweepError(f"search={self.search}: list goes with rows, grid, random and tpe with axes")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SweepError(f"seeds={self.seeds} must name at least one seed, and none twice")
        if self.search == "grid" and any(axis.range for axis in self.axes.values()):
            raise SweepError("a grid needs values or choices: a range is for search random and tpe")
        before: list[str] = []
        for name, stage in self.stages.items():
            _check_names(f"stages.{name}.after", stage.after, before, "the stages before it are")
            before.append(name)
        _check_names("applies_to", self.applies_to, before, "the stages are")

    @property
    def folder(self) -> str:
        return self.output or f"runs/sweeps/{self.name}"


def _check_names(option: str, names: list[str], known: list[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise SweepError(f"{option} names {name!r}, and {what} {', '.join(known) or 'none'}")

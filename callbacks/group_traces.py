"""Groups of validation and of training rollouts as MLflow traces."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.callbacks.kept_group import KeptGroup, kept_groups
from lace_lightning.callbacks.reporting import (
    current_step,
    is_due,
    mlflow_loggers,
    sampled_in,
    threaded,
)
from lace_lightning.evaluation.judged import JudgedOutcome
from lace_lightning.evaluation.method import Cost
from lace_lightning.modules import LatticeGRPO, SampledGroups, ThreadedModule
from lace_lightning.rewards import is_best_correct, total_reward
from lace_lightning.tasks import Verdict
from lace_lightning.tracking.outcome_traces import INTEREST, trace_of


class _Candidate(NamedTuple):
    kept: KeptGroup
    cost: Cost

    @property
    def interest(self) -> int:
        """Place in INTEREST: the lower, the more the group tells."""
        group, verdicts, _ = self.kept
        if is_best_correct(group, verdicts):
            return INTEREST.index("chosen right")
        return INTEREST.index("found but not chosen" if Verdict.CORRECT in verdicts else "not found")


class GroupTraces(Callback):
    """Logs groups as traces with a span per thread: tag, verdict, tokens and mean gate; reward parts of the group.

    Found in MLflow by the tags ``phase``, ``step``, ``outcome`` and ``problem``. Of a validation, test or batch of
    rollouts those are kept that say most: first found but not chosen, then right, then not found.

    Args:
        max_groups: most traces of one validation, test or batch of rollouts.
        every_n_steps: training batches from one report to the next, for stages that sample groups.

    Raises:
        ValueError: an option is below 1.
    """

    def __init__(self, max_groups: int = 4, every_n_steps: int = 50) -> None:
        if max_groups < 1 or every_n_steps < 1:
            raise ValueError(
                f"max_groups={max_groups} and every_n_steps={every_n_steps} must be at least 1: leave GroupTraces out "
                "to log none"
            )
        self.max_groups = max_groups
        self.every_n_steps = every_n_steps
        self._kept: list[_Candidate] = []
        self._began = time.monotonic()

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Take the time."""
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log groups of the batch if it is due and the stage samples groups."""
        sampled = sampled_in(outputs)
        if sampled is not None and mlflow_loggers(trainer) and is_due(trainer, self.every_n_steps):
            self._kept = []
            self._keep(sampled)
            self._log(trainer, threaded(pl_module), "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._kept = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._kept = []

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Take the time."""
        self._began = time.monotonic()

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Take the time."""
        self._began = time.monotonic()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Keep the groups that say most."""
        self._keep(sampled_in(outputs))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Keep the groups that say most."""
        self._keep(sampled_in(outputs))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was kept."""
        if not trainer.sanity_checking:
            self._log(trainer, threaded(pl_module), "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was kept."""
        self._log(trainer, threaded(pl_module), "test")

    def _keep(self, sampled: SampledGroups | None) -> None:
        if sampled is None:
            return
        seconds = (time.monotonic() - self._began) / len(sampled.groups)
        new = [_Candidate(kept, Cost.of(kept.group, seconds)) for kept in kept_groups(sampled)]
        self._kept = sorted([*self._kept, *new], key=lambda candidate: candidate.interest)[: self.max_groups]

    def _log(self, trainer: Trainer, module: ThreadedModule, phase: str) -> None:
        """Log rank zero's groups; reading gates is no collective."""
        kept, self._kept = self._kept, []
        for logger in mlflow_loggers(trainer):
            for one in kept:
                tags = {"phase": phase, "step": str(current_step(trainer))}
                logger.log_trace(trace_of(_judged(one, module, phase), tags))


def _judged(one: _Candidate, module: ThreadedModule, phase: str) -> JudgedOutcome:
    """The group's record with the parts of its reward."""
    record = one.kept.judged(module, phase, one.kept.group.seed, one.cost, reads=False)
    if not isinstance(module, LatticeGRPO):
        return record
    total, parts = total_reward(module.rewards, [one.kept.group], [one.kept.verdicts])
    rewards = {f"reward/{name}": float(value[0]) for name, value in {**parts, "total": total}.items()}
    return replace(record, statistics=rewards)

"""Groups of validation and of training rollouts as MLflow traces."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.callbacks.reporting import (
    check_interval,
    current_step,
    is_due,
    mlflow_loggers,
    sampled_in,
    threaded,
)
from lace_lightning.decoding import Group, Rollout
from lace_lightning.evaluation.inspection import Inspection, Inspector, look
from lace_lightning.evaluation.judged import JudgedOutcome, make_judged
from lace_lightning.evaluation.method import Cost, Outcome, Passage
from lace_lightning.modules import LatticeGRPO, SampledGroups, ThreadedModule
from lace_lightning.rewards import total_reward
from lace_lightning.tasks import Verdict
from lace_lightning.tracking.outcome_traces import INTEREST, trace_of


class _Kept(NamedTuple):
    group: Group
    verdicts: list[Verdict]
    rollout: Rollout
    cost: Cost


class GroupTraces(Callback):
    """Logs groups as traces with a span per thread: tag, verdict, tokens and mean gate; reward parts of the group.

    Found in MLflow by the tags ``phase``, ``step``, ``outcome`` and ``problem``. Of a validation, test or batch of
    rollouts those are kept that say most: first found but not chosen, then right, then not found.

    Args:
        max_groups: most traces of one validation, test or batch of rollouts.
        every_n_steps: training batches from one report to the next; null: the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: an option is below 1.
    """

    def __init__(self, max_groups: int = 4, every_n_steps: int | None = None) -> None:
        if max_groups < 1:
            raise ValueError(f"max_groups={max_groups} must be at least 1: leave GroupTraces out to log none")
        self.max_groups = max_groups
        self.every_n_steps = check_interval(every_n_steps)
        self._kept: list[_Kept] = []
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
        rows = zip(sampled.groups, sampled.verdicts, strict=True)
        ranked = sorted(enumerate(rows), key=lambda row: _interest(*row[1]))[: self.max_groups]
        new = [
            _Kept(group, verdicts, _row(sampled.rollout, index), _cost(group, seconds))
            for index, (group, verdicts) in ranked
        ]
        self._kept = sorted([*self._kept, *new], key=lambda kept: _interest(*kept[:2]))[: self.max_groups]

    def _log(self, trainer: Trainer, module: ThreadedModule, phase: str) -> None:
        """On every rank's groups, of which rank zero's are logged: reading gates is no collective."""
        kept, self._kept = self._kept, []
        for logger in mlflow_loggers(trainer):
            for one in kept:
                tags = {"phase": phase, "step": str(current_step(trainer))}
                logger.log_trace(trace_of(_judged(one, module, phase), tags))


def _judged(kept: _Kept, module: ThreadedModule, phase: str) -> JudgedOutcome:
    """The group as `lace eval` keeps outcomes, with its gates and the parts of its reward."""
    assert module.model is not None
    group = kept.group
    record = make_judged(phase, module.stage, group.seed, _outcome(kept), kept.verdicts, _inspections(kept, module))
    if not isinstance(module, LatticeGRPO):
        return record
    total, parts = total_reward(module.rewards, [group], [kept.verdicts])
    rewards = {f"reward/{name}": float(value[0]) for name, value in {**parts, "total": total}.items()}
    return JudgedOutcome(**{**vars(record), "statistics": rewards})


def _outcome(kept: _Kept) -> Outcome:
    group = kept.group
    chosen = next((index for index, thread in enumerate(group.threads) if thread is group.best), None)
    return Outcome(group.problem, tuple(Passage(thread, "path") for thread in group.threads), chosen, kept.cost)


def _inspections(kept: _Kept, module: ThreadedModule) -> list[Inspection]:
    """Every thread token by token, with its gates where the exchange has some to read."""
    model = module.model
    assert model is not None
    was_training = model.training
    model.eval()
    try:
        looked = look(model, kept.rollout, [kept.group])
    finally:
        model.train(was_training)
    inspector = Inspector(module.data.task.template, module.data.tokenizer)
    return [inspector.thread(n, thread, looked) for n, thread in enumerate(kept.group.threads)]


def _interest(group: Group, verdicts: list[Verdict]) -> int:
    best = next((index for index, thread in enumerate(group.threads) if thread is group.best), None)
    if best is not None and verdicts[best] == Verdict.CORRECT:
        return INTEREST.index("chosen right")
    return INTEREST.index("found but not chosen" if Verdict.CORRECT in verdicts else "not found")


def _row(rollout: Rollout, index: int) -> Rollout:
    rows = {name: part[index : index + 1] for name, part in vars(rollout).items() if isinstance(part, torch.Tensor)}
    return Rollout(**rows, prompt_length=rollout.prompt_length)


def _cost(group: Group, seconds: float) -> Cost:
    tokens = sum(thread.num_tokens for thread in group.threads)
    columns = max((thread.columns[-1] + 1 for thread in group.threads if thread.columns), default=0)
    return Cost(tokens=tokens, columns=columns, seconds=seconds)

"""Runs that go wrong in ways that raise nothing: what is looked for, and what is done about it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lace_lightning.callbacks.reporting import current_step
from lace_lightning.modules import LatticeGRPO, ThreadedModule
from lace_lightning.tracking.run_folder import checkpoint_folder

Policy = Literal["stop", "skip", "warn"]

ADVICE = {
    "non_finite": (
        "look at the last batch; lower model.optimizer.lr, raise its warmup_steps, or set trainer.gradient_clip_val; "
        "--config configs/trainer/debug.yaml names the operation"
    ),
    "constant_reward": (
        "nothing is learned from them: look at samples, reward/<part> and train/tags/fmt. Are the problems too hard or "
        "too easy for this model, is rollout.sampling.temperature 0, does the verifier read the answers?"
    ),
    "lost_tags": (
        "without valid tags no group earns the accuracy reward: look at samples and train/tags/one_tag; lower "
        "model.optimizer.lr, raise model.loss.kl_weight, add FormatReward, or fine-tune on traces once more"
    ),
    "truncated": (
        "no thread ends, so none is judged: look at samples; raise rollout.max_new_tokens (and data.max_length), or "
        "find out why no end-of-sequence token is written"
    ),
}
"""What to look at, by symptom."""


class UnhealthyRun(RuntimeError):
    """A symptom whose policy is ``stop``; the last good state was saved. The ``lace`` command ends with code 3."""


class HealthMonitor(Callback):
    """Finds runs that learn nothing or break, before each optimizer step and on all processes alike.

    A policy is ``warn`` (the step is taken), ``skip`` (the step is not taken: weights and AdamW's moments stay as they
    are) or ``stop`` (likewise, then ``checkpoints/last_good.ckpt`` is saved and the run ends). All but ``non_finite``
    need rollouts, and act once the symptom was there for ``patience`` batches in a row. Numbers of steps and batches
    since the run began are logged as ``health/…``, as they change.

    Args:
        non_finite: a loss or gradient is NaN or infinite. ``skip`` stops after ``patience`` steps in a row.
        constant_reward: all groups of every problem of a batch got the same reward.
        lost_tags: fewer than ``least_tags`` of a batch's groups have valid tags.
        truncated: the length limit ended every thread of a batch.
        patience: batches in a row.
        least_tags: share of groups.

    Raises:
        ValueError: an option is out of range.
        UnhealthyRun: out of ``Trainer.fit``, where the policy is ``stop``.
    """

    def __init__(
        self,
        non_finite: Policy = "stop",
        constant_reward: Policy = "warn",
        lost_tags: Policy = "warn",
        truncated: Policy = "warn",
        patience: int = 20,
        least_tags: float = 0.2,
    ) -> None:
        policies = {
            "non_finite": non_finite,
            "constant_reward": constant_reward,
            "lost_tags": lost_tags,
            "truncated": truncated,
        }
        for name, policy in policies.items():
            if policy not in get_args(Policy):
                raise ValueError(f"health.{name}={policy!r} is unknown: choose one of {', '.join(get_args(Policy))}")
        if patience < 1 or not 0 <= least_tags <= 1:
            raise ValueError(
                f"health: patience={patience} must be at least 1, least_tags={least_tags} lie between 0 and 1"
            )
        self.policies, self.patience, self.least_tags = policies, patience, least_tags
        self._in_a_row: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()
        self._finite_losses: list[Tensor] = []
        self._is_first_step = True  # of its batch
        self._drops = False  # the steps of this batch
        self._reason: str | None = None  # to stop
        self._saved: Path | None = None

    # ---------------------------------------------------------------- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the stage that a bad loss is looked after here."""
        if isinstance(pl_module, ThreadedModule):
            pl_module.has_health_monitor = True

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End a run that was found unhealthy; begin with a fresh batch."""
        self._end()
        self._is_first_step, self._drops = True, False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note whether the loss is finite, without waiting for the device."""
        self._finite_losses.append(loss.detach().isfinite().all())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Examine rollouts, loss and gradients; drop the gradients if the step is not to be taken."""
        if self._is_first_step:
            self._examine_rollout(trainer, pl_module)
        self._is_first_step = False
        if self._is_bad(trainer, pl_module, optimizer) or self._drops:
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves parameters without a gradient alone, moments included
            self._counts["skipped"] += 1

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the counts if they changed; save if the run is to end, which it does at the next hook."""
        if self._counts != self._logged:
            self._logged = self._counts.copy()
            metrics = {f"health/{name}": float(count) for name, count in self._counts.items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=current_step(trainer))
        if self._reason is not None:
            self._saved = checkpoint_folder(trainer) / "last_good.ckpt"
            trainer.save_checkpoint(self._saved, weights_only=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run that was found unhealthy."""
        self._end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run that was found unhealthy."""
        self._end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run that was found unhealthy in its last batch."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Counts and rows of batches, which a resumed run goes on from."""
        return {"counts": dict(self._counts), "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts, self._in_a_row = Counter(state_dict["counts"]), Counter(state_dict["in_a_row"])
        self._logged = self._counts.copy()  # a checkpoint is written after its batch has been logged

    def _end(self) -> None:
        if self._saved is not None:
            raise UnhealthyRun(
                f"{self._reason}\nThe last good state is {self._saved}: --ckpt_path {self._saved} goes on behind this "
                "batch; its policy is an option under health"
            )

    # ---------------------------------------------------------------- what

    def _examine_rollout(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what this batch sampled, over all processes."""
        if not isinstance(pl_module, LatticeGRPO) or pl_module.at_hand is None:
            return
        sampled, rewards = pl_module.at_hand
        is_tied = bool((rewards.amax(1) == rewards.amin(1)).all())  # of all processes
        finished = sampled.rollout.finished[: len(sampled.groups)]  # a process may have no group, and then a stand-in
        num_valid = sum(group.has_valid_tags for group in sampled.groups)
        counts = torch.tensor([num_valid, len(sampled.groups), int(finished.sum())], device=pl_module.device)
        num_valid, num_groups, num_finished = cast(Tensor, trainer.strategy.reduce(counts, reduce_op="sum")).tolist()
        tagged = num_valid / num_groups
        self._note("constant_reward", is_tied, "all groups of every problem got the same reward")
        self._note("lost_tags", tagged < self.least_tags, f"{tagged:.0%} of the groups have valid tags")
        self._note("truncated", num_finished == 0, "the length limit ended every thread")

    def _note(self, name: str, is_there: bool, finding: str) -> None:
        """Count a symptom of rollouts, and act once it lasts."""
        self._in_a_row[name] = self._in_a_row[name] + 1 if is_there else 0
        self._counts[name] += is_there
        lasting, policy = self._in_a_row[name], self.policies[name]
        if not is_there or lasting < self.patience:
            return
        self._drops |= policy != "warn"
        message = f"health: {finding}, for {lasting} batches in a row: {ADVICE[name]}"
        if policy == "stop":
            self._reason = message
        elif lasting % self.patience == 0:
            _say(f"{message}{' (steps are skipped while it lasts)' if policy == 'skip' else ''}")

    def _is_bad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> bool:
        """Whether loss or gradients of some process keep this step from being taken."""
        losses, self._finite_losses = self._finite_losses, []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return False  # float16 overflows now and then: its scaler skips such steps by itself
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = not (all(losses) and _is_finite(gradients))
        if not trainer.strategy.reduce_boolean_decision(bad, all=False):
            self._in_a_row["non_finite"] = 0
            return False
        self._counts["non_finite"] += 1
        self._in_a_row["non_finite"] += 1
        policy, lasting = self.policies["non_finite"], self._in_a_row["non_finite"]
        message = f"health: {_culprit(pl_module, losses)} at step {trainer.global_step}: {ADVICE['non_finite']}"
        if policy == "stop" or (policy == "skip" and lasting >= self.patience):
            self._reason = message if policy == "stop" else f"{message} ({lasting} steps in a row were skipped)"
            self._drops = True
        else:
            _say(f"{message} ({'the step is skipped' if policy == 'skip' else 'the step is taken'})")
        return policy != "warn"


def _is_finite(gradients: list[Tensor]) -> bool:
    """Whether all gradients are finite: one pass over them, and one wait for the device."""
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    local = [g for g in local if g.numel()]  # a process may have no row of a small weight; nothing has no largest entry
    return not local or bool(torch.nn.utils.get_total_norm(local, torch.inf).isfinite())


def _culprit(pl_module: LightningModule, losses: list[Tensor]) -> str:
    """What is not finite, on this process."""
    if not all(losses):
        return "the loss is not finite"
    for name, parameter in pl_module.named_parameters():
        if parameter.grad is not None and not _is_finite([parameter.grad]):
            return f"the gradient of {name} (and perhaps of others) is not finite"
    return "a loss or gradient of another process is not finite"


def _say(message: str) -> None:
    rank_zero_warn(message, category=UserWarning, stacklevel=2)

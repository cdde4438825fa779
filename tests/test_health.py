"""HealthMonitor: what each policy does to weights, moments, log and run, with automatic and manual optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lace_lightning.callbacks import HealthMonitor, UnhealthyRun
from lace_lightning.callbacks.health import _is_finite
from lace_lightning.cli import stages
from lace_lightning.decoding import Group
from lace_lightning.modules import LatticeGRPO, SampledGroups, SupervisedFinetuning, ThreadedModule
from lace_lightning.policy_loss import PolicyLoss
from lace_lightning.rewards import Reward
from lace_lightning.tasks import Verdict
from tests.stage_helpers import (
    DECODING,
    FAST,
    assert_same,
    fitted,
    problem_data,
    quiet_trainer,
    spec,
    trace_data,
    values,
)
from tests.tracking_helpers import TinyModel, tiny_trainer


class Words(Reward):
    """How many words a group has written: hardly two groups have the same."""

    def __init__(self) -> None:
        super().__init__(1.0, "words")

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        return torch.tensor([float(hash(tuple(t.text for t in group.threads)) % 97) for group in groups])


class Same(Words):
    """The same for all."""

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        return torch.ones(len(groups))


def stage(kind: str, **options: Any) -> tuple[ThreadedModule, Any]:
    """A stage with its data: ``sft`` is optimised by Lightning, ``grpo`` by itself, two steps a batch."""
    if kind == "sft":
        return SupervisedFinetuning(spec(), FAST), trace_data()
    settings = {"rewards": [Words()], "minibatches": 2, "groups_per_problem": 4} | options
    return LatticeGRPO(spec(), FAST, rollout=DECODING, validation=DECODING, **settings), problem_data()


def moments(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of all that AdamW keeps."""
    states = trainer.optimizers[0].state_dict()["state"]
    return {f"{index}.{name}": value.clone() for index, state in states.items() for name, value in state.items()}


class Poison(Callback):
    """Makes one gradient of the given optimizer steps not a number, after the backward pass; watches every step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.before: list[dict[str, Tensor]] = []  # weights and moments before each step
        self.after: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        step = len(self.before)
        self.before.append(values(pl_module) | moments(trainer))
        if step in self.steps:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")


def run(kind: str, monitor: HealthMonitor, *steps: int, max_steps: int = 4, **options: Any) -> tuple[Any, Poison]:
    module, data = stage(kind)
    poison = Poison(*steps)
    fitted(module, data, max_steps=max_steps, callbacks=[poison, monitor], **options)
    return module, poison


# ---------------------------------------------------------------- loss and gradients that are not finite


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were_bitwise(kind: str) -> None:
    with pytest.warns(
        UserWarning, match=r"health: the gradient of .* is not finite.*lower model.optimizer.lr.*skipped"
    ):
        module, poison = run(kind, HealthMonitor(non_finite="skip"), 1)
    assert_same(poison.before[2], poison.before[1])
    for earlier, later in ((0, 1), (2, 3)):  # the steps around it are taken
        shared = poison.before[earlier].keys() & poison.before[later].keys()
        assert not all(torch.equal(poison.before[earlier][name], poison.before[later][name]) for name in shared)
    assert all(value.isfinite().all() for value in values(module).values())


def test_a_process_without_a_row_of_a_weight_finds_its_gradient_finite() -> None:
    """FSDP2 gives some processes nothing of a weight with fewer rows than there are processes."""
    assert _is_finite([torch.empty(0, 3), torch.ones(2)]) and _is_finite([torch.empty(0)])
    assert not _is_finite([torch.empty(0, 3), torch.tensor([torch.nan])])


def test_a_warned_of_step_is_taken() -> None:
    with pytest.warns(UserWarning, match="the step is taken"):
        module, _ = run("sft", HealthMonitor(non_finite="warn"), 0, max_steps=1)
    assert not all(value.isfinite().all() for value in values(module).values())


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_stop_saves_the_last_good_state_and_ends_the_run(tmp_path: Path, kind: str) -> None:
    module, data = stage(kind)
    poison = Poison(2)
    with pytest.raises(UnhealthyRun, match=r"(?s)health: the gradient of .*last_good.ckpt: --ckpt_path"):
        fitted(module, data, max_steps=8, callbacks=[poison, HealthMonitor()], default_root_dir=tmp_path)
    saved = torch.load(tmp_path / "checkpoints/last_good.ckpt", weights_only=False)
    good = {name: value for name, value in poison.before[2].items() if name in saved["state_dict"]}
    assert_same(saved["state_dict"], good)
    kept = saved["optimizer_states"][0]["state"]
    assert_same(
        {f"{i}.{name}": value for i, state in kept.items() for name, value in state.items()},
        {name: value for name, value in poison.before[2].items() if name not in saved["state_dict"]},
    )
    again, data = stage(kind)
    trainer = quiet_trainer(max_steps=6, callbacks=[HealthMonitor()])
    trainer.fit(again, data, ckpt_path=tmp_path / "checkpoints/last_good.ckpt")
    assert trainer.global_step == 6


def test_skipping_without_end_stops(tmp_path: Path) -> None:
    with pytest.warns(UserWarning), pytest.raises(UnhealthyRun, match="3 steps in a row were skipped"):
        run("sft", HealthMonitor(non_finite="skip", patience=3), *range(20), max_steps=20, default_root_dir=tmp_path)


def test_a_loss_that_is_not_finite_is_the_monitors_business(tmp_path: Path) -> None:
    """Without the monitor the stage itself raises (tests of the stages)."""

    class NotANumber(Words):
        def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
            return torch.full((len(groups),), float("nan"))

    module, data = stage("grpo", rewards=[NotANumber()])
    with pytest.raises(UnhealthyRun, match="the loss is not finite at step"):
        fitted(module, data, max_steps=2, callbacks=[HealthMonitor()], default_root_dir=tmp_path)


class BadOnRank(Callback):
    """A NaN in the gradients of one process, after they were averaged."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            pl_module.layer.weight.grad[0, 0] = float("nan")


class KeepWeights(Callback):
    """Writes each process's weights after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        weight = pl_module.layer.weight.detach().clone()
        torch.save(weight, self.folder / f"{trainer.global_rank}_{trainer.global_step}.pt")


def test_all_processes_skip_what_one_finds_bad(tmp_path: Path) -> None:
    callbacks = [BadOnRank(), HealthMonitor(non_finite="skip"), KeepWeights(tmp_path)]
    trainer = tiny_trainer(
        tmp_path, max_epochs=1, devices=2, strategy="ddp_fork", callbacks=callbacks, enable_checkpointing=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(TinyModel())
    first, second = ([torch.load(tmp_path / f"{rank}_{step}.pt") for step in (1, 2)] for rank in (0, 1))
    assert torch.equal(first[0], first[1]) and torch.equal(second[0], second[1]) and torch.equal(first[1], second[1])


# ---------------------------------------------------------------- rollouts


def rollouts(monitor: HealthMonitor, batches: int = 3, **options: Any) -> tuple[LatticeGRPO, Poison]:
    module, data = stage("grpo", minibatches=1, **options)
    watcher = Poison()
    fitted(module, data, max_steps=batches, callbacks=[watcher, monitor])
    return module, watcher


def test_a_reward_that_stays_constant_is_named_once_it_lasts() -> None:
    monitor = HealthMonitor(patience=2)
    with pytest.warns(UserWarning, match=r"every problem got the same reward, for 2 batches in a row: .*too hard"):
        rollouts(monitor, rewards=[Same()])
    assert monitor.state_dict()["counts"]["constant_reward"] == 3
    healthy = HealthMonitor(patience=2)
    rollouts(healthy)
    assert healthy.state_dict()["counts"]["constant_reward"] == 0


def test_a_symptom_that_comes_and_goes_does_not_last() -> None:
    class Turns(Words):
        def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
            self.weight = 1.0 - self.weight
            return super().__call__(groups, verdicts)

    monitor = HealthMonitor(constant_reward="stop", patience=2)
    rollouts(monitor, batches=5, rewards=[Turns()])
    assert monitor.state_dict()["counts"]["constant_reward"] in (2, 3)


def test_skipping_constant_rewards_takes_no_step_even_with_a_kl_term() -> None:
    options = {"rewards": [Same()], "loss": PolicyLoss(kl_weight=1.0)}
    with pytest.warns(UserWarning, match="steps are skipped while it lasts"):
        _, watcher = rollouts(HealthMonitor(constant_reward="skip", patience=2), batches=4, **options)
    assert_same(watcher.before[3], watcher.before[2])


def test_stop_ends_a_run_whose_threads_never_end_or_tag_themselves(tmp_path: Path) -> None:
    module, data = stage("grpo")
    monitor = HealthMonitor(truncated="stop", patience=2)
    short = {"max_steps": 9, "callbacks": [monitor], "default_root_dir": tmp_path}
    sample = module.sample

    def never_ending(*args: Any) -> SampledGroups:
        sampled = sample(*args)
        return replace(sampled, rollout=replace(sampled.rollout, finished=torch.zeros_like(sampled.rollout.finished)))

    module.sample = never_ending  # type: ignore[method-assign]
    with pytest.raises(
        UnhealthyRun, match=r"ended every thread, for 2 batches in a row: .*raise rollout.max_new_tokens"
    ):
        fitted(module, data, **short)
    counts = monitor.state_dict()["counts"]
    assert counts["truncated"] == counts["lost_tags"] == 2
    assert (tmp_path / "checkpoints/last_good.ckpt").is_file()


# ---------------------------------------------------------------- books


def test_counts_are_logged_and_go_on_after_a_resume(tmp_path: Path) -> None:
    module, data = stage("sft")
    logger, monitor = CSVLogger(tmp_path), HealthMonitor(non_finite="skip")
    with pytest.warns(UserWarning):
        trainer = fitted(
            module, data, max_steps=4, callbacks=[Poison(1, 2), monitor], logger=logger, log_every_n_steps=1
        )
    logger.save()
    rows = Path(logger.log_dir, "metrics.csv").read_text()
    assert "health/non_finite" in rows and "health/skipped" in rows
    fresh = HealthMonitor()
    fresh.load_state_dict(monitor.state_dict())
    assert fresh.state_dict()["counts"] == {"non_finite": 2, "skipped": 2}
    assert trainer.global_step == 4


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="health.truncated='ignore' is unknown: choose one of stop, skip, warn"):
        HealthMonitor(truncated="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience=0 must be at least 1"):
        HealthMonitor(patience=0)


def test_a_stopped_run_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def build(arguments: Sequence[str]) -> None:
        raise UnhealthyRun("health: nothing is learned")

    monkeypatch.setattr(stages, "build", build)
    assert stages.run(["fit"]) == 3
    assert "health: nothing is learned" in capsys.readouterr().err

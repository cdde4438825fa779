"""Lattice GRPO: its gradient against one from full logits, its books, and that it raises what can be raised."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lace_lightning.decoding import Group, Rollout
from lace_lightning.embedding import NgramEmbedder
from lace_lightning.modules import LatticeGRPO, OptimizerSpec
from lace_lightning.modules.base import NonFiniteLossError, ThreadedModule
from lace_lightning.modules.scoring import score, score_all
from lace_lightning.policy_loss import PolicyLoss
from lace_lightning.rewards import DiversityReward, FormatReward, Reward
from lace_lightning.tasks import Verdict
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import wake
from tests.stage_helpers import (
    DECODING,
    FAST,
    NUM_THREADS,
    QWEN,
    Recorder,
    assert_same,
    fitted,
    problem_data,
    quiet_trainer,
    ready,
    spec,
    values,
)

GROUPS = 3


class Threes(Reward):
    """The share of a group's sampled words that are "3": easy to raise, and hardly two groups have the same."""

    def __init__(self, weight: float = 1.0, name: str = "threes") -> None:
        super().__init__(weight, name)

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        words = [[word for thread in group.threads for word in thread.text.split()] for group in groups]
        return torch.tensor([own.count("3") / max(1, len(own)) for own in words])


class Numbers(Threes):
    """The share of a group's words that are numbers: every group has another one."""

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        words = [[word for thread in group.threads for word in thread.text.split()] for group in groups]
        return torch.tensor([sum(word.isdigit() for word in own) / max(1, len(own)) for own in words])


def grpo(**options: Any) -> LatticeGRPO:
    settings = dict(rollout=DECODING, validation=DECODING, rewards=[Threes()], groups_per_problem=GROUPS)
    model = {name: options.pop(name) for name in ("architecture", "lora") if name in options}
    return LatticeGRPO(spec(**model), options.pop("optimizer", FAST), **settings | options)


def awake(**options: Any) -> LatticeGRPO:
    """A stage before its first step, whose exchange acts."""
    module = ready(grpo(**options), problem_data())
    wake(module.model)
    for reference in module._reference:
        wake(reference)
    return module


def sampled(module: LatticeGRPO) -> tuple[Rollout, Tensor]:
    """Six groups for two problems and advantages, that of one group 0."""
    data = module.data
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    problems = [problem for problem in batch for _ in range(GROUPS)]
    rollout = module.sample(problems, module.rollout, list(range(len(problems)))).rollout
    assert rollout.forced.any() and not rollout.attention_mask[..., : rollout.prompt_length].all()
    return rollout, torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5, 0.5])


def gradient_of(module: LatticeGRPO, rollout: Rollout, advantages: Tensor, **changes: Any) -> dict[str, Tensor]:
    """The gradient that one optimizer step over all groups would take."""
    for name, value in changes.items():
        setattr(module, name, value)
    module.zero_grad()
    groups = torch.arange(len(advantages))
    weights = module.loss.token_weights(rollout.chosen, module.rollout.max_new_tokens)
    reference = score_all(module._reference[0], rollout, module.microbatch_size) if module._reference else None
    module._backward(rollout, groups, advantages, weights, None, reference, [])
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def reference_gradient(module: LatticeGRPO, rollout: Rollout, advantages: Tensor, average: str) -> dict[str, Tensor]:
    """The policy gradient at ratio 1 from full logits: advantage times d log p of each word that a thread chose."""
    logits = module.model(rollout.input_ids, rollout.attention_mask, rollout.prompt_length)
    logprobs = logits.log_softmax(-1)
    per_thread = {}
    for b, n in product(range(len(logits)), range(NUM_THREADS)):
        columns = rollout.attention_mask[b, n].nonzero().flatten().tolist()
        per_thread[b, n] = [
            logprobs[b, n, before, rollout.input_ids[b, n, column]]
            for before, column in zip(columns[:-1], columns[1:], strict=True)
            if column >= rollout.prompt_length and not rollout.forced[b, n, column]
        ]
    num_tokens = sum(len(own) for own in per_thread.values())
    share = {
        "grpo": lambda own: 1 / len(own) / len(per_thread),
        "dr_grpo": lambda own: 1 / (len(per_thread) * DECODING.max_new_tokens),
        "dapo": lambda own: 1 / num_tokens,
    }[average]
    loss = -sum(advantages[b] * torch.stack(own).sum() * share(own) for (b, _), own in per_thread.items())
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return dict(zip((name for name, _ in module.named_parameters()), gradients, strict=True))


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert max(float(gradient.abs().max()) for gradient in a.values()) > 0.01
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


class Gradients(Recorder):
    """What the optimizer is given, and what it should be given for the rollout and advantages at hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, average: str) -> None:
        super().__init__()
        optimise = LatticeGRPO._optimise

        def spy(module: LatticeGRPO, rollout: Rollout, own: list[int], advantages: Tensor) -> Any:
            self.advantages = advantages
            self.expected = reference_gradient(module, rollout, advantages, average)
            return optimise(module, rollout, own, advantages)

        monkeypatch.setattr(LatticeGRPO, "_optimise", spy)

    def on_train_start(self, trainer, pl_module) -> None:
        wake(pl_module.model)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.actual = {name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()}


@pytest.mark.parametrize("average", ["grpo", "dr_grpo", "dapo"])
def test_gradient_is_the_policy_gradient_of_the_words_that_threads_chose(
    monkeypatch: pytest.MonkeyPatch, average: str
) -> None:
    """One advantage for all words of all threads of a group; none for prompts and for what the environment wrote."""
    gradients = Gradients(monkeypatch, average)
    module = grpo(loss=PolicyLoss(average=average), gradient_clip=0.0, rewards=[Numbers(weight=20.0)])
    fitted(module, problem_data(max_length=20), max_steps=1, callbacks=[gradients])
    assert_close(gradients.actual, gradients.expected)
    groups = gradients.outputs[0]["sampled"].groups
    rewards = (20 * Numbers()(groups, [])).tolist()
    for group, reward, advantage in zip(groups, rewards, gradients.advantages.tolist(), strict=True):
        of_problem = [r for other, r in zip(groups, rewards, strict=True) if other.problem.id == group.problem.id]
        assert len(of_problem) == GROUPS
        assert advantage == pytest.approx(reward - sum(of_problem) / GROUPS, abs=1e-5)


@pytest.mark.parametrize("loss", [PolicyLoss(), PolicyLoss(average="grpo", kl_weight=0.3)])
def test_microbatches_have_the_gradient_of_the_whole_batch(loss: PolicyLoss) -> None:
    module = awake(loss=loss)
    rollout, advantages = sampled(module)
    if module._reference:
        with torch.no_grad():  # else the KL term has no gradient
            module._reference[0].backbone.lm_head.weight.mul_(1.5)
    whole = gradient_of(module, rollout, advantages)
    for size in (1, 3, 4):
        assert_close(whole, gradient_of(module, rollout, advantages, microbatch_size=size))


def test_cpus_take_few_groups_at_once_with_the_gradient_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = awake()
    rollout, advantages = sampled(module)
    whole, sizes = gradient_of(module, rollout, advantages), []

    def noted(model: ThreadedLM, rollout: Rollout, groups: Tensor) -> Tensor:
        sizes.append(len(groups))
        return score(model, rollout, groups)

    monkeypatch.setattr("lace_lightning.modules.lattice_grpo.score", noted)
    tokens = rollout.input_ids[0].numel()
    for limit, largest in ((10 * tokens, len(advantages)), (2 * tokens, 2), (1, 1)):
        sizes.clear()
        monkeypatch.setattr("lace_lightning.modules.scoring.CPU_TOKENS", limit)
        assert_close(whole, gradient_of(module, rollout, advantages))
        assert max(sizes) <= largest and len(sizes) >= (advantages != 0).sum() / largest


def test_groups_without_advantage_are_not_computed_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = awake()
    rollout, advantages = sampled(module)
    scored = []

    def counted(model: ThreadedLM, rollout: Rollout, groups: Tensor) -> Tensor:
        scored.extend(groups.tolist())
        return score(model, rollout, groups)

    monkeypatch.setattr("lace_lightning.modules.lattice_grpo.score", counted)
    without = gradient_of(module, rollout, advantages)
    assert scored == [0, 1, 3, 4, 5]
    least = torch.where(advantages == 0, 1e-30, advantages)  # not 0, so it is computed
    assert_close(without, gradient_of(module, rollout, least))
    assert 2 in scored


def test_recomputed_log_probabilities_are_those_that_were_sampled() -> None:
    module = awake()
    rollout, _ = sampled(module)
    scored = score_all(module._model(), rollout, None)
    torch.testing.assert_close(scored, rollout.logprobs, atol=1e-5, rtol=0)
    assert (scored[rollout.chosen] < 0).all() and not scored[~rollout.chosen].any()


class Ratios:
    """Stands before the loss and keeps old and new log-probabilities."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        call = PolicyLoss.__call__

        def spy(loss: PolicyLoss, logprobs: Tensor, old: Tensor, *args: Any) -> Any:
            self.seen.append((logprobs - old).detach().exp())
            return call(loss, logprobs, old, *args)

        monkeypatch.setattr(PolicyLoss, "__call__", spy)


def test_ratio_is_exactly_one_in_a_single_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = Ratios(monkeypatch)
    fitted(grpo(), problem_data(), max_steps=2)
    assert len(ratios.seen) == 2 and all((ratio == 1).all() for ratio in ratios.seen)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5}])
def test_later_passes_compare_with_the_weights_that_sampled(
    monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    """Also where the model has dropout: a ratio is a change of the weights, never a draw of neurons."""
    ratios = Ratios(monkeypatch)
    slow, dropout = OptimizerSpec(lr=1e-3), {**QWEN, "attention_dropout": 0.5}
    module = grpo(passes=3, lora=lora, architecture=dropout, optimizer=slow)
    fitted(module, problem_data(), max_steps=3, callbacks=[WakeLora()])
    distances = [float((ratio - 1).abs().max()) for ratio in ratios.seen]
    assert distances[0] < 1e-5 and 1e-3 < distances[1] < distances[2]


class WakeLora(Recorder):
    """Gives LoRA's zero-started B random weights, so that its dropout would be felt."""

    def on_train_start(self, trainer, pl_module) -> None:
        for name, parameter in pl_module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)


def test_kl_term_holds_the_weights_where_training_started() -> None:
    """At first the divergence is 0; with a huge weight it stays smaller than without."""
    apart = {}
    for weight in (1e-9, 10.0):
        torch.manual_seed(0)
        module, recorder = grpo(loss=PolicyLoss(kl_weight=weight)), KL()
        fitted(module, problem_data(), max_steps=5, callbacks=[recorder])
        assert recorder.kl[0] == 0
        apart[weight] = recorder.kl[-1]
        assert not any("_reference" in name for name in module.state_dict())
    assert 0 < apart[10.0] < apart[1e-9] / 3


class KL(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.kl: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        self.kl.append(trainer.callback_metrics["policy/kl"].item())


def test_all_groups_tied_leaves_the_weights_alone() -> None:
    recorder, before = Recorder(), Start()
    module = grpo(rewards=[Constant()], optimizer=OptimizerSpec(lr=0.1, weight_decay=0.5))
    trainer = fitted(module, problem_data(), max_steps=2, callbacks=[recorder, before])
    assert_same(values(module), before.values)
    assert recorder.steps == [1, 2] and trainer.callback_metrics["reward/tied_problems"] == 1


class Start(Recorder):
    """The weights that training starts from."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.values = values(pl_module)


class Constant(Threes):
    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        return torch.ones(len(groups))


def test_training_raises_a_reward_that_can_be_raised() -> None:
    """An untrained model writes "3" as one word in 27; verdicts stay in what is counted. Other seeds reach 0.75 too."""
    rewards = Rewards()
    module = grpo(groups_per_problem=8, optimizer=OptimizerSpec(lr=0.03))
    fitted(module, problem_data(num_train_problems=24), max_steps=12, callbacks=[rewards])
    assert rewards.seen[0] < 0.2
    assert sum(rewards.seen[-3:]) / 3 > 0.5


class Rewards(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        self.seen.append(trainer.callback_metrics["reward/total"].item())


# ---------------------------------------------------------------- books


@pytest.mark.parametrize(
    ("passes", "minibatches", "max_steps", "steps"),
    [
        (1, 1, 3, [1, 2, 3]),
        (2, 1, 4, [2, 4]),
        (2, 3, 12, [6, 12]),
        (2, 3, 8, [6, 12]),  # the last batch takes all its steps
    ],
)
def test_steps_are_optimizer_steps(passes: int, minibatches: int, max_steps: int, steps: list[int]) -> None:
    recorder = Recorder()
    fitted(grpo(passes=passes, minibatches=minibatches), problem_data(), max_steps=max_steps, callbacks=[recorder])
    assert recorder.steps == steps


def test_every_group_is_in_one_minibatch_of_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    backward = LatticeGRPO._backward

    def spy(self: LatticeGRPO, rollout: Rollout, groups: Tensor, *args: Any) -> Any:
        taken.append(groups.tolist())
        return backward(self, rollout, groups, *args)

    monkeypatch.setattr(LatticeGRPO, "_backward", spy)
    fitted(grpo(passes=2, minibatches=4), problem_data(), max_steps=8)
    assert sorted(map(len, taken[:4])) == [1, 1, 2, 2]
    first, second = ([group for part in half for group in part] for half in (taken[:4], taken[4:]))
    assert sorted(first) == sorted(second) == list(range(2 * GROUPS)) and first != second


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 2, "max_steps": -1}, 2 * 6 * 4),  # 6 batches of 2 problems, 4 optimizer steps each
        ({"max_epochs": 2, "max_steps": 10}, 10),
        ({"max_epochs": 1, "max_steps": 100}, 24),
        ({"max_steps": 40}, 40),
    ],
)
def test_schedule_ends_with_the_last_optimizer_step(limits: dict[str, int], expected: int) -> None:
    module = grpo(passes=2, minibatches=2)
    module_steps = []

    class Probe(Recorder):
        def on_train_start(self, trainer, pl_module) -> None:
            module_steps.append(pl_module.num_optimizer_steps)
            trainer.should_stop = True

    trainer = quiet_trainer(**limits, callbacks=[Probe()])
    trainer.fit(module, problem_data())
    assert module_steps == [expected]


def test_rollouts_differ_between_groups_steps_and_seeds() -> None:
    module = awake()
    problems = [module.data.task.problem(0)] * GROUPS
    seeds = set(module._rollout_seeds(problems))
    module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 1
    seeds |= set(module._rollout_seeds(problems))
    module.rollout = DECODING.__class__(max_new_tokens=12, seed=1)
    assert len(seeds | set(module._rollout_seeds(problems))) == 3 * GROUPS


@pytest.mark.parametrize("training", [True, False])
def test_sampling_keeps_the_mode_of_the_model(training: bool) -> None:
    module = awake().train(training)
    sampled(module)
    assert module.model.training is training


def test_gradient_is_clipped_to_its_norm() -> None:
    norms = {}

    class Norm(Recorder):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            norms[pl_module.gradient_clip] = torch.cat(gradients).norm().item()

    for clip in (0.0, 0.01):
        torch.manual_seed(0)
        fitted(grpo(gradient_clip=clip), problem_data(), max_steps=1, callbacks=[Norm()])
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3) and norms[0.0] > 0.015


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights() -> None:
    class NotANumber(Threes):
        def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
            return torch.full((len(groups),), float("nan"))

    module, before = grpo(rewards=[NotANumber()]), Start()
    with pytest.raises(NonFiniteLossError, match="LatticeGRPO: the loss is nan at step 0"):
        fitted(module, problem_data(), max_steps=2, callbacks=[before])
    assert_same(values(module), before.values)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups_per_problem": 1}, "groups_per_problem=1"),
        ({"passes": 0}, "passes=0"),
        ({"minibatches": 0}, "minibatches=0"),
        ({"microbatch_size": 0}, "microbatch_size=0"),
        ({"gradient_clip": -1.0}, "gradient_clip=-1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        grpo(**options)


@pytest.mark.parametrize("passes", [1, 3])
def test_gaps_between_sampling_and_training_are_those_before_any_update(monkeypatch, passes: int) -> None:
    """One recorded log-probability is half a nat off; the others are off by rounding, whatever the updates do later."""
    counts = []

    def sample(self: LatticeGRPO, *args: Any) -> Any:
        sampled = ThreadedModule.sample(self, *args)
        place = tuple(sampled.rollout.chosen.nonzero()[7])
        sampled.rollout.logprobs[place] += 0.5
        counts.append(sampled.rollout.chosen.sum().item())
        return sampled

    monkeypatch.setattr(LatticeGRPO, "sample", sample)
    module = grpo(passes=passes, rewards=[Numbers()], optimizer=OptimizerSpec(lr=0.1), microbatch_size=2)
    logged = fitted(module, problem_data(), max_steps=passes).callback_metrics
    assert logged["rollout/logprob_gap_max"].item() == pytest.approx(0.5, abs=1e-4)
    assert logged["rollout/logprob_gap_mean"].item() == pytest.approx(0.5 / counts[0], abs=1e-4)


def test_what_ranks_average_stands_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL adds up nothing on a CPU, where wall-clock times are born."""
    averaged: list[torch.device] = []
    original = LatticeGRPO._log_step

    def on_another_device(self: LatticeGRPO, *args: Any) -> None:
        def log_dict(values: dict[str, Tensor], sync_dist: bool = False, **_: Any) -> None:
            averaged.extend(value.device for value in values.values() if sync_dist)

        with monkeypatch.context() as patched:
            patched.setattr(self, "_device", torch.device("meta"))
            patched.setattr(self, "log_dict", log_dict)
            original(self, *args)

    monkeypatch.setattr(LatticeGRPO, "_log_step", on_another_device)
    fitted(grpo(), problem_data(), max_steps=1)
    assert averaged and set(averaged) == {torch.device("meta")}


def test_logged_names_are_documented_and_rewards_stand_by_their_names() -> None:
    rewards = [Threes(), FormatReward(), DiversityReward(NgramEmbedder(), weight=0.5)]
    trainer = fitted(grpo(rewards=rewards, loss=PolicyLoss(kl_weight=0.1)), problem_data(), max_steps=1)
    logged = trainer.callback_metrics
    expected = {
        *("reward/threes", "reward/format", "reward/diversity", "reward/total", "reward/tied_problems"),
        *("policy/loss", "policy/clipped", "policy/entropy", "policy/kl", "rollout/tokens", "rollout/truncated"),
        *("rollout/logprob_gap_mean", "rollout/logprob_gap_max"),
        *("time/rollout", "time/reward", "time/update", "train/reward"),
    }
    assert set(logged) == expected
    total = logged["reward/threes"] + logged["reward/format"] + 0.5 * logged["reward/diversity"]
    assert logged["reward/total"] == pytest.approx(total.item(), abs=1e-6)

"""The clipped surrogate, its averages and its KL term, against loops over tokens and arithmetic on paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lace_lightning.policy_loss import LossOutput, PolicyLoss

AVERAGES = ("grpo", "dr_grpo", "dapo")
MAX_LENGTH = 9


def random_batch(num_groups: int = 4, num_threads: int = 3, columns: int = 7) -> dict[str, Tensor]:
    """Groups of ragged threads, one of them empty, whose ratios lie on both sides of both clips."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> Tensor:
        return torch.randn(num_groups, num_threads, columns, generator=generator, dtype=torch.float64) * scale

    mask = torch.rand(num_groups, num_threads, columns, generator=generator) < 0.6
    mask[0, 0] = False
    old = draw(1.0) - 3
    return {
        "logprobs": old + draw(0.4),
        "old": old,
        "reference": old + draw(0.4),
        "advantages": torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)[:num_groups],
        "mask": mask,
    }


def apply(loss: PolicyLoss, batch: dict[str, Tensor]) -> tuple[LossOutput, Tensor]:
    """The loss and its gradient on the log-probabilities."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    weights = loss.token_weights(batch["mask"], MAX_LENGTH).double()
    output = loss(logprobs, batch["old"], batch["advantages"], weights, batch["reference"])
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def reference_weight(average: str, mask: list, b: int, n: int) -> float:
    """What one token of thread n of group b counts, from the definitions of the three averages."""
    num_threads = len(mask) * len(mask[0])
    if average == "grpo":  # mean over a thread's tokens, then over threads
        return 1 / sum(mask[b][n]) / num_threads
    if average == "dr_grpo":  # a constant
        return 1 / (num_threads * MAX_LENGTH)
    return 1 / sum(token for group in mask for thread in group for token in thread)


def reference_loss(loss: PolicyLoss, batch: dict[str, Tensor]) -> tuple[float, Tensor, int]:
    """Loss, its derivatives by the rules of calculus, and the number of clipped tokens; one token at a time."""
    values = {name: tensor.tolist() for name, tensor in batch.items()}
    total, num_clipped, gradient = 0.0, 0, torch.zeros_like(batch["logprobs"])
    for b, n, t in batch["mask"].nonzero().tolist():
        new, old, anchor = (values[name][b][n][t] for name in ("logprobs", "old", "reference"))
        advantage, weight = values["advantages"][b], reference_weight(loss.average, values["mask"], b, n)
        ratio = math.exp(new - old)
        too_far = ratio > 1 + loss.clip_high if advantage > 0 else ratio < 1 - loss.clip_low and advantage < 0
        if too_far:
            bound = 1 + loss.clip_high if advantage > 0 else 1 - loss.clip_low
            total -= weight * bound * advantage
            num_clipped += 1
        else:
            total -= weight * ratio * advantage
            gradient[b, n, t] -= weight * ratio * advantage
        total += loss.kl_weight * weight * (math.exp(anchor - new) - (anchor - new) - 1)
        gradient[b, n, t] += loss.kl_weight * weight * (1 - math.exp(anchor - new))
    return total, gradient, num_clipped


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("average", AVERAGES)
def test_value_and_gradient_equal_a_loop_over_tokens(average: str, kl_weight: float) -> None:
    loss, batch = PolicyLoss(average=average, kl_weight=kl_weight), random_batch()
    output, gradient = apply(loss, batch)
    value, derivatives, num_clipped = reference_loss(loss, batch)
    assert output.loss.item() == pytest.approx(value, abs=1e-6)  # weights are float32
    torch.testing.assert_close(gradient, derivatives, atol=1e-7, rtol=1e-5)
    assert (output.num_clipped.item(), output.num_chosen.item()) == (num_clipped, batch["mask"].sum().item())
    assert 0 < num_clipped < batch["mask"].sum() / 2


@pytest.mark.parametrize(
    ("advantage", "expected", "gradient"),
    [
        # Three tokens of ratios 1.5, 0.5 and 1.1, clip 0.2 below and 0.28 above, mean over tokens.
        # A = 2: min(3, 2.56) + min(1, 1.6) + min(2.2, 2.2) = 5.76. Only the first has gone too far up.
        (2.0, -5.76 / 3, [0.0, -1.0 / 3, -2.2 / 3]),
        # A = -2: min(-3, -2.56) + min(-1, -1.6) + min(-2.2, -2.2) = -6.8. Only the second has gone too far down.
        (-2.0, 6.8 / 3, [3.0 / 3, 0.0, 2.2 / 3]),
    ],
)
def test_clipping_by_hand(advantage: float, expected: float, gradient: list[float]) -> None:
    old = torch.full((1, 1, 3), -1.0, dtype=torch.float64)
    ratios = torch.tensor([[[1.5, 0.5, 1.1]]], dtype=torch.float64)
    batch = {
        "logprobs": old + ratios.log(),
        "old": old,
        "reference": old,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "mask": torch.ones(1, 1, 3, dtype=torch.bool),
    }
    output, actual = apply(PolicyLoss(), batch)
    assert output.loss.item() == pytest.approx(expected)
    assert actual.flatten().tolist() == pytest.approx(gradient)
    assert output.num_clipped.item() == 1


def test_kl_term_is_never_negative_and_zero_only_at_equal_weights() -> None:
    batch = random_batch()
    apart, _ = apply(PolicyLoss(kl_weight=1.0), batch)
    per_token = batch["reference"] - batch["logprobs"]
    assert (per_token.exp() - per_token - 1 >= 0).all() and apart.kl.item() > 0.01
    together, gradient = apply(
        PolicyLoss(kl_weight=1.0), batch | {"logprobs": batch["reference"], "advantages": torch.zeros(4)}
    )
    assert together.kl.item() == 0 and not gradient.any()


def test_kl_term_is_the_divergence_on_average() -> None:
    """The mean of the estimator over tokens drawn from p is KL(p, q), worked out over a whole vocabulary."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    loss = PolicyLoss(kl_weight=1.0)
    output = loss(p.log()[None, None], p.log()[None, None], torch.zeros(1), p[None, None], q.log()[None, None])
    assert output.kl.item() == pytest.approx(float((p * (p / q).log()).sum()))


@pytest.mark.parametrize("average", AVERAGES)
def test_losses_of_parts_with_weights_of_the_whole_add_up_to_the_whole(average: str) -> None:
    loss, batch = PolicyLoss(average=average, kl_weight=0.1), random_batch()
    weights = loss.token_weights(batch["mask"], MAX_LENGTH)

    def of(groups: slice) -> LossOutput:
        parts = [batch[name][groups] for name in ("logprobs", "old", "advantages")]
        return loss(*parts, weights[groups], batch["reference"][groups])

    whole, parts = of(slice(None)), [of(slice(0, 1)), of(slice(1, 4))]
    for value, *halves in zip(whole, *parts, strict=True):
        assert value.item() == pytest.approx(sum(half.item() for half in halves))


def test_tokens_that_were_not_chosen_change_nothing() -> None:
    batch, noise = random_batch(), torch.randn(4, 3, 7, dtype=torch.float64)
    disturbed = batch | {"logprobs": torch.where(batch["mask"], batch["logprobs"], noise)}
    loss = PolicyLoss(kl_weight=0.5)
    before, after = apply(loss, batch), apply(loss, disturbed)
    assert before[0].loss.item() == after[0].loss.item()
    assert not after[1][~batch["mask"]].any()


def test_groups_without_advantage_have_no_gradient() -> None:
    batch = random_batch()
    _, gradient = apply(PolicyLoss(), batch)
    assert not gradient[2].any() and gradient[[0, 1, 3]].any(-1).any(-1).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"average": "mean"}, "loss.average='mean'"),
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"clip_low": 1.0}, "clip_low=1.0"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
    ],
)
def test_bad_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PolicyLoss(**options)

"""The optimizer's learning rate at each step, and what decays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lace_lightning.modules import OptimizerSpec


def rates(total_steps: float, num_steps: int, **options) -> list[float]:
    """The learning rate that each step is taken with."""
    optimizer, scheduler = OptimizerSpec(**options).build([nn.Parameter(torch.ones(2, 2))], total_steps)
    taken = []
    for _ in range(num_steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_warm_up_rises_linearly_to_lr_and_never_is_zero() -> None:
    assert rates(10, 6, lr=1.0, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_linear_schedule_falls_to_a_tenth_at_the_last_step() -> None:
    # 2 steps of warm-up, then 4 steps from 1 to 0.1: 0.3 less each time.
    assert rates(6, 6, lr=1.0, warmup_steps=2, schedule="linear") == pytest.approx([1 / 3, 2 / 3, 1.0, 0.7, 0.4, 0.1])


def test_cosine_schedule_falls_to_a_tenth_at_the_last_step() -> None:
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert rates(5, 5, lr=1.0, schedule="cosine") == pytest.approx(expected)
    assert (expected[0], expected[-1]) == pytest.approx((1.0, 0.1))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_hold_after_their_end_and_without_one(schedule: str) -> None:
    assert rates(3, 6, lr=1.0, schedule=schedule)[2:] == pytest.approx([0.1] * 4)
    assert rates(math.inf, 3, lr=1.0, schedule=schedule) == [1.0] * 3


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, vector, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    frozen.requires_grad_(False)
    optimizer, _ = OptimizerSpec(lr=0.1, weight_decay=0.5).build([matrix, vector, frozen], 10)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(matrix, torch.full((2, 2), 1 - 0.1 * 0.5))  # decoupled decay: lr times weight_decay
    assert torch.equal(vector, torch.ones(2))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(matrix), id(vector)}


def test_steps_are_those_of_adamw() -> None:
    """The formula of Loshchilov and Hutter (arXiv 1711.05101, Algorithm 2), in float64."""
    lr, decay, (beta1, beta2), eps = 0.1, 0.2, (0.8, 0.9), 1e-8
    parameter = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer, _ = OptimizerSpec(lr=lr, weight_decay=decay, betas=(beta1, beta2)).build([parameter], 10)
    expected, m, v = parameter.detach().clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    for step in range(1, 5):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        adam = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        expected -= lr * (adam + decay * expected)
        parameter.grad = gradient
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_bad_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OptimizerSpec(**options)

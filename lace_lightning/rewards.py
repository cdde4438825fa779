"""Rewards of groups and the advantages made of them (LACE.md §6: one reward and one advantage per group)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lace_lightning.diversity import embedding_diversity
from lace_lightning.embedding import Embedder
from lace_lightning.tasks import Verdict

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Group


class Reward(ABC):
    """One part of a group's reward; YAML chooses parts by class path.

    Args:
        weight: factor of this part in the sum.
        name: what it is called in logs, as in ``reward/<name>``.

    Raises:
        ValueError: a weight that is not finite.
    """

    def __init__(self, weight: float, name: str) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"weight={weight} of reward {name!r}: give a finite number")
        self.weight = weight
        self.name = name

    @abstractmethod
    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        """Rate B groups.

        Args:
            groups: B groups of N threads.
            verdicts: (B, N), one per thread.

        Returns:
            (B,) float32 on the CPU, before the weight.
        """


class AccuracyReward(Reward):
    """1 if the thread tagged ``[[best]]`` is correct, in a group whose tags are valid; else 0."""

    def __init__(self, weight: float = 1.0, name: str = "accuracy") -> None:
        super().__init__(weight, name)

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        return torch.tensor(
            [float(is_best_correct(group, judged)) for group, judged in zip(groups, verdicts, strict=True)]
        )


class FormatReward(Reward):
    """1 if the group's tags are valid, else 0."""

    def __init__(self, weight: float = 1.0, name: str = "format") -> None:
        super().__init__(weight, name)

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        return torch.tensor([float(group.has_valid_tags) for group in groups])


class DiversityReward(Reward):
    """Mean pairwise cosine distance of the threads' embedded thoughts; too much weight scatters the threads.

    Args:
        embedder: how thoughts are embedded.
        weight: λ of LACE.md §6.
        name: what it is called in logs.
    """

    def __init__(self, embedder: Embedder, weight: float = 1.0, name: str = "diversity") -> None:
        super().__init__(weight, name)
        self.embedder = embedder

    def __call__(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
        return embedding_diversity(groups, self.embedder)


def is_best_correct(group: Group, verdicts: Sequence[Verdict]) -> bool:
    """Whether the one thread tagged ``[[best]]`` is correct; False if the tags are not valid."""
    return group.best_index is not None and verdicts[group.best_index] == Verdict.CORRECT


def total_reward(
    rewards: Sequence[Reward], groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the rewards, and each of them by name before its weight; all (B,) float32.

    Raises:
        ValueError: two rewards share a name.
    """
    parts = {reward.name: reward(groups, verdicts) for reward in rewards}
    if len(parts) < len(rewards):
        raise ValueError(f"rewards named {[reward.name for reward in rewards]}: give each its own name")
    total = torch.zeros(len(groups))
    for reward in rewards:
        total += reward.weight * parts[reward.name]
    return total, parts


def group_advantages(rewards: Tensor, scale: Literal["none", "std"] = "none") -> Tensor:
    """Advantage of each group over the other groups of its problem: reward minus their mean (LACE.md §6).

    Args:
        rewards: (P, G) rewards of G groups for each of P problems.
        scale: ``"std"`` divides by the (population) standard deviation over the G groups, which inflates differences
            in diversity wherever accuracy ties; ``"none"`` does not.

    Returns:
        (P, G) float32; 0 throughout where all G rewards are equal.

    Raises:
        ValueError: ``scale`` is neither.
    """
    centred = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    if scale == "none":
        return centred.float()
    if scale != "std":
        raise ValueError(f"scale={scale!r}: choose 'none' or 'std'")
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    is_tied = std < 1e-6  # what float32 rewards that ought to be equal may differ by
    return (centred / std.masked_fill(is_tied, 1.0)).masked_fill(is_tied, 0.0).float()

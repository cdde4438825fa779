"""Numbers of all groups of a batch, whichever process sampled them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lace_lightning.modules.sampled_groups import SampledGroups
from lace_lightning.rewards import Reward, total_reward


@dataclass(frozen=True)
class GroupTable:
    """A row of numbers per group; every process holds the rows of all.

    Args:
        numbers: (num_groups,) float64 on the CPU, by name: ``reward/<part>`` and ``reward/total``; ``tokens`` after the
            prompt; ``truncated``, the share of threads that did not end; ``chosen``, how many tokens were drawn and not
            forced, and their ``surprise``, the sum of -log p.
    """

    numbers: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        sampled: SampledGroups,
        rewards: Sequence[Reward],
        own: Sequence[int],
        num_groups: int,
        add_up: Callable[[Tensor], Tensor],
    ) -> GroupTable:
        """Fill in the rows ``own``, whose groups ``sampled`` holds; ``add_up`` brings those of other processes."""
        totals, parts = total_reward(rewards, sampled.groups, sampled.verdicts)
        rollout, chosen = sampled.rollout, sampled.rollout.chosen
        numbers = {f"reward/{name}": values for name, values in (parts | {"total": totals}).items()} | {
            "tokens": rollout.attention_mask[..., rollout.prompt_length :].sum((1, 2)),
            "truncated": 1 - rollout.finished.double().mean(1),
            "chosen": chosen.sum((1, 2)),
            "surprise": -(rollout.logprobs.double() * chosen).sum((1, 2)),
        }
        rows = torch.stack([number[: len(own)].to(chosen.device, torch.float64) for number in numbers.values()])
        table = rows.new_zeros(len(numbers), num_groups)
        table[:, list(own)] = rows
        return cls(dict(zip(numbers, add_up(table).cpu(), strict=True)))

    @property
    def rewards(self) -> Tensor:
        return self.numbers["reward/total"]

    def metrics(self) -> dict[str, Tensor]:
        """Averages by the names under which they are logged."""
        rewards = {name: number.mean() for name, number in self.numbers.items() if name.startswith("reward/")}
        return rewards | {
            "policy/entropy": self.numbers["surprise"].sum() / self.numbers["chosen"].sum(),
            "rollout/tokens": self.numbers["tokens"].mean(),
            "rollout/truncated": self.numbers["truncated"].mean(),
        }

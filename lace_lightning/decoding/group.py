"""What group decoding returns: tensors to train on (:class:`Rollout`), text for people and metrics (:class:`Group`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lace_lightning.traces.schema import Problem, Tag


@dataclass
class Rollout:
    """B decoded groups on their common lattice. Columns 0 … prompt_length-1 hold the left-padded prompt.

    Args:
        input_ids: (B, N, L) long; pad id where nothing was written.
        attention_mask: (B, N, L) bool: a real token stands here (prompt, sampled or forced).
        forced: (B, N, L) bool: an environment wrote it.
        logprobs: (B, N, L) float32: log-probability of each sampled token under the sampling distribution's logits at
            temperature 1 without truncation; 0 where the thread did not choose.
        prompt_length: number of prompt columns P.
        finished: (B, N) bool: the thread ended itself (end of sequence) rather than at the limit.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    forced: torch.Tensor
    logprobs: torch.Tensor
    prompt_length: int
    finished: torch.Tensor

    @property
    def chosen(self) -> torch.Tensor:
        """(B, N, L) bool: tokens that the model itself chose, the targets of a policy gradient."""
        chosen = self.attention_mask & ~self.forced
        chosen[..., : self.prompt_length] = False
        return chosen


def join_rollouts(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """One rollout of all groups in order: prompts padded on the left, responses on the right.

    Args:
        rollouts: at least one, with one number of threads.
        pad_id: stands where nothing was written.
    """
    if len(rollouts) == 1:
        return rollouts[0]
    prompt = max(rollout.prompt_length for rollout in rollouts)
    response = max(rollout.input_ids.shape[-1] - rollout.prompt_length for rollout in rollouts)

    def join(name: str, fill: int | bool | float) -> Tensor:
        parts = []
        for rollout in rollouts:
            part, columns = getattr(rollout, name), rollout.input_ids.shape[-1]
            missing = (prompt - rollout.prompt_length, response - (columns - rollout.prompt_length))
            parts.append(nn.functional.pad(part, missing, value=fill))
        return torch.cat(parts)

    return Rollout(
        input_ids=join("input_ids", pad_id),
        attention_mask=join("attention_mask", False),
        forced=join("forced", False),
        logprobs=join("logprobs", 0.0),
        prompt_length=prompt,
        finished=torch.cat([rollout.finished for rollout in rollouts]),
    )


@dataclass(frozen=True)
class Thread:
    """One decoded thread as text.

    Args:
        text: everything after the prompt, tags and assessment included, special tokens left out.
        thought: ``text`` up to the assessment, without what the environment wrote (what diversity is measured on).
        answer: the answer parsed from the assessment, or None.
        tag: the one tag of the assessment, or None if there is none or more than one.
        observations: what the environment wrote, in order.
        token_ids, columns, logprobs, forced: of each real token after the prompt: id, lattice time, log-probability,
            and whether it was forced.
        finished: "eos" or "length".
    """

    text: str
    thought: str
    answer: str | None
    tag: Tag | None
    observations: tuple[str, ...]
    token_ids: tuple[int, ...]
    columns: tuple[int, ...]
    logprobs: tuple[float, ...]
    forced: tuple[bool, ...]
    finished: Literal["eos", "length"]

    @property
    def num_tokens(self) -> int:
        """Real tokens after the prompt, forced ones included."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Group:
    """The N threads of one problem, decoded together."""

    problem: Problem
    threads: tuple[Thread, ...]
    seed: int

    @property
    def tags(self) -> list[Tag | None]:
        return [thread.tag for thread in self.threads]

    @property
    def has_valid_tags(self) -> bool:
        """Every thread ends with exactly one tag and exactly one thread says ``[[best]]`` (LACE.md §6)."""
        return None not in self.tags and self.tags.count(Tag.BEST) == 1

    @property
    def best(self) -> Thread | None:
        """The one thread tagged ``[[best]]``; None if the group's tags are not valid."""
        return self.threads[self.tags.index(Tag.BEST)] if self.has_valid_tags else None

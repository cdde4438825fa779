"""Log-probabilities of what was sampled, computed again by a model that learns or is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lace_lightning.decoding import Rollout
from lace_lightning.sharding import whole
from lace_lightning.threaded_lm import ThreadedLM

CPU_TOKENS = 4096
"""Tokens per pass on a CPU: activations of more leave its cache, and their memory goes back to the system each time."""


def score(model: ThreadedLM, rollout: Rollout, groups: Tensor) -> Tensor:
    """(len(groups), N, L) log-probabilities of the chosen tokens, with the exchange on."""
    return model.token_logprobs(
        rollout.input_ids[groups], rollout.attention_mask[groups], rollout.chosen[groups], rollout.prompt_length
    )


@torch.no_grad()
def score_all(model: ThreadedLM, rollout: Rollout, most: int | None) -> Tensor:
    """(B, N, L) log-probabilities of the chosen tokens of all groups, :func:`groups_at_once` of them in a pass."""
    everything = torch.arange(len(rollout.input_ids), device=rollout.input_ids.device)
    parts = everything.split(groups_at_once(rollout, most))
    with whole(model):
        return torch.cat([score(model, rollout, groups) for groups in parts])


def groups_at_once(rollout: Rollout, most: int | None) -> int:
    """Groups per forward and backward pass: ``most``; without it all, on a CPU what :data:`CPU_TOKENS` lets through."""
    num_groups, num_threads, columns = rollout.input_ids.shape
    if most is not None or rollout.input_ids.device.type != "cpu":
        return most or num_groups
    return max(1, CPU_TOKENS // (num_threads * columns))


def logprob_gaps(logprobs: Tensor, rollout: Rollout, groups: Tensor | None = None) -> Tensor:
    """(M,) distances between recomputed log-probabilities (B, N, L) and those at sampling, of the chosen tokens.

    The same weights computed both, but not by the same code: cached columns and rounding differ. A large gap says that
    the policy that is optimised is not the one that was sampled.
    """
    where = slice(None) if groups is None else groups
    return (logprobs - rollout.logprobs[where]).abs()[rollout.chosen[where]]

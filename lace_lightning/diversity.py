"""How different the threads of a group are (LACE.md §6, §7): mean pairwise distances of what they thought.

A thread without a thought is at distance 0 from every other one: saying nothing explores nothing, and must earn no
diversity reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Group
    from lace_lightning.embedding import Embedder


def mean_cosine_distance(embeddings: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over all N(N-1)/2 pairs of threads of 1 - cos, 0 for a pair with an invalid thread.

    Args:
        embeddings: (..., N, E), of any length.
        valid: (..., N) bool, all by default.

    Returns:
        (...) between 0 and 2; 0 where N is 1.
    """
    num_threads = embeddings.shape[-2]
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    similarity = unit @ unit.mT  # (..., N, N)
    valid = torch.ones_like(embeddings[..., 0], dtype=torch.bool) if valid is None else valid
    is_pair = (valid.unsqueeze(-1) & valid.unsqueeze(-2)).triu(diagonal=1)
    total = ((1 - similarity).clamp_min(0) * is_pair).sum((-2, -1))
    return total / max(num_threads * (num_threads - 1) // 2, 1)


def mean_edit_distance(sequences: Sequence[str] | Sequence[Sequence[int]]) -> float:
    """Mean over all pairs of the Levenshtein distance divided by the longer length; 0 for a pair with an empty one.

    Args:
        sequences: the N threads as strings (characters count) or token ids.

    Returns:
        Between 0 (all equal) and 1; 0 where N is 1.
    """
    pairs = list(combinations(sequences, 2))
    from rapidfuzz.distance import Levenshtein  # training needs none of it, and machines for it may lack it

    distances = (Levenshtein.normalized_distance(first, second) for first, second in pairs if first and second)
    return sum(distances) / max(len(pairs), 1)


def embedding_diversity(groups: Sequence[Group], embedder: Embedder) -> Tensor:
    """Mean pairwise cosine distance of the embedded thoughts of each group, (B,) float32 on the CPU."""
    if not groups:
        return torch.zeros(0)
    thoughts = [[thread.thought.strip() for thread in group.threads] for group in groups]
    embeddings = embedder.embed([thought for group in thoughts for thought in group]).float().cpu()
    parts = embeddings.split([len(group) for group in thoughts])
    return torch.stack(
        [
            mean_cosine_distance(part, torch.tensor([bool(thought) for thought in group], dtype=torch.bool))
            for part, group in zip(parts, thoughts, strict=True)
        ]
    )


def thread_similarity(groups: Sequence[Group], embedder: Embedder) -> Tensor:
    """Mean cosine similarity of the thoughts of threads n and m over groups, (N, N) float32 on the CPU.

    A thread without a thought is at similarity 1 to all others, as it is at distance 0 elsewhere.

    Args:
        groups: at least one, all of N threads.
        embedder: embeds thoughts.
    """
    thoughts = [thread.thought.strip() for group in groups for thread in group.threads]
    unit = torch.nn.functional.normalize(embedder.embed(thoughts).float().cpu(), dim=-1)
    unit = unit.unflatten(0, (len(groups), -1))
    is_thought = torch.tensor([bool(thought) for thought in thoughts]).view(unit.shape[:2])
    is_pair = is_thought.unsqueeze(-1) & is_thought.unsqueeze(-2)
    return torch.where(is_pair, unit @ unit.mT, 1.0).mean(0)


def edit_diversity(group: Group) -> float:
    """Mean pairwise normalised edit distance, in characters, of a group's thoughts."""
    return mean_edit_distance([thread.thought.strip() for thread in group.threads])

"""Groups as rows ``prompt | thread 0 | … | thread N-1``: the prompt that the threads share is computed once.

Packed are what layers do to each token by itself. Attention is computed on a row per thread, as without packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SAVED = 0.1
"""Share of the tokens that packing must save to be worth taking rows apart and together in each layer."""


def pays(input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> bool:
    """Whether packing these groups is right, and faster than a row per thread.

    Right it is if the threads of each group have the same prompt. A GPU would have to be waited for to find out.

    Args:
        input_ids, attention_mask: (B, N, P + L).
        prompt_length: P.
    """
    _, num_threads, columns = input_ids.shape
    saved = (num_threads - 1) * prompt_length
    if input_ids.device.type != "cpu" or saved < LEAST_SAVED * num_threads * columns:
        return False
    return all(_is_same_for_all_threads(x[..., :prompt_length]) for x in (input_ids, attention_mask))


def _is_same_for_all_threads(x: Tensor) -> bool:
    return torch.equal(x, x[:, :1].expand_as(x))


def pack(x: Tensor, prompt_length: int) -> Tensor:
    """(B, N, P + L, …) as rows of whole groups (B, P + N * L, …), with the prompt of thread 0."""
    return torch.cat([x[:, 0, :prompt_length], x[:, :, prompt_length:].flatten(1, 2)], dim=1)


def unpack(rows: Tensor, num_threads: int, prompt_length: int) -> Tensor:
    """(B, P + N * L, …) as (B, N, P + L, …), with the prompt repeated for each thread."""
    columns = (rows.shape[1] - prompt_length) // num_threads
    threads = rows[:, prompt_length:].unflatten(1, (num_threads, columns))
    prompt = rows[:, None, :prompt_length].expand(-1, num_threads, *[-1] * (rows.dim() - 1))
    return torch.cat([prompt, threads], dim=2)

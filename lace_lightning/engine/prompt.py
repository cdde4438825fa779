"""The prompt, computed once per group by the Hugging Face model itself."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache

from lace_lightning.backbone import decoder_of
from lace_lightning.threaded_lm import ThreadedLM


def read_prompt(model: ThreadedLM, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, DynamicCache]:
    """Hidden states (B, D) of the last prompt column, before the final norm, and the prompt's keys and values."""
    cache, seen = DynamicCache(), []
    hook = decoder_of(model.backbone).norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
    try:
        model.run(prompt_ids, prompt_mask, lattice=None, past_key_values=cache, use_cache=True)
    finally:
        hook.remove()
    return seen[0], cache

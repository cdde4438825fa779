"""Playing problems: from problems to judgeable groups, the one way that stages and evaluation take."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lace_lightning.decoding.decoder import Engine
from lace_lightning.decoding.group import Group, Rollout, join_rollouts
from lace_lightning.decoding.sampling import Sampling
from lace_lightning.decoding.text import make_decoder, to_groups
from lace_lightning.traces.schema import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.tasks import Task
    from lace_lightning.threaded_lm import ThreadedLM

T = TypeVar("T")


@dataclass(frozen=True)
class DecodingSpec:
    """How groups are sampled.

    Args:
        max_new_tokens: most columns after the prompt; ``max_length`` of data or policy limits them too.
        sampling: temperature and truncation.
        barrier: threads wait for each other once they have opened their closing assessment.
        num_threads: N; null: the model's. Another number tests how far coordination transfers.
        seed: groups are a function of it, of the problem and of the weights.
        engine: what computes the columns: ``plain`` calls the Hugging Face model, ``fast`` is written for decoding and
            knows some families of models and exchanges, ``auto`` takes it for those.
        groups_at_once: groups that are decoded together; their caches must fit in memory. Null: all of a batch.

    Raises:
        ValueError: ``groups_at_once`` is below 1.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    barrier: bool = True
    num_threads: int | None = None
    seed: int = 0
    engine: Engine = "auto"
    groups_at_once: int | None = field(default=None, metadata={"neutral": True})  # has no say in what is sampled

    def __post_init__(self) -> None:
        if self.groups_at_once is not None and self.groups_at_once < 1:
            raise ValueError(f"groups_at_once={self.groups_at_once} must be at least 1, or null for all of a batch")


@torch.no_grad()
def play_groups(
    model: ThreadedLM,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    seeds: Sequence[int],
    spec: DecodingSpec,
    max_length: int,
    texts: Sequence[str] | None = None,
) -> tuple[list[Group], Rollout]:
    """Decode one group of threads per problem; the model's mode is kept.

    A group is a function of its problem, its text, its seed, ``spec`` and the weights: what else is in the batch has
    no say, up to rounding. Under autocast a copy of the model with weights in autocast's dtype decodes: every column
    reads all weights, and would convert them each time.

    Args:
        model: the threads' model, on its device.
        task: its template spells prompts, its environment plays.
        tokenizer: the model's.
        problems: what is asked; the environment goes by it.
        seeds: one per problem.
        spec: how groups are sampled; ``num_threads`` None takes the model's.
        max_length: most columns of a group, prompt included.
        texts: what stands in the prompts instead of the problems' own texts.

    Returns:
        The groups in order, and their tensors.

    Raises:
        ValueError: a prompt leaves no room for threads within ``max_length``.
    """
    asked = [problem.text for problem in problems] if texts is None else texts
    prompts = [task.template.encode_prompt(text, tokenizer) for text in asked]
    limits = [min(spec.max_new_tokens, max_length - len(prompt)) for prompt in prompts]
    _check_room(problems, prompts, max_length)
    num_threads = spec.num_threads or model.num_threads
    rules = (max(limits), spec.sampling, spec.barrier, spec.engine)

    def decode(decoding: ThreadedLM) -> Rollout:
        decoder = make_decoder(decoding, tokenizer, task.template, *rules)
        parts = []
        for at in _slices(len(problems), spec.groups_at_once):
            environment = task.environment(problems[at], num_threads, tokenizer)
            parts.append(decoder.decode(prompts[at], num_threads, seeds[at], environment))
        return _cut(join_rollouts(parts, decoder.rules.pad_id), limits, decoder.rules.pad_id)

    was_training = model.training
    model.eval()
    try:
        rollout = in_autocasts_dtype(model, decode)
    finally:
        model.train(was_training)
    return to_groups(rollout, problems, seeds, tokenizer, task.template), rollout


def in_autocasts_dtype(model: ThreadedLM, decode: Callable[[ThreadedLM], T]) -> T:
    """Decode with the model itself or, under autocast, without it and with a copy whose weights have its dtype.

    The copy and the caches of its engine are gone afterwards.
    """
    kind = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(kind)
    if not torch.is_autocast_enabled(kind) or all(p.dtype == dtype for p in model.parameters()):
        return decode(model)
    with torch.autocast(kind, enabled=False):
        found = decode(_cast(model, dtype))
    gc.collect()  # layers and what runs them refer to each other
    return found


def _cast(model: ThreadedLM, dtype: torch.dtype) -> ThreadedLM:
    """A copy with other weights; buffers stay as they are."""
    cast = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast)  # what is in the memo counts as copied


def _slices(size: int, step: int | None) -> list[slice]:
    return [slice(start, start + (step or size)) for start in range(0, size, step or size)]


def _check_room(problems: Sequence[Problem], prompts: Sequence[Sequence[int]], max_length: int) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) >= max_length:
            raise ValueError(
                f"a prompt about problem {problem.id!r} has {len(prompt)} tokens, which leaves no room for threads in "
                f"max_length={max_length}: raise max_length, or leave out the problem or the method that asks so much"
            )


def _cut(rollout: Rollout, limits: Sequence[int], pad_id: int) -> Rollout:
    """Each group as if it had been decoded with its own limit of columns after the prompt, not with the largest."""
    times = torch.arange(rollout.input_ids.shape[-1], device=rollout.input_ids.device) - rollout.prompt_length
    beyond = (times >= torch.tensor(limits, device=times.device)[:, None])[:, None]
    return Rollout(
        input_ids=rollout.input_ids.masked_fill(beyond, pad_id),
        attention_mask=rollout.attention_mask & ~beyond,
        forced=rollout.forced & ~beyond,
        logprobs=rollout.logprobs.masked_fill(beyond, 0.0),
        prompt_length=rollout.prompt_length,
        finished=rollout.finished & ~(rollout.attention_mask & beyond).any(-1),
    )

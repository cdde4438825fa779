"""From token tensors to groups of threads as text, and from prompts to groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lace_lightning.decoding.decoder import Engine, GroupDecoder
from lace_lightning.decoding.environment import Environment
from lace_lightning.decoding.group import Group, Rollout, Thread
from lace_lightning.decoding.random import group_seed
from lace_lightning.decoding.sampling import Sampling
from lace_lightning.decoding.threads import Column
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.tags import parse_answer, parse_tag
from lace_lightning.traces.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.threaded_lm import ThreadedLM


def to_groups(
    rollout: Rollout,
    problems: Sequence[Problem],
    seeds: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> list[Group]:
    """Spell B decoded groups as text, with answers and tags parsed from their assessments."""
    opening = template.encode_opening(tokenizer)
    tensors = (rollout.input_ids, rollout.attention_mask, rollout.forced, rollout.logprobs)
    response = [tensor[..., rollout.prompt_length :].tolist() for tensor in tensors]
    finished = rollout.finished.tolist()
    groups = []
    for index, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
        rows = zip(*(part[index] for part in response), finished[index], strict=True)
        threads = tuple(_to_thread(tokenizer, opening, *row) for row in rows)
        groups.append(Group(problem, threads, seed))
    return groups


def _to_thread(
    tokenizer: PreTrainedTokenizerBase,
    opening: list[int],
    ids: list[int],
    written: list[bool],
    forced: list[bool],
    logprobs: list[float],
    finished: bool,
) -> Thread:
    columns = [column for column, real in enumerate(written) if real]
    tokens = [ids[column] for column in columns]
    by_environment = [forced[column] for column in columns]
    opens_at = _find(opening, tokens)
    thought = tokens if opens_at is None else tokens[:opens_at]
    assessment = "" if opens_at is None else _spell(tokens[opens_at + len(opening) :], tokenizer)
    runs = groupby(zip(tokens, by_environment, strict=True), key=lambda pair: pair[1])
    return Thread(
        text=_spell(tokens, tokenizer),
        thought=_spell([t for t, f in zip(thought, by_environment, strict=False) if not f], tokenizer),
        answer=parse_answer(assessment),
        tag=parse_tag(assessment),
        observations=tuple(_spell([t for t, _ in run], tokenizer) for is_forced, run in runs if is_forced),
        token_ids=tuple(tokens),
        columns=tuple(columns),
        logprobs=tuple(logprobs[column] for column in columns),
        forced=tuple(by_environment),
        finished="eos" if finished else "length",
    )


def _spell(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _find(needle: list[int], haystack: list[int]) -> int | None:
    """Index of the first occurrence of ``needle``, or None."""
    starts = range(len(haystack) - len(needle) + 1)
    return next((start for start in starts if haystack[start : start + len(needle)] == needle), None)


def make_decoder(
    model: ThreadedLM,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_new_tokens: int,
    sampling: Sampling,
    barrier: bool = True,
    engine: Engine = "auto",
) -> GroupDecoder:
    """A decoder with the rules that tokenizer and template imply."""
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    return GroupDecoder(
        model,
        sampling,
        max_new_tokens,
        eos_ids=[] if eos is None else [eos],
        pad_id=eos if pad is None else pad,
        opening_ids=template.encode_opening(tokenizer) if barrier else None,
        engine=engine,
    )


def generate_groups(
    model: ThreadedLM,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    template: Template | None = None,
    environment: Environment | None = None,
    on_column: Callable[[Column], None] | None = None,
    **sampling: Any,
) -> list[Group]:
    """See :meth:`~lace_lightning.threaded_lm.ThreadedLM.generate_groups`."""
    tokenizer, template = model.tokenizer, template or Template()
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: set model.tokenizer, or load the model by from_pretrained")
    decoder = make_decoder(model, tokenizer, template, max_new_tokens, Sampling(**sampling))
    copies: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        # Seeded by the prompt, not by its place: the same group comes out whatever else is in the batch.
        seeds.append(group_seed(seed, prompt, copies[prompt]))
        copies[prompt] += 1
    problems = [Problem(id=str(i), text=prompt, answer="") for i, prompt in enumerate(prompts)]
    ids = [template.encode_prompt(prompt, tokenizer) for prompt in prompts]
    training = model.training
    model.eval()
    try:
        rollout = decoder.decode(ids, model.num_threads, seeds, environment, on_column)
    finally:
        model.train(training)
    return to_groups(rollout, problems, seeds, tokenizer, template)

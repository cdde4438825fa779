"""Lock-step decoding of groups (LACE.md §4): every column is one forward pass over the threads of all groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lace_lightning.decoding.environment import Environment
from lace_lightning.decoding.group import Rollout
from lace_lightning.decoding.plain import PlainSteps
from lace_lightning.decoding.random import uniform
from lace_lightning.decoding.sampling import Sampling
from lace_lightning.decoding.threads import Column, Rules, Threads
from lace_lightning.threaded_lm import ThreadedLM

Engine = Literal["auto", "fast", "plain"]
"""What computes the columns: ``plain`` calls the Hugging Face model, ``fast`` is :mod:`lace_lightning.engine`."""

_COLUMNS_BETWEEN_CHECKS = 32
"""On a GPU the host must not wait for every column: it asks this rarely whether all threads have ended."""


class Decoding(Protocol):
    """One batch of groups while it is decoded; its prompts have been computed."""

    def advance(self, columns: int) -> None:
        """Decode up to that many further columns; none once all threads have ended or stand at the limit.

        On a GPU the fast engine returns before they are computed.
        """

    def is_over(self) -> bool:
        """Whether all threads have ended or stand at the limit."""

    def last_column(self) -> Column:
        """The column that was decoded last."""

    def force(self, tokens: Tensor) -> None:
        """Note what an environment wants written: (B, N) token ids or FREE."""

    def rollout(self) -> Rollout:
        """All columns so far."""


class GroupDecoder:
    """Decodes batches of groups with one model and one set of rules.

    Args:
        model: the threads' model; its mode (train/eval) is the caller's business.
        sampling: how tokens are drawn.
        max_new_tokens: most columns after the prompt.
        eos_ids: tokens that end a thread.
        pad_id: stands where nothing was written.
        opening_ids: ids that open the closing assessment; a thread that has written them waits for its group
            (the barrier). None: no thread ever waits.
        engine: ``fast``, ``plain``, or ``auto`` for the fast one where it knows the model and its exchange.

    Raises:
        ValueError: ``max_new_tokens`` is not positive, there is no end token, or the engine is unknown or ``fast`` and
            does not know the model.
    """

    def __init__(
        self,
        model: ThreadedLM,
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
        opening_ids: Sequence[int] | None = None,
        engine: Engine = "auto",
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not eos_ids:
            raise ValueError("no end-of-sequence token: the tokenizer must define eos_token")
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.rules = Rules(tuple(eos_ids), pad_id, tuple(opening_ids or ()))
        self._is_fast = _use_fast_engine(model, engine)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        num_threads: int,
        seeds: Sequence[int],
        environment: Environment | None = None,
        on_column: Callable[[Column], None] | None = None,
    ) -> Rollout:
        """Decode ``num_threads`` threads for each of B prompts.

        Args:
            prompts: B lists of token ids.
            num_threads: N.
            seeds: B seeds; see :func:`~lace_lightning.decoding.random.group_seed`.
            environment: answers the threads' actions.
            on_column: is told every column as soon as it is decoded.
        """
        decoding = self.start(prompts, num_threads, seeds)
        is_watched = environment is not None or on_column is not None
        while not decoding.is_over():
            decoding.advance(1 if is_watched else _COLUMNS_BETWEEN_CHECKS)
            if not is_watched:
                continue
            column = decoding.last_column()
            if on_column is not None:
                on_column(column)
            if environment is not None:
                decoding.force(environment.step(column.tokens, column.written))
        return decoding.rollout()

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], num_threads: int, seeds: Sequence[int]) -> Decoding:
        """Compute the prompts, once per group, and stand before the first column; see :meth:`decode`."""
        device = next(self.model.parameters()).device
        prompt_ids, prompt_mask = left_pad(prompts, self.rules.pad_id, device)
        seed_tensor = torch.tensor(list(seeds), dtype=torch.long, device=device)
        if self._is_fast and device.type == "cuda":
            from lace_lightning.engine.graphs import GraphDecoding

            return GraphDecoding(self, prompt_ids, prompt_mask, num_threads, seed_tensor)
        steps: Steps
        if self._is_fast:
            from lace_lightning.engine.steps import FastSteps

            steps = FastSteps(self.model, prompt_ids, prompt_mask, num_threads, self.max_new_tokens)
        else:
            steps = PlainSteps(self.model, prompt_ids, prompt_mask, num_threads)
        return _SteppedDecoding(self, steps, prompt_ids, prompt_mask, num_threads, seed_tensor)


class Steps(Protocol):
    """A model with its caches, its prompt computed."""

    prompt_logits: Tensor
    """(B, N, V) float32: what each thread knows before its first column."""

    def step(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Feed one column (B, N) of tokens; returns (B, N, V) float32 logits, undefined where nothing was written."""


class _SteppedDecoding:
    """Decoding with the host in charge: one call of the model per column."""

    def __init__(
        self,
        decoder: GroupDecoder,
        steps: Steps,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_threads: int,
        seeds: Tensor,
    ) -> None:
        self._steps, self._sampling, self._limit = steps, decoder.sampling, decoder.max_new_tokens
        self._prompt = prompt_ids, prompt_mask
        self._seeds, self._num_threads = seeds, num_threads
        self._threads = Threads(decoder.rules, (len(seeds), num_threads), seeds.device)
        self._logits = steps.prompt_logits
        self._columns: list[Column] = []

    @torch.no_grad()
    def advance(self, columns: int) -> None:
        for _ in range(columns):
            if self.is_over():
                return
            self._decode_column()

    def is_over(self) -> bool:
        return len(self._columns) == self._limit or self._threads.all_ended()

    def last_column(self) -> Column:
        return self._columns[-1]

    def force(self, tokens: Tensor) -> None:
        self._threads.force(tokens)

    def rollout(self) -> Rollout:
        names = ("tokens", "written", "forced", "logprobs")
        decoded = {name: torch.stack([getattr(c, name) for c in self._columns], dim=-1) for name in names}
        return join_rollout(*self._prompt, **decoded, finished=self._threads.ended)

    def _decode_column(self) -> None:
        threads, time = self._threads, len(self._columns)
        if time:
            new = self._steps.step(threads.tokens, threads.written)
            # A waiting thread goes on from what it knew when it wrote its last token.
            self._logits = torch.where(threads.written[..., None], new, self._logits)
        drawn = self._sampling.draw(self._logits, uniform(self._seeds, self._num_threads, time))
        self._columns.append(threads.write(time, drawn, self._logits))


def join_rollout(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    written: Tensor,
    forced: Tensor,
    logprobs: Tensor,
    finished: Tensor,
) -> Rollout:
    """Prompts (B, P) before decoded columns (B, N, T)."""
    num_threads, nothing = tokens.shape[1], torch.zeros_like(prompt_mask)

    def join(prompt: Tensor, decoded: Tensor) -> Tensor:
        return torch.cat([prompt[:, None].expand(-1, num_threads, -1).to(decoded.dtype), decoded], dim=-1)

    return Rollout(
        input_ids=join(prompt_ids, tokens),
        attention_mask=join(prompt_mask, written),
        forced=join(nothing, forced),
        logprobs=join(nothing, logprobs),
        prompt_length=prompt_ids.shape[1],
        finished=finished,
    )


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids and bool mask, each sequence ending in the last column.

    Raises:
        ValueError: a sequence is empty.
    """
    if not all(len(sequence) for sequence in sequences):
        raise ValueError("a prompt has no tokens: the first token of a thread needs something to be predicted from")
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = True
    return ids.to(device), mask.to(device)


def _use_fast_engine(model: ThreadedLM, engine: Engine) -> bool:
    from lace_lightning.engine import obstacle

    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r} is unknown: choose one of {', '.join(get_args(Engine))}")
    if engine == "plain":
        return False
    reason = obstacle(model)
    if reason is not None and engine == "fast":
        raise ValueError(f"engine='fast' cannot decode with this model: {reason}. Use engine: auto or plain")
    return reason is None

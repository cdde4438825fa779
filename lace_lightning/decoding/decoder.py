"""Lock-step decoding of groups (LACE.md §4): every column is one forward pass over the threads of all groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lace_lightning.decoding.environment import FREE, Environment
from lace_lightning.decoding.group import Rollout
from lace_lightning.decoding.random import uniform
from lace_lightning.decoding.sampling import Sampling
from lace_lightning.lattice import Lattice, LatticeCache
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class Column:
    """What was decoded in one lattice column; handed to ``on_column`` while decoding goes on.

    Args:
        time: lattice time t.
        tokens, written, forced: (B, N): token ids, whether the thread wrote one, whether an environment chose it.
        logprobs: (B, N) float32, 0 where the thread did not choose.
    """

    time: int
    tokens: Tensor
    written: Tensor
    forced: Tensor
    logprobs: Tensor


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

    Raises:
        ValueError: ``max_new_tokens`` is not positive, or there is no end token.
    """

    def __init__(
        self,
        model: ThreadedLM,
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
        opening_ids: Sequence[int] | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not eos_ids:
            raise ValueError("no end-of-sequence token: the tokenizer must define eos_token")
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.eos_ids, self.pad_id, self.opening_ids = list(eos_ids), pad_id, list(opening_ids or [])

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
        device = next(self.model.parameters()).device
        prompt_ids, prompt_mask = left_pad(prompts, self.pad_id, device)
        threads = _Threads(self, len(prompts), num_threads, device)
        seed_tensor = torch.tensor(list(seeds), dtype=torch.long, device=device)
        columns = []
        steps = self._forward_passes(prompt_ids, prompt_mask, num_threads, threads)
        for time, logits in enumerate(steps):
            draw = self.sampling.draw(logits, uniform(seed_tensor, num_threads, time))
            column = threads.write(time, draw, logits)
            columns.append(column)
            if on_column is not None:
                on_column(column)
            if environment is not None:
                threads.force(environment.step(column.tokens, column.written))
        return self._rollout(prompt_ids, prompt_mask, num_threads, columns, threads)

    def _forward_passes(
        self, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int, threads: _Threads
    ) -> Iterator[Tensor]:
        """Yield (B, N, V) float32 logits for each column in turn, reading from ``threads`` what was written before."""
        cached = _CachedModel(self.model, prompt_ids, prompt_mask, num_threads)
        logits = cached.prompt_logits
        yield logits
        for _ in range(self.max_new_tokens - 1):
            if threads.all_ended():
                return
            new = cached.step(threads.tokens, threads.written)
            # A waiting thread goes on from what it knew when it wrote its last token.
            logits = torch.where(threads.written[..., None], new, logits)
            yield logits

    def _rollout(
        self, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int, columns: list[Column], threads: _Threads
    ) -> Rollout:
        def join(prompt: Tensor, name: str) -> Tensor:
            decoded = torch.stack([getattr(column, name) for column in columns], dim=-1)
            return torch.cat([prompt[:, None].expand(-1, num_threads, -1).to(decoded.dtype), decoded], dim=-1)

        nothing = torch.zeros_like(prompt_mask)
        return Rollout(
            input_ids=join(prompt_ids, "tokens"),
            attention_mask=join(prompt_mask, "written"),
            forced=join(nothing, "forced"),
            logprobs=join(nothing, "logprobs"),
            prompt_length=prompt_ids.shape[1],
            finished=threads.ended,
        )


class _Threads:
    """Who writes, who waits at the barrier, who has ended, and what is forced next: all (B, N)."""

    def __init__(self, rules: GroupDecoder, batch: int, num_threads: int, device: torch.device) -> None:
        shape = (batch, num_threads)
        self._rules = rules
        self._eos = torch.tensor(rules.eos_ids, device=device)
        self._opening = torch.tensor(rules.opening_ids, dtype=torch.long, device=device)
        self._recent = torch.full((*shape, len(rules.opening_ids)), FREE, device=device)
        self._due = torch.full(shape, FREE, device=device)
        self._opened = torch.zeros(shape, dtype=torch.bool, device=device)
        self._waiting = torch.zeros(shape, dtype=torch.bool, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self.tokens = torch.full(shape, rules.pad_id, device=device)
        self.written = ~self.ended

    def all_ended(self) -> bool:
        return bool(self.ended.all())

    def write(self, time: int, drawn: Tensor, logits: Tensor) -> Column:
        """Let every thread that neither waits nor has ended write its forced or drawn token."""
        self.written = ~(self.ended | self._waiting)
        forced = self.written & (self._due != FREE)
        tokens = torch.where(forced, self._due, drawn)
        self.tokens = torch.where(self.written, tokens, self._rules.pad_id)
        self._due = self._due.masked_fill(self.written, FREE)
        chosen = self.written & ~forced
        logprobs = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
        self.ended = self.ended | (self.written & torch.isin(self.tokens, self._eos))
        self._meet_at_barrier()
        return Column(time, self.tokens, self.written, forced, torch.where(chosen, logprobs, 0.0))

    def force(self, tokens: Tensor) -> None:
        """Note what the environment wants written, until the thread next writes."""
        self._due = torch.where(tokens != FREE, tokens, self._due)

    def _meet_at_barrier(self) -> None:
        if not len(self._opening):
            return
        shifted = torch.cat([self._recent[..., 1:], self.tokens[..., None]], dim=-1)
        self._recent = torch.where(self.written[..., None], shifted, self._recent)
        self._opened = self._opened | (self._recent == self._opening).all(-1)
        everyone_arrived = (self._opened | self.ended).all(-1, keepdim=True)
        self._waiting = self._opened & ~self.ended & ~everyone_arrived


class _CachedModel:
    """The model with its caches: the prompt is computed once per group, then one column at a time."""

    def __init__(self, model: ThreadedLM, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int) -> None:
        self._model, self._num_threads = model, num_threads
        self._batch, prompt_length = prompt_ids.shape
        # Without a config every layer keeps all keys: a sliding window is then counted in real tokens, not columns.
        self._cache = DynamicCache()
        self._lattice_cache = LatticeCache()
        self._mask = prompt_mask.repeat_interleave(num_threads, 0)
        self._time = 0
        if model.exchange_config.reads_prompt and model.exchanges:
            ids = prompt_ids.repeat_interleave(num_threads, 0)
            mask = prompt_mask[:, None].expand(-1, num_threads, -1)
            out = self._forward(ids, self._mask, model.lattice(mask, prompt_length, self._lattice_cache))
            self.prompt_logits = out.view(self._batch, num_threads, -1)
        else:
            out = self._forward(prompt_ids, prompt_mask, lattice=None)
            self._cache.batch_repeat_interleave(num_threads)
            self.prompt_logits = out[:, None].expand(-1, num_threads, -1)

    def step(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Feed one column (B, N) of tokens; returns (B, N, V) float32 logits, undefined where nothing was written."""
        self._mask = torch.cat([self._mask, written.reshape(-1, 1)], dim=1)
        lattice = Lattice(self._model.exchange_at, written[..., None], first_time=self._time, cache=self._lattice_cache)
        self._time += 1
        return self._forward(tokens.reshape(-1, 1), self._mask, lattice).view(self._batch, self._num_threads, -1)

    def _forward(self, ids: Tensor, mask: Tensor, lattice: Lattice | None) -> Tensor:
        """(rows, V) float32 logits of the last of these columns."""
        hidden = self._model.run(ids, mask, lattice, past_key_values=self._cache, use_cache=True)
        return self._model.head(hidden[:, -1]).float()


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

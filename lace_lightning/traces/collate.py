"""From traces to tensors: N threads on one lattice, held at the assessment barrier as decoding holds them.

See LACE.md §4 (barrier) and §6 (thread shuffling and jitter). All randomness of an example is a pure function of the
seed and the example's serial number: neither worker, nor rank, nor the rest of the batch has a say in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lace_lightning.traces.batch import TraceBatch
from lace_lightning.traces.loader import Stream, counter_rng, served
from lace_lightning.traces.schema import Trace
from lace_lightning.traces.template import EncodedThread, Segment, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Group(NamedTuple):
    """One trace on its lattice: the shared prompt, and per thread the tokens with their columns after the prompt."""

    prompt: list[int]
    threads: list[EncodedThread]
    columns: list[np.ndarray]

    @property
    def num_columns(self) -> int:
        return 1 + max(int(columns[-1]) for columns in self.columns)


class TraceCollator:
    """Turns (trace, serial number) pairs into a :class:`TraceBatch`.

    Prompts are padded on the left to a common length; the response columns follow. A thread's tokens stand in order,
    one per column, except for waiting columns (holes), which come from

    - *jitter*: each thread draws a delay from 0 … ``jitter`` and a place in its thought, and waits that many columns
      before the token there (the first token of the assessment opening is the last place possible);
    - the *barrier*: a thread whose last opening token stands in column c waits from c + 1 on; once every thread of
      the group has written its own, all go on in the next column. So all answers start in one column. Nothing
      aligns threads after that: tags stand where the answers end, as in decoding.

    Args:
        tokenizer: must have an end-of-sequence token; pads with its padding token, else with end-of-sequence.
        template: spelling of prompts and threads.
        num_threads: N, demanded of every trace.
        max_length: most columns (prompt and response, waits included) that one group may take.
        shuffle_threads: serve the threads in a random order. Leave it off where traces depend on the order of the
            threads, as those of most puzzles do (LACE.md §8).
        jitter: longest random delay of a thread, in columns.
        barrier: threads wait for each other after the assessment opening.
        seed: of the shuffling and the jitter.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        num_threads: int,
        max_length: int,
        shuffle_threads: bool = False,
        jitter: int = 0,
        barrier: bool = True,
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.num_threads = num_threads
        self.max_length = max_length
        self.shuffle_threads = shuffle_threads
        self.jitter = jitter
        self.barrier = barrier
        self.seed = seed
        self._opening_length = len(template.encode_opening(tokenizer))
        pad = tokenizer.pad_token_id
        self._pad_id = tokenizer.eos_token_id if pad is None else pad

    def __call__(self, examples: Sequence[tuple[Trace, int]]) -> TraceBatch:
        """Collate B traces, each with its serial number (what makes its random draws its own).

        The tokens of a stand-in are nobody's targets, as if an environment had written them all.

        Raises:
            ValueError: a trace with another number of threads, or with more than ``max_length`` columns.
        """
        batch = _stack([self._lay_out(trace, served(serial)) for trace, serial in examples], self._pad_id)
        for b, (_, serial) in enumerate(examples):
            if serial < 0:
                batch.segments[b].masked_fill_(batch.attention_mask[b], int(Segment.ENVIRONMENT))
        return batch

    def check(self, trace: Trace) -> Trace:
        """The trace itself if it can be collated, whatever the random draws.

        Raises:
            ValueError: the reason why not: number of threads, length, the assessment opening inside a thought, or
                text for which the tokenizer has no tokens.
        """
        _, threads = self._encode(trace)
        opening = self.template.opening.strip()
        for n, thread in enumerate(trace.threads):
            if opening and opening in thread.text:
                raise ValueError(f"threads[{n}]: the text contains the assessment opening {opening!r}")
            if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in threads[n].ids:
                raise ValueError(f"threads[{n}]: the tokenizer has no tokens for part of the text, answer or tag")
        return trace

    def _encode(self, trace: Trace) -> tuple[list[int], list[EncodedThread]]:
        if len(trace.threads) != self.num_threads:
            raise ValueError(
                f"trace {trace.problem.id!r} has {len(trace.threads)} threads, but num_threads={self.num_threads}: "
                "change num_threads of data and model, or give other traces"
            )
        prompt = self.template.encode_prompt(trace.problem.text, self.tokenizer)
        threads = [self.template.encode_thread(thread, self.tokenizer) for thread in trace.threads]
        longest = len(prompt) + self._most_columns(threads)
        if longest > self.max_length:
            raise ValueError(
                f"trace {trace.problem.id!r} takes up to {longest} columns (prompt {len(prompt)}, jitter "
                f"{self.jitter}), but max_length={self.max_length}: raise max_length, or shorten or leave out the trace"
            )
        return prompt, threads

    def _most_columns(self, threads: list[EncodedThread]) -> int:
        """Response columns if the jitter falls as badly as it can; so whether a trace fits is no matter of chance."""
        if not self.barrier:
            return self.jitter + max(len(thread.ids) for thread in threads)
        arrivals = [self._arrival(thread) for thread in threads]
        return self.jitter + max(arrivals) + max(len(t.ids) - a for t, a in zip(threads, arrivals, strict=True))

    def _arrival(self, thread: EncodedThread) -> int:
        """Number of tokens that a thread writes before it waits at the barrier."""
        return thread.assessment_start + self._opening_length

    def _lay_out(self, trace: Trace, serial: int) -> _Group:
        prompt, threads = self._encode(trace)
        columns = [np.arange(len(thread.ids)) for thread in threads]
        if self.shuffle_threads or self.jitter:  # a generator costs as much as all the rest
            threads, columns = self._randomise(threads, columns, counter_rng(self.seed, Stream.LAYOUT, serial))
        if self.barrier:
            _hold(columns, [self._arrival(thread) for thread in threads])
        return _Group(prompt, threads, columns)

    def _randomise(
        self, threads: list[EncodedThread], columns: list[np.ndarray], rng: np.random.Generator
    ) -> tuple[list[EncodedThread], list[np.ndarray]]:
        """The threads in the order in which they are served, and their columns with the waits of the jitter."""
        if self.shuffle_threads:
            order = rng.permutation(self.num_threads)
            threads, columns = [threads[n] for n in order], [columns[n] for n in order]
        if self.jitter:
            for thread, own in zip(threads, columns, strict=True):
                own[rng.integers(thread.assessment_start + 1) :] += rng.integers(self.jitter + 1)
        return threads, columns


def _hold(columns: list[np.ndarray], arrivals: list[int]) -> None:
    """Move, in place, what each thread writes after its first ``arrivals[n]`` tokens behind the last one's arrival."""
    release = 1 + max(int(own[arrival - 1]) for own, arrival in zip(columns, arrivals, strict=True))
    for own, arrival in zip(columns, arrivals, strict=True):
        own[arrival:] += release - (own[arrival - 1] + 1)


def _stack(groups: list[_Group], pad_id: int) -> TraceBatch:
    prompt_length = max(len(group.prompt) for group in groups)
    num_columns = prompt_length + max(group.num_columns for group in groups)
    shape = (len(groups), len(groups[0].threads), num_columns)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    segments = np.full(shape, Segment.NONE, dtype=np.uint8)
    for b, group in enumerate(groups):
        start = prompt_length - len(group.prompt)
        input_ids[b, :, start:prompt_length] = group.prompt
        segments[b, :, start:prompt_length] = Segment.PROMPT
        for n, (thread, columns) in enumerate(zip(group.threads, group.columns, strict=True)):
            input_ids[b, n, prompt_length + columns] = thread.ids
            segments[b, n, prompt_length + columns] = thread.segments
    return TraceBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(segments != Segment.NONE),
        segments=torch.from_numpy(segments),
        prompt_length=prompt_length,
    )

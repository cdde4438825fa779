"""Decoding on a GPU: a column is one CUDA graph, replayed; the host only asks now and then whether all have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lace_lightning.decoding.environment import FREE
from lace_lightning.decoding.group import Rollout
from lace_lightning.decoding.threads import Column
from lace_lightning.engine.operations import Operations
from lace_lightning.engine.plan import Plan, plan
from lace_lightning.engine.prompt import read_prompt
from lace_lightning.engine.state import Capacity, GroupState
from lace_lightning.engine.weights import DecoderWeights
from lace_lightning.threaded_lm import ThreadedLM

if TYPE_CHECKING:
    from lace_lightning.decoding.decoder import GroupDecoder

_PROMPT_STEP = 64
"""Prompts are padded to multiples of this, so that graphs serve prompts of other lengths."""


class GroupEngine:
    """The state, kernels and graphs for batches of one size; kept between batches, since capturing takes time."""

    def __init__(self, decoder: GroupDecoder, capacity: Capacity) -> None:
        self.weights = DecoderWeights(decoder.model)
        self.state = GroupState(self.weights, capacity, decoder.rules.pad_id)
        self.operations = Operations(
            self.weights, self.state, decoder.rules, decoder.sampling, pdl=_has_dependent_launch()
        )
        self.num_batches = 0
        self._graphs: dict[Plan, torch.cuda.CUDAGraph] = {}
        self._num_processors = torch.cuda.get_device_properties(self.state.held.device).multi_processor_count

    def begin(self, hidden: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor, seeds: Tensor) -> None:
        """Take over computed prompts: hidden states (B, D) before the last norm, (B, HKV, P, d) caches, (B, P) mask."""
        state, threads = self.state, self.state.capacity.num_threads
        self.num_batches += 1
        self.weights.refresh()
        columns = mask.shape[1]
        for cache, layers in ((state.prompt_k, keys), (state.prompt_v, values)):
            for target, layer in zip(cache, layers, strict=True):
                target[:, :, state.capacity.prompt - columns :] = layer
        state.prompt_start.copy_(state.capacity.prompt - mask.sum(-1))
        state.seeds.copy_(seeds)
        state.reset(self.operations.pad_id)
        state.held.copy_(hidden.repeat_interleave(threads, 0))

    def first_column(self) -> None:
        """Decode the column that the prompt alone predicts."""
        self.operations.draw()
        self.operations.advance()

    def column(self, time: int) -> None:
        """Feed the last column and decode the next, which is column ``time``."""
        columns = max(256, 1 << (time - 1).bit_length())
        now = plan(self.state, self.weights, min(columns, self.state.capacity.new), self._num_processors)
        if now not in self._graphs:
            self._graphs[now] = self._capture(now)
        self._graphs[now].replay()

    def _capture(self, now: Plan) -> torch.cuda.CUDAGraph:
        self.operations.set_plan(now)
        before = [tensor.clone() for tensor in self.state.mutable]
        self._step()  # compiles the kernels, which a capture cannot
        for tensor, value in zip(self.state.mutable, before, strict=True):
            tensor.copy_(value)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        ops, layers = self.operations, self.weights.layers
        ops.embed()
        for index, layer in enumerate(layers):
            ops.qkv(layer)
            ops.attend(index, layer)
            if index in self.weights.sides:
                ops.exchange(index)
            ops.project_attended(index, layer)
            ops.mlp(layer, is_last=index == len(layers) - 1)
        ops.draw()
        ops.advance()


class GraphDecoding:
    """A batch of groups on the fast engine; see :class:`~lace_lightning.decoding.decoder.Decoding`."""

    def __init__(
        self, decoder: GroupDecoder, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int, seeds: Tensor
    ) -> None:
        self._limit, self._time = decoder.max_new_tokens, 0
        self._prompt = prompt_ids, prompt_mask
        columns = -(-prompt_ids.shape[1] // _PROMPT_STEP) * _PROMPT_STEP
        capacity = Capacity(len(prompt_ids), num_threads, columns, decoder.max_new_tokens)
        self._engine = _engine(decoder, capacity)
        hidden, cache = read_prompt(decoder.model, prompt_ids, prompt_mask)
        layers: list[Any] = cache.layers
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self._engine.begin(hidden, keys, values, prompt_mask, seeds)
        self._batch = self._engine.num_batches

    def advance(self, columns: int) -> None:
        if self._batch != self._engine.num_batches:
            raise RuntimeError("another batch of this model was started: the fast engine holds one at a time")
        for _ in range(min(columns, self._limit - self._time)):
            if self._time == 0:
                self._engine.first_column()
            else:
                self._engine.column(self._time)
            self._time += 1

    def is_over(self) -> bool:
        return self._time == self._limit or bool(self._engine.state.ended.all())

    def last_column(self) -> Column:
        at, state = self._time - 1, self._engine.state
        return Column(
            at,
            state.out_tokens[..., at].clone(),
            state.out_written[..., at].bool(),
            state.out_forced[..., at].bool(),
            state.out_logprobs[..., at].clone(),
        )

    def force(self, tokens: Tensor) -> None:
        due = self._engine.state.due
        due.copy_(torch.where(tokens != FREE, tokens, due))

    def rollout(self) -> Rollout:
        from lace_lightning.decoding.decoder import join_rollout

        state = self._engine.state
        # Columns after the last end were computed, since the host looks rarely, but nothing was written there.
        used = state.out_written[..., : self._time].flatten(0, 1).any(0).nonzero()
        columns = int(used.max()) + 1
        return join_rollout(
            *self._prompt,
            tokens=state.out_tokens[..., :columns].clone(),
            written=state.out_written[..., :columns].bool(),
            forced=state.out_forced[..., :columns].bool(),
            logprobs=state.out_logprobs[..., :columns].clone(),
            finished=state.ended.bool(),
        )


_ENGINES: WeakKeyDictionary[ThreadedLM, tuple[object, GroupEngine]] = WeakKeyDictionary()
"""The last engine of each model; one, since its caches take memory."""


def _engine(decoder: GroupDecoder, capacity: Capacity) -> GroupEngine:
    """The model's last engine, if it fits and the weights still stand where its graphs read them."""
    places = tuple(p.data_ptr() for p in decoder.model.parameters())
    key = (capacity, decoder.rules, decoder.sampling, places)
    found = _ENGINES.get(decoder.model)
    if found is None or found[0] != key:
        del found  # with it goes the old engine: two of them would double the caches
        _ENGINES.pop(decoder.model, None)
        _ENGINES[decoder.model] = (key, GroupEngine(decoder, capacity))
    return _ENGINES[decoder.model][1]


def _has_dependent_launch() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)

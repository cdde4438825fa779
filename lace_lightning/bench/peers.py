"""What others take for the same decoding step: Hugging Face's ways to generate, and our engine without tricks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lace_lightning.bench.clock import CaseFailed, Clock, free_memory, in_turn, spread
from lace_lightning.bench.decoding import Point, make_decoder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from lace_lightning.bench.bench import Bench
    from lace_lightning.threaded_lm import ThreadedLM

REPEATS = 3
"""Rounds of peers: they take up to fifty times as long as what they are compared with."""

PEERS = {
    "dynamic": "HF generate, dynamic cache",
    "static": "HF generate, static cache",
    "compiled": "HF generate, static cache, compiled",
    "continuous": "HF continuous batching",
    "graph": "HF forward and StaticCache in a CUDA graph",
    "plain": "our plain engine",
}


def label(name: str) -> str:
    """Full name of a peer; ``plain`` comes with the case it ran."""
    peer, _, case = name.partition(" ")
    return f"{PEERS[peer]}, {case}" if case else PEERS[peer]


def peers(bench: Bench, models: dict[str, ThreadedLM], point: Point, names: Sequence[str]) -> dict[str, Any]:
    """Peer -> spread of milliseconds per step, or why there is none. ``plain`` makes one entry for each case."""
    rows = torch.tensor(bench.prompts(point.groups, point.prompt), device=bench.device)
    rows = rows.repeat_interleave(point.threads, 0)  # they know no groups: (B·N, P)
    backbone = bench.backbone()  # of their own: ours routes its attention through the exchange
    known: dict[str, Callable[[], float]] = {
        "dynamic": partial(_generate, backbone, rows, point, None, False),
        "static": partial(_generate, backbone, rows, point, "static", False),
        "compiled": partial(_generate, backbone, rows, point, "static", True),
        "continuous": partial(_continuous, backbone, rows, point),
        "graph": partial(_graph, backbone, rows, point),
    }
    samplers = {name: _guarded(sample) for name, sample in known.items() if name in names}
    if "plain" in names:
        samplers |= {f"plain {case}": partial(_plain, bench, model, point) for case, model in models.items()}
    samples, errors = in_turn(samplers, 1, REPEATS, lambda text: bench.progress(f"{point}: {text}"))
    del samplers, known, backbone
    free_memory()
    return {name: {"step_ms": spread(taken)} for name, taken in samples.items()} | {
        name: {"error": error} for name, error in errors.items()
    }


def _guarded(sample: Callable[[], float]) -> Callable[[], float]:
    """A peer that does not run here is a line of the record, never the end of ours."""

    def guarded() -> float:
        try:
            return sample()
        except (torch.OutOfMemoryError, CaseFailed):
            raise
        except Exception as error:
            raise CaseFailed(f"{type(error).__name__}: {error}"[:500]) from error

    return guarded


def _plain(bench: Bench, model: ThreadedLM, point: Point) -> float:
    decoder = make_decoder(model, point.max_new_tokens, "plain")
    decoding = decoder.start(bench.prompts(point.groups, point.prompt), point.threads, list(range(point.groups)))
    decoding.advance(point.lead_in)
    return bench.clock.milliseconds(lambda: decoding.advance(point.columns)) / point.columns


# ---------------------------------------------------------------- Hugging Face generate


def _sampling(point: Point, **options: Any) -> GenerationConfig:
    """Sampling at temperature 1 from the whole vocabulary, without an end."""
    from transformers import GenerationConfig

    rules = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)
    return GenerationConfig(max_new_tokens=point.max_new_tokens, **rules, **options)


def _generate(model: PreTrainedModel, rows: Tensor, point: Point, cache: str | None, is_compiled: bool) -> float:
    options = {"cache_implementation": cache, "disable_compile": not is_compiled}
    ticks = _Ticks(rows.device)
    generate: Any = model.generate
    generate(
        rows,
        attention_mask=torch.ones_like(rows),
        generation_config=_sampling(point, **options),
        stopping_criteria=[ticks],
    )
    return ticks.step_ms(point)


class _Ticks:
    """A stopping criterion that never stops, and notes when each step was reached."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._is_cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step_ms(self, point: Point) -> float:
        """Mean milliseconds of the timed steps; the lead-in is not among them."""
        if len(self._marks) != point.max_new_tokens:
            raise CaseFailed(f"took {len(self._marks)} steps of {point.max_new_tokens}")
        first, last = self._marks[point.lead_in - 1], self._marks[-1]
        if not self._is_cuda:
            return 1e3 * (last - first) / point.columns
        last.synchronize()
        return first.elapsed_time(last) / point.columns


def _continuous(model: PreTrainedModel, rows: Tensor, point: Point) -> float:
    """By the host's time stamps of every token, which this scheduler keeps itself."""
    attention = model.config._attn_implementation
    generate_batch: Any = model.generate_batch
    try:
        outputs = generate_batch(
            inputs=rows.tolist(), generation_config=_sampling(point), record_timestamps=True, progress_bar=False
        )
    finally:
        model.set_attn_implementation(attention)  # it leaves the model on its paged attention
    stamps = [output.timestamps for output in outputs.values()]
    if len(stamps) != len(rows) or any(len(times) != point.max_new_tokens for times in stamps):
        raise CaseFailed(f"returned {[len(times) for times in stamps]} tokens of {len(rows)} × {point.max_new_tokens}")
    return statistics.median(1e3 * (times[-1] - times[point.lead_in - 1]) / point.columns for times in stamps)


# ---------------------------------------------------------------- a CUDA graph by hand


def _graph(model: PreTrainedModel, rows: Tensor, point: Point) -> float:
    """The model's own forward on a static cache and the draw, captured once; without a GPU the same step uncaptured."""
    step = _StaticStep(model, rows, point.max_new_tokens)
    replay = _capture(step) if rows.is_cuda else step
    for _ in range(point.lead_in - step.num_taken):
        replay()
    return Clock(rows.device).milliseconds(lambda: [replay() for _ in range(point.columns)]) / point.columns


class _StaticStep:
    """One decoding step whose every input is a tensor that the step itself moves on."""

    num_taken = 4
    """Columns written before the first replay: one by the prefill, three to warm up."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, rows: Tensor, max_new_tokens: int) -> None:
        from transformers import StaticCache

        self._model = model
        length = rows.shape[1] + max_new_tokens
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._position = torch.full((1, 1), rows.shape[1], device=rows.device)
        self._token = self._draw(model(rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits)
        for _ in range(self.num_taken - 1):
            self()

    @torch.no_grad()
    def __call__(self) -> None:
        out = self._model(
            self._token, position_ids=self._position, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._token.copy_(self._draw(out.logits))
        self._position.add_(1)

    @staticmethod
    def _draw(logits: Tensor) -> Tensor:
        """(rows, 1) draws: an exponential race, as torch.multinomial holds it, but without its checks on the host."""
        probs = logits[:, -1].float().softmax(-1)
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay

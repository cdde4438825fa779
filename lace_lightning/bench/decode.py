"""Milliseconds per decoding step and per prefill, exchange on and off in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lace_lightning.bench import floors
from lace_lightning.bench.bench import OFF, Bench, joined
from lace_lightning.bench.clock import free_memory, spread
from lace_lightning.bench.decoding import Point, make_decoder, timed_start
from lace_lightning.bench.peers import peers
from lace_lightning.decoding import GroupDecoder
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class Sample:
    """One decoding: its two times, and the (B, N, T) log-probabilities of what was decoded."""

    prefill_ms: float
    step_ms: float
    logprobs: Tensor


def decode(
    bench: Bench,
    threads: Sequence[int],
    groups: int,
    prompts: Sequence[int],
    lattice_times: Sequence[int],
    columns: int,
    peer_names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """One cell for each N, prompt and lattice time; the named peers follow as a cell of their own."""
    models = bench.models()
    for prompt in prompts:
        for lattice_time in lattice_times:
            for num_threads in threads:
                point = Point(num_threads, groups, prompt, lattice_time, columns)
                yield measure(bench, models, point)
                if peer_names:
                    yield asdict(point) | {"peers": peers(bench, models, point, peer_names)}


def measure(bench: Bench, models: dict[str, ThreadedLM], point: Point) -> dict[str, Any]:
    """One cell: all cases at one point."""
    decoders = {
        case: make_decoder(model, point.max_new_tokens, bench.settings.engine) for case, model in models.items()
    }
    samplers: dict[str, Callable[[], Sample]] = {
        case: partial(_sample, bench, decoder, point) for case, decoder in decoders.items()
    }
    samples, errors = bench.in_turn(point, samplers)
    cases = {case: _case_record(bench, models[case], point, taken) for case, taken in samples.items()}
    free_memory()
    effect = _exchange_effect({case: taken[-1].logprobs for case, taken in samples.items()})
    return asdict(point) | joined(cases, errors) | {"exchange_effect": effect}


def _sample(bench: Bench, decoder: GroupDecoder, point: Point) -> Sample:
    """Decode from the start: the prefill is timed, the lead-in is not, the columns behind it are."""
    prefill, decoding = timed_start(bench, decoder, point.groups, point.threads, point.prompt)
    decoding.advance(point.lead_in)
    step = bench.clock.milliseconds(lambda: decoding.advance(point.columns)) / point.columns
    logprobs = decoding.rollout().logprobs[..., point.prompt :]
    assert logprobs.shape[-1] == point.max_new_tokens, "decoding ended before its last column"
    return Sample(prefill, step, logprobs.cpu())


def _case_record(bench: Bench, model: ThreadedLM, point: Point, samples: Sequence[Sample]) -> dict[str, Any]:
    step = spread([sample.step_ms for sample in samples])
    middle = point.lead_in + point.columns / 2
    floor = floors.step_bytes(model, point.groups, point.threads, point.prompt, middle).record(bench.bytes_per_second)
    return {
        "step_ms": step,
        "prefill_ms": spread([sample.prefill_ms for sample in samples]),
        "tokens_per_second": 1e3 * point.groups * point.threads / step["median"],
        "floor": floor,
        "times_floor": step["median"] / floor["ms"],
        "kv": floors.kv_record(model, point.groups, point.threads, point.prompt, point.max_new_tokens),
    }


def _exchange_effect(logprobs: dict[str, Tensor]) -> dict[str, float]:
    """How far each exchange moved the log-probabilities of the decoded tokens from those without: above 0, it acts."""
    off = logprobs.get(OFF)
    return {case: float((on - off).abs().max()) for case, on in logprobs.items() if case != OFF and off is not None}

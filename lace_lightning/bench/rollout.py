"""Rollouts as Lattice GRPO needs them: many groups at once, and whether their log-probabilities are the trainer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lace_lightning.bench import floors
from lace_lightning.bench.bench import Bench, joined
from lace_lightning.bench.clock import free_memory, spread
from lace_lightning.bench.decoding import make_decoder, timed_start
from lace_lightning.decoding import GroupDecoder, Rollout
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class Batch:
    """B groups of N threads with T new tokens each, behind prompts of P tokens."""

    groups: int
    threads: int
    prompt: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.groups} × {self.threads} threads × {self.new_tokens} new tokens"


@dataclass(frozen=True)
class Sample:
    """One rollout and its two times."""

    prefill_ms: float
    decode_ms: float
    rollout: Rollout


def rollout(bench: Bench, batch: Batch, score_groups: int) -> Iterator[dict[str, Any]]:
    """One cell.

    Args:
        bench: settings and machine.
        batch: what is decoded.
        score_groups: groups whose log-probabilities are recomputed at once.
    """
    models = bench.models()
    samplers: dict[str, Callable[[], Sample]] = {
        case: partial(_sample, bench, make_decoder(model, batch.new_tokens, bench.settings.engine), batch)
        for case, model in models.items()
    }
    samples, errors = bench.in_turn(batch, samplers)
    del samplers
    cases = {}
    for case, taken in samples.items():
        bench.progress(f"{batch}: {case}, log-probabilities recomputed")
        free_memory()
        cases[case] = _timing(bench, models[case], batch, taken) | {
            "logprobs": compare_logprobs(models[case], taken[-1].rollout, score_groups)
        }
    yield asdict(batch) | joined(cases, errors)


def _sample(bench: Bench, decoder: GroupDecoder, batch: Batch) -> Sample:
    prefill, decoding = timed_start(bench, decoder, batch.groups, batch.threads, batch.prompt)
    decode = bench.clock.milliseconds(lambda: decoding.advance(batch.new_tokens))
    return Sample(prefill, decode, decoding.rollout())


def _timing(bench: Bench, model: ThreadedLM, batch: Batch, samples: Sequence[Sample]) -> dict[str, Any]:
    step = spread([sample.decode_ms / batch.new_tokens for sample in samples])
    total = spread([sample.prefill_ms + sample.decode_ms for sample in samples])
    limit = floors.step_bytes(model, batch.groups, batch.threads, batch.prompt, (batch.new_tokens - 1) / 2)
    floor = limit.record(bench.bytes_per_second)
    return {
        "step_ms": step,
        "prefill_ms": spread([sample.prefill_ms for sample in samples]),
        "total_ms": total,
        "tokens_per_second": 1e3 * batch.groups * batch.threads * batch.new_tokens / total["median"],
        "floor": floor,
        "share_of_limit": floor["ms"] / step["median"],
    }


@torch.no_grad()
def compare_logprobs(model: ThreadedLM, rollout: Rollout, score_groups: int) -> dict[str, float]:
    """Mean and largest |log-probability of the rollout - recomputed by one forward pass| over the chosen tokens.

    An out-of-memory error is part of the answer: ``{"error": "OOM"}``.
    """
    total = largest = 0.0
    try:
        for groups in torch.arange(len(rollout.input_ids), device=rollout.input_ids.device).split(score_groups):
            chosen = rollout.chosen[groups]
            recomputed = model.token_logprobs(
                rollout.input_ids[groups], rollout.attention_mask[groups], chosen, rollout.prompt_length
            )
            gap = (recomputed - rollout.logprobs[groups])[chosen].abs()
            total, largest = total + float(gap.sum()), max(largest, float(gap.max()))
    except torch.OutOfMemoryError:
        return {"error": "OOM"}  # type: ignore[dict-item]
    return {"mean": total / int(rollout.chosen.sum()), "max": largest}

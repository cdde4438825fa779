"""The tables of docs/scaling.md: what several GPUs must move per step, and what of it stays in sight. Nothing is run.

    python3 benchmarks/scaling.py

Sizes come from the benchmark's shapes, rates from docs/performance.md (one H200); links are data sheets', of which
programs get a share. Formulas stand in docs/scaling.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHARE = 0.8
"""Of a link's rate that large transfers get."""
NVLINK = 450e9 * SHARE
"""Bytes per second and direction of one GPU to the others of its host."""
NIC = 50e9 * SHARE
"""Of 400 Gb/s InfiniBand."""
GPUS = 8
"""Per host."""
HOP = 7e-6
"""Seconds that a message takes from one GPU of a ring to the next; assumed."""
SIZES = (2, 8, 16, 64, 256, 1024)
MEASURED_TOKENS = 36_872
"""Training tokens per second of 1.7B with recomputed activations, causal: docs/performance.md, Training."""
COLUMN = {"qwen3-1.7b": 3.447e-3, "qwen3-4b": 4.824e-3}
"""Seconds per decoded column of 128 threads, causal: docs/performance.md, Rollouts and Decoding."""
COLUMN_ALONE = {"qwen3-1.7b": 1.342e-3, "qwen3-4b": 2.823e-3}
"""The same of a single group of four threads."""
SFT_TOKENS = 2 * 4 * 2048
GROUPS, THREADS, PROMPT, NEW, MICROBATCHES = 32, 4, 128, 512, 4
"""Of a GRPO step of one GPU; the groups of a microbatch pass together."""


@dataclass(frozen=True)
class Model:
    """Parameters in all and of the root (embedding, which is also the head), layers, training tokens per second."""

    name: str
    parameters: float
    root: float
    layers: int
    tokens_per_second: float


def models() -> list[Model]:
    from lace_lightning.bench.shapes import SHAPES

    found = [Model(name, *_parameters(SHAPES[name]), 0.0) for name in COLUMN]
    # Work per token grows with the parameters.
    return [replace(m, tokens_per_second=MEASURED_TOKENS * found[0].parameters / m.parameters) for m in found]


def _parameters(shape: dict[str, Any]) -> tuple[float, float, int]:
    width, heads = shape["hidden_size"], shape["head_dim"]
    attention = width * heads * 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = attention + 3 * width * shape["intermediate_size"]
    root = shape["vocab_size"] * width
    return root + shape["num_hidden_layers"] * layer, root, shape["num_hidden_layers"]


def link(num_gpus: int, nics: int = GPUS) -> float:
    """Bytes per second that a ring over all GPUs gets: its slowest hop, between hosts all of a host's NICs together."""
    return NVLINK if num_gpus <= GPUS else min(NVLINK, nics * NIC)


def ddp_bytes(model: Model, num_gpus: int) -> float:
    """Sent by each GPU per optimizer step: an all-reduce of float32 gradients."""
    return 2 * (num_gpus - 1) / num_gpus * 4 * model.parameters


def fsdp_bytes(model: Model, num_gpus: int) -> tuple[float, float]:
    """Sent per pass in forward (gather bfloat16), and in backward (gather again, scatter float32 gradients)."""
    others = (num_gpus - 1) / num_gpus
    return others * 2 * model.parameters, others * (2 * (model.parameters - model.root) + 4 * model.parameters)


def hidden(moved: float, rate: float, seconds: float) -> float:
    """Seconds that a transfer adds to the work that it runs beside."""
    return max(0.0, moved / rate - seconds)


def sft_efficiency(model: Model, num_gpus: int, strategy: str, nics: int = GPUS, tokens: int = SFT_TOKENS) -> float:
    """Share of the throughput of as many GPUs that need not talk."""
    step, rate = tokens / model.tokens_per_second, link(num_gpus, nics)
    forward, backward = step / 4, 3 * step / 4  # forward : recomputing : backward is 1 : 1 : 2
    if strategy == "ddp":
        return step / (step + hidden(ddp_bytes(model, num_gpus), rate, backward))
    gathered, scattered = fsdp_bytes(model, num_gpus)
    latency = model.layers * (num_gpus - 1) * HOP  # of a ring's collective per layer; all-reduces go by trees
    return step / (step + hidden(gathered, rate, forward - latency) + hidden(scattered, rate, backward - 2 * latency))


def grpo_efficiency(model: Model, num_gpus: int, strategy: str, nics: int = GPUS) -> float:
    """As :func:`sft_efficiency`; rollouts move nothing, but FSDP2's weights are made whole for them, in full sight."""
    tokens, rate = GROUPS * THREADS * (PROMPT + NEW), link(num_gpus, nics)
    update, rollout = tokens / model.tokens_per_second, NEW * COLUMN[model.name]
    if strategy == "ddp":  # gradients are exchanged in the last microbatch alone
        extra = hidden(ddp_bytes(model, num_gpus), rate, 3 * update / 4 / MICROBATCHES)
    else:
        share = sft_efficiency(model, num_gpus, "fsdp", nics, tokens // MICROBATCHES)
        extra = update * (1 / share - 1) + fsdp_bytes(model, num_gpus)[0] / rate
    return (update + rollout) / (update + rollout + extra)


def tokens_to_hide(num_gpus: int, nics: int = GPUS) -> float:
    """Tokens per GPU and step from which DDP's all-reduce hides behind the backward pass; the model cancels out."""
    model = models()[0]
    return ddp_bytes(model, num_gpus) / link(num_gpus, nics) * model.tokens_per_second / (3 / 4)


def memory(model: Model, num_gpus: int, strategy: str) -> float:
    """Bytes of weights, gradients and AdamW's moments in float32, and of what FSDP2 gathers; without activations."""
    everything = 16 * model.parameters
    if strategy == "ddp":
        return everything
    layer = (model.parameters - model.root) / model.layers
    training = 2 * (model.root + 2 * layer) + 2 * (model.root + layer)  # gathered, and their gradients
    return everything / num_gpus + max(training, 2 * model.parameters)  # whole for rollouts


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    head = list(head)
    print(f"\n{title}\n\n| {' | '.join(head)} |\n| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    all_models, cases = models(), [(m, s) for m in models() for s in ("ddp", "fsdp")]
    gpus = [f"{size} GPUs" for size in SIZES]
    for model in all_models:
        print(f"{model.name}: {model.parameters / 1e9:.3f}e9 parameters, {model.root / 1e9:.3f}e9 of them in the root")
    table("Gigabytes sent per GPU", ["", *gpus], (
        [f"{m.name}, {s}", *(f"{(ddp_bytes(m, w) if s == 'ddp' else sum(fsdp_bytes(m, w))) / 1e9:.1f}" for w in SIZES)]
        for m, s in cases
    ))  # fmt: skip
    table("Milliseconds that takes", ["", *gpus], (
        [f"{m.name}, {s}, {nics} per host",
         *(f"{1e3 * (ddp_bytes(m, w) if s == 'ddp' else sum(fsdp_bytes(m, w))) / link(w, nics):.0f}" for w in SIZES)]
        for m, s in cases for nics in (8, 1)
    ))  # fmt: skip
    for name, efficiency in (("SFT", sft_efficiency), ("GRPO", grpo_efficiency)):
        table(f"{name}: share of perfect scaling", ["", *gpus], (
            [f"{m.name}, {s}, {nics} per host", *(f"{efficiency(m, w, s, nics):.3f}" for w in SIZES)]
            for m, s in cases for nics in (8, 1)
        ))  # fmt: skip
    table("Tokens per GPU and step that hide DDP", ["", *gpus], (
        [f"{nics} per host", *(f"{tokens_to_hide(w, nics):,.0f}" for w in SIZES)] for nics in (8, 1)
    ))  # fmt: skip
    table("Gigabytes per GPU before activations", ["", *gpus], (
        [f"{m.name}, {s}", *(f"{memory(m, w, s) / 1e9:.1f}" for w in SIZES)] for m, s in cases
    ))  # fmt: skip
    table("A GRPO step of 128 groups: seconds", ["", "groups per GPU", "rollout", "update", "speed-up"], strong())


def strong() -> Iterable[list[str]]:
    """One batch on ever more GPUs: from 32 groups per GPU, the largest measured rollout, to one."""
    for model in models():
        whole = GROUPS * THREADS * (PROMPT + NEW) / model.tokens_per_second
        seconds = {4: (NEW * COLUMN[model.name], whole), 128: (NEW * COLUMN_ALONE[model.name], whole / GROUPS)}
        for num_gpus, (rollout, update) in seconds.items():
            ratio = sum(seconds[4]) / (rollout + update)
            yield [
                f"{model.name}, {num_gpus} GPUs",
                str(128 // num_gpus),
                f"{rollout:.2f}",
                f"{update:.2f}",
                f"{ratio:.2f}",
            ]


if __name__ == "__main__":
    main()

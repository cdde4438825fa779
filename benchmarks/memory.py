"""Measured peaks of CUDA memory beside what ``lace_lightning.memory`` predicts from shapes alone.

    python benchmarks/memory.py [results.json [stage …]]

Qwen3-1.7B's shape with random weights, a model at a time; exit code 1 if a prediction is off by more than 15 %.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lace_lightning.backbone import checkpoint_layers
from lace_lightning.bench import shapes
from lace_lightning.bench.clock import free_memory
from lace_lightning.bench.decoding import make_decoder
from lace_lightning.bench.machine import describe
from lace_lightning.compiled_layers import compile_layers
from lace_lightning.decoding.playing import in_autocasts_dtype
from lace_lightning.exchange import LatticeAttentionConfig
from lace_lightning.memory import Decoding, Pass, Precision, Run, Shape, estimate
from lace_lightning.threaded_lm import ThreadedLM

ALLOWED = 0.15
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """A stage on one GPU: ``sft``, ``cpt`` (frozen backbone), ``grpo`` (rollout, then microbatches) or ``decode``."""

    stage: str
    precision: str
    groups: int
    threads: int
    prompt: int
    columns: int
    has_holes: bool = True
    checkpointing: bool = False
    compile: bool = False
    microbatch: int | None = None

    @property
    def new(self) -> int:
        return self.columns - self.prompt

    def __str__(self) -> str:
        flags = ("has_holes", "checkpointing", "compile")
        set_ones = "".join(f", {name}" for name in flags if getattr(self, name) and self.stage != "decode")
        micro = f", microbatch {self.microbatch}" if self.microbatch else ""
        size = f"{self.groups} x {self.threads} x ({self.prompt} + {self.new})"
        return f"{self.stage} {self.precision} {size}{micro}{set_ones}"


MIXED, TRUE = "bf16-mixed", "bf16-true"
CASES = (
    Case("sft", TRUE, 2, 4, 0, 2048, has_holes=False),
    Case("sft", TRUE, 2, 4, 256, 2048),
    Case("sft", MIXED, 2, 4, 256, 2048),
    Case("sft", MIXED, 4, 4, 256, 2048, checkpointing=True),
    Case("cpt", MIXED, 2, 4, 256, 2048),
    Case("cpt", MIXED, 4, 4, 256, 2048, checkpointing=True),
    Case("sft", "32-true", 1, 4, 256, 1024, checkpointing=True),
    Case("decode", TRUE, 1, 128, 2048, 2560),
    Case("decode", MIXED, 32, 4, 512, 1024),
    Case("grpo", TRUE, 16, 4, 256, 768, microbatch=4),
    Case("grpo", MIXED, 16, 4, 256, 768, checkpointing=True, microbatch=4),
    Case("sft", MIXED, 2, 4, 256, 2048, compile=True),
    Case("sft", MIXED, 4, 4, 256, 2048, checkpointing=True, compile=True),
)


def main(out: Path | None, stages: Sequence[str]) -> int:
    machine = describe(DEVICE) if out else {}
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if stages and case.stage not in stages:
            continue
        rows.append(measured(case))
        if out:
            out.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1))
    return int(any("failed" in row or abs(row["error"]) > ALLOWED for row in rows))


def measured(case: Case) -> dict[str, Any]:
    """One case: prediction, measurement and what the prediction is made of."""
    free_memory()
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    model = build(case, DEVICE)
    phase = estimate(run_of(case, model)).peak
    try:
        WORK[case.stage](case, model)
    except RuntimeError as error:  # out of memory among them; the other cases go on
        print(f"{case}: {error}", flush=True)
        return {"case": asdict(case), "failed": str(error)}
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    off = phase.total / peak - 1
    print(
        f"{str(case):<75} measured {peak / 1e9:7.2f} GB  predicted {phase.total / 1e9:7.2f} GB  {off:+6.1%}"
        f"  ({phase.name}, {time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    return {
        "case": asdict(case),
        "peak_bytes": peak,
        "predicted_bytes": phase.total,
        "error": off,
        "phase": phase.name,
        "parts": dict(phase.parts),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "beside_torch_bytes": total - free - reserved,
    }


def run_of(case: Case, model: ThreadedLM) -> Run:
    """What the memory model is told."""
    trained = list(model.exchanges.parameters() if case.stage == "cpt" else model.parameters())
    dtype = "bfloat16" if case.precision == TRUE else "float32"
    run = Run(Shape.of(model, trained), Precision.of(case.precision, dtype), head="fused")
    decoding = Decoding(case.groups, case.threads, case.prompt, case.new)
    if case.stage == "decode":
        return replace(run, rollout=decoding)
    batch = Pass(case.microbatch or case.groups, case.threads, case.prompt, case.columns, case.has_holes)
    run = replace(run, training=batch, checkpointing=case.checkpointing, compile=case.compile)
    return replace(run, head="scored", rollout=decoding) if case.stage == "grpo" else run


def build(case: Case, device: torch.device) -> ThreadedLM:
    dtype = torch.bfloat16 if case.precision == TRUE else torch.float32
    backbone = shapes.build_backbone(shapes.load_config("qwen3-1.7b"), device, dtype, seed=0)
    model = shapes.add_exchange(backbone, LatticeAttentionConfig(scope="causal"), case.threads, None, seed=0)
    if case.checkpointing:
        checkpoint_layers(backbone)
    if case.compile:
        compile_layers(backbone)
    if case.stage == "cpt":
        backbone.requires_grad_(False)
    return model


# ---------------------------------------------------------------- stages, in Lightning's order of things


def learn_from_traces(case: Case, model: ThreadedLM) -> None:
    """Two steps as Lightning takes them: gradients are dropped after the forward pass that follows them."""
    optimizer, (ids, mask, targets) = adamw(model.train()), batch_of(case)
    for _ in range(2):
        with autocast(case):
            loss = model.mean_nll(ids, mask, targets, case.prompt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn_from_rollouts(case: Case, model: ThreadedLM) -> None:
    """Two steps of LatticeGRPO without its rewards."""
    optimizer, (ids, mask, targets) = adamw(model.train()), batch_of(case)
    for _ in range(2):
        with autocast(case):
            decode_groups(case, model)
            for micro in torch.arange(case.groups, device=DEVICE).split(case.microbatch or case.groups):
                logprobs = model.token_logprobs(ids[micro], mask[micro], targets[micro], case.prompt)
                (-logprobs.sum() / targets.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def decode_groups(case: Case, model: ThreadedLM) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, (case.groups, case.prompt), generator=generator).tolist()
    model.eval()

    def play(decoded: ThreadedLM) -> None:
        decoding = make_decoder(decoded, case.new, "auto").start(prompts, case.threads, list(range(case.groups)))
        decoding.advance(case.new)
        decoding.rollout()

    with torch.no_grad():
        in_autocasts_dtype(model, play)
    model.train()


def decode(case: Case, model: ThreadedLM) -> None:
    with autocast(case):
        decode_groups(case, model)


def adamw(model: ThreadedLM) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def autocast(case: Case) -> AbstractContextManager[None]:
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=case.precision == MIXED)


def batch_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and targets; with holes every thread has one waiting column."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (case.groups, case.threads, case.columns), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if case.has_holes:
        mask[..., case.columns - 8] = False
    targets = mask.clone()
    targets[..., : case.prompt] = False
    return ids, mask, targets


WORK = {"sft": learn_from_traces, "cpt": learn_from_traces, "grpo": learn_from_rollouts, "decode": decode}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, sys.argv[2:]))

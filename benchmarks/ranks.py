"""Throughput and memory of SFT and Lattice GRPO on one GPU and on several of one host, at the same batch per GPU.

    python3 benchmarks/ranks.py [--gpus 2] [--cases one ddp fsdp] [--out benchmarks/results] [--commit HASH]

Runs the real stages in Lightning's Trainer, on random weights and made-up words: ``one`` on one GPU, ``ddp`` and
``fsdp`` on ``--gpus``, a case after the other, each in fresh processes (torchrun). A step's time is the wall clock of
rank zero from batch to batch, so it holds all that ranks wait for each other. Writes a JSON file into ``--out`` and
prints a table with the ratio to ``one``; exit code 1 if a case failed. Threads never end early: nothing of their
weights is a language.

Needs torch, Lightning and transformers, and no other package of the project. About three minutes on two H200s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

CASES = ("one", "ddp", "fsdp")
STAGES = ("sft", "grpo")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="of %(choices)s (default: all)")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="of %(choices)s (default: both)")
    add("--gpus", type=int, default=2, help="processes of ddp and fsdp (default: %(default)s)")
    add("--shape", default="qwen3-1.7b", help="of lace bench (default: %(default)s)")
    add("--precision", default="bf16-mixed", help="of the Trainer; weights are float32 (default: %(default)s)")
    add("--threads", type=int, default=4, help="N (default: %(default)s)")
    add("--groups", type=int, default=2, help="SFT: groups per GPU and step (default: %(default)s)")
    add("--length", type=int, default=2048, help="SFT: tokens per thread (default: %(default)s)")
    add("--problems", type=int, default=4, help="GRPO: problems per GPU and step (default: %(default)s)")
    add("--group-count", type=int, default=8, help="GRPO: groups per problem, G (default: %(default)s)")
    add("--new-tokens", type=int, default=256, help="GRPO: columns after the prompt (default: %(default)s)")
    add("--prompt", type=int, default=128, help="GRPO: tokens of a prompt (default: %(default)s)")
    add("--microbatch", type=int, default=8, help="GRPO: groups per backward pass (default: %(default)s)")
    add("--warmup", type=int, default=3, help="SFT: steps that do not count; GRPO takes one (default: %(default)s)")
    add("--steps", type=int, default=8, help="SFT: steps that count; GRPO takes a quarter (default: %(default)s)")
    add("--compile", action="store_true", help="compile decoder layers: faster, and a minute later per case")
    add("--no-checkpointing", action="store_true", help="keep activations")
    add("--out", default="benchmarks/results", help="folder of the JSON file (default: %(default)s)")
    add("--commit", help="names the commit where there is no git checkout")
    add("--worker", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parsed()
    if options.worker:
        work(*options.worker, options)
        return 0
    record = new_record(options)
    found = {}
    for case in options.cases:
        started = time.perf_counter()
        print(f"{case} …", flush=True)
        cells = launch(case, options)
        for cell in cells:
            record.add(cell | {"case": case, "seconds": time.perf_counter() - started})
            found[case, cell["stage"]] = cell
    report(found)
    print(record.path)
    return int(len(found) < len(options.cases) * len(options.stages))


def new_record(options: argparse.Namespace) -> Any:
    import torch

    from lace_lightning.bench.machine import describe
    from lace_lightning.bench.record import Record

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = {name: value for name, value in vars(options).items() if name != "worker"}
    machine = describe(device, options.commit)
    return Record(Path(options.out), "ranks", sys.argv, plain, machine, options.shape)


def launch(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one case in its own processes; no results if it failed, with its output shown."""
    processes = 1 if case == "one" else options.gpus
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cells.json")
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(run if processes > 1 else []), __file__, *sys.argv[1:]]
        threads = str(max(1, min(8, (os.cpu_count() or 1) // processes)))
        environment = os.environ | {
            "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": threads,
        }
        process = subprocess.run([*command, "--worker", case, str(file)], env=environment)
        if process.returncode:
            print(f"{case} failed with exit code {process.returncode}", file=sys.stderr)
        return json.loads(file.read_text()) if file.exists() else []


def report(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    print(f"{'stage':<6}{'case':<6}{'GPUs':>5}{'s/step':>9}{'tokens/s':>12}{'ratio':>7}{'peak GB/GPU':>13}")
    for (case, stage), cell in sorted(found.items(), key=lambda item: STAGES.index(item[0][1])):
        one = found.get(("one", stage))
        ratio = f"{cell['tokens_per_second'] / one['tokens_per_second']:.2f}" if one else "–"
        peaks = "–" if cell["peak_bytes"][0] is None else f"{max(cell['peak_bytes']) / 1e9:.1f}"
        line = f"{stage:<6}{case:<6}{cell['processes']:>5}{cell['step_seconds']['median']:>9.3f}"
        print(f"{line}{cell['tokens_per_second']:>12,.0f}{ratio:>7}{peaks:>13}")


# -------------------------------------------------------------------- one process of a case


def work(case: str, file: str, options: argparse.Namespace) -> None:
    """Train each stage for a few steps; rank zero writes what it measured."""
    import torch

    cells: list[dict[str, Any]] = []
    for stage in options.stages:
        cells.append(measure(case, stage, options))
        if int(os.environ.get("RANK", 0)) == 0:
            Path(file).write_text(json.dumps(cells))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure(case: str, stage: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from lace_lightning.bench.clock import free_memory, spread
    from lace_lightning.modules import FullySharded

    processes = 1 if case == "one" else options.gpus
    warmup, steps = (options.warmup, options.steps) if stage == "sft" else (1, max(2, options.steps // 4))
    on_cuda = torch.cuda.is_available()

    class Stopwatch(Callback):
        """Seconds from batch to batch, and what the stage logged."""

        def __init__(self) -> None:
            self.marks: list[float] = []
            self.logged: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if on_cuda:
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
            self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
            if len(self.marks) == warmup and on_cuda:
                torch.cuda.reset_peak_memory_stats()

    free_memory()
    watch = Stopwatch()
    ddp = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True)
    trainer = Trainer(
        accelerator="gpu" if on_cuda else "cpu",
        devices=processes,
        strategy={"one": "auto", "ddp": ddp, "fsdp": FullySharded()}[case],
        precision=options.precision,
        max_steps=warmup + steps,
        callbacks=[watch],
        logger=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0 if stage == "sft" else None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    torch.manual_seed(0)
    module, data, tokens = sft(options) if stage == "sft" else grpo(options)
    trainer.fit(module, data)
    # Not the module's device: after the fit it stands on the CPU again, where NCCL gathers nothing.
    peak = torch.tensor(torch.cuda.max_memory_allocated() if on_cuda else 0, device=trainer.strategy.root_device)
    peaks = trainer.strategy.all_gather(peak).reshape(-1).tolist()
    seconds = [after - before for before, after in zip(watch.marks[warmup - 1 :], watch.marks[warmup:], strict=False)]
    return {
        "stage": stage,
        "processes": processes,
        "tokens_per_step": tokens * processes,
        "step_seconds": spread(seconds),
        "tokens_per_second": tokens * processes / statistics.median(seconds),
        "peak_bytes": peaks if on_cuda else [None] * processes,
        "logged": watch.logged,
    }


def model_spec(options: argparse.Namespace) -> Any:
    from lace_lightning.bench.shapes import SHAPES
    from lace_lightning.exchange import LatticeAttentionConfig
    from lace_lightning.model_spec import ModelSpec

    width, heads = (16, 1) if options.shape == "tiny" else (128, 4)
    return ModelSpec(
        architecture=SHAPES[options.shape],
        exchange=LatticeAttentionConfig(width=width, heads=heads, scope="causal"),
        num_threads=options.threads,
        gradient_checkpointing=not options.no_checkpointing,
        compile=options.compile,
    )


def sft(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """The stage, its data, and the tokens of a step of one process."""
    from lace_lightning.datamodules import TraceData
    from lace_lightning.modules import OptimizerSpec, SupervisedFinetuning

    task = babble(8, options.length - 16)
    data = TraceData(
        task, num_threads=options.threads, batch_size=options.groups, max_length=options.length, num_workers=0,
        num_traces=10_000,
    )  # fmt: skip
    module = SupervisedFinetuning(model_spec(options), OptimizerSpec(lr=1e-6))
    return module, data, options.groups * options.threads * options.length


def grpo(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """The stage, its data, and the sampled tokens of a step of one process."""
    from lace_lightning.datamodules import ProblemData
    from lace_lightning.modules import DecodingSpec, LatticeGRPO, OptimizerSpec

    task = babble(options.prompt, 8)
    length = options.prompt + options.new_tokens + 8
    data = ProblemData(
        task, num_threads=options.threads, batch_size=options.problems, max_length=length, num_train_problems=10_000
    )
    decoding = DecodingSpec(max_new_tokens=options.new_tokens, barrier=False)
    module = LatticeGRPO(
        model_spec(options), OptimizerSpec(lr=1e-6), rollout=decoding, rewards=[coin()],
        groups_per_problem=options.group_count, microbatch_size=options.microbatch,
    )  # fmt: skip
    return module, data, options.problems * options.group_count * options.threads * options.new_tokens


def babble(prompt_words: int, thread_words: int) -> Any:
    """A puzzle of random words."""
    from lace_lightning.puzzles.word_puzzle import WordPuzzle
    from lace_lightning.tasks import Verdict
    from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread

    words = [f"w{i}" for i in range(200)]

    class Babble(WordPuzzle):
        def problem(self, index: int, split: str = "train") -> Problem:
            rng = random.Random(f"{split} {index}")
            return Problem(f"{split}-{index}", " ".join(rng.choices(words, k=prompt_words)), "")

        def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
            rng = random.Random(f"trace {split} {index}")
            texts = [" ".join(rng.choices(words, k=thread_words)) for _ in range(num_threads)]
            threads = tuple(TraceThread(t, "w0", Tag.FAIL if n else Tag.BEST) for n, t in enumerate(texts))
            return Trace(self.problem(index, split), threads)

        def judge(self, items: Sequence[Any]) -> list[Verdict]:
            return [Verdict.WRONG] * len(items)

    return Babble(words, seed=0)


def coin() -> Any:
    """A reward that tells groups apart, so that every one of them is trained on."""
    import torch

    from lace_lightning.rewards import Reward

    class Coin(Reward):
        def __call__(self, groups: Sequence[Any], verdicts: Sequence[Any]) -> torch.Tensor:
            return torch.tensor([random.Random(group.seed).random() for group in groups])

    return Coin(1.0, "coin")


if __name__ == "__main__":
    sys.exit(main())

"""Do the recipes of configs/paper fit their GPU? Optimisation steps of every stage at full size, with random weights.

    python3 benchmarks/paper_recipes.py --size 1.7b --tokenizer FOLDER --problems dapo_math_17k.jsonl.gz

Runs ``lace fit`` with the recipe's own files. Replaced is only what cannot be had without a network: the backbone's
weights (random ones of its architecture), its tokenizer (a folder) and the traces (made-up threads, some 2,900 tokens).
Threads of random weights do not end, so rollouts are as long as the recipe allows. Writes after every stage
``recipes_<size>_<date>.json``: seconds, tokens, peak memory, loss of each step. CPT and SFT take three steps, the first
of which compiles; Lattice GRPO takes one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"1.7b": "qwen3-1.7b", "4b": "qwen3-4b", "tiny": "tiny"}  # tiny only tries this script on a CPU
STEPS = {"cpt": 3, "sft": 3, "grpo": 1}
TOKENS_PER_THREAD = 2900


class StepMeter(Callback):
    """Writes what each training batch took to a file of JSON lines."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        tokens = outputs["sampled"].rollout.attention_mask if "sampled" in outputs else batch.attention_mask
        row = {
            "seconds": seconds,
            "tokens": int(tokens.sum()),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "loss": float(outputs["loss"]),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> int:
    options = parsed()
    from lace_lightning.bench.machine import git
    from lace_lightning.tracking.run_info import environment, hardware

    record: dict[str, Any] = {"size": options.size, "git": git(options.commit)}
    record |= {"environment": environment(), "hardware": hardware(), "stages": {}}
    out = Path(options.out) / f"recipes_{options.size}_{time.strftime('%Y-%m-%d_%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        traces = make_traces(options, Path(folder) / "traces.jsonl")
        for stage in options.stages:
            record["stages"][stage] = run(stage, options, traces, Path(folder))
            out.write_text(json.dumps(record, indent=1))
            print(summary(stage, record["stages"][stage]), flush=True)
    print(f"wrote {out}")
    return int(any(not found["steps"] for found in record["stages"].values()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="1.7b", help="of the recipe (default: %(default)s)")
    add("--tokenizer", required=True, metavar="FOLDER", help="the backbone's tokenizer")
    add("--problems", required=True, metavar="FILE", help="problems of Lattice GRPO, and texts for made-up threads")
    add("--stages", nargs="+", choices=STEPS, default=list(STEPS), help="of %(choices)s (default: all)")
    add("--steps", type=int, help="optimisation steps of each stage")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of lace fit")
    add("--out", default="benchmarks/results", help="folder of the JSON file (default: %(default)s)")
    add("--commit", help="names the commit where there is no git checkout")
    return parser.parse_args()


def make_traces(options: argparse.Namespace, path: Path) -> Path:
    """Twelve groups of four threads: words of the problems in random order, as long as compressed traces may be."""
    from lace_lightning.traces.reading import read_problems
    from lace_lightning.traces.schema import Tag, Trace, TraceThread
    from lace_lightning.traces.writing import write_traces

    problems = read_problems(options.problems)[:200]
    words = [word for problem in problems for word in problem.text.split()]
    draw = random.Random(0)

    def thread(tag: Tag, answer: str) -> TraceThread:
        # Words of these problems have 1.6 tokens on average with the tokenizer of Qwen3.
        return TraceThread(" ".join(draw.choices(words, k=int(TOKENS_PER_THREAD / 1.6))), answer, tag)

    tags = (Tag.BEST, Tag.SUCCESS, Tag.FAIL, Tag.FAIL)
    write_traces([Trace(p, tuple(thread(tag, p.answer) for tag in tags)) for p in problems[:12]], path)
    return path


def run(stage: str, options: argparse.Namespace, traces: Path, folder: Path) -> dict[str, Any]:
    """``lace fit`` of one stage; its steps, how long all of it took, and how it ended."""
    from lace_lightning.bench.shapes import SHAPES

    steps, overlay = folder / f"{stage}.jsonl", folder / f"{stage}.yaml"
    data: dict[str, Any] = {"tokenizer": options.tokenizer}
    data |= {"train_problems": options.problems} if stage == "grpo" else {"traces": str(traces)}
    meter = {"class_path": "benchmarks.paper_recipes.StepMeter", "init_args": {"path": str(steps)}}
    architecture = SHAPES[SIZES[options.size]] | {"vocab_size": 151_936}
    settings = {
        "trainer": {
            "max_steps": options.steps or STEPS[stage],
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [meter],
        },
        "data": {"init_args": data},
        "model": {"init_args": {"spec": {"backbone": None, "architecture": architecture}}},
    }
    overlay.write_text(yaml.safe_dump(settings))
    size = ["configs/paper/qwen3_4b.yaml"] if options.size == "4b" else []
    configs = ["configs/paper/base.yaml", f"configs/paper/{stage}.yaml", *size, str(overlay)]
    command = [sys.executable, "-m", "lace_lightning", "fit", *(f"--config={config}" for config in configs)]
    command += [f"--{setting}" for setting in options.set]
    start = time.perf_counter()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    rows = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    if done.returncode:
        print(done.stdout[-1500:], done.stderr[-3000:], sep="\n", file=sys.stderr)
    return {"steps": rows, "seconds": time.perf_counter() - start, "exit_code": done.returncode}


def summary(stage: str, found: dict[str, Any]) -> str:
    """One line: the last step."""
    if not found["steps"]:
        return f"{stage}: no step was taken (exit code {found['exit_code']})"
    last = found["steps"][-1]
    return (
        f"{stage}: step {len(found['steps'])} took {last['seconds']:.2f} s for {last['tokens']:,} tokens "
        f"({last['tokens'] / last['seconds']:,.0f} per second), peak {last['peak_bytes'] / 1e9:.1f} GB, "
        f"loss {last['loss']:.4f}; {found['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    sys.exit(main())

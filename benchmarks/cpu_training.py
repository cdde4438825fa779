"""Seconds per training step of each stage of the demo on a CPU, this tree against an earlier commit.

    .venv/bin/python benchmarks/cpu_training.py [--against COMMIT] [--rounds N] [STAGE ...]

Both trees run real ``lace fit`` processes of the demo's own configs, MLflow and checkpoints included, one torch thread
each, and take turns every few steps, so that whatever else the machine does slows both alike. Of ``grpo`` only the
update is timed, for sampling is not training. Prints medians and quartiles over the turns in milliseconds per step, and
of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1]
STRAIGHTFORWARD = "15fce23"
"""The last commit before the speed work."""
STAGES = {
    "pretrain": "backbone/pretrain",
    "cpt": "lace/cpt",
    "sft": "lace/sft",
    "isolated": "isolated/sft",
    "independent": "independent/sft",
    "grpo": "lace/grpo",
}
TURN = 8
"""Steps of a turn; the first refills the caches and is not timed. Of GRPO, whose steps take a second, one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--against", default=STRAIGHTFORWARD, help="commit to compare with (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each tree (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{'stage':<12}{'before':>10}{'quartiles':>18}{'now':>10}{'quartiles':>18}{'ratio':>8}{'quartiles':>14}")
    with checked_out(arguments.against) as before:
        for stage in arguments.stages or STAGES:
            report(stage, np.array(list(take_turns(stage, [before, HERE], arguments.rounds))))


def report(stage: str, seconds: np.ndarray) -> None:
    """Print one line from (rounds, 2) seconds."""
    milliseconds, ratios = seconds.T * 1000, seconds[:, 0] / seconds[:, 1]
    line = f"{stage:<12}"
    for times in milliseconds:
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
        line += f"{middle:>10.1f}{f'{low:.1f}–{high:.1f}':>18}"
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    print(line + f"{middle:>7.2f}x{f'{low:.2f}–{high:.2f}':>14}", flush=True)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of this repository at a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "before")
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def take_turns(stage: str, roots: list[Path], rounds: int) -> Iterator[list[float]]:
    """Median seconds of a step in one turn of each tree, round by round."""
    turn = 1 if stage == "grpo" else TURN
    with ExitStack() as stack:
        trees = [stack.enter_context(training(root, stage, (rounds + 1) * turn)) for root in roots]
        for number in range(rounds + 1):
            seconds = [[step(tree) for _ in range(turn)] for tree in trees]
            if number:  # the first turn warms up
                yield [float(np.median(of_tree[turn > 1 :])) for of_tree in seconds]


@contextmanager
def training(root: Path, stage: str, steps: int) -> Iterator[subprocess.Popen[str]]:
    """A process that trains a stage with the code in ``root``, one step whenever it reads a line."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w") as log:
        command = [sys.executable, __file__, "--worker", stage, folder, str(steps)]
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield process
        except BaseException:
            print(Path(folder, "log").read_text(), file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()


def step(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:  # Lightning prints too
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RuntimeError("a worker ended early")


# -------------------------------------------------------------------- the worker: knows nothing of this tree's code


def work(stage: str, folder: str, steps: int) -> None:
    from lightning import Callback

    from lace_lightning.cli.demo_plan import LANES, PRETRAIN
    from lace_lightning.cli.stages import build

    plan = {step.name: step for step in (PRETRAIN, *(step for lane in LANES.values() for step in lane))}
    logger = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "save_dir": f"{folder}/runs"}
    options = [f"--trainer.logger.init_args.{name}={value}" for name, value in logger.items()]
    fresh = [option for option in plan[STAGES[stage]].fit(Path(folder), 0, steps + 1) if "init_from" not in option]

    class TakeTurns(Callback):
        """Tells the seconds of each step, and waits to be asked for the next one."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            nonlocal start
            now = time.perf_counter()
            if start is not None:
                print(f"\nseconds {clock.pop() if clock else now - start}", flush=True)
            if not sys.stdin.readline():
                sys.exit()
            start = time.perf_counter()

    start: float | None = None
    clock: list[float] = []
    if stage == "grpo":
        _time_updates(clock)
    build([*fresh, *options], callbacks=[TakeTurns()])


def _time_updates(clock: list[float]) -> None:
    """Note the seconds of each GRPO update."""
    from lace_lightning.modules import LatticeGRPO

    optimise = LatticeGRPO._optimise

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return optimise(*arguments)
        finally:
            clock[:] = [time.perf_counter() - start]

    LatticeGRPO._optimise = timed  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()

"""Chaos, room faults: killed and signalled processes, dead ranks and workers, endpoints that go away, for every stage.

Kill points are random; each test prints the seed that it drew. ``LACE_CHAOS_SEED`` repeats one.
"""

from __future__ import annotations

import csv
import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from lace_lightning.callbacks.one_run import UNFINISHED
from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.synthesis.chat import ChatRequest
from lace_lightning.synthesis.chats import OpenAIChat
from lace_lightning.tasks import Verdict
from lace_lightning.verification import Verifier
from tests.chaos.processes import LIMIT, ended, lace, ranks, wait_until
from tests.chat_server import chat_server
from tests.stage_helpers import assert_same
from tests.test_resume import grpo_settings, sft_settings

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]

KILLS = 8
"""Of each stage in turn, each followed by a resume; 32 in all, and those of ranks."""
SECONDS = 0.05
"""Pause after each batch: room for kills between batches."""


def pretrain_settings(folder: Path, seconds: float = 0.0) -> dict[str, Any]:
    """Single threads without an exchange."""
    settings = sft_settings(folder, seconds)
    settings["data"]["init_args"] |= {"num_threads": 1, "shuffle_threads": False}
    settings["model"]["class_path"] = "lace_lightning.modules.BackbonePretraining"
    spec = settings["model"]["init_args"]["spec"]
    spec |= {"num_threads": 1, "exchange": {"class_path": "lace_lightning.exchange.Isolated"}}
    return settings


def cpt_settings(folder: Path, seconds: float = 0.0) -> dict[str, Any]:
    """The backbone is frozen; it is drawn anew from the seed on each start."""
    settings = sft_settings(folder, seconds)
    settings["model"]["class_path"] = "lace_lightning.modules.ContinuedPretraining"
    return settings


STAGES: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "pretrain": pretrain_settings,
    "cpt": cpt_settings,
    "sft": sft_settings,
    "grpo": grpo_settings,
}
STEPS = {"pretrain": 120, "cpt": 120, "sft": 120, "grpo": 240}
"""Optimizer steps of a whole run; a batch of GRPO takes four."""


@pytest.fixture
def draw() -> random.Random:
    """Random kill points, from a seed that is printed."""
    seed = int(os.environ.get("LACE_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"LACE_CHAOS_SEED={seed}")
    return random.Random(seed)


class Runs:
    """Runs of one stage that share a folder of checkpoints; each start has a log of its own."""

    def __init__(self, stage: str, folder: Path, more: dict[str, Any] | None = None, seconds: float = SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        self.starts = 0
        folder.mkdir()
        self._settings = functools.partial(STAGES[stage], folder)
        self._trainer = {"max_steps": STEPS[stage], "max_epochs": 1000, **(more or {})}

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def stamp(self) -> int:
        """When the last checkpoint was written; 0: there is none."""
        return self.last.stat().st_mtime_ns if self.last.exists() else 0

    def wait_for_checkpoint(self, process: BaseProcess, stamp: int) -> None:
        """Wait for one that is younger than the stamp, or for the end of the process."""
        wait_until(lambda: self.stamp() > stamp, process)

    def unfinished(self) -> set[Path]:
        """Checkpoints that are being written, or were when their process was killed."""
        return set(self.folder.glob(UNFINISHED))

    @property
    def log(self) -> Path:
        """Output of the running start."""
        return self.folder / f"{self.starts}.log"

    def command(self, **trainer: Any) -> list[str]:
        """Of one more start, which resumes where the one before was killed."""
        self.starts += 1
        settings = self._settings(self.seconds)
        settings["trainer"] |= self._trainer | trainer
        if "class_path" in (logger := settings["trainer"]["logger"]) and logger["class_path"].endswith("CSVLogger"):
            logger["init_args"]["version"] = str(self.starts)
        config = self.folder / f"{self.starts}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return ["fit", "--config", str(config), *(["--ckpt_path", str(self.last)] if self.last.exists() else [])]

    def rows(self) -> dict[int, dict[str, str]]:
        """What every batch logged, by its number; batches that were run twice must have logged the same."""
        found: dict[int, dict[str, str]] = {}
        for path in sorted(self.folder.glob("log/*/metrics.csv")):
            text = path.read_text()
            for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
                step = int(row["step"])
                known = found.setdefault(step, {})
                # Of one batch several rows tell: what the stage logged, what its callbacks did.
                for name in [name for name, value in row.items() if value and not name.startswith("time/")]:
                    same = known.setdefault(name, row[name]) == row[name]
                    assert same, f"{name} of batch {step} was not the same again in {path}"
        return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    """The whole run of a stage that nobody disturbs, made once."""

    @functools.cache
    def whole(stage: str) -> Runs:
        runs = Runs(stage, tmp_path_factory.mktemp("whole") / stage, seconds=0.0)
        assert ended(lace(runs.command(), runs.log)) == 0, runs.log.read_text()
        return runs

    return whole


def assert_same_rows(runs: Runs, whole: Runs, kills: int) -> None:
    """Both logged the same. A kill between a checkpoint and the row of its batch loses that row: the batch is done."""
    found, expected = runs.rows(), whole.rows()
    assert set(found) <= set(expected)
    cut = [step for step in expected if found.get(step) != expected[step]]
    assert all(found.get(step, {}).items() <= expected[step].items() for step in cut)
    assert len(cut) <= kills, cut


def kill_at_random(runs: Runs, draw: random.Random) -> str:
    """Start, and kill -9 at some moment: while it starts, between and inside batches, while it writes a checkpoint."""
    moment = draw.choice(["after a while", "in a batch", "while writing", "while writing"])
    before, left, process = runs.stamp(), runs.unfinished(), lace(runs.command(), runs.log)
    if moment == "after a while":
        time.sleep(draw.uniform(0.0, 3.0))
    else:
        runs.wait_for_checkpoint(process, before)
        time.sleep(draw.uniform(0.0, 0.3))
    if moment == "while writing":
        wait_until(lambda: bool(runs.unfinished() - left), process, pause=0.0)
        time.sleep(draw.choice([0.0, 0.0, 0.001, 0.003]))
    process.kill()
    code = ended(process)
    assert code in (-signal.SIGKILL, 0), runs.log.read_text()
    notes = [" (it had ended)" if code == 0 else "", " (a file is unfinished)" if runs.unfinished() - left else ""]
    return moment + "".join(notes)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again_it_is_the_uninterrupted_run(
    stage: str, tmp_path: Path, draw: random.Random, uninterrupted: Callable[..., Runs]
) -> None:
    whole, runs = uninterrupted(stage), Runs(stage, tmp_path / "killed")
    for number in range(KILLS):
        print(f"{stage}, kill {number}: {kill_at_random(runs, draw)}")
        for checkpoint in runs.folder.glob("*.ckpt"):
            read_checkpoint(checkpoint)  # whole, whatever was going on
    runs.seconds = 0.0
    assert ended(lace(runs.command(), runs.log)) == 0, runs.log.read_text()
    assert len(whole.rows()) == STEPS[stage] // (4 if stage == "grpo" else 1)
    assert_same_rows(runs, whole, KILLS)
    one, other = read_checkpoint(whole.last), read_checkpoint(runs.last)
    assert_same(one["state_dict"], other["state_dict"])
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    for mine, theirs in zip(*(list(moment.values()) for moment in moments), strict=True):
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_when_one_rank_of_two_is_killed_the_other_ends_and_the_run_resumes_exactly(
    stage: str, tmp_path: Path, draw: random.Random
) -> None:
    """Nobody supervises the ranks here: it is the broken connection that ends the other."""
    two = {"devices": 2, "strategy": "ddp", "max_steps": 80}
    whole, runs = Runs(stage, tmp_path / "whole", two, seconds=0.0), Runs(stage, tmp_path / "killed", two)
    assert [ended(process) for process in ranks(whole.command(), whole.log)] == [0, 0]
    for victim in draw.sample([0, 1], 2):
        before, started = runs.stamp(), ranks(runs.command(), runs.log)
        runs.wait_for_checkpoint(started[0], before)
        time.sleep(draw.uniform(0.0, 0.5))
        started[victim].kill()
        began = time.monotonic()
        assert ended(started[1 - victim], 60) == 1, "an error, not a hang and not success"
        print(f"{stage}: rank {victim} killed, the other ended after {time.monotonic() - began:.1f} s")
        told = runs.log.with_suffix(f".{1 - victim}.log").read_text()
        assert "peer" in told or "onnection" in told, told
    runs.seconds = 0.0
    assert [ended(process) for process in ranks(runs.command(), runs.log)] == [0, 0]
    assert_same_rows(runs, whole, 2)
    assert_same(*(read_checkpoint(each.last)["state_dict"] for each in (whole, runs)))


@pytest.mark.parametrize("victim", ["main", "child"])
def test_ranks_that_wait_to_be_joined_end_when_the_other_is_killed(victim: str, tmp_path: Path) -> None:
    """Lightning's own launcher, in real starts of Python: no connection is there yet that could break."""
    runs = Runs("sft", tmp_path / "runs", {"devices": 2, "strategy": "ddp"})
    command = [sys.executable, "-m", "lace_lightning", *runs.command()]
    with runs.log.open("w") as log:
        main = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + LIMIT
    while not (children := main.children()):
        assert main.poll() is None and time.monotonic() < deadline, runs.log.read_text()
        time.sleep(0.05)
    killed, other = (main, children[0]) if victim == "main" else (children[0], main)
    killed.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs([other], timeout=60)
    print(f"{victim} killed, the other ended after {time.monotonic() - began:.1f} s")
    for process in alive:
        process.kill()
    assert not alive and main.wait() != 0, runs.log.read_text()


# ---------------------------------------------------------------- signals


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.mark.parametrize(
    ("stage", "number"),
    [("sft", signal.SIGTERM), ("sft", signal.SIGINT), ("grpo", signal.SIGTERM), ("grpo", signal.SIGUSR1)],
)
def test_signals_end_a_run_within_30_seconds_with_checkpoint_status_and_code(
    stage: str, number: int, tmp_path: Path, draw: random.Random
) -> None:
    """At a random moment from the first checkpoint on: in batches, rollouts, validations and while writing."""
    store = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "save_dir": str(tmp_path / "runs")}
    logger = {"class_path": "lace_lightning.tracking.MLflowLogger", "init_args": store}
    more = {"logger": logger, "limit_val_batches": 1.0, "val_check_interval": 5, "check_val_every_n_epoch": None}
    runs = Runs(stage, tmp_path / "stopped", {**more, "max_steps": 10_000}, seconds=0.0)
    process = lace(runs.command(), runs.log)
    assert wait_until(runs.last.exists, process), runs.log.read_text()
    time.sleep(draw.uniform(0.0, 1.0))
    assert process.pid is not None
    os.kill(process.pid, number)
    began = time.monotonic()
    assert ended(process, 30) == CODES[signal.Signals(number)], runs.log.read_text()
    print(f"{stage}: ended {time.monotonic() - began:.1f} s after {signal.Signals(number).name}")
    state = read_checkpoint(runs.folder / "interrupted.ckpt")
    client = MlflowClient(store["tracking_uri"])
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "KILLED"
    name = "policy/loss" if stage == "grpo" else "train/loss"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
    assert sorted(set(steps)) == list(range(state["global_step"] // (4 if stage == "grpo" else 1)))


# ---------------------------------------------------------------- data workers, verifiers, teachers


def test_a_killed_data_worker_ends_the_run_with_the_reason_and_no_batch_is_lost(
    tmp_path: Path, uninterrupted: Callable[..., Runs]
) -> None:
    whole, runs = uninterrupted("sft"), Runs("sft", tmp_path / "killed", seconds=0.1)
    command = runs.command()
    process = lace([*command, "--data.num_workers=2"], runs.log)
    assert wait_until(runs.last.exists, process), runs.log.read_text()
    while process.exitcode is None:  # one that had nothing left to do ends no run
        with suppress(psutil.NoSuchProcess, IndexError):
            psutil.Process(process.pid).children()[-1].kill()
        process.join(0.5)
    assert ended(process) == 2, runs.log.read_text()
    told = runs.log.read_text()
    assert "DataLoader worker (pid" in told and "data.num_workers" in told, told
    runs.seconds = 0.0
    assert ended(lace(runs.command(), runs.log)) == 0, runs.log.read_text()
    assert runs.rows() == whole.rows()


def test_right_answers_stay_right_while_verification_workers_are_stopped_and_killed(draw: random.Random) -> None:
    pairs = [(f"{number}/7", rf"\frac{{{number}}}{{7}}") for number in range(600)]
    with Verifier(num_workers=2) as verifier:
        verifier.verify(pairs[:2])
        over = threading.Event()

        def torment() -> None:
            for _ in range(5):
                busy: list[Any] = []
                while not (busy or over.wait(0.02)):
                    busy = [worker for worker in list(verifier._pool._workers) if worker.job is not None]
                if busy and not over.wait(draw.uniform(0.0, 0.2)):
                    with suppress(ProcessLookupError):
                        os.kill(draw.choice(busy)._process.pid, draw.choice([signal.SIGKILL, signal.SIGSTOP]))

        tormentor = threading.Thread(target=torment)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lace_lightning.verification.worker_process.STANDSTILL", 1.0)
            patch.setattr("lace_lightning.verification.pool.MAX_ATTEMPTS", 6)
            tormentor.start()
            try:
                verdicts = verifier.verify(pairs)
            finally:
                over.set()
                tormentor.join()
        assert set(verdicts) == {Verdict.CORRECT} and verifier.counts.retries > 0
        print(verifier.counts)


def test_a_teacher_that_is_away_for_long_is_waited_for(draw: random.Random) -> None:
    """Nobody listens for longer than all attempts of a request would take; then every reply arrives, once."""
    with chat_server() as server:
        port = server.server_port
    chat = OpenAIChat("m", f"http://127.0.0.1:{port}/v1", patience=60, max_attempts=3, backoff=0.2)
    requests = [ChatRequest((("user", f"question {number}"),), seed=number) for number in range(20)]
    replies: list[Any] = []
    asking = threading.Thread(target=lambda: replies.extend(chat.ask(requests)))
    asking.start()
    time.sleep(8.0)
    assert not replies and asking.is_alive()
    with chat_server(port=port) as server:
        asking.join(60)
        assert [reply.text for reply in replies] == [f"echo: question {number}" for number in range(20)]
        assert set(server.asked.values()) == {1}

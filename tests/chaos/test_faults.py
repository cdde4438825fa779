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
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.synthesis.chat import ChatRequest
from lace_lightning.synthesis.chats import OpenAIChat
from lace_lightning.tasks import Verdict
from lace_lightning.verification import Verifier
from tests.chaos.processes import ended, lace, ranks, wait_until
from tests.chat_server import chat_server
from tests.stage_helpers import assert_same
from tests.test_resume import grpo_settings, sft_settings

pytestmark = pytest.mark.chaos

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
                kept = {name: value for name, value in row.items() if not name.startswith("time/")}
                step = int(kept["step"])
                assert found.setdefault(step, kept) == kept, f"batch {step} was not the same again in {path}"
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


def kill_at_random(runs: Runs, draw: random.Random) -> str:
    """Start, and kill -9 at some moment: while it starts, between and inside batches, while it writes a checkpoint."""
    moment = draw.choice(["after a while", "in a batch", "while writing", "while writing"])
    before = runs.last.stat().st_mtime_ns if runs.last.exists() else 0
    process = lace(runs.command(), runs.log)
    if moment == "after a while":
        time.sleep(draw.uniform(0.0, 3.0))
    else:
        wait_until(lambda: runs.last.exists() and runs.last.stat().st_mtime_ns > before, process)
        time.sleep(draw.uniform(0.0, 0.3))
    if moment == "while writing":
        wait_until(lambda: any(runs.folder.glob(".*.part")), process, pause=0.0)
        time.sleep(draw.choice([0.0, 0.0, 0.001, 0.003]))
    process.kill()
    code = ended(process)
    assert code in (-signal.SIGKILL, 0), runs.log.read_text()
    parts = len(list(runs.folder.glob(".*.part")))
    return f"{moment}{' (finished before)' if code == 0 else ''}{f' ({parts} unfinished file)' if parts else ''}"


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
    assert runs.rows() == whole.rows() and len(whole.rows()) == STEPS[stage] // (4 if stage == "grpo" else 1)
    one, other = read_checkpoint(whole.last), read_checkpoint(runs.last)
    assert_same(one["state_dict"], other["state_dict"])
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    for mine, theirs in zip(*(list(moment.values()) for moment in moments), strict=True):
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])

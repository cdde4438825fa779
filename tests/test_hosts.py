"""Several hosts, and hosts that SLURM takes away."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.stages import build
from tests.stage_helpers import MAX_LENGTH, NUM_THREADS, QWEN

ROOT = Path(__file__).parents[1]
STEPS, GLOBAL_BATCH, NUM_PARAMETERS = 6, 4, 6_080


def settings(folder: Path, batch_size: int) -> list[str]:
    """Arguments of ``lace`` for a tiny SFT whose losses go to a CSV file, epochs of 4 batches and a ragged one."""
    checkpoint = {"class_path": "lace_lightning.callbacks.StageCheckpoint"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": logger | {"init_args": {"save_dir": str(folder), "name": "log", "version": ""}},
        "callbacks": [checkpoint | {"init_args": {"dirpath": str(folder), "save_last": True}}],
    }
    exchange = {"class_path": "lace_lightning.exchange.LatticeAttentionConfig", "init_args": {"width": 8, "heads": 2}}
    spec = {"architecture": QWEN, "exchange": exchange, "num_threads": NUM_THREADS, "layers": [0, 1]}
    data = {"task": {"class_path": "tests.stage_helpers.UnevenDoors"}, "num_threads": NUM_THREADS, "num_traces": 18}
    data |= {"batch_size": batch_size, "max_length": MAX_LENGTH, "jitter": 2}
    model = {"spec": spec, "optimizer": {"lr": 0.01}}
    everything: dict[str, Any] = {
        "seed_everything": 1,
        "trainer": trainer,
        "data": {"class_path": "lace_lightning.datamodules.TraceData", "init_args": data},
        "model": {"class_path": "lace_lightning.modules.SupervisedFinetuning", "init_args": model},
    }
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(everything))
    return ["fit", "--config", f"{SHIPPED}/trainer/ddp.yaml", "--config", str(folder / "run.yaml")]


def losses(folder: Path) -> list[float]:
    with (folder / "log" / "metrics.csv").open() as stream:
        return [float(row["train/loss"]) for row in csv.DictReader(stream)]


# ---------------------------------------------------------------- two hosts


def why_no_namespaces() -> str | None:
    """Why this machine cannot play two hosts; None if it can."""
    if shutil.which("ip") is None:
        return "no ip command (iproute2)"
    tried = subprocess.run(["ip", "netns", "add", f"lace-try-{os.getpid()}"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are refused: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"lace-try-{os.getpid()}"], check=True)
    return None


def on_two_hosts(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "tests" / "two_hosts.sh"), "-m", "lace_lightning", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def namespaced() -> None:
    if (reason := why_no_namespaces()) is not None:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.usefixtures("namespaced")
def test_two_hosts_have_the_losses_of_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = on_two_hosts([*settings(two, GLOBAL_BATCH // 2), "--trainer.num_nodes=2"])
    assert done.returncode == 0, done.stderr[-3000:]
    build([*settings(one, GLOBAL_BATCH), "--trainer.strategy=auto"])
    assert len(losses(one)) == STEPS and losses(two) == pytest.approx(losses(one), abs=1e-5)
    found = re.search(r"bytes over the wire: (\d+)", done.stdout)
    assert found is not None and int(found[1]) > 4 * NUM_PARAMETERS * STEPS, "gradients went another way"


@pytest.mark.slow
@pytest.mark.usefixtures("namespaced")
def test_a_mistake_on_the_hosts_is_told_and_leaves_no_namespace(tmp_path: Path) -> None:
    before = namespaces()
    done = on_two_hosts([*settings(tmp_path / "run", 2), "--trainer.num_nodes=2", "--model.init_from=[none.ckpt]"])
    assert done.returncode != 0 and "none.ckpt does not exist" in done.stderr
    assert namespaces() <= before


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}

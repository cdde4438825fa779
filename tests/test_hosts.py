"""Several hosts, and hosts that SLURM takes away."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.stages import build
from tests.stage_helpers import MAX_LENGTH, NUM_THREADS, QWEN
from tests.test_graceful_stop import interrupt, resumed, uninterrupted

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
    return column(folder / "log" / "metrics.csv")


def column(file: Path) -> list[float]:
    with file.open() as stream:
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
@pytest.mark.cluster
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
@pytest.mark.cluster
@pytest.mark.usefixtures("namespaced")
def test_a_mistake_on_the_hosts_is_told_and_leaves_no_namespace(tmp_path: Path) -> None:
    before = namespaces()
    done = on_two_hosts([*settings(tmp_path / "run", 2), "--trainer.num_nodes=2", "--model.init_from=[none.ckpt]"])
    assert done.returncode != 0 and "none.ckpt does not exist" in done.stderr
    assert namespaces() <= before


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


# ---------------------------------------------------------------- SLURM

SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/scontrol.log
kill -TERM $PPID  # as SLURM does to the job that it requeues
exit {code}
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The variables of a job's only task, and a ``scontrol`` that notes what it is told; its folder."""
    job = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "NNODES": 1, "JOB_ID": 4711, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "lace")
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "scontrol", SCONTROL.format(folder=folder, code=0))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def told(folder: Path) -> list[str]:
    log = folder / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("array", [False, True])
def test_slurms_signal_saves_at_the_end_of_a_batch_and_requeues_the_job(slurm, array, tmp_path, monkeypatch) -> None:
    """SLURM's SIGTERM to the requeued job, which comes at once, does not cut the end short."""
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "99")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    code, checkpoint = interrupt(tmp_path, "train", 1, signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1
    assert told(slurm) == ["requeue 99_3" if array else "requeue 4711"]
    assert read_checkpoint(checkpoint)["global_step"] == 2
    rest, whole = resumed(tmp_path / "rest", checkpoint), uninterrupted(tmp_path / "whole")
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    assert not list(tmp_path.glob("**/hpc_ckpt*")), "Lightning's own handler saves in the middle of a batch"


class Finalised(CSVLogger):
    """Notes what SIGTERM would do when the run is closed."""

    at_end: Any = None

    def finalize(self, status: str) -> None:
        self.at_end = signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "ignored"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_requeued_job_closes_its_run_undisturbed(slurm, tmp_path, number: int, ignored: bool) -> None:
    logger = Finalised(tmp_path)
    interrupt(tmp_path, "train", 1, number, logger=logger)
    assert (logger.at_end == signal.SIG_IGN) == ignored
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_sigterm_under_slurm_saves_and_leaves_requeueing_to_slurm(slurm, tmp_path) -> None:
    """It comes with scancel, and with a preemption, after which SLURM requeues by itself."""
    code, checkpoint = interrupt(tmp_path, "train", 1, signal.SIGTERM)
    assert code == 143 and told(slurm) == [] and read_checkpoint(checkpoint)["global_step"] == 2


def test_a_job_that_cannot_be_requeued_says_so_and_keeps_its_checkpoint(slurm, tmp_path, capsys) -> None:
    program(slurm / "scontrol", "#!/bin/sh\necho 'Requests are disabled' >&2\nexit 1\n")
    code, checkpoint = interrupt(tmp_path, "train", 1, signal.SIGUSR1)
    assert code == 138 and checkpoint.exists()
    assert "could not be requeued, submit it again: Requests are disabled" in capsys.readouterr().out


def test_nothing_is_requeued_before_there_is_something_to_resume(slurm, tmp_path) -> None:
    """A job too short for its first batch would come back for ever."""
    code, checkpoint = interrupt(tmp_path, "val", 0, signal.SIGUSR1, num_sanity_val_steps=2)
    assert code == 138 and told(slurm) == [] and not checkpoint.exists()


SRUN = """#!/bin/sh
shift  # --kill-on-bad-exit
echo $$ > {folder}/pid
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_the_shipped_job_goes_on_after_it_was_requeued(slurm, tmp_path: Path, monkeypatch) -> None:
    """Its losses on two runs, of which SLURM ended the first, are those of one run."""
    monkeypatch.chdir(tmp_path)
    program(slurm / "srun", SRUN.format(folder=slurm))
    program(slurm / "lace", f'#!/bin/sh\nexec {sys.executable} -m lace_lightning "$@"\n')
    config = tmp_path / "job" / "run.yaml"
    settings(config.parent, GLOBAL_BATCH)
    changed = yaml.safe_load(config.read_text())
    changed["trainer"]["logger"] = {"class_path": "tests.test_hosts.CSVInFolder"}
    changed["trainer"]["callbacks"] = [
        {"class_path": "lace_lightning.callbacks.StageCheckpoint", "init_args": {"save_last": True}},
        {"class_path": "tests.stage_helpers.Slow", "init_args": {"seconds": 0.5}},
    ]
    config.write_text(yaml.safe_dump(changed))
    environment = {**os.environ, "STAGE": f"--config {config}", "OVERLAYS": "", "PYTHONPATH": str(ROOT)}
    job = ["bash", str(SHIPPED / "slurm" / "train.sbatch")]
    first = subprocess.Popen(job, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob("runs/slurm-4711/*/*/metrics.csv")), first)
    os.kill(int((slurm / "pid").read_text()), signal.SIGUSR1)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 138 and "is requeued" in said and told(slurm) == ["requeue 4711"]
    again = subprocess.run(job, env=environment | {"SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "goes on from runs/slurm-4711" in again.stdout and "interrupted.ckpt" in again.stdout

    build([*settings(tmp_path / "whole", GLOBAL_BATCH), "--trainer.strategy=auto"])
    parts = [values for file in sorted(tmp_path.glob("runs/slurm-4711/*/*/metrics.csv")) for values in column(file)]
    assert parts == losses(tmp_path / "whole")


class CSVInFolder(CSVLogger):
    """A CSVLogger that flushes each row, with the arguments of our MLflowLogger that the job sets."""

    def __init__(self, save_dir: str = "runs") -> None:
        super().__init__(save_dir, flush_logs_every_n_steps=1)


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)

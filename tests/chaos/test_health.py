"""A run whose weights explode, as a user starts it: exit code, state kept, MLflow's status, and going on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.chaos

FIT = ["fit", "--config", "configs/demo/base.yaml", "--config", "configs/demo/sft.yaml", "--trainer.max_steps=6"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]


def lace(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lace_lightning", *FIT, *QUIET, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_run_that_explodes_ends_with_3_keeps_its_last_good_state_and_goes_on(tmp_path: Path) -> None:
    done = lace(tmp_path, "--model.init_args.optimizer.lr=1e30")  # the first step ruins the weights, the second is bad
    assert done.returncode == 3, done.stderr
    assert "is not finite at step 1: look at the last batch" in done.stderr
    (checkpoint,) = tmp_path.rglob("last_good.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in weights.values())
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FAILED"
    assert (run.data.metrics["health/non_finite"], run.data.metrics["health/skipped"]) == (1, 1)
    again = lace(
        tmp_path, "--model.init_args.optimizer.lr=1e30", f"--ckpt_path={checkpoint}", "--health.non_finite=warn"
    )
    assert again.returncode == 0, again.stderr

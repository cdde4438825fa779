"""What the chaos suite proves at length, in short: dead data workers end a run with the reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import yaml

from lace_lightning.cli.main import main
from lace_lightning.traces.schema import Trace
from tests.stage_helpers import UnevenDoors
from tests.test_resume import sft_settings


class DeadlyDoors(UnevenDoors):
    """Kills the data worker that makes trace number 5, as a system short of memory would."""

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        if index == 5 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().trace(index, num_threads, split)


def test_a_killed_data_worker_ends_the_run_with_reason_and_remedy(tmp_path: Path, capfd) -> None:
    settings = sft_settings(tmp_path)
    settings["data"]["init_args"] |= {"task": {"class_path": "tests.test_faults.DeadlyDoors"}, "num_workers": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    said = capfd.readouterr().err
    assert "DataLoader worker (pid" in said and "killed" in said and "data.num_workers" in said

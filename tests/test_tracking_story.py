"""From a metric to the checkpoint, config and commit that made it; what a run says about itself."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lace_lightning.callbacks import GracefulStop, Lineage
from lace_lightning.checkpoints import writer_of
from lace_lightning.cli import sync
from lace_lightning.tracking import MLflowLogger
from lace_lightning.tracking.logger import PARENT_RUN
from lace_lightning.tracking.note import NOTE
from lace_lightning.tracking.spool import SpoolReader
from tests.stage_helpers import problem_data, quiet_trainer, spec, trace_data
from lace_lightning.modules import LatticeGRPO, SupervisedFinetuning
from lightning.pytorch.callbacks import ModelCheckpoint


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / "runs"


def make_logger(uri: str, folder: Path, name: str, **options: Any) -> MLflowLogger:
    return MLflowLogger("story", name, uri, save_dir=str(folder), system_seconds=0, **options)


def fit(uri: str, folder: Path, name: str, init_from: list[str] = [], **options: Any) -> tuple[MLflowLogger, Path]:
    logger = make_logger(uri, folder, name)
    callbacks = [ModelCheckpoint(save_last=True), Lineage(f"lace fit --name {name}")]
    trainer = quiet_trainer(2, callbacks, logger=logger, enable_checkpointing=True, **options)
    trainer.fit(SupervisedFinetuning(spec(), init_from=init_from), datamodule=trace_data())
    return logger, Path(trainer.checkpoint_callback.last_model_path)


def test_x(uri, folder):
    logger, path = fit(uri, folder, "first")
    client = MlflowClient(uri)
    run = client.get_run(logger.run_id)
    print(run.data.tags, run.outputs, path, writer_of(path))
    second, path2 = fit(uri, folder, "second", [str(path)])
    run = client.get_run(second.run_id)
    print(run.data.tags[NOTE], run.inputs, run.outputs)
    [output] = run.outputs.model_outputs
    print(client.get_logged_model(output.model_id))

"""``lace register``: a run's model in MLflow's registry, loadable by ``mlflow.pyfunc.load_model``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lace_lightning.cli.main import MISTAKE, explain
from lace_lightning.cli.next_steps import say_next


def run(argv: Sequence[str]) -> int:
    """Register; the exit code: 0, or 2 for what the user can mend."""
    given = _parser().parse_args(argv)
    if (given.run is None) == (given.config is None):
        print("lace register: give one model: --run, or --config with --ckpt", file=sys.stderr)
        return MISTAKE
    from lace_lightning.tracking.store import TrackingError

    try:
        version, uri = _register(given)
    except (ValueError, OSError, TrackingError) as error:
        return explain(error)
    print(
        f"{given.name} version {version} is registered, with an input example. Load it anywhere:\n"
        f"  mlflow.pyfunc.load_model({uri!r}).predict([{{'text': …}}], params={{'seed': 0}})"
    )
    say_next(("see it in MLflow, page Models", "lace ui"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace register", description="Put a run's model into MLflow's registry: problems in, groups out."
    )
    parser.add_argument("--run", metavar="FOLDER", help="a run of lace fit: its config.yaml and newest checkpoint")
    parser.add_argument("--config", metavar="FILE", help="instead: config.yaml of a run, with --ckpt")
    parser.add_argument("--ckpt", metavar="FILE", help="with --run or --config: the checkpoint to use")
    parser.add_argument("--name", default="lace", help="of the registered model (lace)")
    parser.add_argument("--tracking_uri", help="the store (MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db)")
    return parser


def _register(given: argparse.Namespace) -> tuple[str, str]:
    from lace_lightning.checkpoints import writer_of
    from lace_lightning.cli.sources import example_of, load_stage
    from lace_lightning.tracking.register import register

    module, data, config, checkpoint = load_stage(given)
    run_id = writer_of(checkpoint)
    if run_id is None:
        raise ValueError(f"{checkpoint} does not say which MLflow run wrote it: train with MLflowLogger, then register")
    assert module.model is not None
    return register(
        module.model, _task_of(config), module.validation, data.max_length, example_of(data), given.name, run_id,
        given.tracking_uri,
    )  # fmt: skip


def _task_of(config: Path) -> dict[str, Any]:
    """Class path and arguments of the task in a run's resolved config."""
    import yaml

    settings = yaml.safe_load(config.read_text())["data"]["init_args"]["task"]
    return {"class_path": settings} if isinstance(settings, str) else settings

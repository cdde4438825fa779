"""``lace fit|validate|test|predict``: LightningCLI over our stages and DataModules."""

from __future__ import annotations

import json
import logging
import shlex
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lace_lightning.callbacks import (
    GracefulStop,
    HealthMonitor,
    Lineage,
    OneRun,
    SaveConfig,
    UnhealthyRun,
    ValidationTable,
)
from lace_lightning.callbacks.lineage import last_checkpoint
from lace_lightning.cli.main import STAGES, UNHEALTHY, explain
from lace_lightning.cli.next_steps import say_next
from lace_lightning.cli.orphans import end_with_launcher
from lace_lightning.cli.shipped import with_shipped_configs
from lace_lightning.datamodules.base import GroupData
from lace_lightning.modules import ThreadedModule
from lace_lightning.modules.base import NonFiniteLossError
from lace_lightning.signals import stopping_anywhere
from lace_lightning.tracking import TrackingError
from lace_lightning.tracking.run_folder import run_folder
from lace_lightning.verification.pool import WorkersFailed

MISTAKES = (
    ArgumentError, ValueError, OSError, MisconfigurationException, NonFiniteLossError, TrackingError, WorkersFailed,
)  # fmt: skip
"""What a user can mend: shown as one message. Anything else is a bug of ours and keeps its traceback."""


class LaceCLI(LightningCLI):
    """LightningCLI with our defaults. ``--ckpt_path`` resumes a run; weights to start from are ``model.init_from``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(GracefulStop, "graceful_stop")
        parser.add_lightning_class_args(HealthMonitor, "health")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line as it is.

        Lightning would silently replace it by the hyperparameters of ``--ckpt_path``; our modules refuse to resume
        under other settings instead (:meth:`ThreadedModule.on_load_checkpoint`).
        """

    def before_fit(self) -> None:
        """Refuse a second run of the same files before anything is begun."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, OneRun):
                callback.hold_known(self.trainer, self.config_init["fit"]["ckpt_path"])

    def before_predict(self) -> None:
        """Groups are written as they come (``GroupWriter``), not kept until the end."""
        self.config_init["predict"]["return_predictions"] = False

    def before_validate(self) -> None:
        self._leave_the_table_to_us("validate")

    def before_test(self) -> None:
        self._leave_the_table_to_us("test")

    def _leave_the_table_to_us(self, subcommand: str) -> None:
        """Lightning's own table of the same numbers, without intervals, beside ours helps nobody."""
        if any(isinstance(callback, ValidationTable) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            self.config_init[subcommand]["verbose"] = False


def run(arguments: Sequence[str]) -> int:
    """Run one Lightning subcommand; returns the exit code."""
    end_with_launcher()
    try:
        with stopping_anywhere():
            cli = build(arguments)
    except UnhealthyRun as error:
        explain(error)
        return UNHEALTHY
    except torch.OutOfMemoryError as error:
        from lace_lightning.cli.out_of_memory import explain_out_of_memory

        return explain_out_of_memory(error, arguments)
    except MISTAKES as error:
        return explain(error)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return explain(_dead_worker(error))
    if cli.trainer.is_global_zero and "-h" not in arguments:
        say_next(*_next(arguments[0], cli))
    return 0


def _dead_worker(error: RuntimeError) -> RuntimeError:
    """The error of a data worker that was killed, with its remedy."""
    return RuntimeError(
        f"{str(error).strip()} Workers are mostly killed for lack of memory: see the kernel log, lower "
        "data.num_workers, and resume with --ckpt_path and the last checkpoint: no batch is lost"
    )


def _next(command: str, cli: LaceCLI) -> list[tuple[str, str]]:
    """What usually comes after a stage."""
    folder = run_folder(cli.trainer)
    folder = folder.parent if folder.name == "checkpoints" else folder
    checkpoint = last_checkpoint(cli.trainer) if command == "fit" else None
    browse = [("browse the run in MLflow", "lace ui")] if cli.trainer.logger is not None else []
    if checkpoint is None:
        return [*browse, ("all that lies on this machine", f"ls {shlex.quote(str(folder))}")]
    source = shlex.join(["--run", str(folder), "--ckpt", str(checkpoint)])
    config = shlex.join(["--config", str(run_folder(cli.trainer) / "config.yaml"), "--ckpt_path", str(checkpoint)])
    return [
        ("watch threads write", f"lace generate {source} --problem 0"),
        ("measure it on the evaluation problems", f"lace validate {config}"),
        ("start the next stage from it", f"lace fit … --model.init_from={shlex.quote(json.dumps([str(checkpoint)]))}"),
        *browse,
    ]


class ParsedCLI(LaceCLI):
    """Only parses and checks the arguments; builds nothing and touches no random state."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        """Leave ``config`` as it was parsed."""

    def settings(self) -> dict[str, Any]:
        """All settings with their defaults, as plain values."""
        return dict(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))


def resolve(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of a stage with all defaults filled in, from arguments without a subcommand.

    Raises:
        ArgumentError: an option or a key of a config is unknown, or its value is of a wrong type.
    """
    cli = build(arguments, run=False, kind=ParsedCLI)
    assert isinstance(cli, ParsedCLI)
    return cli.settings()


def build(
    arguments: Sequence[str], run: bool = True, callbacks: Sequence[Callback] = (), kind: type[LaceCLI] = LaceCLI
) -> LaceCLI:
    """The CLI for the arguments; runs the subcommand unless told not to (then give no subcommand).

    Args:
        arguments: what stands behind ``lace``.
        run: False only parses and builds.
        callbacks: callbacks besides those of the configuration.
        kind: the class that does it.

    Raises:
        ArgumentError: an option or a key of a config is unknown, or its value is of a wrong type.
    """
    _quieten()
    _show_choices()
    raise_errors = {"exit_on_error": False}
    return kind(
        ThreadedModule,
        GroupData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the stages configure their own: model.optimizer
        trainer_defaults={
            "logger": {"class_path": "lace_lightning.tracking.MLflowLogger"},
            "plugins": [{"class_path": "lace_lightning.checkpoint_io.AtomicCheckpointIO"}],
            "callbacks": [OneRun(), *callbacks, Lineage(f"lace {shlex.join(arguments)}")],
        },
        parser_kwargs={**raise_errors, **{stage: dict(raise_errors) for stage in STAGES}},
        args=with_shipped_configs(arguments),
        run=run,
    )


def _quieten() -> None:
    """Leave out what a user can do nothing about."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # config.yaml is there
    warnings.filterwarnings("ignore", message="It is recommended to use .*sync_dist=True")  # metrics add up themselves
    warnings.filterwarnings("ignore", message=".broadcast_buffers. is deprecated")  # its successor needs torch 2.13
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "litlogger" not in record.getMessage())


def _show_choices() -> None:
    """Say which attention backend was chosen, where Lightning says what it chose."""
    choices = logging.getLogger("lace_lightning.exchange")
    choices.setLevel(logging.INFO)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        choices.addHandler(handler)  # a handler that is there already is not added again

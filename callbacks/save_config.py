"""Keeping the resolved configuration with the run."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lace_lightning.tracking.redact import redact
from lace_lightning.tracking.run_folder import run_folder
from lace_lightning.whole_file import write_text


class SaveConfig(SaveConfigCallback):
    """LightningCLI's ``save_config_callback``: the resolved config as ``config.yaml``, artifact and parameters.

    The file lies in the run's folder (without a logger, beside its checkpoints) and reproduces the run with
    ``--config``. Loggers with ``log_text``, such as our MLflowLogger, also get it as artifact ``config/config.yaml``
    and as flat parameters. Values under secret-looking keys are hidden in all three.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning once, on rank zero, when the first stage is set up."""
        settings: Any = redact(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        text = yaml.safe_dump(settings, sort_keys=False)
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / self.config_filename, text)
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                logger.log_text(text, f"config/{self.config_filename}")
                logger.log_hyperparams(settings)

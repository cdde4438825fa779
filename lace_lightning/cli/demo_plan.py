"""What the demo trains, in which order, from whose weights: the CLI's own configs and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

BASE = "configs/demo/base.yaml"


@dataclass(frozen=True)
class Step:
    """One ``lace fit`` of the demo, and the ``lace validate`` after it.

    Args:
        name: ``method/stage``; the step's checkpoint is ``<folder>/<name>.ckpt``.
        configs: overlays on the demo's base config.
        starts_from: names of the steps whose weights it starts from, later ones winning.
        data_seed: of the order in which the stage sees its data.
        is_validated: the 2,000 fresh puzzles are played after it.
        max_steps: replaces the config's; null keeps it.
    """

    name: str
    configs: tuple[str, ...]
    starts_from: tuple[str, ...] = ()
    data_seed: int = 0
    is_validated: bool = True
    max_steps: int | None = None

    def checkpoint(self, folder: Path) -> Path:
        return folder / f"{self.name}.ckpt"

    def config(self, folder: Path) -> Path:
        return folder / f"{self.name}.yaml"

    def metrics(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"

    def fit(self, folder: Path, seed: int, max_steps: int | None = None) -> list[str]:
        """Arguments of ``lace`` that train the step."""
        weights = [str(folder / f"{name}.ckpt") for name in self.starts_from]
        arguments = [*self._common("fit", seed), f"--model.init_from={json.dumps(weights)}"]
        arguments += [f"--trainer.logger.init_args.run_name={self.name.replace('/', '-')}-seed{seed}"]
        steps = max_steps or self.max_steps
        if steps is not None:
            arguments += [f"--trainer.max_steps={steps}"]
        if self.name.endswith("grpo"):
            arguments += [f"--model.rollout.seed={seed}"]
        return arguments

    def validate(self, folder: Path, seed: int, num_problems: int | None = None) -> list[str]:
        """Arguments of ``lace`` that play the fresh puzzles with the step's weights."""
        arguments = [*self._common("validate", seed), f"--ckpt_path={self.checkpoint(folder)}"]
        arguments += [f"--trainer.logger.init_args.run_name={self.name.replace('/', '-')}-seed{seed}-validation"]
        if num_problems is not None:
            arguments += [f"--data.num_problems={num_problems}"]
        return arguments

    def _common(self, command: str, seed: int) -> list[str]:
        configs = [argument for config in (BASE, *self.configs) for argument in ("--config", config)]
        seeds = [f"--seed_everything={seed}", f"--data.task.init_args.seed={seed}", f"--data.seed={self.data_seed}"]
        return [command, *configs, *seeds]


PRETRAIN = Step("backbone/pretrain", ("configs/demo/pretrain.yaml",), is_validated=False)
"""The small backbone that every method starts from."""

ISOLATED = "configs/exchange/isolated.yaml"
CPT, SFT, GRPO = (f"configs/demo/{stage}.yaml" for stage in ("cpt", "sft", "grpo"))

LANES: dict[str, tuple[Step, ...]] = {
    "lace": (
        Step("lace/cpt", (CPT,), ("backbone/pretrain",), data_seed=1, is_validated=False),
        Step("lace/sft", (SFT,), ("backbone/pretrain", "lace/cpt"), data_seed=2),
        Step("lace/grpo", (GRPO,), ("lace/sft",), data_seed=3),
    ),
    "baselines": (
        # Isolated Parallel has no exchange to pre-train: it gets those steps as fine-tuning on the same traces.
        Step("isolated/cpt", (SFT, ISOLATED), ("backbone/pretrain",), 1, is_validated=False, max_steps=100),
        Step("isolated/sft", (SFT, ISOLATED), ("isolated/cpt",), data_seed=2),
        Step("isolated/grpo", (GRPO, ISOLATED), ("isolated/sft",), data_seed=3),
        Step("independent/sft", (SFT, "configs/demo/independent.yaml"), ("backbone/pretrain",), data_seed=2),
    ),
}
"""Two lanes of about equal length, run side by side."""

FINAL = {"lace": "lace/grpo", "isolated": "isolated/grpo", "independent": "independent/sft"}
"""Method -> the step whose metrics stand for it."""

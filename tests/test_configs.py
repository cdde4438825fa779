"""Every shipped config is parsed and runs one step, on top of what it is meant for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lace_lightning.cli.main import main
from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.stages import build
from lace_lightning.modules import FullySharded, FullyShardedOnDisk, LatticeGRPO
from lace_lightning.puzzles.vocabulary import word_tokenizer

pytestmark = pytest.mark.usefixtures("no_process_group_left")

FILES = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
ANY_STAGE = ("exchange", "trainer")
"""Folders of files that go on top of any stage."""
VALIDATED = ("real",)
"""Folders whose configs have nothing to train."""
OF_OTHER_COMMANDS = ("eval", "countdown/eval", "synth", "sweeps", "paper")
"""Beginnings of configs whose own tests read them: of other commands, and stages that need weights and a GPU."""
NOT_PLAIN = ("accelerator", "devices", "strategy", "plugins")
"""Settings of overlays that the tests replace, or that are objects."""
NEEDED = {"agents": "textworld"}
"""Packages that a folder's configs need and ``dev`` does not install."""
STAGE = ("demo/base.yaml", "demo/sft.yaml")


def stacks_of(file: str) -> list[tuple[str, ...]]:
    """The configs that a file is used with, in order, itself last (configs/README.md).

    A file goes on top of its folder's ``base.yaml``, or of the files that its first line names: "# On top of sft.yaml".
    """
    folder = file.split("/")[0]
    first_line = (SHIPPED / file).read_text().splitlines()[0]
    if folder in ANY_STAGE:
        return [(*STAGE, file)]
    if file == f"{folder}/base.yaml":
        return [(file,)]
    if named := re.match(r"# On top of (\w+\.yaml)(?: or (\w+\.yaml))?", first_line):
        return [(*stack, file) for name in named.groups() if name for stack in stacks_of(f"{folder}/{name}")]
    return [(f"{folder}/base.yaml", file)]


STACKS = [stack for file in FILES if not file.startswith(OF_OTHER_COMMANDS) for stack in stacks_of(file)]
STAGES = [stack for stack in STACKS if stack[-1].split("/")[0] not in (*ANY_STAGE, *VALIDATED)]


def options_for(stack: tuple[str, ...]) -> list[str]:
    """``--config`` options, then what makes the run tiny and keeps it in the working directory."""
    if package := NEEDED.get(stack[0].split("/")[0]):
        pytest.importorskip(package, reason=f"{package} is not installed")
    tiny = {
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "data.init_args.num_problems": 2,
        "data.init_args.val_batch_size": 2,
        "model.init_args.validation.max_new_tokens": 4,
    }
    if stack[0].split("/")[0] in VALIDATED:
        tiny |= real_input()
    else:
        tiny |= {"trainer.max_steps": 1, "data.init_args.batch_size": 2}
    if any("LatticeGRPO" in (SHIPPED / file).read_text() for file in stack):
        tiny |= {"model.init_args.groups_per_problem": 2, "model.init_args.rollout.max_new_tokens": 4}
    configs = [f"--config={SHIPPED / file}" for file in stack]
    return configs + [f"--{name}={value}" for name, value in tiny.items()]


def real_input() -> dict[str, object]:
    """Stands in for the hub: a tokenizer and two problems."""
    word_tokenizer(["###", "Assessment", "\\boxed{7}", "What", "is"]).save_pretrained("tokenizer")
    rows = [{"id": str(i), "problem": "What is", "answer": "7"} for i in range(2)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.init_args.tokenizer": "tokenizer", "data.init_args.problems": "problems.jsonl"}


class Witness(Callback):
    """Whether training moved the weights that learn, and how many problems validation saw."""

    moved = validated = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = [p for p in pl_module.parameters() if p.requires_grad]
        self.moved = sum(not torch.equal(a, b) for a, b in zip(after, self._before, strict=True))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, *args) -> None:
        self.validated += len(outputs["sampled"].groups)


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_config_runs_one_step(stack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "validate" if stack[0].split("/")[0] in VALIDATED else "fit"
    witness = Witness()
    cli = build([command, *options_for(stack)], callbacks=[witness])
    if command == "validate":
        assert witness.validated == 2
    else:
        assert cli.trainer.global_step == (cli.trainer.fast_dev_run or 1)
        assert witness.moved > 0 or isinstance(cli.model, LatticeGRPO)  # groups of random weights may tie


@pytest.mark.parametrize("stage", STAGES, ids="+".join)
def test_trainer_overlays_go_on_top_of_every_stage(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overlays = [file for file in FILES if file.startswith("trainer/")]
    cli = build([*options_for((*stage, *overlays)), "--trainer.devices=1"], run=False)
    asked: dict[str, object] = {}
    for file in overlays:
        asked |= yaml.safe_load((SHIPPED / file).read_text())["trainer"]
    kept = {name: value for name, value in asked.items() if name not in NOT_PLAIN}
    assert kept and {name: cli.config["trainer"][name] for name in kept} == kept
    assert isinstance(cli.trainer.strategy, FullySharded)  # of the last overlay that names one


@pytest.mark.parametrize("stage", STAGES, ids="+".join)
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_overlays_for_several_gpus_go_on_top_of_every_stage(stage, overlay, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = (*stage, f"trainer/{overlay}.yaml", "trainer/slurm.yaml")
    trainer = build([*options_for(files), "--trainer.devices=2", "--trainer.num_nodes=3"], run=False).trainer
    assert type(trainer.strategy) is {"ddp": DDPStrategy, "fsdp": FullyShardedOnDisk}[overlay]
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size) == (2, 3, 6)
    assert trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("file", FILES)
def test_config_begins_by_saying_what_it_is_for(file):
    assert (SHIPPED / file).read_text().startswith("# ")


def test_print_config_shows_the_outcome_of_a_stack(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", *(f"--config={SHIPPED / file}" for file in (*STAGE, "exchange/isolated.yaml")), "--print_config"])
    assert not end.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["spec"]["exchange"]["class_path"] == "lace_lightning.exchange.Isolated"
    base, sft = (yaml.safe_load((SHIPPED / file).read_text()) for file in STAGE)
    assert shown["trainer"]["max_steps"] == sft["trainer"]["max_steps"]
    assert shown["data"]["init_args"]["num_threads"] == base["data"]["init_args"]["num_threads"]

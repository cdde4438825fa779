"""Checkpoint files: what they hold, which are refused and why, and what may start from or resume which."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lace_lightning.checkpoint_io import AtomicCheckpointIO
from lace_lightning.checkpoints import (
    FROZEN,
    TRAINED,
    CheckpointError,
    initialise,
    read_checkpoint,
    read_weights,
    sample_frozen,
)
from lace_lightning.cli.stages import build
from lace_lightning.exchange import LatticeAttentionConfig
from lace_lightning.modules import (
    BackbonePretraining,
    ContinuedPretraining,
    DecodingSpec,
    LatticeGRPO,
    OptimizerSpec,
    SupervisedFinetuning,
    ThreadedModule,
)
from lace_lightning.modules.stage_settings import SETTINGS
from lace_lightning.rewards import AccuracyReward
from tests.stage_helpers import (
    FAST,
    NUM_THREADS,
    QWEN,
    Recorder,
    assert_same,
    fitted,
    problem_data,
    quiet_trainer,
    ready,
    saved,
    spec,
    trace_data,
    values,
)

LORA = {"r": 2, "target_modules": ["q_proj"]}


def checkpoint_of(state: dict[str, Any], path: Path, **keys: Any) -> Path:
    torch.save({"state_dict": state, TRAINED: sorted(state)} | keys, path)
    return path


def trained(module: ThreadedModule, path: Path, seed: int = 0, data: Any = None) -> Path:
    """The checkpoint of a stage after one step."""
    torch.manual_seed(seed)
    fitted(module, data or trace_data(), max_steps=1)
    return saved(module, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chain of stages: pre-training, continued pre-training on top of it, fine-tuning on top of both."""
    folder = tmp_path_factory.mktemp("stages")
    pre = trained(BackbonePretraining(spec(), FAST), folder / "pre.ckpt")
    cpt = trained(ContinuedPretraining(spec(), FAST, init_from=[str(pre)]), folder / "cpt.ckpt", seed=1)
    sft = trained(SupervisedFinetuning(spec(), FAST, init_from=[str(pre), str(cpt)]), folder / "sft.ckpt", seed=2)
    return {"pre": pre, "cpt": cpt, "sft": sft}


# ---------------------------------------------------------------- what is in them


@pytest.mark.parametrize(
    ("stage", "options", "parts"),
    [
        (ContinuedPretraining, {}, ["exchanges."]),
        (SupervisedFinetuning, {"learn": "exchange"}, ["exchanges."]),
        (SupervisedFinetuning, {"learn": "lora", "lora": LORA}, ["exchanges.", "lora_"]),
        (SupervisedFinetuning, {}, [""]),
    ],
)
def test_a_checkpoint_holds_what_its_stage_trained_and_no_more(tmp_path: Path, stage, options, parts) -> None:
    module = stage(spec(lora=options.get("lora")), FAST, **{k: v for k, v in options.items() if k != "lora"})
    path = trained(module, tmp_path / "x.ckpt")
    expected = {name: value for name, value in values(module).items() if any(part in name for part in parts)}
    assert_same(read_weights(path), expected)
    optimizer = read_checkpoint(path)["optimizer_states"][0]["state"]
    assert len(optimizer) == len(expected)


# ---------------------------------------------------------------- files that are refused


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.target,)


def readers() -> list[Any]:
    return [read_weights, AtomicCheckpointIO().load_checkpoint]


@pytest.mark.parametrize("reader", range(2))
@pytest.mark.parametrize("spelling", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, spelling: str, reader: int) -> None:
    path, proof = tmp_path / "bomb.ckpt", tmp_path / "exploded"
    bomb = {"state_dict": {}, TRAINED: [], "extra": Bomb(proof)}
    torch.save(bomb, path) if spelling == "torch" else path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="bomb.ckpt cannot be read"):
        readers()[reader](path)
    assert not proof.exists()
    if spelling == "torch":  # it is a real one
        torch.load(path, weights_only=False)
        assert proof.exists()


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    state = {"weight": torch.arange(64.0)}
    whole = checkpoint_of(state, tmp_path / "whole.ckpt").read_bytes()
    path, generator, refused = tmp_path / "flipped.ckpt", random.Random(0), 0
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert torch.equal(read_weights(path)["weight"], state["weight"])
        except CheckpointError as error:
            assert "flipped.ckpt" in str(error)
            refused += 1
    assert refused > len(whole) // 7 / 4
    data = bytearray(whole)
    data[whole.index(state["weight"].numpy().tobytes()) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="flipped.ckpt is damaged: the checksum of"):
        read_weights(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = checkpoint_of({"weight": torch.arange(64.0)}, tmp_path / "whole.ckpt").read_bytes()
    path = tmp_path / "cut.ckpt"
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut.ckpt cannot be read"):
            read_weights(path)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone.ckpt does not exist"):
        read_weights(tmp_path / "gone.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="other.ckpt is not of a lace-lightning stage"):
        read_weights(tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="list.ckpt holds a list"):
        read_weights(tmp_path / "list.ckpt")
    torch.save({"state_dict": {}, TRAINED: ["a", "b"]}, tmp_path / "half.ckpt")
    with pytest.raises(CheckpointError, match="half.ckpt lacks 2 trained tensors, a among them"):
        read_weights(tmp_path / "half.ckpt")


# ---------------------------------------------------------------- init_from


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def test_later_files_win(tmp_path: Path) -> None:
    a = checkpoint_of(linear(1.0).state_dict(), tmp_path / "a.ckpt")
    b = checkpoint_of({"bias": torch.full((3,), 2.0)}, tmp_path / "b.ckpt")
    for paths, bias in (([a, b], 2.0), ([b, a], 1.0), ([a, b, a], 1.0)):
        layer = linear(0.0)
        origin = initialise(layer, paths)
        assert layer.weight.unique().tolist() == [1.0] and layer.bias.unique().tolist() == [bias]
        assert origin == {"weight": a, "bias": b if bias == 2.0 else a}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"other": torch.zeros(3)}, r"second.ckpt has other, which this model lacks"),
        ({"bias": torch.zeros(4)}, r"bias is \(4,\) in checkpoint .*second.ckpt and \(3,\) in this model"),
        (None, "second.ckpt cannot be read"),
    ],
)
def test_nothing_changes_if_any_file_is_bad(tmp_path: Path, state: dict | None, reason: str) -> None:
    good, bad, layer = tmp_path / "good.ckpt", tmp_path / "second.ckpt", linear(0.0)
    checkpoint_of(linear(1.0).state_dict(), good)
    bad.write_bytes(b"PK\x03\x04 not really") if state is None else checkpoint_of(state, bad)
    with pytest.raises(CheckpointError, match=reason):
        initialise(layer, [good, bad])
    assert_same(values(layer), values(linear(0.0)))


def test_part_of_a_model_is_refused_on_top_of_other_weights(tmp_path: Path) -> None:
    """A checkpoint of the bias alone, from a layer whose frozen weight was 1."""
    frozen = linear(1.0)
    frozen.weight.requires_grad_(False)
    part = checkpoint_of({"bias": torch.zeros(3)}, tmp_path / "part.ckpt", **{FROZEN: sample_frozen(frozen)})
    whole = checkpoint_of(linear(1.0).state_dict(), tmp_path / "whole.ckpt")
    with pytest.raises(CheckpointError, match=r"part.ckpt .*other weights \(weight\) underneath: .*model.init_from"):
        initialise(linear(2.0), [part])
    initialise(linear(2.0), [whole, part])
    initialise(linear(1.001), [part])  # what bfloat16 makes of it
    initialise(linear(1.0), [part])


def test_a_stage_starts_from_the_stages_before_it(files: dict[str, Path]) -> None:
    torch.manual_seed(5)
    module = ready(SupervisedFinetuning(spec(), init_from=[str(files["pre"]), str(files["cpt"])]), trace_data())
    assert_same(values(module), read_weights(files["pre"]) | read_weights(files["cpt"]))
    with pytest.raises(CheckpointError, match="cpt.ckpt holds only what its stage trained"):
        ready(SupervisedFinetuning(spec(), init_from=[str(files["cpt"])]), trace_data())


# ---------------------------------------------------------------- resuming


def resume(module: ThreadedModule, path: Path, data: Any = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    quiet_trainer(max_steps=2).fit(module, data or trace_data(), ckpt_path=path)


WIDE = LatticeAttentionConfig(width=16, heads=2, scope="aligned")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: SupervisedFinetuning(spec(), OptimizerSpec(lr=0.02)), r"model\.optimizer\.lr was 0\.01 and is 0\.02"),
        (lambda: SupervisedFinetuning(spec(WIDE), FAST), r"model\.spec\.exchange\.width was 8 and is 16"),
        (lambda: SupervisedFinetuning(spec(layers=None), FAST), r"model\.spec\.layers\.0 was 0 and is not set"),
        (lambda: SupervisedFinetuning(spec(lora=LORA), FAST), r"model\.spec\.lora\.r was not set and is 2"),
        (
            lambda: SupervisedFinetuning(spec(architecture={**QWEN, "rope_theta": 5e5}), FAST),
            r"model\.spec\.architecture\.rope_theta was not set and is 500000",
        ),
        (lambda: SupervisedFinetuning(spec(), FAST, learn="exchange"), r"model\.learn was 'all' and is 'exchange'"),
        (lambda: BackbonePretraining(spec(), FAST), r"model\.stage was 'SupervisedFinetuning' and is 'Backbone"),
    ],
)
def test_resuming_under_another_setting_names_it_and_both_values(files, changed, message: str) -> None:
    module = changed()
    start = Start()
    with pytest.raises(
        CheckpointError, match=rf"--ckpt_path .*sft\.ckpt resumes .*{message}.*model\.init_from instead"
    ):
        quiet_trainer(max_steps=2, callbacks=[start]).fit(module, trace_data(), ckpt_path=files["sft"])
    assert_same(values(module), start.values)


def test_a_setting_younger_than_the_checkpoint_was_at_its_default(files, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(files["sft"])
    settings = json.loads(checkpoint[SETTINGS])
    for name in ("spec.compile", "spec.exchange.backend", "optimizer.schedule"):
        del settings[name]
    torch.save(checkpoint | {SETTINGS: json.dumps(settings)}, tmp_path / "old.ckpt")
    pre = [str(files["pre"])]
    resume(SupervisedFinetuning(spec(), FAST, init_from=pre), tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.spec\.compile was False and is True\."):
        resume(SupervisedFinetuning(spec(compile=True), FAST, init_from=pre), tmp_path / "old.ckpt")


class Start(Recorder):
    """The weights before a checkpoint is looked at."""

    def setup(self, trainer, pl_module, stage) -> None:
        configure = pl_module.configure_model

        def configured() -> None:
            configure()
            self.values = values(pl_module)

        pl_module.configure_model = configured


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rewards", [AccuracyReward(weight=2.0)], r"model\.rewards\.0\.weight was 1\.0 and is 2\.0"),
        ("passes", 2, r"model\.passes was 1 and is 2"),
    ],
)
def test_resuming_grpo_under_another_setting_names_it(tmp_path: Path, option: str, value, message: str) -> None:
    options: dict[str, Any] = {"groups_per_problem": 2}
    path = trained(LatticeGRPO(spec(), FAST, **options), tmp_path / "grpo.ckpt", data=problem_data())
    with pytest.raises(CheckpointError, match=message):
        resume(LatticeGRPO(spec(), FAST, **options, **{option: value}), path, problem_data())


def test_settings_without_an_effect_on_training_may_change(files: dict[str, Path]) -> None:
    resume(SupervisedFinetuning(spec(), FAST, DecodingSpec(seed=9), [str(files["pre"])]), files["sft"])


def test_a_frozen_backbone_is_not_resumed_without_its_origin(files: dict[str, Path]) -> None:
    message = r"cpt\.ckpt holds only what its stage trained, and this model has other weights"
    for do in ("fit", "validate"):
        with pytest.raises(CheckpointError, match=message):
            getattr(quiet_trainer(max_steps=2, limit_val_batches=1), do)(
                ContinuedPretraining(spec(), FAST), datamodule=trace_data(), ckpt_path=files["cpt"]
            )
    resume(ContinuedPretraining(spec(), FAST, init_from=[str(files["pre"])]), files["cpt"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"].popitem(), r"x\.ckpt lacks 1 trained tensors, model\."),
        (lambda c: c["state_dict"].update(foreign=torch.zeros(1)), r"x\.ckpt has foreign, which this model lacks"),
        (lambda c: c.pop(TRAINED), r"x\.ckpt is not of a lace-lightning stage"),
        (
            lambda c: c["state_dict"].update({"model.backbone.model.norm.weight": torch.zeros(3)}),
            r"norm\.weight is \(3,\) in checkpoint .*x\.ckpt and \(16,\)",
        ),
    ],
)
@pytest.mark.parametrize("do", ["fit", "validate"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(
    files, tmp_path, do, change, message
) -> None:
    checkpoint = read_checkpoint(files["sft"])
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    module, start = SupervisedFinetuning(spec(), FAST), Start()
    trainer = quiet_trainer(max_steps=2, callbacks=[start], limit_val_batches=1)
    with pytest.raises(CheckpointError, match=message):
        getattr(trainer, do)(module, datamodule=trace_data(), ckpt_path=tmp_path / "x.ckpt")
    assert_same(values(module), start.values)


def test_a_stage_that_trains_more_refuses_the_checkpoint_of_one_that_trains_less(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"cpt\.ckpt lacks \d+ trained tensors, model\.backbone"):
        quiet_trainer(limit_val_batches=1).validate(
            SupervisedFinetuning(spec(), init_from=[str(files["pre"])]), trace_data(), ckpt_path=files["cpt"]
        )


def test_the_command_line_stands_against_hyperparameters_in_a_checkpoint(files, tmp_path: Path) -> None:
    """LightningCLI would replace what the user says by what the checkpoint says."""
    path = tmp_path / "hparams.ckpt"
    torch.save(
        read_checkpoint(files["sft"]) | {"hyper_parameters": {"optimizer": {"lr": 7.0}, "_instantiator": "x"}}, path
    )
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG)
    cli = build(["--config", str(config), "--model.init_args.optimizer.lr=0.5"], run=False)
    assert cli.model.optimizer_spec.lr == 0.5
    arguments = ["validate", "--config", str(config), "--ckpt_path", str(path)]
    arguments += ["--trainer.limit_val_batches=1", f"--trainer.default_root_dir={tmp_path}"]
    cli = build([*arguments, "--model.init_args.optimizer.lr=0.5"])
    assert cli.model.optimizer_spec.lr == 0.5
    assert_same(values(cli.model), read_weights(path))


CONFIG = f"""
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
data:
  class_path: lace_lightning.datamodules.TraceData
  init_args:
    task: {{class_path: tests.stage_helpers.UnevenDoors}}
    num_threads: {NUM_THREADS}
    num_problems: 4
    max_length: 24
model:
  class_path: lace_lightning.modules.SupervisedFinetuning
  init_args:
    spec:
      architecture: {QWEN}
      exchange:
        class_path: lace_lightning.exchange.LatticeAttentionConfig
        init_args: {{width: 8, heads: 2, scope: aligned}}
      num_threads: {NUM_THREADS}
      layers: [0, 1]
    validation: {{max_new_tokens: 12}}
"""

"""A configured stage in the terms of the memory model, ``lace doctor``, and what is said when memory runs out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lace_lightning.cli import doctor, doctor_checks, stages
from lace_lightning.cli.main import main
from lace_lightning.cli.planned import planned_run
from lace_lightning.memory import Precision, knobs
from lace_lightning.modules import ContinuedPretraining, LatticeGRPO, SupervisedFinetuning
from lace_lightning.policy_loss import PolicyLoss
from tests.stage_helpers import DECODING, problem_data, spec, trace_data

# ---------------------------------------------------------------- from a configuration


def test_a_stage_is_planned_on_the_meta_device() -> None:
    module = LatticeGRPO(
        spec(), rollout=DECODING, groups_per_problem=4, minibatches=2, microbatch_size=1, loss=PolicyLoss(kl_weight=0.1)
    )
    data = problem_data()
    outline = module.spec.outline(data.tokenizer)
    assert all(p.is_meta for p in outline.parameters())
    run = planned_run(module, data, {"devices": 2, "precision": "bf16-mixed"}, on_cuda=True)
    assert run.rollout is not None and run.training is not None
    assert (run.rollout.groups, run.rollout.new) == (8, 12) and run.rollout.prompt + run.rollout.new == data.max_length
    assert (run.training.groups, run.keeps_gradients, run.has_reference, run.strategy) == (1, True, True, "ddp")
    assert run.precision == Precision(4, 2, 4)


def test_the_outline_has_the_shapes_of_the_model_that_is_built() -> None:
    tokenizer = trace_data().tokenizer
    own = {name: p.shape for name, p in spec().build(tokenizer).named_parameters()}
    assert {name: p.shape for name, p in spec().outline(tokenizer).named_parameters()} == own


def test_only_what_learns_has_gradients_and_states() -> None:
    plans = [
        planned_run(kind(spec()), trace_data(), {"devices": 1}, on_cuda=False)
        for kind in (ContinuedPretraining, SupervisedFinetuning)
    ]
    assert [plan.shape.trained for plan in plans] == [plans[0].shape.exchange, plans[1].shape.parameters]
    assert plans[0].shape.exchange > 0 and not plans[0].shape.learns_linears


# ---------------------------------------------------------------- the command

DEMO = ["--config", "configs/demo/base.yaml", "--config", "configs/demo/sft.yaml", "--trainer.accelerator=cpu"]
GPU = [*DEMO[:-1], "--trainer.accelerator=gpu"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_doctor_shows_memory_knobs_and_checks_and_leaves_no_file(in_empty_folder: Path, capsys) -> None:
    assert main(["doctor", *DEMO]) == 0
    told = capsys.readouterr().out
    words = (
        "estimated peak",
        "activations",
        "AdamW's states",
        "gradient_checkpointing",
        "tracking",
        "disk",
        "decoding",
    )
    assert all(word in told for word in words), told
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.init_args.traces=gone.jsonl"], "data.traces=gone.jsonl"),
        (["--trainer.logger.init_args.tracking_uri=http://127.0.0.1:9"], "cannot be used"),
        (["--data.init_args.tokenizer=./gone"], "no such folder"),
        (["--device_memory=0.01"], "does not fit"),
    ],
)
def test_a_failed_check_is_named_and_ends_with_1(options: list[str], told: str, capsys) -> None:
    assert main(["doctor", *(GPU if "--device_memory=0.01" in options else DEMO), *options]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert any(told in line for line in lines), lines


def test_secrets_in_settings_are_not_shown_nor_control_characters(capsys) -> None:
    options = ["--data.init_args.traces=s3://me:hunter22@host/\x1b[2Jgone.jsonl"]
    assert main(["doctor", *DEMO, *options]) == 1
    told = capsys.readouterr().out
    assert "gone.jsonl" in told and "hunter22" not in told and "\x1b" not in told


def test_an_mlflow_logger_among_others_is_found() -> None:
    mlflow = {"class_path": "lace_lightning.tracking.MLflowLogger", "init_args": {"tracking_uri": "http://127.0.0.1:9"}}
    loggers = [{"class_path": "lightning.pytorch.loggers.CSVLogger"}, mlflow]
    assert doctor_checks.tracking({"logger": loggers}).state == "failed"


@pytest.mark.parametrize("given", [None, "1", "0"])
def test_doctor_leaves_the_users_environment_as_it_was(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if given is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", given)
    main(["doctor", *DEMO, "--trainer.max_stepz=3"])
    assert os.environ.get("HF_HUB_OFFLINE") == given


def test_a_mistake_in_the_options_ends_with_2(capsys) -> None:
    assert main(["doctor", *DEMO, "--trainer.max_stepz=3"]) == 2
    assert "trainer.max_stepz" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_every_option_that_doctor_names_is_one_that_fit_takes(stage: str) -> None:
    options = [*DEMO[:3], f"configs/demo/{stage}.yaml", DEMO[-1]]
    cli = doctor.parsed(options)
    module, data = doctor.made(cli)
    run = planned_run(module, data, cli.settings()["trainer"], on_cuda=True)
    named = [knob.option.partition(" (")[0] for knob in knobs(run) if knob.option.startswith("--")]
    assert len(named) >= 3
    stages.resolve([*options, *named])


def test_out_of_memory_names_the_best_option_with_the_estimate(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def build(arguments: list[str], **options: Any) -> Any:
        if options:
            return whole(arguments, **options)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.73 GiB. GPU 0 has a total capacity of 80")

    whole = stages.build
    monkeypatch.setattr(stages, "build", build)
    assert main(["fit", *GPU]) == 2
    told = capsys.readouterr().err
    assert "Tried to allocate 3.73 GiB" in told and "expects a peak of" in told
    assert "What helps most: --model.init_args.spec.gradient_checkpointing=true" in told

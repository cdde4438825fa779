"""A run that was killed or stopped and resumed is the uninterrupted run, bit for bit on CPUs."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lace_lightning.callbacks import GracefulStop, StageCheckpoint
from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.cli.stages import build
from lace_lightning.datamodules import ProblemData
from lace_lightning.decoding import Sampling
from lace_lightning.embedding import NgramEmbedder
from lace_lightning.modules import (
    ContinuedPretraining,
    DecodingSpec,
    LatticeGRPO,
    OptimizerSpec,
    SupervisedFinetuning,
    ThreadedModule,
)
from lace_lightning.policy_loss import PolicyLoss
from lace_lightning.rewards import DiversityReward
from lace_lightning.traces.schema import Trace
from tests.stage_helpers import (
    FAST,
    MAX_LENGTH,
    NUM_THREADS,
    QWEN,
    Recorder,
    Signal,
    UnevenDoors,
    Validations,
    assert_same,
    fitted,
    problem_data,
    quiet_trainer,
    saved,
    spec,
    trace_data,
    values,
)

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- kill -9


def shared_settings(folder: Path, max_steps: int, every: int, seconds: float) -> dict[str, Any]:
    """Trainer, data and model settings of both stages; epochs of 7 batches, checkpoints in their middle."""
    trainer = {
        "accelerator": "cpu",
        "max_steps": max_steps,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "log", "version": "", "flush_logs_every_n_steps": 1},
        },
        "callbacks": [
            {
                "class_path": "lace_lightning.callbacks.StageCheckpoint",
                "init_args": {"dirpath": str(folder), "every_n_train_steps": every, "save_last": True},
            },
            {"class_path": "tests.stage_helpers.Slow", "init_args": {"seconds": seconds}},
        ],
    }
    data = {
        "task": {"class_path": "tests.stage_helpers.UnevenDoors"},
        "num_threads": NUM_THREADS,
        "batch_size": 2,
        "max_length": MAX_LENGTH,
    }
    model = {
        "spec": {
            "architecture": {**QWEN, "attention_dropout": 0.2},
            "exchange": {
                "class_path": "lace_lightning.exchange.LatticeAttentionConfig",
                "init_args": {"width": 8, "heads": 2, "scope": "causal"},
            },
            "num_threads": NUM_THREADS,
            "layers": [0, 1],
        },
        "optimizer": {"lr": 0.003, "warmup_steps": 3, "schedule": "cosine"},
    }
    return {"trainer": trainer, "data": data, "model": model}


def sft_settings(folder: Path, seconds: float = 0.0) -> dict[str, Any]:
    settings = shared_settings(folder, max_steps=17, every=3, seconds=seconds)
    data = settings["data"] | {"num_traces": 14, "shuffle_threads": True, "jitter": 2}
    return settings | {
        "data": {"class_path": "lace_lightning.datamodules.TraceData", "init_args": data},
        "model": {"class_path": "lace_lightning.modules.SupervisedFinetuning", "init_args": settings["model"]},
    }


def grpo_settings(folder: Path, seconds: float = 0.0) -> dict[str, Any]:
    """Four optimizer steps a batch, dense rewards, and a reference model."""
    settings = shared_settings(folder, max_steps=40, every=4, seconds=seconds)
    settings["trainer"]["gradient_clip_val"] = None
    reward = {
        "class_path": "lace_lightning.rewards.DiversityReward",
        "init_args": {"embedder": {"class_path": "lace_lightning.embedding.NgramEmbedder"}},
    }
    model = settings["model"] | {
        "rollout": {"max_new_tokens": 12},
        "rewards": [reward],
        "loss": {"kl_weight": 0.1},
        "groups_per_problem": 2,
        "passes": 2,
        "minibatches": 2,
    }
    return settings | {
        "data": {
            "class_path": "lace_lightning.datamodules.ProblemData",
            "init_args": settings["data"] | {"num_train_problems": 14},
        },
        "model": {"class_path": "lace_lightning.modules.LatticeGRPO", "init_args": model},
    }


STAGES = {"sft": sft_settings, "grpo": grpo_settings}


def arguments(settings: dict[str, Any], folder: Path, *more: str) -> list[str]:
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(config), *more]


def logged(folder: Path) -> list[dict[str, str]]:
    """What every batch logged, as written, without shares of time; a line that a kill cut short is left out."""
    rows = [row for row in _rows(folder) if row["epoch"]]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "health/"))} for row in rows]


def alarms(folder: Path) -> list[dict[str, str]]:
    """The counts of alarms, in rows of their own wherever they changed."""
    rows = [{k: v for k, v in row.items() if k == "step" or k.startswith("health/")} for row in _rows(folder)]
    return [row for row in rows if any(value for name, value in row.items() if name != "step")]


def _rows(folder: Path) -> list[dict[str, str]]:
    text = (folder / "log" / "metrics.csv").read_text()
    return list(csv.DictReader(text[: text.rindex("\n") + 1].splitlines()))


def killed(stage: str, folder: Path) -> None:
    """Run ``lace fit`` in a process of its own and kill it somewhere after its first checkpoint."""
    command = [sys.executable, "-m", "lace_lightning", *arguments(STAGES[stage](folder, 0.2), folder)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (folder / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.SystemRandom().uniform(0, 1.0))
    process.kill()
    assert process.wait() == -9


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_run_is_the_uninterrupted_one(stage: str, tmp_path: Path) -> None:
    dead, whole, rest = (tmp_path / name for name in ("dead", "whole", "rest"))
    killed(stage, dead)
    build(arguments(STAGES[stage](whole), whole))
    build(arguments(STAGES[stage](rest), rest, "--ckpt_path", str(dead / "last.ckpt")))

    before = read_checkpoint(dead / "last.ckpt")
    num_batches = before["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    all_rows, rows = logged(whole), logged(rest)
    assert 0 < num_batches < len(all_rows)
    assert rows == all_rows[num_batches:]
    counted = alarms(rest)
    assert counted == alarms(whole)[len(alarms(whole)) - len(counted) :]
    assert stage != "grpo" or counted  # tiny models of random weights never tag well
    lived = logged(dead)
    assert len(lived) >= num_batches - 1 and lived == all_rows[: len(lived)]
    ends = [read_checkpoint(folder / "last.ckpt") for folder in (whole, rest)]
    assert_same(*(end["state_dict"] for end in ends))
    assert len({end["global_step"] for end in ends}) == 1
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    for one, other in zip(*(list(moment.values()) for moment in moments), strict=True):
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


# ---------------------------------------------------------------- signals


def sft(optimizer: OptimizerSpec = FAST) -> SupervisedFinetuning:
    return SupervisedFinetuning(spec(architecture={**QWEN, "attention_dropout": 0.3}), optimizer)


def grpo() -> LatticeGRPO:
    decoding = DecodingSpec(max_new_tokens=12, sampling=Sampling(top_p=0.9))
    return LatticeGRPO(
        spec(),
        OptimizerSpec(lr=0.003, schedule="linear"),
        rollout=decoding,
        rewards=[DiversityReward(NgramEmbedder())],
        loss=PolicyLoss(average="grpo", kl_weight=0.05),
        groups_per_problem=2,
        passes=2,
        minibatches=2,
        microbatch_size=3,
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_grpo_stopped_by_sigterm_resumes_as_the_uninterrupted_run(batch: int, tmp_path: Path) -> None:
    """Batch 5 is the last of its epoch; a batch takes four optimizer steps."""
    torch.manual_seed(0)
    whole = grpo()
    fitted(whole, problem_data(), max_steps=32)

    torch.manual_seed(0)
    stopped = quiet_trainer(32, [GracefulStop(), Signal(batch)], default_root_dir=tmp_path)
    with pytest.raises(SystemExit) as end:
        stopped.fit(grpo(), problem_data())
    assert end.value.code == 143
    checkpoint = tmp_path / "checkpoints" / "interrupted.ckpt"
    assert read_checkpoint(checkpoint)["global_step"] == 4 * (batch + 1)

    torch.manual_seed(0)
    rest, recorder = grpo(), Recorder()
    quiet_trainer(32, [recorder]).fit(rest, problem_data(), ckpt_path=checkpoint)
    assert recorder.steps == list(range(4 * (batch + 2), 33, 4))
    assert_same(values(whole), values(rest))


# ---------------------------------------------------------------- a limit of epochs


@pytest.mark.parametrize("make", [sft, grpo])
def test_a_run_with_a_limit_of_epochs_resumes_inside_the_epoch(make, tmp_path: Path) -> None:
    """As in all shipped configs. Lightning then makes the loader before it knows where to resume."""
    data, steps = (trace_data, 1) if make is sft else (problem_data, 4)
    torch.manual_seed(0)
    whole = make()
    fitted(whole, data(), max_steps=5 * steps, max_epochs=1000)
    torch.manual_seed(0)
    part = make()
    stopped = quiet_trainer(5 * steps, [GracefulStop(), Signal(1)], default_root_dir=tmp_path, max_epochs=1000)
    with pytest.raises(SystemExit):
        stopped.fit(part, data())
    torch.manual_seed(0)
    rest = make()
    trainer = quiet_trainer(5 * steps, max_epochs=1000)
    trainer.fit(rest, data(), ckpt_path=tmp_path / "checkpoints" / "interrupted.ckpt")
    assert_same(values(whole), values(rest))


# ---------------------------------------------------------------- dropout


def stopped_at(step: int, module: ThreadedModule, folder: Path) -> Path:
    """The last checkpoint of a run that ended in mid-epoch, at fewer steps than it is going to have."""
    saver = StageCheckpoint(folder, every_n_train_steps=50, save_last=True)
    fitted(module, trace_data(), max_steps=step, callbacks=[saver], enable_checkpointing=True)
    return folder / "last.ckpt"


def test_dropout_follows_the_run_and_not_the_process(tmp_path: Path) -> None:
    """Resumed with another global random state."""
    torch.manual_seed(0)
    whole = sft()
    fitted(whole, trace_data(), max_steps=5)
    for step in (2, 4):
        torch.manual_seed(0)
        path = stopped_at(step, sft(), tmp_path / str(step))
        torch.manual_seed(99)
        rest = sft()
        quiet_trainer(5).fit(rest, trace_data(), ckpt_path=path)
        assert_same(values(whole), values(rest))


class OneTrace(UnevenDoors):
    """The same trace again and again."""

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        return super().trace(0, num_threads, split)


def test_dropout_differs_between_steps_epochs_and_seeds() -> None:
    """With one trace and weights that hardly move, only dropout can change the loss."""
    losses = []
    for seed in (0, 1):
        torch.manual_seed(0)
        module, recorder = sft(optimizer=OptimizerSpec(lr=1e-30, weight_decay=0.0)), Recorder()
        torch.manual_seed(0)
        module._seed = seed
        fitted(module, trace_data(OneTrace(), num_traces=8), max_steps=4, callbacks=[recorder])
        losses += [output["loss"].item() for output in recorder.outputs]
    assert len(set(losses)) == 8


# ---------------------------------------------------------------- a frozen backbone


def test_exchange_only_run_resumes_on_the_backbone_that_it_started_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = sft()
    fitted(base, trace_data(), max_steps=1)
    start = [str(saved(base, tmp_path / "base.ckpt"))]
    architecture = {**QWEN, "attention_dropout": 0.3}

    def cpt() -> ContinuedPretraining:
        return ContinuedPretraining(spec(architecture=architecture), FAST, init_from=start)

    torch.manual_seed(1)
    whole = cpt()
    fitted(whole, trace_data(), max_steps=5)
    torch.manual_seed(1)
    path = stopped_at(2, cpt(), tmp_path / "part")
    torch.manual_seed(2)
    rest = cpt()
    quiet_trainer(5).fit(rest, trace_data(), ckpt_path=path)
    assert_same(values(whole), values(rest))


# ---------------------------------------------------------------- the last step


@pytest.mark.parametrize(
    ("limits", "every", "steps"),
    [
        ({"max_steps": 5}, 3, 5),
        ({"max_steps": 6}, 3, 6),
        ({"max_steps": 2}, 50, 2),
        ({"max_steps": -1, "max_epochs": 1}, 2, 3),
    ],
)
def test_the_state_after_the_last_step_is_saved_whatever_the_interval(limits, every, steps, tmp_path: Path) -> None:
    module = sft()
    saver = StageCheckpoint(tmp_path, every_n_train_steps=every, save_last=True)
    fitted(module, trace_data(), callbacks=[saver], enable_checkpointing=True, **limits)
    last = read_checkpoint(tmp_path / "last.ckpt")
    assert last["global_step"] == steps
    assert_same(last["state_dict"], values(module))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["last.ckpt", Path(saver.best_model_path).name])


def test_shipped_configs_save_the_last_step() -> None:
    """Lightning's own ModelCheckpoint does not, unless the interval divides the number of steps."""
    configs = [*(ROOT / "configs").rglob("*.yaml")]
    assert len(configs) > 5
    assert [path.name for path in configs if "ModelCheckpoint" in path.read_text()] == []
    assert "callbacks.StageCheckpoint" in (ROOT / "configs/demo/base.yaml").read_text()


# ---------------------------------------------------------------- signals while groups are decoded


class SignalledDoors(UnevenDoors):
    """Sends this process a signal when its threads have decoded a few columns of the batch of that number, if any."""

    def __init__(self, batch: int = -1, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.batch, self.number = batch, number
        self.batches = self.late_columns = 0

    def environment(self, problems, num_threads, tokenizer):
        environment, number = super().environment(problems, num_threads, tokenizer), self.batches
        self.batches += 1
        step, columns = environment.step, 0

        def counted(tokens, written):
            nonlocal columns
            columns += 1
            if number == self.batch and columns == 3:
                os.kill(os.getpid(), self.number)
            self.late_columns += number == self.batch and columns > 3
            return step(tokens, written)

        environment.step = counted
        return environment


def problems_of(task: SignalledDoors) -> ProblemData:
    return ProblemData(
        task, num_threads=NUM_THREADS, batch_size=2, num_train_problems=12, num_problems=4, val_batch_size=2,
        max_length=MAX_LENGTH,
    )  # fmt: skip


VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 3, "log_every_n_steps": 1}
"""Six batches of an epoch; two validation batches after the third and the sixth."""


@pytest.mark.parametrize(
    ("batch", "steps"),
    [
        (2, 2),  # the third rollout
        (3, 3),  # first batch of the first validation
        (4, 3),  # its second batch
        (5, 3),  # the rollout after it
        (10, 6),  # first rollout of the second epoch
    ],
)
def test_a_signal_inside_a_rollout_or_validation_is_obeyed_at_once_and_resumed_exactly(
    batch: int, steps: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole, validations = grpo(), Validations()
    log = CSVLogger(tmp_path, "whole", flush_logs_every_n_steps=1)
    quiet_trainer(32, [validations], logger=log, **VALIDATED).fit(whole, problems_of(SignalledDoors()))

    torch.manual_seed(0)
    task, before = SignalledDoors(batch), Validations()
    stopped = quiet_trainer(32, [GracefulStop(), before], default_root_dir=tmp_path, **VALIDATED)
    with pytest.raises(SystemExit) as end:
        stopped.fit(grpo(), problems_of(task))
    assert end.value.code == 143
    assert task.late_columns == 0, "the batch was not finished"
    checkpoint = tmp_path / "checkpoints" / "interrupted.ckpt"
    assert read_checkpoint(checkpoint)["global_step"] == 4 * steps

    torch.manual_seed(0)
    rest, after = grpo(), Validations()
    rest_log = CSVLogger(tmp_path, "rest", flush_logs_every_n_steps=1)
    again = quiet_trainer(32, [after, GracefulStop()], logger=rest_log, **VALIDATED)
    again.fit(rest, problems_of(SignalledDoors()), ckpt_path=checkpoint)
    assert_same(values(whole), values(rest))
    assert before.steps + after.steps == validations.steps, "each validation came to its end once"
    assert _steps_logged(rest_log) == [step for step in _steps_logged(log) if step >= steps]


def _steps_logged(log: CSVLogger) -> list[int]:
    rows = csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines())
    return [int(row["step"]) for row in rows if row["policy/loss"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_inside_the_first_rollout_has_nothing_to_save(number: int, code: int, tmp_path: Path, capsys) -> None:
    trainer = quiet_trainer(32, [GracefulStop()], default_root_dir=tmp_path)
    with pytest.raises(SystemExit) as end:
        trainer.fit(grpo(), problems_of(SignalledDoors(0, number)))
    assert end.value.code == code and list(tmp_path.iterdir()) == []
    assert "nothing to save" in capsys.readouterr().out

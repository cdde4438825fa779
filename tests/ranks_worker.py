"""One process of a tiny run; ``torchrun`` starts several. Writes what every training batch logged, as JSON.

python -m torch.distributed.run --nproc_per_node 2 -m tests.ranks_worker sft ddp FOLDER '{"size": 9}'
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lace_lightning.callbacks import GateMonitor, GracefulStop, HealthMonitor
from lace_lightning.exchange import Isolated
from lace_lightning.lattice import Lattice
from lace_lightning.modules import (
    BackbonePretraining,
    ContinuedPretraining,
    FullySharded,
    LatticeGRPO,
    OptimizerSpec,
    SupervisedFinetuning,
)
from lace_lightning.policy_loss import PolicyLoss
from lace_lightning.rewards import DiversityReward
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES
from tests.stage_helpers import DECODING, LATTICE, problem_data, quiet_trainer, spec, trace_data

EXCHANGES_BY_NAME = {"ours": LATTICE, "isolated": Isolated(), **EXCHANGES}
STAGES = {"pretrain": BackbonePretraining, "cpt": ContinuedPretraining, "sft": SupervisedFinetuning}
STEPS = 5
GLOBAL_BATCH = 4
UNCOMPARED = ("time/", "val", "tags")
"""Beginnings of what is no number of the training batch."""
EVALUATION = {"num_problems": 7, "val_batch_size": 3, "seed": 3}
"""One process of two has a batch more than the other."""


class Log(Callback):
    """All that was logged after each training batch and after validation, and the norm of each gradient step."""

    def __init__(self) -> None:
        self.batches: list[dict[str, float]] = []
        self.validation: dict[str, float] = {}
        self.groups: list[list[str]] = []
        self.lengths: list[list[int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append({k: float(v) for k, v in trainer.logged_metrics.items() if not k.startswith(UNCOMPARED)})
        if isinstance(outputs, dict) and "sampled" in outputs:
            groups = outputs["sampled"].groups
            self.groups.append([f"{g.problem.id} {g.seed} {[t.text for t in g.threads]}" for g in groups])
            self.lengths.append([len(g.problem.text.split()) for g in groups])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "tags/"))}


def strategy_of(name: str) -> Strategy | str:
    """By the names of the overlays."""
    if name == "fsdp":
        return FullySharded()
    return DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if name == "ddp" else "auto"


def module_of(stage: str, options: dict[str, Any]) -> LightningModule:
    """A tiny stage whose weights have one seed."""
    torch.manual_seed(1)
    exchange = EXCHANGES_BY_NAME[options.get("exchange", "ours")]
    model = spec(exchange, gradient_checkpointing=options.get("checkpointing", False))
    optimizer = OptimizerSpec(lr=0.01)
    if stage != "grpo":
        return STAGES[stage](model, optimizer, DECODING)
    from lace_lightning.embedding import NgramEmbedder
    from tests.test_lattice_grpo import Numbers

    rewards = [Numbers(weight=5.0), DiversityReward(NgramEmbedder(), weight=1.0)]
    loss = PolicyLoss(average=options.get("average", "dapo"), kl_weight=options.get("kl_weight", 0.0))
    names = ("groups_per_problem", "passes", "minibatches", "microbatch_size")
    changes = {name: options[name] for name in names if name in options}
    return LatticeGRPO(
        model, optimizer, DECODING, rollout=DECODING, rewards=rewards, loss=loss,
        **{"groups_per_problem": 3, "gradient_clip": 0.5} | changes,
    )  # fmt: skip


def _without_exchange(model: ThreadedLM, *args: Any, **kwargs: Any) -> Lattice:
    lattice = ThreadedLM.lattice(model, *args, **kwargs)
    return replace(lattice, exchanges={}) if model.training else lattice


def leave_out(module: LightningModule, is_here: bool) -> None:
    """Let the training batches of this process reach no exchange, if it is the one that leaves it out."""
    build = module.configure_model

    def configure_model() -> None:
        build()
        if is_here:
            module.model.lattice = partial(_without_exchange, module.model)

    module.configure_model = configure_model


def main(stage: str, strategy: str, folder: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    num_processes = options.get("processes", 1)
    batch_size = options.get("batch", GLOBAL_BATCH) // num_processes
    if stage == "grpo":
        data: Any = problem_data(batch_size=batch_size, num_train_problems=options["size"], **EVALUATION)
    else:
        data = trace_data(batch_size=batch_size, num_traces=options["size"], jitter=2, **EVALUATION)
    log = Log()
    trainer = quiet_trainer(
        max_steps=options.get("steps", STEPS),
        callbacks=[log, GateMonitor(num_batches=3), HealthMonitor(), GracefulStop()],
        strategy=strategy_of(strategy),
        devices=num_processes,
        gradient_clip_val=None if stage == "grpo" else 0.5,
        limit_val_batches=3,
        val_check_interval=1,
        log_every_n_steps=1,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    module = module_of(stage, options)
    if "unreached" in options:
        leave_out(module, trainer.global_rank == options["unreached"])
    trainer.fit(module, data, ckpt_path=options.get("resume"))
    if "save" in options:
        trainer.save_checkpoint(options["save"])
    found = {"batches": log.batches, "validation": log.validation, "groups": log.groups, "lengths": log.lengths}
    Path(folder, f"{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))

"""One process of a tiny run that saves or resumes; ``torchrun`` starts several. Writes each step's loss as JSON.

python -m torch.distributed.run --nproc_per_node 2 -m tests.resume_worker fsdp FOLDER '{"steps": 3}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lace_lightning import shards
from lace_lightning.callbacks import StageCheckpoint
from lace_lightning.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from lace_lightning.modules import FullyShardedOnDisk, OptimizerSpec, SupervisedFinetuning
from tests.stage_helpers import DECODING, quiet_trainer, spec, trace_data

GLOBAL_BATCH = 4


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.values[trainer.global_step] = float(trainer.logged_metrics["train/loss"])


def strategy_of(name: str) -> Strategy | str:
    """By the names of the overlays."""
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    return FullyShardedOnDisk() if name == "fsdp" else "auto"


def fill_disk(of: str | None) -> None:
    """No space for the shards of rank one, or for what rank zero writes beside the shards, from step 6 on."""
    if int(os.environ.get("RANK", 0)) != {"shards": 1, "meta": 0}.get(of or ""):
        return

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(self.path if of == "shards" else self)
        if "step=6" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return original(self, *args, **kwargs)

    place, name = (dcp.FileSystemWriter, "write_data") if of == "shards" else (shards, "whole_file")
    original = getattr(place, name)
    setattr(place, name, full)


def main(strategy: str, folder: str, options: dict[str, Any]) -> None:
    """Options: ``steps`` to end at, a checkpoint to ``resume``, the step to ``save`` at, ``background``, ``full``."""
    torch.set_num_threads(1)
    fill_disk(options.get("full"))
    num_processes, num_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("NUM_NODES", 1))
    data = trace_data(batch_size=GLOBAL_BATCH // (num_processes * num_nodes), num_traces=18, jitter=2, seed=3)
    losses, save = Losses(), options.get("save", 3)
    saver = StageCheckpoint(folder, filename="{step}", every_n_train_steps=save, save_top_k=-1, save_last=True)
    trainer = quiet_trainer(
        max_steps=options.get("steps", 7),
        callbacks=[losses, saver],
        enable_checkpointing=True,
        strategy=strategy_of(strategy),
        devices=num_processes,
        num_nodes=num_nodes,
        plugins=[BackgroundCheckpointIO() if options.get("background") else AtomicCheckpointIO()],
        log_every_n_steps=1,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    torch.manual_seed(1)
    module = SupervisedFinetuning(spec(), OptimizerSpec(lr=0.01, schedule="cosine"), DECODING)
    trainer.fit(module, data, ckpt_path=options.get("resume"))
    Path(folder, f"losses{trainer.global_rank}.json").write_text(json.dumps(losses.values))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})

"""Checkpoint files: what of one may be read, what it must hold, and starting from the weights of earlier runs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lace_lightning.sharding import gathered
from lace_lightning.shards import META, CheckpointError, ShardReader, is_sharded

TRAINED = "lace_trained"
"""Key of a checkpoint: names of the parameters that its stage trained, all of which must be in its state."""
FROZEN = "lace_frozen"
"""Key of a checkpoint: a few values of each parameter that its stage did not train and its state therefore lacks."""

RUN = "lace_run"
"""Key of a checkpoint: id of the MLflow run that wrote it; absent without one."""


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of any Lightning run; every byte is checked against its checksum, and no code is run from it.

    Args:
        path: the file, or the folder of shards.
        mmap: leave the tensors on disk; for those who copy them at once, since the file may change later.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or would run code.
    """
    if is_sharded(path):
        return ShardReader(path, read_checkpoint(Path(path) / META)).checkpoint()
    if not Path(path).is_file():
        what = f"is a folder without {META}: its first write did not end" if Path(path).is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself ignores the checksums
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch raise many types on damaged and foreign files
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(checkpoint).__name__}: it is not Lightning's")
    return checkpoint


def weights_of(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of one of our stages.

    Raises:
        CheckpointError: the checkpoint is foreign or incomplete.
    """
    if TRAINED not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"checkpoint {path} is not of a lace-lightning stage")
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    if missing := sorted(set(checkpoint[TRAINED]) - set(weights)):
        raise CheckpointError(f"checkpoint {path} lacks {len(missing)} trained tensors, {missing[0]} among them")
    return weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file of one of our stages.

    Raises:
        CheckpointError: the file is missing, damaged, foreign or incomplete.
    """
    return weights_of(read_checkpoint(path, mmap=True), path)


def writer_of(path: str | Path) -> str | None:
    """Id of the MLflow run that wrote a checkpoint; None if it does not say, or cannot be read."""
    file = Path(path) / META if is_sharded(path) else path
    try:
        checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever needs the weights will say what is wrong
        return None
    run = checkpoint.get(RUN) if isinstance(checkpoint, dict) else None
    return run if isinstance(run, str) else None


def check_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError if ``weights`` has a tensor that ``own`` lacks or has in another shape."""
    for name, tensor in weights.items():
        if name not in own:
            raise CheckpointError(f"checkpoint {path} has {name}, which this model lacks: other backbone or exchange?")
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in checkpoint {path} and {tuple(own[name].shape)} in this model"
            )


def sample_frozen(module: nn.Module) -> dict[str, Tensor]:
    """Up to eight values of each parameter that does not learn: too little to load, enough to notice other weights."""
    return {name: _sample(tensor) for name, tensor in module.named_parameters() if not tensor.requires_grad}


def check_frozen(checkpoint: Mapping[str, Any], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError unless ``own`` has the weights that the checkpoint's stage did not train but relied on."""
    for name, values in checkpoint.get(FROZEN, {}).items():
        # The tolerance lets a model change between float32 and bfloat16.
        if name in own and not _is_close(_sample(own[name]), values):
            raise CheckpointError(
                f"checkpoint {path} holds only what its stage trained, and this model has other weights ({name}) "
                "underneath: give the same model.spec.backbone, and list in model.init_from, before this file, the "
                "checkpoints that its run started from"
            )


def initialise(module: nn.Module, paths: Sequence[str | Path]) -> dict[str, Path]:
    """Copy the weights of earlier stages into ``module``, in order, the last one winning.

    All files are read and checked before anything is changed.

    Returns:
        Parameter name -> the file that its value came from.

    Raises:
        CheckpointError: a file is unreadable, has a tensor that this model lacks or has in another shape, or was
            trained on top of other weights than those it would meet here.
    """
    own = module.state_dict()
    planned = dict(own)
    origin: dict[str, Path] = {}
    for path in paths:
        checkpoint = read_checkpoint(path, mmap=True)
        weights = weights_of(checkpoint, path)
        check_fit(weights, own, path)
        planned |= weights
        check_frozen(checkpoint, planned, path)
        origin |= dict.fromkeys(weights, Path(path))
    with torch.no_grad():
        for name in origin:
            own[name].copy_(planned[name])
    return origin


def _sample(tensor: Tensor) -> Tensor:
    flat = gathered(tensor.detach()).flatten()
    return flat[:: max(1, len(flat) // 8)][:8].float().cpu()


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-4)

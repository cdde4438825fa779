"""Starting from the weights of earlier runs. Resuming a run (``--ckpt_path``) is Lightning's business, not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TRAINED = "lace_trained"
"""Key of a checkpoint: names of the parameters that its stage trained, all of which must be in its state."""


class CheckpointError(ValueError):
    """A checkpoint does not hold what it should; the message names file and reason."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Model weights of one of our Lightning checkpoints; runs no code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, foreign or incomplete.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"init_from: {path} does not exist")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types on damaged archives
        raise CheckpointError(f"init_from: {path} cannot be read: {error}") from error
    if not isinstance(checkpoint, dict) or TRAINED not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"init_from: {path} is no checkpoint of a lace-lightning stage")
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    if missing := sorted(set(checkpoint[TRAINED]) - set(weights)):
        raise CheckpointError(f"init_from: {path} lacks {len(missing)} trained tensors, {missing[0]} among them")
    return weights


def initialise(module: nn.Module, paths: Sequence[str | Path]) -> dict[str, Path]:
    """Copy the weights of earlier stages into ``module``, in order, the last one winning.

    All files are read and checked before anything is changed.

    Returns:
        Parameter name -> the file that its value came from.

    Raises:
        CheckpointError: a file is unreadable, or has a tensor that this model lacks or has in another shape.
    """
    own = module.state_dict()
    files = {Path(path): read_weights(path) for path in paths}
    for path, weights in files.items():
        _check_fit(weights, own, path)
    origin: dict[str, Path] = {}
    with torch.no_grad():
        for path, weights in files.items():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
                origin[name] = path
    return origin


def _check_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in weights.items():
        if name not in own:
            raise CheckpointError(f"init_from: {path} has {name}, which this model lacks: other backbone or exchange?")
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"init_from: {name} is {tuple(tensor.shape)} in {path} and {tuple(own[name].shape)} in this model"
            )

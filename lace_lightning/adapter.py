"""Exchange weights on disk: ``exchange.safetensors`` with the tensors, ``exchange.json`` with what they belong to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from lace_lightning.threaded_lm import ThreadedLM

WEIGHTS, SETTINGS = "exchange.safetensors", "exchange.json"


def save_exchange(model: ThreadedLM, folder: Path) -> None:
    """Write both files; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.exchanges.state_dict().items()}
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial)
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (SETTINGS + ".partial")
    partial.write_text(json.dumps(_settings(model), indent=2) + "\n")
    os.replace(partial, folder / SETTINGS)


def load_exchange(model: ThreadedLM, folder: Path) -> None:
    """Check everything, then load.

    Raises:
        ValueError: a file is missing or damaged, or it belongs to other settings; the message names both.
    """
    settings, tensors = _read(folder)
    ours = _settings(model)
    differing = [key for key in ours if ours[key] != settings.get(key)]
    if differing:
        raise ValueError(
            f"{folder / SETTINGS} does not fit this model: "
            + "; ".join(f"{key} is {settings.get(key)!r} there and {ours[key]!r} here" for key in differing)
        )
    expected = {name: tensor.shape for name, tensor in model.exchanges.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(
            f"{folder / WEIGHTS} does not fit this model: tensors {names[:4]} are missing, foreign or misshaped"
        )
    model.exchanges.load_state_dict(tensors)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return json.loads((folder / SETTINGS).read_text()), load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: give the folder that save_exchange wrote") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"the exchange in {folder} is damaged: {error}") from error


def _settings(model: ThreadedLM) -> dict[str, Any]:
    """What the weights' meaning depends on; the backend does not belong to it."""
    config = {key: value for key, value in asdict(model.exchange_config).items() if key != "backend"}
    return {"exchange": type(model.exchange_config).__name__, "config": config, "layers": model.layers}

"""Exchange weights on disk: ``exchange.safetensors`` with the tensors, ``exchange.json`` with what they belong to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from lace_lightning.exchange import ExchangeConfig
from lace_lightning.whole_file import whole_file

if TYPE_CHECKING:
    from lace_lightning.threaded_lm import ThreadedLM

WEIGHTS, SETTINGS, CHECKSUM = "exchange.safetensors", "exchange.json", "weights_sha256"


def save_exchange(model: ThreadedLM, folder: Path) -> None:
    """Write both files; each appears whole or not at all, and neither if there is no room for both."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.exchanges.state_dict().items()}
    content = save(tensors)
    settings = {**_settings(model), CHECKSUM: hashlib.sha256(content).hexdigest()}
    with whole_file(folder / SETTINGS) as first, whole_file(folder / WEIGHTS) as second:
        first.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        second.write_bytes(content)


def load_exchange(model: ThreadedLM, folder: Path) -> None:
    """Check everything, then load.

    Raises:
        ValueError: a file is missing or damaged, or it belongs to other settings; the message names both.
    """
    settings = _read_settings(folder)
    tensors, checksum = _read_tensors(folder)
    ours = _settings(model)
    if settings.get("exchange") == ours["exchange"] and isinstance(config := settings.get("config"), dict):
        # A setting that is younger than the file was at its default.
        settings["config"] = {f.name: f.default for f in fields(model.exchange_config) if f.name != "backend"} | config
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
    if settings.get(CHECKSUM, checksum) != checksum:  # files of before checksums were kept have none
        raise ValueError(f"the exchange in {folder} is damaged: {WEIGHTS} does not have the checksum in {SETTINGS}")
    model.exchanges.load_state_dict(tensors)


def read_exchange_config(folder: str | Path) -> tuple[ExchangeConfig, list[int]]:
    """Settings and lattice layers of a saved exchange, from which to build a model that can load it.

    The file names a class among the imported subclasses of :class:`~lace_lightning.exchange.ExchangeConfig`: ours, and
    your own once you have imported them. Nothing is imported for its sake, and the backend is the default one.

    Raises:
        ValueError: the file is missing or damaged, or names a class or a setting that does not exist.
    """
    path = Path(folder) / SETTINGS
    settings = _read_settings(Path(folder))
    name, values, layers = (settings.get(key) for key in ("exchange", "config", "layers"))
    known = {config.__name__: config for config in _subclasses(ExchangeConfig)}  # type: ignore[type-abstract]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path}: exchange {name!r} is none of {', '.join(sorted(known))}: import its class first")
    if not isinstance(values, dict) or not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise ValueError(f"{path} is damaged: config must be an object and layers a list of whole numbers")
    try:
        return known[name](**values), layers
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from error


def _subclasses(base: type[ExchangeConfig]) -> list[type[ExchangeConfig]]:
    return [config for direct in base.__subclasses__() for config in (direct, *_subclasses(direct))]


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(folder / SETTINGS) from error
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"the exchange in {folder} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / SETTINGS} is damaged: it must hold an object")
    return settings


def _read_tensors(folder: Path) -> tuple[dict[str, Any], str]:
    """The tensors, and the checksum of their file."""
    try:
        content = (folder / WEIGHTS).read_bytes()
        return load(content), hashlib.sha256(content).hexdigest()
    except FileNotFoundError as error:
        raise _missing(folder / WEIGHTS) from error
    except SafetensorError as error:
        raise ValueError(f"the exchange in {folder} is damaged: {error}") from error


def _missing(path: Path) -> ValueError:
    return ValueError(f"{path} is missing: give the folder that save_exchange wrote")


def _settings(model: ThreadedLM) -> dict[str, Any]:
    """What the weights' meaning depends on; the backend does not belong to it."""
    config = {key: value for key, value in asdict(model.exchange_config).items() if key != "backend"}
    return {"exchange": type(model.exchange_config).__name__, "config": config, "layers": model.layers}

"""What ``lace doctor`` looks at besides memory: whether all that a run needs is there before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from lace_lightning.cli.planned import count_of_devices, engine_of
from lace_lightning.lattice import LatticeMask
from lace_lightning.memory import Run
from lace_lightning.modules import LatticeGRPO, ThreadedModule
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.tracking.redact import redact_uri

State = Literal["ok", "note", "failed"]
FILES = (".jsonl", ".jsonl.gz", ".parquet", ".ckpt", ".safetensors")
"""Endings of options that name a file."""


@dataclass(frozen=True)
class Check:
    """One finding: ``failed`` ones keep a run from starting, or from ending well."""

    name: str
    state: State
    detail: str


def checks_of_settings(settings: Mapping[str, Any], on_cuda: bool) -> Iterator[Check]:
    """What can be looked at before anything is made.

    Args:
        settings: the whole parsed configuration.
        on_cuda: whether the run takes GPUs.
    """
    yield versions()
    yield devices(settings["trainer"], on_cuda)
    yield weights(settings["model"]["init_args"]["spec"].get("backbone"))
    yield files(settings)
    yield tracking(settings["trainer"])


def checks_of_stage(
    module: ThreadedModule, settings: Mapping[str, Any], run: Run, outline: ThreadedLM
) -> Iterator[Check]:
    """What needs the stage itself.

    Args:
        module: the stage, not set up.
        settings: the whole parsed configuration.
        run: the stage in the terms of the memory model.
        outline: its model on the meta device.
    """
    yield disk(settings["trainer"], run)
    yield lattice_backend(module, run)
    yield engine(module, outline, run.on_cuda)


def versions() -> Check:
    """Whether what is installed is what the package asks for."""
    from packaging.requirements import Requirement

    names = ("torch", "transformers", "lightning", "triton", "flash-attn-4", "mlflow")
    found = ", ".join(f"{name} {_version(name) or 'missing'}" for name in names)
    try:
        asked = [Requirement(line) for line in metadata.requires("lace-lightning") or ()]
    except metadata.PackageNotFoundError:
        asked = []  # a checkout that was never installed
    wrong = [
        f"{asked_for.name} {_version(asked_for.name) or 'missing'} (needs {asked_for.specifier})"
        for asked_for in asked
        if asked_for.marker is None and not asked_for.specifier.contains(_version(asked_for.name) or "0", True)
    ]
    return Check("versions", "failed" if wrong else "ok", "; ".join(wrong) or found)


def _version(name: str) -> str | None:
    try:
        return torch.__version__.partition("+")[0] if name == "torch" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices(trainer: Mapping[str, Any], on_cuda: bool) -> Check:
    """Whether the machine has the devices that the run asks for."""
    wanted, nodes = count_of_devices(trainer), int(trainer.get("num_nodes") or 1)
    if not on_cuda:
        return Check("devices", "ok", f"CPU, {wanted} process{'es' if wanted > 1 else ''}")
    here = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(index) for index in range(here)}
    if not here:
        return Check("devices", "note", f"{wanted} GPUs wanted, none on this machine: planning for another one")
    detail = f"{wanted} GPUs wanted on {nodes} hosts, {here} here: {', '.join(sorted(names))}"
    return Check("devices", "failed" if wanted > here * nodes else "ok", detail)


def weights(backbone: str | None) -> Check:
    """Whether the backbone's weights lie on this machine."""
    if backbone is None:
        return Check("backbone", "ok", "random weights (model.spec.architecture)")
    from transformers.utils import cached_file

    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        found = cached_file(backbone, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if found is not None:
            return Check("backbone", "ok", f"{backbone}: {Path(found).parent}")
    return Check("backbone", "failed", f"{backbone} is not on this machine: fetch it first (hf download {backbone})")


def files(settings: Mapping[str, Any]) -> Check:
    """Whether the files exist that options of data and model name."""
    named = [*_named_files(settings["data"], "data"), *_named_files(settings["model"], "model")]
    missing = [f"{option}={path}" for option, path in named if not Path(path).expanduser().exists()]
    if missing:
        return Check("files", "failed", f"not there: {', '.join(missing)}")
    return Check("files", "ok", ", ".join(path for _, path in named) or "none needed")


def _named_files(value: Any, option: str) -> Iterator[tuple[str, str]]:
    """(option, path) of every option that names a file."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _named_files(part, option if name == "init_args" else f"{option}.{name}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _named_files(part, f"{option}[{index}]")
    elif isinstance(value, str) and value.endswith(FILES):
        yield option, value


def tracking(trainer: Mapping[str, Any]) -> Check:
    """Whether the tracking server answers."""
    logger = _mlflow_logger(trainer)
    if logger is None:
        return Check("tracking", "note", f"trainer.logger={trainer.get('logger')}: nothing goes to MLflow")
    from lace_lightning.tracking import store

    try:
        uri = store.resolve_tracking_uri(logger.get("init_args", {}).get("tracking_uri"))
        if store.is_server(uri):
            store.check(store.connect(uri), uri)
    except (ValueError, store.TrackingError) as error:
        return Check("tracking", "failed", str(error))
    return Check("tracking", "ok", f"{redact_uri(uri)}{' answers' if store.is_server(uri) else ''}")


def _mlflow_logger(trainer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the run's MLflow logger, the first if there are several."""
    loggers = trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Mapping) and str(logger.get("class_path", "")).endswith("MLflowLogger"):
            return logger
    return None


def disk(trainer: Mapping[str, Any], run: Run) -> Check:
    """Whether the run's checkpoints fit on its disk, with one more that is being written."""
    folder = Path(_run_folder(trainer)).absolute()
    while not folder.exists():
        folder = folder.parent
    each = 3 * run.shape.trained * run.precision.weights
    count = _kept_checkpoints(trainer) + 1
    free, needed = shutil.disk_usage(folder).free, count * each
    detail = (
        f"{count} checkpoints of {each / 1e9:.2f} GB need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB free at {folder}"
    )
    return Check("disk", "failed" if needed > free else "ok", detail)


def _run_folder(trainer: Mapping[str, Any]) -> str:
    settings = (_mlflow_logger(trainer) or {}).get("init_args", {})
    return settings.get("save_dir") or trainer.get("default_root_dir") or "."


def _kept_checkpoints(trainer: Mapping[str, Any]) -> int:
    """Checkpoints that stay on the disk at once; without a limit one per thousand steps is no help: then a dozen."""
    count = 0
    for callback in trainer.get("callbacks") or []:
        if str(callback.get("class_path", "")).endswith("Checkpoint"):
            settings = callback.get("init_args", {})
            best = settings.get("save_top_k", 1)
            count += (12 if best == -1 else best) + bool(settings.get("save_last"))
    return count or int(trainer.get("enable_checkpointing") is not False)


def lattice_backend(module: ThreadedModule, run: Run) -> Check:
    """Which backend of lattice attention a training pass takes, and why."""
    from lace_lightning.exchange import LatticeAttentionConfig
    from lace_lightning.exchange.backends import Heads, fastest
    from lace_lightning.exchange.flash import installed

    config, batch = module.spec.exchange, run.training
    if not isinstance(config, LatticeAttentionConfig) or batch is None:
        return Check("lattice attention", "ok", f"{type(config).__name__}: no backend to choose")
    kernel = f"FlashAttention here: {installed()}"
    if config.backend != "auto":
        return Check("lattice attention", "ok", f"backend {config.backend}, as named; {kernel}")
    if run.on_cuda and not torch.cuda.is_available():
        return Check("lattice attention", "note", f"chosen on the GPU machine, for its kernels; {kernel}")
    keys = batch.threads * max(1, batch.columns - batch.prompt)
    rows = (batch.columns, batch.threads) if config.scope == "aligned" else (1, keys)
    visible = torch.ones(rows, dtype=torch.bool, device="cuda" if run.on_cuda else "cpu")
    dtype = torch.bfloat16 if run.precision.compute == 2 else torch.float32
    name, why = fastest(
        LatticeMask(config.topology, batch.threads, visible, 0, rows[1]), Heads(config.heads, config.dim, dtype)
    )
    return Check("lattice attention", "ok", f"backend {name}: {why}; {kernel}")


def engine(module: ThreadedModule, outline: ThreadedLM, on_cuda: bool) -> Check:
    """Which engine decodes, and what keeps the fast one from it."""
    from lace_lightning.engine import obstacle

    spec = module.rollout if isinstance(module, LatticeGRPO) else module.validation
    reason = obstacle(outline, "cuda" if on_cuda and torch.cuda.is_available() else "cpu")
    chosen = engine_of(spec, outline, on_cuda)
    if chosen != "plain":
        return Check("decoding", "ok", f"fast engine ({'CUDA graphs' if chosen == 'graphs' else 'plain torch'})")
    why = "as named" if spec.engine == "plain" else f"the fast one cannot: {reason}"
    return Check("decoding", "failed" if spec.engine == "fast" else "note", f"plain engine, {why}")

"""Putting a run's model into MLflow's registry."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lace_lightning import __version__
from lace_lightning.decoding import DecodingSpec
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem
from lace_lightning.tracking import store
from lace_lightning.tracking.group_model import FILES, input_row, save_group_model
from lace_lightning.tracking.store import TrackingError
from lace_lightning.tracking.weights import model_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature


def register(
    model: ThreadedLM,
    task: dict[str, Any],
    decoding: DecodingSpec,
    max_length: int,
    example: Problem,
    name: str,
    run_id: str,
    tracking_uri: str | None = None,
) -> tuple[str, str]:
    """Add the files of a pyfunc model to the logged model of the run, and register it.

    Args:
        model, task, decoding, max_length: see :func:`~lace_lightning.tracking.group_model.save_group_model`.
        example: the input example.
        name: of the registered model; created if there is none.
        run_id: the run that wrote the model's checkpoint.
        tracking_uri: as of :class:`~lace_lightning.tracking.MLflowLogger`.

    Returns:
        Version, and the URI to load it by.

    Raises:
        TrackingError: the store does not answer, has no room, or does not know the run's checkpoint. Nothing is
            registered then.
        OSError: the temporary folder has no room.
    """
    uri = store.resolve_tracking_uri(tracking_uri)
    client = store.connect(uri)
    store.check(client, uri)
    with store.remedies(uri):
        model_id = model_of(client, run_id)
    if model_id is None:
        raise TrackingError(
            f"{store.redact_uri(uri)} does not know the checkpoint of run {run_id}: send what is left with `lace sync` "
            "or name the store of the run with --tracking_uri"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, FILES)
        try:
            save_group_model(model, task, decoding, max_length, files)
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}; TMPDIR names another folder") from error
        save_pyfunc(files, example, Path(folder, "model"))
        with store.remedies(uri):
            client.log_model_artifacts(model_id, str(Path(folder, "model")))
    with store.remedies(uri):
        version = _new_version(client, name, run_id, model_id)
    return version, f"models:/{name}/{version}"


def _new_version(client: MlflowClient, name: str, run_id: str, model_id: str) -> str:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    # Not models:/<id>, which MLflow's sqlite store looks up in the process's global store.
    source = client.get_logged_model(model_id).artifact_location
    return str(client.create_model_version(name, source, run_id, model_id=model_id).version)


def save_pyfunc(files: Path, example: Problem, folder: Path) -> None:
    """Write an MLflow model of the files of a group model, with an input example."""
    import mlflow.pyfunc

    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={FILES: str(files)},
        input_example=([input_row(example)], {"seed": 0}),
        signature=_signature(),
        pip_requirements=[f"lace-lightning=={__version__}"],
    )


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    optional = [ColSpec("string", name, required=False) for name in ("id", "answer", "facts")]
    return ModelSignature(
        inputs=Schema([ColSpec("string", "text"), *optional]),
        params=ParamSchema([ParamSpec("seed", "long", 0)]),
    )

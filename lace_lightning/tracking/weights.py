"""Weights as MLflow's logged models: what joins a metric to the checkpoint, and a run to those that it starts from.

A run that trains has one logged model, its last checkpoint. It is found by the run: sending twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lace_lightning.tracking.store import run_or_none

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MODEL_NAME = "weights"


def model_of(client: MlflowClient, run_id: str) -> str | None:
    """Id of the logged model that a run wrote; None if there is none."""
    run = run_or_none(client, run_id)
    if run is None:
        return None
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'", max_results=10)
    ids = [model.model_id for model in found if model.name == MODEL_NAME]
    return ids[0] if ids else None


def send_weights(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    """Make the run's logged model, or bring its tags up to date, and link the run's last metrics to it."""
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    model_id = model_of(client, run_id)
    if model_id is None:
        experiment_id = run.info.experiment_id
        model = client.create_logged_model(experiment_id, MODEL_NAME, run_id, model_type="checkpoint")
        model_id = model.model_id
    client.set_logged_model_tags(model_id, {"run_id": run_id, "step": str(record["step"]), **record["tags"]})
    client.finalize_logged_model(model_id, "READY")
    if model_id not in {output.model_id for output in _linked(run, "outputs")}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, record["step"])])
    # The same values at the same times: the run's own history stays as it is.
    values = record["values"].items()
    metrics = [Metric(name, value, time, step, model_id=model_id) for name, (value, time, step) in values]
    client.log_batch(run_id, metrics=metrics)


def send_uses(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    """Note which logged models a run takes in; one that the store does not have (yet) is left out."""
    from mlflow.entities import LoggedModelInput

    there = {model.model_id for model in _linked(client.get_run(run_id), "inputs")}
    models = [model_of(client, other) for other in record["runs"]]
    new = [LoggedModelInput(model_id) for model_id in models if model_id is not None and model_id not in there]
    if new:
        client.log_inputs(run_id, models=new)


def _linked(run: Any, side: str) -> list[Any]:
    """The logged models that go into (``inputs``) or come out of (``outputs``) a run."""
    linked = getattr(run, side)
    return [] if linked is None else list(getattr(linked, f"model_{side}") or [])

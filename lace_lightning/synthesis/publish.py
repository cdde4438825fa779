"""The data card in MLflow: numbers as metrics, the files as artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lace_lightning.synthesis.card import Card


def publish(card: Card, folder: Path, run_name: str, tracking_uri: str, experiment_name: str) -> None:
    """Log the card that stands in ``folder`` as a finished run.

    Raises:
        TrackingError: the store cannot be used.
    """
    from lace_lightning.tracking.store import connect, open_run, resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    client = connect(uri)
    run_id = open_run(client, uri, experiment_name, run_name, {"lace.kind": "synthesis"}).info.run_id
    client.log_param(run_id, "teacher", card["teacher"]["identity"][:500])
    for name, value in metrics_of(card).items():
        client.log_metric(run_id, name, value)
    for file in ("card.md", "card.json"):
        client.log_artifact(run_id, str(folder / file))
    client.set_terminated(run_id)


def metrics_of(card: Card) -> dict[str, float]:
    """The card's numbers by name."""
    traces = card["traces"]
    stages = {f"stages/{name}": stage["kept"] for name, stage in card["stages"].items()}
    numbers: Mapping[str, Any] = (
        stages
        | {
            "traces": traces["num_traces"],
            "diversity/edit_distance": traces["diversity"]["edit_distance"],
            "diversity/embedding_dissimilarity": traces["diversity"]["embedding_dissimilarity"],
            "diversity_before/edit_distance": card["diversity_before"]["edit_distance"],
            "diversity_before/embedding_dissimilarity": card["diversity_before"]["embedding_dissimilarity"],
            "S/mean": card["S"]["mean"],
            "judging/disagree_on_best": card["judging"]["disagree_on_best"],
            "cost/price": card["cost"]["price"],
        }
        | {f"tags/{tag.strip('[]')}": share for tag, share in traces["tags"].items()}
    )
    return {name: float(value) for name, value in numbers.items() if value is not None}

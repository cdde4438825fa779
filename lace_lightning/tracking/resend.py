"""Sending what an earlier run could not: ``lace sync``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lace_lightning.tracking import store
from lace_lightning.tracking.redact import redact_uri
from lace_lightning.tracking.sender import drain
from lace_lightning.tracking.spool import HEADER, RECORDS, alone
from lace_lightning.tracking.spool_reader import SpoolReader

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


class Replayed(NamedTuple):
    """What became of one spool: the number of records sent, and why others were left, if any were."""

    folder: Path
    sent: int
    problem: str = ""


def find_spools(folder: Path) -> list[Path]:
    """The spools at or below ``folder``."""
    return sorted(path.parent for path in folder.rglob(HEADER) if path.parent.name == "spool")


def replay(folder: Path, tracking_uri: str | None = None) -> Replayed:
    """Send what is left in one spool. A run that died without a word (kill -9, power cut) is ended as KILLED.

    Args:
        folder: the spool.
        tracking_uri: the store, where it has moved or needs a password, which a spool does not keep.
    """
    try:
        with alone(folder):
            return _replay(SpoolReader(folder), tracking_uri)
    except BlockingIOError:
        return Replayed(folder, 0, "a run is still writing it and sends by itself")
    except (OSError, ValueError) as error:  # run.json, or the disk
        return Replayed(folder, 0, str(error))


def _replay(reader: SpoolReader, tracking_uri: str | None) -> Replayed:
    uri = store.resolve_tracking_uri(tracking_uri or reader.tracking_uri)
    waiting = reader.pending()
    try:
        client = store.connect(uri)
        drain(client, reader)
        _end_if_dead(client, reader)
    except Exception as error:  # whatever a store may raise; the spool keeps the rest
        sent = waiting - reader.pending()
        return Replayed(reader.folder, sent, f"{redact_uri(uri)} does not take records: {redact_uri(str(error))}")
    return Replayed(reader.folder, waiting)


def _end_if_dead(client: MlflowClient, reader: SpoolReader) -> None:
    if client.get_run(reader.run_id).info.status == "RUNNING":
        died_at = int((reader.folder / RECORDS).stat().st_mtime * 1000)
        client.set_terminated(reader.run_id, "KILLED", died_at)

"""Where studies lie: sqlite for one machine or PostgreSQL for many, and a lock over one of them.

The lock is PostgreSQL's advisory one, or one beside the sqlite file.
"""

from __future__ import annotations

import fcntl
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from lace_lightning.sweep.spec import SweepError
from lace_lightning.tracking.redact import redact_uri


class Storage:
    """The storage of a study; ``optuna`` is what Optuna makes of it.

    Args:
        url: ``sqlite:///file`` or ``postgresql://…``.
        name: of the study that the lock is over.
        heartbeat: seconds between signs of life; after three times as long without any a trial is stale.

    Raises:
        SweepError: it cannot be used.
    """

    def __init__(self, url: str, name: str, heartbeat: int) -> None:
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)  # SQLAlchemy's default is the driver before it
        self._lock_file = _lock_file(url)
        self._name = name
        with _remedies(url):
            self._locks = create_engine(url)
            with self.alone():  # making the tables is not safe beside others
                self.optuna = _open(url, heartbeat)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is inside of this at the same time."""
        if self._lock_file is not None:
            with self._lock_file.open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            return
        key = {"key": zlib.crc32(self._name.encode())}
        with self._locks.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), key)
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)


def _open(url: str, heartbeat: int) -> RDBStorage:
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with quiet():
        return RDBStorage(url, options, heartbeat_interval=heartbeat, grace_period=3 * heartbeat)


@contextmanager
def _remedies(url: str) -> Iterator[None]:
    """Say what to do when the storage does not work."""
    try:
        yield
    except ImportError as error:
        raise SweepError(f"storage {redact_uri(url)} needs a driver: pip install 'lace-lightning[postgres]'") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise SweepError(f"storage {redact_uri(url)} cannot be used: {cause}") from error


def _lock_file(url: str) -> Path | None:
    """The lock beside an sqlite file, whose folder is made; None for PostgreSQL.

    Raises:
        SweepError: it is neither.
    """
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f"{path.name}.lock")
    if url.startswith(("postgresql://", "postgresql+")):
        return None
    raise SweepError(f"storage {redact_uri(url)} is neither sqlite:///FILE nor postgresql://USER@HOST/DATABASE")


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings that heartbeats are experimental, and meant for its own loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield

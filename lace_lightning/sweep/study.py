"""Bookkeeping by Optuna: which trial is whose, in sqlite for one machine or PostgreSQL for many.

A claim looks at all trials and takes one, while nobody else does: PostgreSQL's advisory lock, or a lock beside the
sqlite file, sees to that. A worker proves by heartbeats that it lives; the trial of one that stopped is taken over.
"""

from __future__ import annotations

import fcntl
import os
import platform
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import optuna
import psutil
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from lace_lightning.sweep.spec import SweepError
from lace_lightning.tracking.redact import redact_uri

UNIT, LABEL, SEEDS, WORKER, ERROR, OUTCOME = "unit", "label", "seeds", "worker", "error", "outcome"
SEARCH, PARENT = "search", "parent"
"""Attributes of trials, and of the study."""

Direction = Literal["maximize", "minimize"]
State = Literal["open", "running", "finished", "failed"]


@dataclass(frozen=True)
class Unit:
    """What one Optuna trial stands for.

    Args:
        key: equal for equal work.
        label: of the row.
        seeds: that are run.
    """

    key: str
    label: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """A trial that is ours to run."""

    unit: Unit
    number: int
    trial_id: int
    params: Mapping[str, Any]


class Ledger:
    """A sweep's study.

    Args:
        url: ``sqlite:///file`` or ``postgresql://…``.
        name: of the study; who gives the same shares it.
        direction: ``maximize`` or ``minimize``.
        heartbeat: seconds between signs of life; a trial without any for three times as long is taken over.
        search_seed: of Optuna's sampler.
        search: what the sampler draws from, as text; it must stay the same.

    Raises:
        SweepError: the storage cannot be used, or holds another search under this name.
    """

    def __init__(
        self, url: str, name: str, direction: Direction, heartbeat: int = 20, search_seed: int = 0, search: str = ""
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)  # SQLAlchemy's default is the driver before it
        self._lock_file = _lock_file(url)
        self._heartbeat = heartbeat
        self._name = name
        with _remedies(url):
            self._locks = create_engine(url)
            with self.alone():  # making the tables is not safe beside others
                self._storage = self._open(url)
        with self.alone():
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction=direction,
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=search_seed, constant_liar=True),
            )
            if self.study.user_attrs.setdefault(SEARCH, search) != search:
                raise SweepError(f"{name} in {url} is another search: give this one another name or storage")
            self.study.set_user_attr(SEARCH, search)

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

    def states(self) -> dict[str, tuple[State, FrozenTrial]]:
        """State and latest trial by unit."""
        latest = {trial.user_attrs[UNIT]: trial for trial in self.trials() if UNIT in trial.user_attrs}
        return {key: (_state(trial), trial) for key, trial in latest.items()}

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def claim(self, units: Sequence[Unit], retry: frozenset[int] = frozenset()) -> Claim | None:
        """The first unit that nobody has finished, failed or is at; None if there is none.

        Args:
            units: in order.
            retry: numbers of failed trials that are to be run again.
        """
        with self.alone():
            self._release_the_dead()
            states = self.states()
            for unit in units:
                state, before = states.get(unit.key, ("open", None))
                if state == "open" or (state == "failed" and before is not None and before.number in retry):
                    return self._begin(unit, self._ask())
        return None

    def claim_suggestion(
        self,
        space: dict[str, BaseDistribution],
        limit: int,
        unit_of: Callable[[Mapping[str, Any]], Unit],
        retry: frozenset[int] = frozenset(),
    ) -> Claim | None:
        """A unit that a dead worker left, or one that Optuna suggests; None once there are ``limit`` of them.

        Args:
            space: what Optuna draws from.
            limit: most units.
            unit_of: the unit of what it drew; its key is replaced by the trial's number.
            retry: numbers of failed trials that are to be run again.
        """
        with self.alone():
            self._release_the_dead()
            states = self.states()
            for key, (state, before) in states.items():
                if state == "open" or (state == "failed" and before.number in retry):
                    self.study.enqueue_trial(before.params)
                    trial = self._ask(space)
                    return self._begin(replace(unit_of(trial.params), key=key), trial)
            if len(states) >= limit:
                return None
            trial = self._ask(space)
            return self._begin(replace(unit_of(trial.params), key=f"suggestion {trial.number}"), trial)

    def _ask(self, space: dict[str, BaseDistribution] | None = None) -> optuna.Trial:
        with _quiet():
            return self.study.ask(space)

    def _begin(self, unit: Unit, trial: optuna.Trial) -> Claim:
        self._storage.record_heartbeat(trial._trial_id)
        for name, value in ((WORKER, _me()), (LABEL, unit.label), (SEEDS, unit.seeds), (UNIT, unit.key)):
            trial.set_user_attr(name, value)
        return Claim(unit, trial.number, trial._trial_id, trial.params)

    @contextmanager
    def alive(self, claim: Claim) -> Iterator[None]:
        """Send heartbeats for a trial while it runs."""
        ended = Event()

        def beat() -> None:
            while not ended.wait(self._heartbeat):
                with suppress(optuna.exceptions.StorageInternalError, SQLAlchemyError):  # the next one may get through
                    self._storage.record_heartbeat(claim.trial_id)

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self, claim: Claim, value: float, outcome: Mapping[str, Any]) -> bool:
        """Record what came out; False if another worker has taken the trial over."""
        return self._tell(claim, OUTCOME, outcome, value)

    def fail(self, claim: Claim, error: str) -> bool:
        """Record that the trial itself failed: it is not run again unless it is asked for."""
        return self._tell(claim, ERROR, error, None)

    def give_back(self, claim: Claim) -> bool:
        """Let the trial go on another time."""
        return self._tell(claim, WORKER, None, None)

    def _tell(self, claim: Claim, name: str, content: Any, value: float | None) -> bool:
        try:
            self._storage.set_trial_user_attr(claim.trial_id, name, content)
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            self.study.tell(claim.number, value, state=state)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError, RuntimeError):
            if self._storage.get_trial(claim.trial_id).state.is_finished():
                return False
            raise
        return True

    def _release_the_dead(self) -> None:
        """End the trials of processes that stopped: by missing heartbeats, on this machine at once."""
        with _quiet():
            fail_stale_trials(self.study)
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and _is_dead(trial.user_attrs.get(WORKER)):
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _open(self, url: str) -> RDBStorage:
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        with _quiet():
            return RDBStorage(url, options, heartbeat_interval=self._heartbeat, grace_period=3 * self._heartbeat)


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


def _state(trial: FrozenTrial) -> State:
    if trial.state == TrialState.COMPLETE:
        return "finished"
    if trial.state == TrialState.FAIL:
        return "failed" if ERROR in trial.user_attrs else "open"
    return "running"


def _me() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": _host(), "pid": process.pid, "started": process.create_time()}


def _host() -> str:
    """This machine, and which of its containers: process ids mean something in there alone."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {os.readlink(space) if space.is_symlink() else ''}".strip()


def _is_dead(worker: Mapping[str, Any] | None) -> bool:
    """Whether a worker of this machine is gone; of others nothing is known."""
    if worker is None or worker["host"] != _host():
        return False
    try:
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1
    except psutil.NoSuchProcess:
        return True


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
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that heartbeats are experimental, and meant for its own loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield

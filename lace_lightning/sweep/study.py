"""Bookkeeping by Optuna: which trial is whose.

A claim looks at all trials and takes one, while nobody else does: the storage's lock sees to that. A worker proves by
heartbeats that it lives; the trial of one that stopped is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event, Thread
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from lace_lightning.sweep.spec import SweepError
from lace_lightning.sweep.storage import Storage, quiet
from lace_lightning.sweep.units import Claim, Unit
from lace_lightning.sweep.worker import is_dead, this_worker
from lace_lightning.tracking.redact import redact_uri

UNIT, LABEL, SEEDS, WORKER, ERROR, OUTCOME = "unit", "label", "seeds", "worker", "error", "outcome"
SEARCH, PARENT = "search", "parent"
"""Attributes of trials, and of the study."""

Direction = Literal["maximize", "minimize"]
State = Literal["open", "running", "finished", "failed"]


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
        self._heartbeat = heartbeat
        store = Storage(url, name, heartbeat)
        self.alone, self._storage = store.alone, store.optuna
        with self.alone():
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction=direction,
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=search_seed, constant_liar=True),
            )
            if self.study.user_attrs.setdefault(SEARCH, search) != search:
                raise SweepError(
                    f"{name} in {redact_uri(url)} is another search: give this one another name or storage"
                )
            self.study.set_user_attr(SEARCH, search)

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
        with quiet():
            return self.study.ask(space)

    def _begin(self, unit: Unit, trial: optuna.Trial) -> Claim:
        self._storage.record_heartbeat(trial._trial_id)
        for name, value in ((WORKER, this_worker()), (LABEL, unit.label), (SEEDS, unit.seeds), (UNIT, unit.key)):
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
        with quiet():
            fail_stale_trials(self.study)
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and is_dead(trial.user_attrs.get(WORKER)):
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _state(trial: FrozenTrial) -> State:
    if trial.state == TrialState.COMPLETE:
        return "finished"
    if trial.state == TrialState.FAIL:
        return "failed" if ERROR in trial.user_attrs else "open"
    return "running"

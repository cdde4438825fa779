"""Workers that claim trials, run them, and write the table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Any

from lace_lightning.evaluation.store import StoreError
from lace_lightning.sweep.outcome import OUTCOMES, measure, statistics_of, value_of
from lace_lightning.sweep.plan import Trial, plan, plan_trial
from lace_lightning.sweep.points import distributions, suggested
from lace_lightning.sweep.process import CommandFailed, Room, Stopped
from lace_lightning.sweep.result import result_of, write
from lace_lightning.sweep.spec import SweepError, SweepSpec
from lace_lightning.sweep.store import Store
from lace_lightning.sweep.study import PARENT, Ledger
from lace_lightning.sweep.table import Result
from lace_lightning.sweep.tracking import environment_of, log_result, open_parent
from lace_lightning.sweep.units import Claim, Unit
from lace_lightning.tracking import TrackingError

WAIT_SECONDS = 2.0
"""Between looks at the study while only others work."""


@dataclass(frozen=True)
class RunOptions:
    """How this machine takes part.

    Args:
        source: the sweep's file, as it was given.
        storage: of the study; None: an sqlite file in the sweep's folder.
        workers: trials at once.
        gpus: handed to the workers in turn through CUDA_VISIBLE_DEVICES; empty: every worker sees all.
        retry_failed: run trials again that had failed before.
        heartbeat: seconds between signs of life.
    """

    source: str
    storage: str | None = None
    workers: int = 1
    gpus: Sequence[str] = ()
    retry_failed: bool = False
    heartbeat: int = 20


@dataclass
class Runner:
    """One machine's part of a sweep.

    Args:
        sweep: what to run.
        options: how.
        tell: is told what happens.
    """

    sweep: SweepSpec
    options: RunOptions
    tell: Callable[[str], None] = print
    stop: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.units: list[Unit] = []
        self.trials: dict[str, Trial] = {}
        for trial in plan(self.sweep):  # rows may have equal settings: they share one trial
            self.units.append(unit := _unit(self.sweep, trial))
            self.trials.setdefault(unit.key, trial)
        self.folder = Path(self.sweep.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        url = self.options.storage or f"sqlite:///{self.folder}/study.db"
        self.ledger = Ledger(
            url, self.sweep.name, self.sweep.direction, self.options.heartbeat, self.sweep.search_seed, self._search()
        )
        failed = [before.number for state, before in self.ledger.states().values() if state == "failed"]
        self.retry = frozenset(failed if self.options.retry_failed else [])
        self.parent = self._parent()
        minutes = self.sweep.limits.total_minutes
        self.ends = time.monotonic() + 60 * minutes if minutes else float("inf")

    def run(self) -> Result:
        """Run trials until none is left, then write the table; a stop writes it too."""
        with ThreadPoolExecutor(self.options.workers) as pool:
            workers = [pool.submit(self._work, index) for index in range(self.options.workers)]
            try:
                while not all(worker.done() for worker in workers):
                    if time.monotonic() > self.ends and not self.stop.is_set():
                        self.tell("limits.total_minutes is over: the same command goes on")
                        self.stop.set()
                    time.sleep(0.1)
            finally:
                self.stop.set()
        for worker in workers:
            worker.result()
        return self.write()

    def write(self) -> Result:
        """Write table and figure of what there is."""
        result = result_of(self.sweep, self.ledger, self.units)
        write(result, self.folder)
        if self.parent is not None and self.sweep.tracking is not None:
            try:
                log_result(self.sweep.tracking, self.parent, result, self.folder, self.options.source)
            except TrackingError as error:
                self.tell(
                    f"The report is in {self.folder}, and not in MLflow; the same command sends it again. {error}"
                )
        return result

    def outcomes_of(self, label: str) -> Path | None:
        """Folder of the evaluation of a planned row with its first seed; None for rows that Optuna suggested."""
        key = next((unit.key for unit in self.units if unit.label == label), None)
        return None if key is None else store_folder(self.sweep) / self.trials[key].folder / OUTCOMES

    def _work(self, index: int) -> None:
        is_waiting = False
        while not self.stop.is_set():
            claim = self._claim()
            if claim is not None:
                self._run(claim, index)
            elif not any(state == "running" for state, _ in self.ledger.states().values()):
                return
            elif not is_waiting:
                is_waiting = True
                self.tell("no trial is left; waits for those of other workers, to take over what they leave")
            else:
                self.stop.wait(WAIT_SECONDS)

    def _claim(self) -> Claim | None:
        if self.sweep.search != "tpe":
            return self.ledger.claim(self.units, self.retry)
        return self.ledger.claim_suggestion(
            distributions(self.sweep), self.sweep.limits.trials, self._unit_of, self.retry
        )

    def _unit_of(self, params: Mapping[str, Any]) -> Unit:
        return Unit("", suggested(self.sweep, params).label, tuple(self.sweep.seeds))

    def _run(self, claim: Claim, index: int) -> None:
        name = f"{claim.unit.label}, seed {', '.join(map(str, claim.unit.seeds))}"
        store = self._store(index, name)
        start = time.monotonic()
        try:
            with self.ledger.alive(claim):
                outcomes = {str(trial.seed): measure(self.sweep, store.run(trial)) for trial in self._trials_of(claim)}
            value = value_of(self.sweep, list(outcomes.values()))
        except Stopped:
            self.ledger.give_back(claim)
        except (CommandFailed, SweepError, StoreError) as error:
            self.tell(f"{name}: failed: {error}")
            self.ledger.fail(claim, str(error))
        except BaseException:
            self.ledger.give_back(claim)
            raise
        else:
            is_ours = self.ledger.finish(claim, value, outcomes)
            spent = f"{time.monotonic() - start:.0f} s"
            end = f"{self.sweep.metric} {value:.3f}, {spent}" if is_ours else "another worker had taken it over"
            self.tell(f"{name}: {end}")

    def _trials_of(self, claim: Claim) -> list[Trial]:
        if claim.unit.key in self.trials:
            return [self.trials[claim.unit.key]]
        point = suggested(self.sweep, claim.params)
        return [plan_trial(self.sweep, point, seed) for seed in claim.unit.seeds]

    def _store(self, index: int, name: str) -> Store:
        minutes = self.sweep.limits.trial_minutes
        deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        room = Room(self._environment(index), deadline, self.stop)
        return Store(store_folder(self.sweep), room, self.sweep.tracking, lambda what: self.tell(f"{name}: {what}"))

    def _environment(self, index: int) -> dict[str, str]:
        """Workers share cores and GPUs, unless the user has said otherwise."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // self.options.workers)))}
        if self.options.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.options.gpus[index % len(self.options.gpus)]
        return environment | dict(environment_of(self.sweep.tracking, self.parent))

    def _parent(self) -> str | None:
        """The parent run, opened by whoever comes first."""
        if self.sweep.tracking is None:
            return None
        with self.ledger.alone():
            if (known := self.ledger.study.user_attrs.get(PARENT)) is None:
                known = open_parent(self.sweep.tracking, self.sweep, self.options.source)
                self.ledger.study.set_user_attr(PARENT, known)
        return str(known)

    def _search(self) -> str:
        """What must stay the same about a search of Optuna's; planned ones may grow."""
        if self.sweep.search != "tpe":
            return self.sweep.metric
        own = self.sweep
        drawn = (own.axes, own.seeds, own.stages, own.applies_to, own.evaluation)
        told = repr((*drawn, own.metric, own.direction, own.benchmark, own.method))
        return blake2b(told.encode(), digest_size=16).hexdigest()


def store_folder(sweep: SweepSpec) -> Path:
    """Sweeps beside each other share their stages."""
    return Path(sweep.folder).parent / "stages"


def _unit(sweep: SweepSpec, trial: Trial) -> Unit:
    """The trial as it is kept in the study: measured anew, from its folder, where other numbers are asked for."""
    kept = repr((trial.digest, sweep.benchmark, statistics_of(sweep)))
    return Unit(blake2b(kept.encode(), digest_size=20).hexdigest(), trial.point.label, (trial.seed,))

"""Running methods on benchmarks: in batches, resumable per outcome, and past problems that fail."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lace_lightning.decoding import group_seed
from lace_lightning.embedding import Embedder, NgramEmbedder
from lace_lightning.evaluation.judged import ANSWERING, JudgedOutcome, Key, make_judged
from lace_lightning.evaluation.method import Method, Outcome, Policy
from lace_lightning.evaluation.statistics import with_statistics
from lace_lightning.evaluation.store import Failure, Store, StoreError
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem

TRACEBACK_LINES = 12


@dataclass(frozen=True)
class Job:
    """One method on one benchmark with one seed.

    Args:
        benchmark, method_name: as the configuration names them.
        method: the method.
        seed: of all its groups; methods with the same seed start from the same random numbers.
        problems: of the benchmark, all of them.
    """

    benchmark: str
    method_name: str
    method: Method
    seed: int
    problems: Sequence[Problem]

    def key(self, problem: Problem) -> Key:
        return Key(self.benchmark, self.method_name, self.seed, problem.id)

    def pending(self, finished: Mapping[Key, str]) -> list[Problem]:
        """The problems without an outcome.

        Raises:
            StoreError: an outcome that is there is of another problem with the same id.
        """
        for problem in self.problems:
            if finished.get(self.key(problem), problem.text) != problem.text:
                raise StoreError(
                    f"problem {problem.id!r} of benchmark {self.benchmark!r} has another text than when its outcome "
                    "was stored: the data has changed; give this evaluation another output folder"
                )
        return [problem for problem in self.problems if self.key(problem) not in finished]


class Runner:
    """Runs jobs and stores what comes out, batch by batch.

    Args:
        store: gets outcomes and failures.
        batch_size: problems that a method gets at once.
        embedder: for ``expl``.
        on_done: is told how many problems have been dealt with, after each batch.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int = 64,
        embedder: Embedder | None = None,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._store = store
        self._batch_size = batch_size
        self._embedder = embedder or NgramEmbedder()
        self._on_done = on_done

    def run(self, job: Job, policy: Policy, pending: Sequence[Problem]) -> None:
        """Solve the pending problems of a job, those of like length together.

        A batch that raises is done again problem by problem, so that one problem takes no other with it; what then
        fails is stored as a failure.
        """
        ordered = sorted(pending, key=lambda problem: len(problem.text))
        for start in range(0, len(ordered), self._batch_size):
            self._run_batch(job, policy, ordered[start : start + self._batch_size])

    def _run_batch(self, job: Job, policy: Policy, batch: Sequence[Problem]) -> None:
        try:
            records = self._solve(job, policy, batch)
        except Exception as error:  # whatever a method, a model or a judge raises
            _free_memory()
            if len(batch) > 1:
                for problem in batch:
                    self._run_batch(job, policy, [problem])
                return
            self._store.add_failure(_failure(job.key(batch[0]), error))
        else:
            self._store.add(records)
        self._on_done(len(batch))

    def _solve(self, job: Job, policy: Policy, batch: Sequence[Problem]) -> list[JudgedOutcome]:
        seeds = [group_seed("evaluation", job.seed, problem.id) for problem in batch]
        outcomes = job.method.solve(policy, batch, seeds)
        if [outcome.problem.id for outcome in outcomes] != [problem.id for problem in batch]:
            raise RuntimeError(
                f"{type(job.method).__name__} returned {len(outcomes)} outcomes for {len(batch)} problems, or in "
                "another order: a method returns one per problem, in order"
            )
        threads = [passage.thread for outcome in outcomes for passage in outcome.passages]
        inspect = getattr(policy, "take_inspections", lambda threads: [None] * len(threads))
        inspections, verdicts = iter(inspect(threads)), iter(judge(policy, outcomes))
        records = []
        for outcome in outcomes:
            own = [(next(verdicts), next(inspections)) for _ in outcome.passages]
            of_passages = ([verdict for verdict, _ in own], [inspection for _, inspection in own])
            records.append(make_judged(job.benchmark, job.method_name, job.seed, outcome, *of_passages))
        return with_statistics(records, self._embedder)


def judge(policy: Policy, outcomes: Sequence[Outcome]) -> list[Verdict | None]:
    """A verdict for every passage of all outcomes, in order; None for those that do not answer."""
    items = [
        (outcome.problem, passage.thread) if passage.role in ANSWERING or index == outcome.chosen else None
        for outcome in outcomes
        for index, passage in enumerate(outcome.passages)
    ]
    verdicts = iter(policy.task.judge([item for item in items if item is not None]))
    return [None if item is None else next(verdicts) for item in items]


def _failure(key: Key, error: Exception) -> Failure:
    lines = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK_LINES:]
    return Failure(*key, type=type(error).__name__, message=str(error), traceback="\n".join(lines))


def _free_memory() -> None:
    """A batch that was too large for the device leaves its blocks in the allocator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

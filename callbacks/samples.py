"""A few groups of each phase to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.callbacks.reporting import current_step, is_due, mlflow_loggers, sampled_in, threaded
from lace_lightning.decoding import Group
from lace_lightning.evaluation.inspection import Inspector
from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.method import Cost, Passage
from lace_lightning.modules import SampledGroups
from lace_lightning.tasks import Verdict
from lace_lightning.tracking.run_folder import run_folder
from lace_lightning.viewer import viewer_page
from lace_lightning.whole_file import write_text

_MAX_CHARACTERS = 4000
"""Of a text in the table; the page shows more."""

Judged = tuple[Group, Sequence[Verdict]]


class SampleGroups(Callback):
    """Keeps the first groups of the last validation, test and training batch: one table and one page for each phase.

    The page ``samples/<phase>.html`` lies in the run's folder and among its artifacts, the table is called
    ``samples_<phase>``; both replace those of before. Phases are ``train``, ``val`` and ``test``.

    Args:
        num_groups: groups per phase.
        every_n_steps: training batches from one page to the next, for stages that sample groups.

    Raises:
        ValueError: an option is below 1.
    """

    def __init__(self, num_groups: int = 8, every_n_steps: int = 100) -> None:
        if num_groups < 1 or every_n_steps < 1:
            raise ValueError(f"num_groups={num_groups} and every_n_steps={every_n_steps} must be at least 1")
        self.num_groups = num_groups
        self.every_n_steps = every_n_steps
        self._kept: list[Judged] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the batch's groups if it is due and the stage samples groups."""
        sampled = sampled_in(outputs)
        if sampled is not None and trainer.is_global_zero and is_due(trainer, self.every_n_steps):
            self._show(trainer, pl_module, "train", _judged(sampled)[: self.num_groups])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._kept = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._kept = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Keep groups until there are enough."""
        self._keep(sampled_in(outputs))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Keep groups until there are enough."""
        self._keep(sampled_in(outputs))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was kept."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._show(trainer, pl_module, "val", self._kept)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was kept."""
        if trainer.is_global_zero:
            self._show(trainer, pl_module, "test", self._kept)

    def _keep(self, sampled: SampledGroups | None) -> None:
        missing = self.num_groups - len(self._kept)
        if sampled is not None and missing > 0:
            self._kept += _judged(sampled)[:missing]

    def _show(self, trainer: Trainer, pl_module: LightningModule, phase: str, judged: list[Judged]) -> None:
        if not judged:
            return
        data, step = threaded(pl_module).data, current_step(trainer)
        inspector = Inspector(data.task.template, data.tokenizer)
        outcomes = [outcome_of(group, verdicts, inspector) for group, verdicts in judged]
        page = viewer_page(f"{phase} groups, step {step:,}", outcomes)
        path = run_folder(trainer) / "samples" / f"{phase}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        for logger in mlflow_loggers(trainer):
            logger.log_text(page, f"samples/{phase}.html")
            logger.log_table(sample_rows(judged), f"samples_{phase}")


def outcome_of(group: Group, verdicts: Sequence[Verdict], inspector: Inspector) -> JudgedOutcome:
    """A judged group as the viewer shows it; gates and reads are not recorded."""
    passages = tuple(
        JudgedPassage(Passage(thread, "path"), verdict, inspector.thread(n, thread))
        for n, (thread, verdict) in enumerate(zip(group.threads, verdicts, strict=True))
    )
    chosen = next((n for n, thread in enumerate(group.threads) if thread is group.best), None)
    return JudgedOutcome("", "", 0, group.problem, passages, chosen, Cost())


def sample_rows(judged: Sequence[Judged]) -> list[dict[str, object]]:
    """One row per thread, texts cut to 4,000 characters."""
    return [
        {
            "problem": group.problem.id,
            "thread": index,
            "chosen": thread is group.best,
            "tag": thread.tag,
            "verdict": str(verdict),
            "answer": None if thread.answer is None else thread.answer[:_MAX_CHARACTERS],
            "reference": group.problem.answer[:_MAX_CHARACTERS],
            "question": group.problem.text[:_MAX_CHARACTERS],
            "text": thread.text[:_MAX_CHARACTERS],
            "tokens": thread.num_tokens,
        }
        for group, verdicts in judged
        for index, (thread, verdict) in enumerate(zip(group.threads, verdicts, strict=True))
    ]


def _judged(sampled: SampledGroups) -> list[Judged]:
    return list(zip(sampled.groups, sampled.verdicts, strict=True))

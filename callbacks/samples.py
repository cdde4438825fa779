"""A few groups of each phase to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.callbacks.kept_group import KeptGroup, kept_groups
from lace_lightning.callbacks.reporting import current_step, is_due, mlflow_loggers, sampled_in, threaded
from lace_lightning.evaluation.method import Cost
from lace_lightning.modules import SampledGroups
from lace_lightning.tracking.run_folder import run_folder
from lace_lightning.viewer import viewer_page
from lace_lightning.whole_file import write_text

_MAX_CHARACTERS = 4000
"""Of a text in the table; the page shows more."""


class SampleGroups(Callback):
    """Keeps the first groups of the last validation, test and training batch: one table and one page for each phase.

    The page ``samples/<phase>.html`` lies in the run's folder and among its artifacts, the table is called
    ``samples_<phase>``; both replace those of before. Phases are ``train``, ``val`` and ``test``. The page has gates
    and what each token read, by one more forward pass per group; of groups with very long threads gates alone.

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
        self._kept: list[KeptGroup] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the batch's groups if it is due and the stage samples groups."""
        sampled = sampled_in(outputs)
        if sampled is not None and trainer.is_global_zero and is_due(trainer, self.every_n_steps):
            self._show(trainer, pl_module, "train", kept_groups(sampled)[: self.num_groups])

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
            self._kept += kept_groups(sampled)[:missing]

    def _show(self, trainer: Trainer, pl_module: LightningModule, phase: str, kept: list[KeptGroup]) -> None:
        if not kept:
            return
        module, step = threaded(pl_module), current_step(trainer)
        outcomes = [group.judged(module, phase, 0, Cost(), reads=True) for group in kept]
        page = viewer_page(f"{phase} groups, step {step:,}", outcomes)
        path = run_folder(trainer) / "samples" / f"{phase}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        for logger in mlflow_loggers(trainer):
            logger.log_text(page, f"samples/{phase}.html")
            logger.log_table(sample_rows(kept), f"samples_{phase}")


def sample_rows(kept: Sequence[KeptGroup]) -> list[dict[str, object]]:
    """One row per thread, texts cut to 4,000 characters."""
    return [
        {
            "problem": group.problem.id,
            "thread": index,
            "chosen": index == group.best_index,
            "tag": thread.tag,
            "verdict": str(verdict),
            "answer": None if thread.answer is None else thread.answer[:_MAX_CHARACTERS],
            "reference": group.problem.answer[:_MAX_CHARACTERS],
            "question": group.problem.text[:_MAX_CHARACTERS],
            "text": thread.text[:_MAX_CHARACTERS],
            "tokens": thread.num_tokens,
        }
        for group, verdicts, _ in kept
        for index, (thread, verdict) in enumerate(zip(group.threads, verdicts, strict=True))
    ]

"""How threads tag themselves, against how they were judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Tag

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Group

VERDICTS = tuple(Verdict)
"""Rows of the confusion matrix."""

TAGS = (*Tag, None)
"""Columns of the confusion matrix; None is a thread without exactly one tag."""


class TagConfusion(Metric):
    """Counts threads by verdict and tag, and groups by validity of their tags."""

    full_state_update = False
    confusion: Tensor
    groups: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confusion", torch.zeros(len(VERDICTS), len(TAGS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("groups", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")  # all, with valid tags

    def update(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Add B groups with the verdicts (B, N) on their threads.

        Raises:
            ValueError: there is not one verdict for every thread.
        """
        for group, judged in zip(groups, verdicts, strict=True):
            for tag, verdict in zip(group.tags, judged, strict=True):
                self.confusion[VERDICTS.index(verdict), TAGS.index(tag)] += 1
            self.groups += torch.tensor([1, group.has_valid_tags], device=self.device)

    def compute(self) -> dict[str, Tensor]:
        """``confusion``, (3, 4) counts of :data:`VERDICTS` by :data:`TAGS`; ``one_tag`` and ``fmt``, nan if empty."""
        return {
            "confusion": self.confusion,
            "one_tag": self.confusion[:, :-1].sum() / self.confusion.sum(),
            "fmt": self.groups[1] / self.groups[0],
        }

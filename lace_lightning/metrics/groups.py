"""The metrics of decoded groups (LACE.md §7) and their bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lace_lightning.diversity import edit_diversity, embedding_diversity
from lace_lightning.embedding import Embedder
from lace_lightning.metrics.names import GROUP_METRICS
from lace_lightning.rewards import is_best_correct
from lace_lightning.tasks import Verdict

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Group


class GroupMetrics(Metric):
    """Means over all groups of the statistics listed in :data:`~lace_lightning.metrics.names.GROUP_METRICS`.

    Keeps one row of numbers per group, so that ranks may hold different numbers of groups and intervals can be drawn.

    Args:
        embedder: embeds thoughts for ``expl``.
    """

    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder
        # flat, because the empty state of a rank without groups is gathered as a tensor of one dimension
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Add B groups with the verdicts (B, N) on their threads.

        Raises:
            ValueError: there is not one verdict for every thread.
        """
        exploration = embedding_diversity(groups, self.embedder).tolist()
        rows = [
            list((group_statistics(group, judged) | {"expl": expl}).values())
            for group, judged, expl in zip(groups, verdicts, exploration, strict=True)
        ]
        self.rows.append(torch.tensor(rows, dtype=torch.float32, device=self.device).flatten())  # type: ignore[union-attr]

    def compute(self) -> dict[str, Tensor]:
        """Mean of each statistic over the groups of all ranks; nan if there are none."""
        return dict(zip(GROUP_METRICS, self._table().mean(0).unbind(), strict=True))

    def intervals(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the means, resampling groups. Every rank must call it.

        Args:
            level: probability that an interval is meant to hold.
            resamples: number of bootstrap samples.
            seed: of the resampling.

        Returns:
            ``(low, high)`` by statistic; nan if there are no groups.

        Raises:
            ValueError: ``level`` is not between 0 and 1, or ``resamples`` is not positive.
        """
        with self.sync_context(should_sync=self._to_sync):
            table = self._table()
        low, high = bootstrap_intervals(table.cpu(), level, resamples, seed)
        return {name: (a, b) for name, a, b in zip(GROUP_METRICS, low.tolist(), high.tolist(), strict=True)}

    def _table(self) -> Tensor:
        """(number of groups, number of statistics), from all ranks while synchronised."""
        flat = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, device=self.device)
        return flat.reshape(-1, len(GROUP_METRICS))


def group_statistics(group: Group, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The statistics of one group, keyed and ordered as ``GROUP_METRICS``; ``expl`` is left at nan.

    Raises:
        ValueError: there is not one verdict for every thread.
    """
    if len(verdicts) != len(group.threads):
        raise ValueError(f"{len(verdicts)} verdicts for the {len(group.threads)} threads of {group.problem.id!r}")
    num_correct = verdicts.count(Verdict.CORRECT)
    return {
        "acc": float(is_best_correct(group, verdicts)),
        "best_at_n": float(num_correct > 0),
        "mean_at_n": num_correct / len(verdicts),
        "vote_at_n": float(is_majority_correct(group, verdicts)),
        "expl": float("nan"),
        "edit_distance": edit_diversity(group),
        "fmt": float(group.has_valid_tags),
        "unparsable": verdicts.count(Verdict.UNPARSABLE) / len(verdicts),
        "tokens": float(sum(thread.num_tokens for thread in group.threads)),
    }


def is_majority_correct(group: Group, verdicts: Sequence[Verdict]) -> bool:
    """Whether a thread that gave the group's most frequent answer is correct.

    Answers are compared as stripped text; threads without one don't vote; of equally frequent answers the one that
    comes first in thread order wins.
    """
    answers = [(thread.answer or "").strip() for thread in group.threads]
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return False
    winner, _ = votes.most_common(1)[0]  # ties: the first counted
    return any(
        verdict == Verdict.CORRECT for answer, verdict in zip(answers, verdicts, strict=True) if answer == winner
    )


def bootstrap_intervals(table: Tensor, level: float, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap (Efron 1979) intervals of column means.

    Args:
        table: (M, K) on the CPU, one row per independent observation.
        level: share of the bootstrap means inside, between 0 and 1.
        resamples: number of bootstrap samples R.
        seed: of the resampling.

    Returns:
        Lower and upper ends, (K,) each; nan if M is 0.

    Raises:
        ValueError: ``level`` or ``resamples`` out of range.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level} must lie between 0 and 1 and resamples={resamples} must be at least 1")
    num_rows = len(table)
    if num_rows == 0:
        nan = table.new_full((table.shape[1],), float("nan"))
        return nan, nan
    draws = torch.randint(num_rows, (resamples, num_rows), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, num_rows).scatter_add_(1, draws, torch.ones(draws.shape))
    means = counts @ table / num_rows  # (R, K)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail]), dim=0)
    return low, high

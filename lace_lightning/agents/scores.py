"""Best score, mean score and win rate of threads that played games (LACE.md §7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lace_lightning.agents.game import Status, last_standing
from lace_lightning.metrics.groups import bootstrap_intervals

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Group

SCORES = ("best_score", "mean_score", "chosen_score", "win_rate", "mean_win", "lost")
"""Statistics of a group of players, all between 0 and 1; :func:`game_scores` says what they are."""


def game_scores(group: Group) -> dict[str, float]:
    """The statistics of one group, keyed and ordered as :data:`SCORES`.

    Points are shares of ``problem.facts["max_score"]``; they are read from what the environment wrote.

    - ``best_score``, ``mean_score``: the most points of any thread, and the mean over the threads;
    - ``chosen_score``: points of the one thread tagged best; 0 if the tags are invalid;
    - ``win_rate``: 1 if at least one thread won; ``mean_win``, ``lost``: share of threads that won, and that lost.

    Raises:
        ValueError: the problem has no ``max_score`` of at least 1.
    """
    max_score = group.problem.facts.get("max_score")
    if not isinstance(max_score, int) or max_score < 1:
        raise ValueError(
            f"problem {group.problem.id!r} has max_score={max_score!r} among its facts: scores need the points of a "
            "perfect game, so use a task of lace_lightning.agents"
        )
    standings = [last_standing(thread.observations) for thread in group.threads]
    points = [min(standing.score / max_score, 1.0) for standing in standings]
    won = [standing.status == Status.WON for standing in standings]
    num_lost = sum(standing.status == Status.LOST for standing in standings)
    best = group.best
    values = (
        max(points),
        sum(points) / len(points),
        0.0 if best is None else points[group.threads.index(best)],
        float(any(won)),
        sum(won) / len(won),
        num_lost / len(won),
    )
    return dict(zip(SCORES, values, strict=True))


class GameScores(Metric):
    """Means of :func:`game_scores` over all groups of all ranks, and their intervals."""

    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        # flat, because the empty state of a rank without groups is gathered as a tensor of one dimension
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, groups: Sequence[Group]) -> None:
        """Add groups that have been played."""
        rows = [list(game_scores(group).values()) for group in groups]
        self.rows.append(torch.tensor(rows, dtype=torch.float32, device=self.device).flatten())  # type: ignore[union-attr]

    def compute(self) -> dict[str, Tensor]:
        """Mean of each statistic; nan if there are no groups."""
        return dict(zip(SCORES, self._table().mean(0).unbind(), strict=True))

    def intervals(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the means, resampling groups; every rank must call it."""
        with self.sync_context(should_sync=self._to_sync):
            table = self._table()
        low, high = bootstrap_intervals(table.cpu(), level, resamples, seed)
        return {name: (a, b) for name, a, b in zip(SCORES, low.tolist(), high.tolist(), strict=True)}

    def num_groups(self) -> int:
        """Groups of all ranks; every rank must call it."""
        with self.sync_context(should_sync=self._to_sync):
            return len(self._table())

    def _table(self) -> Tensor:
        """(number of groups, number of statistics), from all ranks while synchronised."""
        flat = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, device=self.device)
        return flat.reshape(-1, len(SCORES))

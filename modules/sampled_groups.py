"""Groups as a stage samples them: decoded, judged, and with the tensors that training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lace_lightning.datamodules.base import GroupData
from lace_lightning.decoding import DecodingSpec, Group, Rollout, play_groups
from lace_lightning.tasks import Verdict
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem


@dataclass(frozen=True)
class SampledGroups:
    """Decoded groups with the verdicts (B, N) on their threads and, for training, their tensors."""

    groups: list[Group]
    verdicts: list[list[Verdict]]
    rollout: Rollout

    @classmethod
    def of(
        cls, model: ThreadedLM, data: GroupData, problems: Sequence[Problem], spec: DecodingSpec, seeds: Sequence[int]
    ) -> SampledGroups:
        """Decode one group per problem and judge its threads; the model's mode is kept."""
        groups, rollout = play_groups(model, data.task, data.tokenizer, problems, seeds, spec, data.max_length)
        flat = data.task.judge([(group.problem, thread) for group in groups for thread in group.threads])
        num_threads = len(groups[0].threads)
        verdicts = [flat[i : i + num_threads] for i in range(0, len(flat), num_threads)]
        return cls(groups, verdicts, rollout)

"""A sampled group that a callback keeps, to take it apart later."""

from __future__ import annotations

from typing import NamedTuple

from lace_lightning.decoding import Group, Rollout
from lace_lightning.evaluation.inspection import Inspection, Inspector, Looked, look
from lace_lightning.evaluation.judged import JudgedOutcome, make_judged
from lace_lightning.evaluation.method import Cost, Outcome, Passage
from lace_lightning.modules import SampledGroups, ThreadedModule
from lace_lightning.tasks import Verdict

MAX_PAIRS = 2**24
"""Most pairs of lattice positions of a group for which reads are recorded: one pass holds the weights of all layers."""


class KeptGroup(NamedTuple):
    """One group of a sampled batch: its judged threads, and the tensors (of B = 1) to read its gates from."""

    group: Group
    verdicts: list[Verdict]
    rollout: Rollout

    def judged(self, module: ThreadedModule, phase: str, seed: int, cost: Cost, reads: bool) -> JudgedOutcome:
        """The group as ``lace eval`` keeps outcomes, with its gates and, if asked for and it is not too long, reads."""
        looked = self._look(module, reads)
        inspector = Inspector(module.data.task.template, module.data.tokenizer)
        threads = self.group.threads
        inspections: list[Inspection] = [inspector.thread(n, thread, looked) for n, thread in enumerate(threads)]
        passages = tuple(Passage(thread, "path") for thread in threads)
        outcome = Outcome(self.group.problem, passages, self.group.best_index, cost)
        return make_judged(phase, module.stage, seed, outcome, self.verdicts, inspections)

    def _look(self, module: ThreadedModule, reads: bool) -> Looked | None:
        """None where there are no gates, or the weights are sharded: a pass would wait for the other processes."""
        from torch.distributed.tensor import DTensor

        model = module.model
        assert model is not None
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return None
        was_training = model.training
        model.eval()
        try:
            fits = self.rollout.input_ids[0].numel() ** 2 <= MAX_PAIRS
            return look(model, self.rollout, [self.group], reads and fits)
        finally:
            model.train(was_training)


def kept_groups(sampled: SampledGroups) -> list[KeptGroup]:
    """The groups of a batch, one by one."""
    rows = enumerate(zip(sampled.groups, sampled.verdicts, strict=True))
    return [
        KeptGroup(group, verdicts, sampled.rollout.part(slice(index, index + 1))) for index, (group, verdicts) in rows
    ]

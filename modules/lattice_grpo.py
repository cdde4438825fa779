"""Lattice GRPO (LACE.md §6.3): one reward and one advantage per group, shared by all tokens of all its threads.

Left out of GRPO on purpose: a value network, a reference model unless the KL term asks for it, and importance weights
between samplers, since the trainer samples with its own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lace_lightning.dealing import deal
from lace_lightning.decoding import Rollout, group_seed
from lace_lightning.embedding import Embedder
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules.base import DecodingSpec, ThreadedModule
from lace_lightning.modules.group_table import GroupTable
from lace_lightning.modules.optimizer import OptimizerSpec
from lace_lightning.modules.sampled_groups import SampledGroups
from lace_lightning.modules.scoring import groups_at_once, logprob_gaps, score, score_all
from lace_lightning.modules.step_clock import StepClock
from lace_lightning.policy_loss import LossOutput, PolicyLoss
from lace_lightning.rewards import AccuracyReward, Reward, group_advantages
from lace_lightning.sharding import whole
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem


class LatticeGRPO(ThreadedModule):
    """Samples G groups of N threads per problem and raises the probability of the better ones; dropout is off.

    Several processes deal the groups of a batch among themselves and exchange a row of numbers per group: rewards,
    advantages, averages and minibatches are those of the whole batch, as one process would have them.

    Args:
        spec, optimizer, validation, init_from, embedder: see :class:`~lace_lightning.modules.base.ThreadedModule`.
        rollout: how training groups are sampled.
        rewards: parts of the group's reward; null: accuracy alone.
        loss: averaging, clipping and KL.
        groups_per_problem: G.
        advantage_scale: ``none``, or ``std`` to divide by the standard deviation over the G groups.
        passes: optimisation passes over each rollout.
        minibatches: optimizer steps per pass, each on its share of the groups. ``trainer.max_steps`` and
            ModelCheckpoint's ``every_n_train_steps`` count optimizer steps, of which every batch takes passes times
            minibatches, the last one too; logged steps count batches.
        microbatch_size: groups per forward and backward pass, to bound memory; null: a minibatch at once, on CPUs as
            many as keep to 4,096 tokens.
        gradient_clip: largest norm of the gradient; 0 leaves it.

    Raises:
        ValueError: an option is out of range.
    """

    stage = "LatticeGRPO"

    def __init__(
        self,
        spec: ModelSpec,
        optimizer: OptimizerSpec | None = None,
        validation: DecodingSpec | None = None,
        init_from: Sequence[str] = (),
        embedder: Embedder | None = None,
        rollout: DecodingSpec | None = None,
        rewards: list[Reward] | None = None,
        loss: PolicyLoss | None = None,
        groups_per_problem: int = 8,
        advantage_scale: Literal["none", "std"] = "none",
        passes: int = 1,
        minibatches: int = 1,
        microbatch_size: int | None = None,
        gradient_clip: float = 1.0,
    ) -> None:
        super().__init__(spec, optimizer, validation, init_from, embedder)
        if groups_per_problem < 2:
            raise ValueError(f"model.groups_per_problem={groups_per_problem}: an advantage compares at least 2 groups")
        sizes = (passes, minibatches, 1 if microbatch_size is None else microbatch_size)
        if min(sizes) < 1 or gradient_clip < 0:
            raise ValueError(
                f"model: passes={passes}, minibatches={minibatches} and microbatch_size={microbatch_size} must be at "
                f"least 1, gradient_clip={gradient_clip} at least 0"
            )
        self.automatic_optimization = False
        self.rollout = rollout or DecodingSpec()
        self.rewards = rewards or [AccuracyReward()]
        self.loss = loss or PolicyLoss()
        self.groups_per_problem = groups_per_problem
        self.advantage_scale: Literal["none", "std"] = advantage_scale
        self.passes, self.minibatches, self.microbatch_size = passes, minibatches, microbatch_size
        self.gradient_clip = gradient_clip
        self.at_hand: tuple[SampledGroups, Tensor] | None = None
        """The batch that is being learned from, for callbacks: its groups, and their rewards (problems, G)."""
        self._reference: list[ThreadedLM] = []  # in a list, so that it is neither trained, moved nor saved

    def shard(self, model: ThreadedLM) -> None:
        """Divide the weights; before that, copy what the KL term pulls towards."""
        _disable_dropout(model)
        if self.loss.kl_weight:
            self._reference = [copy.deepcopy(model).requires_grad_(False).eval()]
            super().shard(self._reference[0])
        super().shard(model)

    def settings(self) -> dict[str, Any]:
        names = (
            "rollout", "rewards", "loss", "groups_per_problem", "advantage_scale", "passes", "minibatches",
            "gradient_clip",
        )  # fmt: skip
        reference = {"init_from": self.init_from} if self.loss.kl_weight else {}  # what the KL term pulls towards
        return super().settings() | {name: getattr(self, name) for name in names} | reference

    @property
    def num_optimizer_steps(self) -> float:
        """Lightning's estimate takes every batch for one step."""
        steps = super().num_optimizer_steps * self.passes * self.minibatches
        return steps if self.trainer.max_steps == -1 else min(steps, self.trainer.max_steps)

    def training_step(self, batch: list[Problem], batch_idx: int) -> dict[str, Any]:
        """Sample, reward, and take ``passes * minibatches`` optimizer steps."""
        clock = StepClock(self.device)
        problems = [problem for problem in batch for _ in range(self.groups_per_problem)]
        with clock.measure("rollout"):
            own = self._deal(problems)
            sampled = self._sample_some(problems, own or [0])  # a process without a group keeps in step with others
            sampled = sampled if own else replace(sampled, groups=[], verdicts=[])
        with clock.measure("reward"):
            table = GroupTable.of(sampled, self.rewards, own, len(problems), self.add_up)
            by_problem = table.rewards.view(len(batch), self.groups_per_problem)
            advantages = group_advantages(by_problem, self.advantage_scale).flatten().to(self.device)
        self.at_hand = sampled, by_problem
        with clock.measure("update"):
            outputs, gaps = self._optimise(sampled.rollout, own, advantages)
        self.at_hand = None
        self._log_step(table, by_problem, outputs, clock)
        self._log_gaps(gaps, len(batch))
        return {"loss": outputs[-1].loss.detach(), "sampled": sampled}

    def _deal(self, problems: Sequence[Problem]) -> list[int]:
        """Indices of the groups that this process samples."""
        template, tokenizer = self.data.task.template, self.data.tokenizer
        lengths = [len(template.encode_prompt(problem.text, tokenizer)) for problem in problems]
        return deal(lengths, self.trainer.world_size)[self.trainer.global_rank]

    def _sample_some(self, problems: Sequence[Problem], groups: Sequence[int]) -> SampledGroups:
        seeds = self._rollout_seeds(problems)
        with whole(self._model()):
            return self.sample([problems[i] for i in groups], self.rollout, [seeds[i] for i in groups])

    def _rollout_seeds(self, problems: Sequence[Problem]) -> list[int]:
        return [
            group_seed("rollout", self.rollout.seed, self.global_step, problem.id, index % self.groups_per_problem)
            for index, problem in enumerate(problems)
        ]

    # ---------------------------------------------------------------- optimisation

    def _optimise(
        self, rollout: Rollout, own: Sequence[int], advantages: Tensor
    ) -> tuple[list[LossOutput], list[Tensor]]:
        """All optimizer steps on one rollout: the outputs of each, and the gaps found before the first.

        ``advantages`` are of all groups of the batch, of which ``rollout`` holds those of ``own``.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        gaps: list[Tensor] = []
        old = reference = None
        if self.passes * self.minibatches > 1:
            old = score_all(self._model(), rollout, self.microbatch_size)
            gaps += [logprob_gaps(old, rollout)] if own else []
        if self._reference:
            reference = score_all(self._reference[0].to(self.device), rollout, self.microbatch_size)
        # Fixed by the run's seed and step, so that a resumed run draws the same minibatches.
        generator = torch.Generator().manual_seed(group_seed("minibatches", self.rollout.seed, self.global_step))
        place = torch.full((len(advantages),), -1)  # of each group in the rollout, if it is there
        place[list(own)] = torch.arange(len(own))
        advantages = advantages[list(own) or [0]]
        outputs = []
        for _ in range(self.passes):
            order = place[torch.randperm(len(place), generator=generator)]
            for places in order.tensor_split(self.minibatches):
                groups = places[places >= 0].to(self.device)
                weights = self.loss.token_weights(rollout.chosen[groups], self.rollout.max_new_tokens, self.add_up)
                output = self._backward(rollout, groups, advantages, weights, old, reference, gaps)
                self.check_finite(output.loss)
                if self.gradient_clip:
                    self.clip_gradients(optimizer, self.gradient_clip, "norm")  # type: ignore[arg-type]
                optimizer.step()  # type: ignore[union-attr]
                optimizer.zero_grad()  # type: ignore[union-attr]
                scheduler.step()  # type: ignore[union-attr, call-arg]
                outputs.append(output)
        return outputs, gaps

    def _backward(
        self,
        rollout: Rollout,
        groups: Tensor,
        advantages: Tensor,
        weights: Tensor,
        old: Tensor | None,
        reference: Tensor | None,
        gaps: list[Tensor],
    ) -> LossOutput:
        """Accumulate the gradient of one minibatch, a microbatch at a time; returns its outputs, summed everywhere.

        Without ``old`` it is the only one: what it computes are then the log-probabilities before any update.

        Groups with advantage 0 have no gradient (unless the KL term gives one) and are not computed at all; their
        tokens still count in the averages.
        """
        learns = (advantages[groups] != 0) | bool(self.loss.kl_weight)
        totals = torch.zeros(len(LossOutput._fields), device=self.device)
        micros = self._microbatches(rollout, groups[learns], weights[learns])
        for number, (micro, micro_weights) in enumerate(micros, start=1):
            logprobs = score(self._model(), rollout, micro)
            before = logprobs.detach() if old is None else old[micro]
            if old is None and micro_weights.any():
                gaps.append(logprob_gaps(before, rollout, micro))
            then = None if reference is None else reference[micro]
            output = self.loss(logprobs, before, advantages[micro], micro_weights, then)
            with self._gradients_exchanged(number == len(micros)):
                self.manual_backward(output.loss * self.trainer.world_size)  # processes' gradients are averaged
            totals += torch.stack([part.detach().float() for part in output])
        return LossOutput(*self.add_up(totals))

    def _microbatches(self, rollout: Rollout, groups: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Groups and weights of each pass; all processes take equally many, and what one lacks counts for nothing."""
        size = groups_at_once(rollout, self.microbatch_size)
        micros = list(zip(groups.split(size), weights.split(size), strict=True)) if len(groups) else []
        num_passes = self.trainer.strategy.reduce(torch.tensor(len(micros), device=self.device), reduce_op="max")
        stand_in = groups.new_zeros(1), weights.new_zeros(1, *weights.shape[1:])
        return micros + [stand_in] * (int(num_passes) - len(micros))  # type: ignore[arg-type]

    def _gradients_exchanged(self, is_last: bool) -> Any:
        """DDP averages gradients once they are added up, in the last backward pass."""
        strategy = self.trainer.strategy
        return nullcontext() if is_last or not isinstance(strategy, DDPStrategy) else strategy.block_backward_sync()

    def _model(self) -> ThreadedLM:
        assert self.model is not None
        return self.model

    # ---------------------------------------------------------------- logging

    def _log_step(
        self,
        table: GroupTable,
        rewards: Tensor,
        outputs: list[LossOutput],
        clock: StepClock,
    ) -> None:
        num_clipped = sum(output.num_clipped for output in outputs)
        num_chosen = sum(output.num_chosen for output in outputs)
        metrics: dict[str, Any] = table.metrics() | {
            "reward/tied_problems": (rewards.amax(1) == rewards.amin(1)).float().mean(),
            "policy/loss": torch.stack([output.loss for output in outputs]).mean(),
            "policy/clipped": num_clipped / max(1, num_chosen),
        }
        if self.loss.kl_weight:
            metrics["policy/kl"] = torch.stack([output.kl for output in outputs]).mean()
        self.log_dict({name: value.float() for name, value in metrics.items()}, batch_size=len(rewards))
        # Ranks add these up themselves, and NCCL adds up nothing on a CPU.
        shares = {f"time/{name}": torch.tensor(share, device=self.device) for name, share in clock.shares().items()}
        self.log_dict(shares, batch_size=len(rewards), sync_dist=True)
        self.log("train/reward", metrics["reward/total"].float(), prog_bar=True, logger=False, batch_size=len(rewards))

    def _log_gaps(self, gaps: list[Tensor], batch_size: int) -> None:
        """Log how far sampling and training disagree, unless no group was worth computing."""
        found = torch.cat([torch.zeros(0, device=self.device), *gaps])
        total, count = self.add_up(torch.stack([found.sum(), found.new_tensor(len(found))]))
        largest = self.trainer.strategy.reduce(found.max() if len(found) else found.new_zeros(()), reduce_op="max")
        if count:
            self.log("rollout/logprob_gap_mean", total / count, batch_size=batch_size)
            self.log("rollout/logprob_gap_max", largest, reduce_fx="max", batch_size=batch_size)


def _disable_dropout(model: nn.Module) -> None:
    """The policy that is optimised is the one that was sampled, not one with holes in it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):  # transformers' attention modules keep a number
            module.attention_dropout = 0.0  # type: ignore[assignment]

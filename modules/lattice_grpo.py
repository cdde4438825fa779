"""Lattice GRPO (LACE.md §6.3): one reward and one advantage per group, shared by all tokens of all its threads.

Left out of GRPO on purpose: a value network, a reference model unless the KL term asks for it, and importance weights
between samplers, since the trainer samples with its own weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lace_lightning.decoding import Rollout, group_seed
from lace_lightning.embedding import Embedder
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules.base import DecodingSpec, SampledGroups, ThreadedModule
from lace_lightning.modules.optimizer import OptimizerSpec
from lace_lightning.policy_loss import LossOutput, PolicyLoss
from lace_lightning.rewards import AccuracyReward, Reward, group_advantages, total_reward
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem

CPU_TOKENS = 4096
"""Tokens per pass on a CPU: activations of more leave its cache, and their memory goes back to the system each time."""


class LatticeGRPO(ThreadedModule):
    """Samples G groups of N threads per problem and raises the probability of the better ones; dropout is off.

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

    def configure_model(self) -> None:
        super().configure_model()
        _disable_dropout(self._model())
        if self.loss.kl_weight and not self._reference:
            self._reference = [copy.deepcopy(self._model()).requires_grad_(False).eval()]

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
        clock = _Clock(self.device)
        problems = [problem for problem in batch for _ in range(self.groups_per_problem)]
        with clock.measure("rollout"):
            sampled = self.sample(problems, self.rollout, self._rollout_seeds(problems))
        with clock.measure("reward"):
            rewards, parts = total_reward(self.rewards, sampled.groups, sampled.verdicts)
            by_problem = rewards.view(len(batch), self.groups_per_problem)
            advantages = group_advantages(by_problem, self.advantage_scale).flatten().to(self.device)
        self.at_hand = sampled, by_problem
        with clock.measure("update"):
            outputs, gaps = self._optimise(sampled.rollout, advantages)
        self.at_hand = None
        self._log_step(sampled, by_problem, parts | {"total": rewards}, outputs, clock)
        self._log_gaps(gaps, len(batch))
        return {"loss": outputs[-1].loss.detach(), "sampled": sampled}

    def _rollout_seeds(self, problems: Sequence[Problem]) -> list[int]:
        return [
            group_seed("rollout", self.rollout.seed, self.global_step, problem.id, index % self.groups_per_problem)
            for index, problem in enumerate(problems)
        ]

    # ---------------------------------------------------------------- optimisation

    def _optimise(self, rollout: Rollout, advantages: Tensor) -> tuple[list[LossOutput], list[Tensor]]:
        """All optimizer steps on one rollout: the outputs of each, and the gaps found before the first."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        gaps: list[Tensor] = []
        old = reference = None
        if self.passes * self.minibatches > 1:
            old = self._score_all(self._model(), rollout)
            gaps.append(logprob_gaps(old, rollout))
        if self._reference:
            reference = self._score_all(self._reference[0].to(self.device), rollout)
        # Fixed by the run's seed and step, so that a resumed run draws the same minibatches.
        generator = torch.Generator().manual_seed(group_seed("minibatches", self.rollout.seed, self.global_step))
        outputs = []
        for _ in range(self.passes):
            order = torch.randperm(len(advantages), generator=generator).to(self.device)
            for groups in order.tensor_split(self.minibatches):
                weights = self.loss.token_weights(rollout.chosen[groups], self.rollout.max_new_tokens)
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
        """Accumulate the gradient of one minibatch, a microbatch at a time; returns its summed outputs.

        Without ``old`` it is the only one: what it computes are then the log-probabilities before any update.

        Groups with advantage 0 have no gradient (unless the KL term gives one) and are not computed at all; their
        tokens still count in the averages. Several processes compute them: all must take as many backward passes.
        """
        is_needed = bool(self.loss.kl_weight) or self.trainer.world_size > 1
        learns = (advantages[groups] != 0) | is_needed
        groups, weights = groups[learns], weights[learns]
        totals = [torch.zeros((), device=self.device) for _ in LossOutput._fields]
        size = self._groups_at_once(rollout)
        for micro, micro_weights in zip(groups.split(size), weights.split(size), strict=True):
            if not len(micro):
                continue
            logprobs = self._score(self._model(), rollout, micro)
            before = logprobs.detach() if old is None else old[micro]
            if old is None:
                gaps.append(logprob_gaps(before, rollout, micro))
            then = None if reference is None else reference[micro]
            output = self.loss(logprobs, before, advantages[micro], micro_weights, then)
            self.manual_backward(output.loss)
            totals = [total + part.detach() for total, part in zip(totals, output, strict=True)]
        return LossOutput(*totals)

    def _model(self) -> ThreadedLM:
        assert self.model is not None
        return self.model

    def _score(self, model: ThreadedLM, rollout: Rollout, groups: Tensor) -> Tensor:
        """(len(groups), N, L) log-probabilities of the chosen tokens, with the exchange on."""
        return model.token_logprobs(
            rollout.input_ids[groups], rollout.attention_mask[groups], rollout.chosen[groups], rollout.prompt_length
        )

    @torch.no_grad()
    def _score_all(self, model: ThreadedLM, rollout: Rollout) -> Tensor:
        everything = torch.arange(len(rollout.input_ids), device=self.device)
        parts = everything.split(self._groups_at_once(rollout))
        return torch.cat([self._score(model, rollout, groups) for groups in parts])

    def _groups_at_once(self, rollout: Rollout) -> int:
        """Groups per forward and backward pass."""
        num_groups, num_threads, columns = rollout.input_ids.shape
        if self.microbatch_size is not None or self.device.type != "cpu":
            return self.microbatch_size or num_groups
        return max(1, CPU_TOKENS // (num_threads * columns))

    # ---------------------------------------------------------------- logging

    def _log_step(
        self,
        sampled: SampledGroups,
        rewards: Tensor,
        parts: dict[str, Tensor],
        outputs: list[LossOutput],
        clock: _Clock,
    ) -> None:
        num_clipped = sum(output.num_clipped for output in outputs)
        num_chosen = sum(output.num_chosen for output in outputs)
        chosen = sampled.rollout.chosen
        metrics = {f"reward/{name}": values.mean() for name, values in parts.items()} | {
            "reward/tied_problems": (rewards.amax(1) == rewards.amin(1)).float().mean(),
            "policy/loss": torch.stack([output.loss for output in outputs]).mean(),
            "policy/clipped": num_clipped / max(1, num_chosen),
            "policy/entropy": -sampled.rollout.logprobs[chosen].mean(),
            "rollout/tokens": sampled.rollout.attention_mask[..., sampled.rollout.prompt_length :]
            .float()
            .sum((1, 2))
            .mean(),
            "rollout/truncated": 1 - sampled.rollout.finished.float().mean(),
        }
        if self.loss.kl_weight:
            metrics["policy/kl"] = torch.stack([output.kl for output in outputs]).mean()
        metrics |= {f"time/{name}": torch.tensor(share) for name, share in clock.shares().items()}
        self.log_dict(metrics, batch_size=len(rewards), sync_dist=True)
        self.log("train/reward", metrics["reward/total"], prog_bar=True, logger=False, batch_size=len(rewards))

    def _log_gaps(self, gaps: list[Tensor], batch_size: int) -> None:
        """Log how far sampling and training disagree, unless no group was worth computing."""
        found = torch.cat(gaps) if gaps else torch.zeros(0)
        if len(found):
            options: dict[str, Any] = {"batch_size": batch_size, "sync_dist": True}
            self.log("rollout/logprob_gap_mean", found.mean(), **options)
            self.log("rollout/logprob_gap_max", found.max(), reduce_fx="max", **options)


def logprob_gaps(logprobs: Tensor, rollout: Rollout, groups: Tensor | None = None) -> Tensor:
    """(M,) distances between recomputed log-probabilities (B, N, L) and those at sampling, of the chosen tokens.

    The same weights computed both, but not by the same code: cached columns and rounding differ. A large gap says that
    the policy that is optimised is not the one that was sampled.
    """
    where = slice(None) if groups is None else groups
    return (logprobs - rollout.logprobs[where]).abs()[rollout.chosen[where]]


def _disable_dropout(model: nn.Module) -> None:
    """The policy that is optimised is the one that was sampled, not one with holes in it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):  # transformers' attention modules keep a number
            module.attention_dropout = 0.0  # type: ignore[assignment]


class _Clock:
    """Shares of a step's wall-clock time; waits for the device, so that its work is counted where it belongs."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._seconds[name] = self._now() - start

    def shares(self) -> dict[str, float]:
        total = sum(self._seconds.values())
        return {name: seconds / total for name, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

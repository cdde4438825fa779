"""A model that plays a task, as methods ask it: the policy of ``lace eval``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from lace_lightning.checkpoints import initialise
from lace_lightning.decoding import DecodingSpec, Group, Rollout, Thread, play_groups
from lace_lightning.evaluation.inspection import Inspection, Inspector, look
from lace_lightning.evaluation.method import Cost, Played
from lace_lightning.model_spec import ModelSpec
from lace_lightning.tasks import Task
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.tokenizer import load_tokenizer
from lace_lightning.traces.schema import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelPolicy:
    """Implements :class:`~lace_lightning.evaluation.method.Policy` with one model.

    Args:
        model: with its weights, on its device.
        task: how problems are asked, played and judged.
        tokenizer: the model's.
        decoding: how groups are sampled; its ``num_threads`` None takes the model's, its ``seed`` is not used: methods
            bring seeds.
        max_length: most columns of a group, prompt included.
        keep_gates: look up the gates of whatever is played, for :meth:`take_inspections`; costs one more forward pass,
            which is not counted among the seconds.
        keep_reads: look up what each token read from which thread too; that pass needs all attention weights at once.
    """

    def __init__(
        self,
        model: ThreadedLM,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        decoding: DecodingSpec | None = None,
        max_length: int = 2048,
        keep_gates: bool = False,
        keep_reads: bool = False,
    ) -> None:
        self.model = model
        self.task = task
        self.tokenizer = tokenizer
        self.decoding = decoding or DecodingSpec()
        self.max_length = max_length
        self.num_threads = self.decoding.num_threads or model.num_threads
        self.keep_gates = keep_gates
        self.keep_reads = keep_reads
        self._inspector = Inspector(task.template, tokenizer)
        self._inspected: dict[int, tuple[Thread, Inspection]] = {}

    def play(
        self,
        problems: Sequence[Problem],
        seeds: Sequence[int],
        num_threads: int | None = None,
        texts: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Played:
        """Decode one group per problem (:meth:`Policy.play`); the seconds of the call are shared evenly.

        Raises:
            ValueError: a prompt leaves no room for threads within ``max_length``.
        """
        if not problems:
            return Played([], [])
        spec = replace(
            self.decoding,
            num_threads=num_threads or self.num_threads,
            max_new_tokens=self.decoding.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )
        start = self._now()
        groups, rollout = play_groups(
            self.model, self.task, self.tokenizer, problems, seeds, spec, self.max_length, texts
        )
        seconds = (self._now() - start) / len(groups)
        prompt_tokens = rollout.attention_mask[:, 0, : rollout.prompt_length].sum(-1).tolist()
        self._inspect(groups, rollout)
        costs = [Cost.of(group, seconds, count) for group, count in zip(groups, prompt_tokens, strict=True)]
        return Played(groups, costs)

    def take_inspections(self, threads: Sequence[Thread]) -> list[Inspection | None]:
        """The threads played since the last call token by token, None for others; forgets them all.

        Threads are known by identity: a method hands on those that it got.
        """
        noted, self._inspected = self._inspected, {}
        return [noted[id(thread)][1] if id(thread) in noted else None for thread in threads]

    def prompt_tokens(self, text: str) -> int:
        """How many tokens the prompt around ``text`` has."""
        return len(self.task.template.encode_prompt(text, self.tokenizer))

    def _inspect(self, groups: Sequence[Group], rollout: Rollout) -> None:
        looks = self.keep_gates or self.keep_reads
        looked = look(self.model, rollout, groups, self.keep_reads) if looks else None
        for index, group in enumerate(groups):
            for n, thread in enumerate(group.threads):
                # The thread is kept too, lest another object get its identity.
                self._inspected[id(thread)] = (thread, self._inspector.thread(n, thread, looked, index))

    def _now(self) -> float:
        """Seconds on a clock, once the device has done all its work."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()


@dataclass(frozen=True)
class PolicySpec:
    """What YAML says about a policy: a model, where its weights come from, and how it writes.

    Args:
        spec: backbone and exchange.
        init_from: checkpoints of stages whose weights it gets, in order, later ones winning (a stage's checkpoint holds
            only what that stage trained).
        exchange: folder that ``save_exchange`` wrote, for a backbone of the hub.
        tokenizer: folder or hub name of a tokenizer; null takes the task's own.
        decoding: how groups are sampled.
        max_length: most columns of a group, prompt included.
        device: ``auto`` takes CUDA where there is one.

    Raises:
        ValueError: ``max_length`` is not positive.
    """

    spec: ModelSpec
    init_from: list[str] = field(default_factory=list)
    exchange: str | None = None
    tokenizer: str | None = None
    decoding: DecodingSpec = field(default_factory=DecodingSpec)
    max_length: int = 2048
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} of a policy must be at least 1")

    def check(self) -> None:
        """Raise ValueError, before anything is loaded, if a file of weights is missing."""
        for path in self.init_from:
            if not Path(path).is_file():
                raise ValueError(f"init_from names {path}, and there is no such file")
        if self.exchange is not None and not Path(self.exchange).is_dir():
            raise ValueError(f"exchange={self.exchange!r}: there is no such folder")

    def fingerprint(self) -> str:
        """A digest of the files of weights: the same paths may hold other weights tomorrow. Not of a hub's backbone."""
        digest = hashlib.blake2b(digest_size=16)
        folder = sorted(Path(self.exchange).glob("exchange.*")) if self.exchange else []
        for path in [*map(Path, self.init_from), *folder]:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def build(self, task: Task, keep_gates: bool = False, keep_reads: bool = False) -> ModelPolicy:
        """The policy with its weights on its device; ``keep_gates`` and ``keep_reads`` as of :class:`ModelPolicy`.

        Raises:
            ValueError: tokenizer, weights and model do not belong together.
        """
        self.check()
        tokenizer = load_tokenizer(self.tokenizer, task)
        model = self.spec.build(tokenizer)
        initialise(nn.ModuleDict({"model": model}), self.init_from)
        if self.exchange is not None:
            model.load_exchange(self.exchange)
        model.requires_grad_(False).eval().to(self._device())
        return ModelPolicy(model, task, tokenizer, self.decoding, self.max_length, keep_gates, keep_reads)

    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

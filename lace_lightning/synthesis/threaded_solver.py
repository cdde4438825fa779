"""The model to be trained as solver: a ThreadedLM, one thread at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lace_lightning.checkpoints import initialise
from lace_lightning.decoding import GroupDecoder, Sampling, make_decoder, to_groups
from lace_lightning.model_spec import ModelSpec
from lace_lightning.synthesis.rows import describe, digest
from lace_lightning.synthesis.solver import Solver
from lace_lightning.synthesis.teacher import Solution, Usage
from lace_lightning.tasks import Task
from lace_lightning.traces.checksum import file_digest
from lace_lightning.traces.schema import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ThreadedSolver(Solver):
    """Decodes single threads. The model is loaded with the first attempt.

    Args:
        task: asks and plays, with the same settings as the pipeline's task.
        spec: the model.
        checkpoints: files of earlier stages to start from, in order, the last one winning.
        tokenizer: hub name or folder; null: the task's own.
        max_new_tokens: most columns of an attempt.
        sampling: how tokens are chosen; null: at temperature 1.
        batch_size: attempts decoded together; does not change what comes out.

    Raises:
        OSError: a checkpoint cannot be read.
    """

    def __init__(
        self,
        task: Task,
        spec: ModelSpec,
        checkpoints: Sequence[str] = (),
        tokenizer: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        batch_size: int = 64,
    ) -> None:
        self.task = task
        self.spec = spec
        self.checkpoints = tuple(checkpoints)
        self.tokenizer_name = tokenizer
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        self.batch_size = batch_size
        weights = [file_digest(Path(path)) for path in self.checkpoints]
        settings = describe([task, spec, weights, tokenizer, max_new_tokens, self.sampling])
        self.identity = f"ThreadedSolver({', '.join(checkpoints) or spec.backbone}, {digest(settings)[:12]})"

    def attempt(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Solution]:
        starts = range(0, len(problems), self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        return [solution for batch in batches for solution in self._attempt(problems[batch], seeds[batch])]

    @torch.inference_mode()
    def _attempt(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Solution]:
        tokenizer, template = self._tokenizer, self.task.template
        prompts = [template.encode_prompt(problem.text, tokenizer) for problem in problems]
        environment = self.task.environment(problems, 1, tokenizer)
        rollout = self._decoder.decode(prompts, 1, list(seeds), environment)
        groups = to_groups(rollout, list(problems), list(seeds), tokenizer, template)
        return [
            Solution(thread.thought, thread.answer, usage=Usage(1, len(prompt), thread.num_tokens))
            for prompt, group in zip(prompts, groups, strict=True)
            for thread in group.threads
        ]

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_name is not None:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        own = self.task.tokenizer()
        if own is None:
            raise ValueError(f"solver.tokenizer: {type(self.task).__name__} has no tokenizer of its own; name one")
        return own

    @cached_property
    def _decoder(self) -> GroupDecoder:
        model = self.spec.build(self._tokenizer)
        initialise(_Holder(model), self.checkpoints)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return make_decoder(model, self._tokenizer, self.task.template, self.max_new_tokens, self.sampling)


class _Holder(nn.Module):
    """Gives the weights the names that they have in a stage's checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

"""Real tokenizer, real problems: AIME 2024, GSM8K and third-party Countdown go the way that a user's run takes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lace_lightning.cli.stages import build
from lace_lightning.datamodules import ProblemData
from lace_lightning.decoding import FREE, Environment
from lace_lightning.metrics.names import GROUP_METRICS
from lace_lightning.modules import SampledGroups
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Tag, TraceThread
from lace_lightning.verification import MathTask

DATA = Path(__file__).parents[2] / "shared/data"
ROOT = Path(__file__).parents[1]
FILES = {"aime24": "aime2024.jsonl", "gsm8k": "gsm8k_test_dev.jsonl"}
NUM_PROBLEMS = {"aime2024.jsonl": 30, "gsm8k_test_dev.jsonl": 660}
NUM_TOKENS = 6

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")


@dataclass
class Validation:
    """What `lace validate` sampled, measured and wrote."""

    data: ProblemData
    batches: list[SampledGroups]
    written: dict[str, Any]

    @property
    def judged(self) -> list[tuple[Any, Sequence[Verdict]]]:
        return [pair for batch in self.batches for pair in zip(batch.groups, batch.verdicts, strict=True)]


class Spy(Callback):
    def __init__(self) -> None:
        self.batches: list[SampledGroups] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *args) -> None:
        self.batches.append(outputs["sampled"])


def validate(folder: Path, benchmark: str, **options: object) -> Validation:
    """`lace validate` with a shipped config on two problems of a benchmark, two threads each."""
    spy = Spy()
    options = {
        "data.init_args.tokenizer": DATA / "tokenizer",
        "data.init_args.problems": DATA / "math" / FILES[benchmark],
        "data.init_args.num_problems": 2,
        "data.init_args.num_threads": 2,
        "model.init_args.spec.num_threads": 2,
        "model.init_args.validation.max_new_tokens": NUM_TOKENS,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "lace_lightning.callbacks.ValidationTable",
        "trainer.callbacks.path": folder / "table.json",
    } | options
    configs = [f"--config={ROOT}/configs/real/{name}.yaml" for name in ("base", benchmark)]
    cli = build(["validate", *configs, *(f"--{name}={value}" for name, value in options.items())], callbacks=[spy])
    return Validation(cli.datamodule, spy.batches, json.loads((folder / "table.json").read_text()))


@pytest.fixture(scope="module", params=list(FILES))
def untrained(request, tmp_path_factory) -> Validation:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there")
    return validate(tmp_path_factory.mktemp(request.param), request.param)


def test_prompts_hold_the_whole_problem_and_threads_spell_what_was_decoded(untrained):
    tokenizer = untrained.data.tokenizer
    (sampled,) = untrained.batches
    rollout = sampled.rollout
    assert rollout.input_ids.shape == (2, 2, rollout.prompt_length + NUM_TOKENS)
    for group, ids, mask in zip(sampled.groups, rollout.input_ids, rollout.attention_mask, strict=True):
        for n, thread in enumerate(group.threads):
            real = mask[n, : rollout.prompt_length].bool()
            assert tokenizer.decode(ids[n, : rollout.prompt_length][real]) == group.problem.text + "\n\n"
            decoded = ids[n, rollout.prompt_length :][mask[n, rollout.prompt_length :].bool()]
            assert thread.token_ids == tuple(decoded.tolist())
            assert thread.text == tokenizer.decode(decoded, skip_special_tokens=True)


def test_every_metric_is_there_and_agrees_with_the_groups(untrained):
    written = untrained.written
    metrics = written["metrics"]
    assert set(metrics) == {*GROUP_METRICS, "one_tag"} and written["num_groups"] == 2 and written["ceiling"] is None
    assert all(0 <= value <= 1 for name, value in metrics.items() if name != "tokens")  # null would raise
    judged = untrained.judged
    threads = [thread for group, _ in judged for thread in group.threads]
    tagged = [re.findall(r"\[\[(?:best|success|fail)\]\]$", thread.text) for thread in threads]
    assert metrics["one_tag"] == sum(map(len, tagged)) / len(threads)
    assert metrics["fmt"] <= metrics["one_tag"] and metrics["acc"] <= min(metrics["fmt"], metrics["best_at_n"])
    unparsable = [verdict == Verdict.UNPARSABLE for _, verdicts in judged for verdict in verdicts]
    assert metrics["unparsable"] == sum(unparsable) / len(unparsable)
    assert metrics["tokens"] == sum(len(thread.token_ids) for thread in threads) / len(judged)


def test_every_problem_of_the_file_has_room_for_its_threads(untrained):
    data = untrained.data
    problems = data.read_problems(data.problems, data.problems_split, "problems")
    assert len(problems) == len({problem.text for problem in problems}) == NUM_PROBLEMS[Path(data.problems).name]
    # The limits of configs/real/base.yaml: no prompt is so long that it would cost its threads tokens.
    longest = max(len(data.task.template.encode_prompt(problem.text, data.tokenizer)) for problem in problems)
    assert longest + 64 <= data.max_length


class Dictation(Environment):
    """Writes whole threads, from their second token on."""

    def __init__(self, scripts: list[list[list[int]]]) -> None:
        self._scripts = scripts

    def step(self, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(tokens, FREE)
        for b, n in written.nonzero().tolist():
            if self._scripts[b][n]:
                forced[b, n] = self._scripts[b][n].pop(0)
        return forced


class DictatedMath(MathTask):
    """AIME problems whose threads are dictated: one is right, one is wrong, the first one calls itself the best."""

    def environment(self, problems: Sequence[Problem], num_threads: int, tokenizer: Any) -> Environment:
        scripts = []
        for index, problem in enumerate(problems):
            right, wrong = rf"\frac{{{2 * int(problem.answer)}}}{{2}}", str(int(problem.answer) + 1)
            answers = [right, wrong] if index % 2 == 0 else [wrong, right]
            threads = [
                TraceThread("so " * (1 + 3 * n), answer, tag)
                for n, (answer, tag) in enumerate(zip(answers, (Tag.BEST, Tag.FAIL), strict=True))
            ]
            scripts.append([self.template.encode_thread(thread, tokenizer).ids for thread in threads])
        return Dictation(scripts)


@needs_data
def test_dictated_solutions_are_aligned_parsed_verified_and_counted(tmp_path):
    options = {"data.init_args.task": f"{__name__}.DictatedMath", "model.init_args.validation.max_new_tokens": 40}
    validation = validate(tmp_path, "aime24", **options)
    metrics = validation.written["metrics"]
    expected = {"acc": 0.5, "best_at_n": 1, "mean_at_n": 0.5, "vote_at_n": 0.5, "fmt": 1, "unparsable": 0, "one_tag": 1}
    assert {name: metrics[name] for name in expected} == expected
    for group, verdicts in validation.judged:
        right, wrong = rf"\frac{{{2 * int(group.problem.answer)}}}{{2}}", str(int(group.problem.answer) + 1)
        assert {thread.answer: verdict for thread, verdict in zip(group.threads, verdicts, strict=True)} == {
            right: Verdict.CORRECT,
            wrong: Verdict.WRONG,
        }
        assert [thread.finished for thread in group.threads] == ["eos", "eos"]
        assert not any("so" in thread.thought for thread in group.threads)  # what was dictated is not its own
        starts = [_start_of_answer(validation.data, thread) for thread in group.threads]
        assert starts[0] == starts[1]  # the barrier


def _start_of_answer(data: ProblemData, thread: Any) -> int:
    """The column of the first token after the assessment opening."""
    opening = tuple(data.tokenizer.encode(data.task.template.opening))
    at = next(i for i in range(thread.num_tokens) if thread.token_ids[i : i + len(opening)] == opening)
    return thread.columns[at + len(opening)]

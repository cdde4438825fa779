"""Where ``lace generate`` takes model, task and problem from: a Hugging Face model, or a run of ours."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lace_lightning.decoding import Engine, GroupDecoder, Sampling, group_seed, make_decoder
from lace_lightning.shards import is_sharded
from lace_lightning.tasks import Puzzle, Task
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.datamodules.base import GroupData
    from lace_lightning.decoding import Environment, Group
    from lace_lightning.modules import ThreadedModule
    from lace_lightning.tasks import Verdict

NUM_SEARCHED = 1000
"""How many test problems of a puzzle are searched for one that reads like the prompt."""


@dataclass(frozen=True)
class Request:
    """One group to decode.

    Args:
        model: on the CPU, with its tokenizer.
        problem: what is asked.
        seed: the group's seed.
        num_threads, max_new_tokens, sampling, barrier: rules of decoding.
        engine: what computes the columns.
        template: spelling of prompt and assessment.
        task: plays and judges the problem; None if only its text is known.
    """

    model: ThreadedLM
    problem: Problem
    seed: int
    num_threads: int
    max_new_tokens: int
    sampling: Sampling
    barrier: bool = True
    engine: Engine = "auto"
    template: Template = Template()
    task: Task | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt.

        Raises:
            ValueError: the prompt holds what the tokenizer has no token for.
        """
        text, tokenizer = self.problem.text, self.tokenizer
        if tokenizer.unk_token_id in tokenizer.encode(text, add_special_tokens=False):
            raise ValueError(f"PROMPT {text!r} has words that the model's tokenizer does not know: choose others")
        return self.template.encode_prompt(text, tokenizer)

    def decoder(self) -> GroupDecoder:
        """The rules of decoding, with the model on the fastest device here."""
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        rules = (self.max_new_tokens, self.sampling, self.barrier, self.engine)
        return make_decoder(self.model, self.tokenizer, self.template, *rules)

    def environment(self) -> Environment | None:
        """What answers the threads' actions.

        Raises:
            ValueError: the environment needs facts that a prompt does not hold.
        """
        if self.task is None:
            return None
        try:
            return self.task.environment([self.problem], self.num_threads, self.tokenizer)
        except KeyError as error:
            raise ValueError(
                f"PROMPT {self.problem.text!r}: {type(self.task).__name__} plays only problems whose hidden facts it "
                "knows, and none of its test problems reads like this: give --problem INDEX instead"
            ) from error

    def judge(self, group: Group) -> list[Verdict] | None:
        """One verdict per thread; None where only the problem's text is known."""
        if self.task is None or not (self.problem.answer or self.problem.facts):
            return None
        return self.task.judge([(self.problem, thread) for thread in group.threads])


def make_request(arguments: argparse.Namespace) -> Request:
    """What the command line asks for; :mod:`lace_lightning.cli.generate` has the options and checks that they agree.

    Raises:
        ValueError: an option names nothing usable, or is out of range.
    """
    return _from_hub(arguments) if arguments.model is not None else _from_run(arguments)


# ---------------------------------------------------------------- a Hugging Face model


def _from_hub(given: argparse.Namespace) -> Request:
    from lace_lightning.adapter import read_exchange_config

    exchange, layers = (None, None) if given.exchange is None else read_exchange_config(given.exchange)
    num_threads = _or_else(given.threads, 4)
    if given.model.startswith((".", "/", "~")) and not Path(given.model).expanduser().is_dir():
        raise ValueError(f"--model {given.model}: no such folder")
    name = str(Path(given.model).expanduser()) if given.model.startswith("~") else given.model
    try:
        model = ThreadedLM.from_pretrained(name, exchange, num_threads, layers, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {given.model} cannot be used, give a folder or a hub name: {error}") from error
    if given.exchange is not None:
        model.load_exchange(given.exchange)
    return Request(
        model,
        Problem(id="prompt", text=given.prompt, answer=""),
        seed=group_seed(_or_else(given.seed, 0), given.prompt, 0),  # that of ThreadedLM.generate_groups
        num_threads=num_threads,
        max_new_tokens=_or_else(given.max_new_tokens, 256),
        sampling=_sampling(given, Sampling()),
    )


# ---------------------------------------------------------------- a run of ours


def load_run(given: argparse.Namespace) -> tuple[ThreadedLM, GroupData]:
    """Model and data of the run that ``run``, or ``config`` with ``ckpt``, names.

    Raises:
        ValueError: they name no run of ours.
    """
    module, data, _, checkpoint = _find_run(given)
    return _load(module, data, checkpoint), data


def load_stage(given: argparse.Namespace) -> tuple[ThreadedModule, GroupData, Path, Path]:
    """The same run's stage, with its model, its data, and the files of config and checkpoint.

    Raises:
        ValueError: ``run``, or ``config`` with ``ckpt``, name no run of ours.
    """
    module, data, config, checkpoint = _find_run(given)
    _load(module, data, checkpoint)
    return module, data, config, checkpoint


def _find_run(given: argparse.Namespace) -> tuple[ThreadedModule, GroupData, Path, Path]:
    folder = None if given.run is None else _run_folder(Path(given.run))
    if folder is None and given.ckpt is None:
        raise ValueError(f"--config {given.config} needs the checkpoint of its run: --ckpt FILE")
    config = Path(given.config) if folder is None else folder / "config.yaml"
    checkpoint = Path(given.ckpt) if folder is None or given.ckpt else _newest_checkpoint(folder)
    _check_file(config, "--config")
    if not is_sharded(checkpoint):
        _check_file(checkpoint, "--ckpt")
    return *_instantiate(config), config, checkpoint


def _from_run(given: argparse.Namespace) -> Request:
    module, data, _, checkpoint = _find_run(given)
    problem = _problem_at(data, given.problem) if given.prompt is None else _problem_like(data.task, given.prompt)
    decoding = module.validation
    room = data.max_length - len(data.task.template.encode_prompt(problem.text, data.tokenizer))
    return Request(
        _load(module, data, checkpoint),
        problem,
        seed=group_seed("validation", _or_else(given.seed, decoding.seed), problem.id),  # the group of `lace validate`
        num_threads=_or_else(given.threads, decoding.num_threads or module.spec.num_threads),
        max_new_tokens=_or_else(given.max_new_tokens, min(decoding.max_new_tokens, room)),
        sampling=_sampling(given, decoding.sampling),
        barrier=decoding.barrier,
        engine=decoding.engine,
        template=data.task.template,
        task=data.task,
    )


def _instantiate(config: Path) -> tuple[ThreadedModule, GroupData]:
    """Stage and DataModule of a resolved config; trainer, logger and callbacks are not made."""
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser

    from lace_lightning.datamodules.base import GroupData
    from lace_lightning.modules import ThreadedModule

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(ThreadedModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(GroupData, "data", subclass_mode=True)
    try:
        settings: Any = yaml.safe_load(config.read_text())
        parsed = parser.parse_object({name: settings[name] for name in ("model", "data")})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ArgumentError) as error:
        raise ValueError(f"{config} is not the config of a run, with sections model and data: {error}") from error
    objects = parser.instantiate_classes(parsed)
    return objects.model, objects.data


def _load(module: ThreadedModule, data: GroupData, checkpoint: Path) -> ThreadedLM:
    """The run's model with the weights of its checkpoint; what its stage did not train comes from ``init_from``."""
    from lace_lightning.checkpoints import initialise, read_weights

    model = module.model = module.spec.build(data.tokenizer)
    is_whole = set(read_weights(checkpoint)) >= {name for name, _ in module.named_parameters()}
    initialise(module, [checkpoint] if is_whole else [*module.init_from, checkpoint])
    return model


def _run_folder(run: Path) -> Path:
    """The folder with the run's config; a run without a logger keeps it beside its checkpoints."""
    folders = [folder for folder in (run, run / "checkpoints") if (folder / "config.yaml").is_file()]
    if not folders:
        raise ValueError(f"--run {run} has no config.yaml: give the folder of a run, or --config and --ckpt")
    return folders[0]


def _newest_checkpoint(run: Path) -> Path:
    written = [*run.glob("*.ckpt"), *run.glob("checkpoints/*.ckpt")]
    found = [path for path in written if path.is_file() or is_sharded(path)]  # not a folder that a kill left unfinished
    if not found:
        raise ValueError(
            f"--run {run} has no checkpoint, neither itself nor in checkpoints/: name one with --ckpt FILE"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def example_of(data: GroupData) -> Problem:
    """A problem that the run evaluates on."""
    data.setup("predict")
    problems: Any = data.predict_dataloader().dataset  # type: ignore[union-attr]  # setup raises if there are none
    return next(iter(problems))


def _problem_at(data: GroupData, index: int) -> Problem:
    """Problem number ``index`` of those that the run's DataModule evaluates on; of a puzzle's there is no last one."""
    if data.problems is None and isinstance(data.task, Puzzle):
        return data.task.problem(index, "test")
    data.setup("predict")
    problems: Any = data.predict_dataloader().dataset  # type: ignore[union-attr]  # setup raises if there are none
    if index >= len(problems):
        raise ValueError(f"--problem {index}: {data.problems} has {len(problems)} problems, counted from 0")
    return problems[index]


def _problem_like(task: Task, prompt: str) -> Problem:
    """The first test problem of a puzzle that reads like the prompt, else one of which only the text is known."""
    candidates: Iterable[Problem] = ()
    if isinstance(task, Puzzle):
        candidates = (task.problem(index, "test") for index in range(NUM_SEARCHED))
    unknown = Problem(id="prompt", text=prompt, answer="")
    return next((problem for problem in candidates if problem.text == prompt.strip()), unknown)


# ---------------------------------------------------------------- small parts


def _sampling(given: argparse.Namespace, default: Sampling) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p")
    return replace(default, **{name: getattr(given, name) for name in names if getattr(given, name) is not None})


def _check_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file")


def _or_else(value: int | None, default: int) -> int:
    return default if value is None else value

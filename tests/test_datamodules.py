"""DataModules: the right examples in the right order, also after an interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lace_lightning.datamodules import ProblemData, TraceData
from lace_lightning.decoding.group import Thread
from lace_lightning.tasks import Puzzle, Task, Verdict
from lace_lightning.traces.batch import TraceBatch
from lace_lightning.traces.loader import EpochSampler, ResumableLoader, SerialDataset
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
from lace_lightning.traces.sources import BadDataError
from lace_lightning.traces.template import Segment, Template
from lace_lightning.traces.writing import write_traces

TOKENIZER_FOLDER = Path(__file__).parents[2] / "shared" / "data" / "tokenizer"
WORDS = ["<pad>", "<eos>", "<unk>", *(str(i) for i in range(1000)), "test", "train", "assess", *Tag]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


class Count(Puzzle):
    """Problem ``index`` asks for index; its threads count up to it in different strides."""

    template = Template(prompt="{text}", opening=" assess ", answer="{answer}", separator=" ")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return make_tokenizer(pad_token="<pad>", eos_token="<eos>")

    def problem(self, index: int, split: str = "train") -> Problem:
        return Problem(f"{split}-{index}", f"{split} {index}", str(index))

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        tags = [Tag.BEST, *[Tag.FAIL] * (num_threads - 1)]
        threads = [TraceThread(" ".join(["7"] * (n + index % 3)), str(index), tag) for n, tag in enumerate(tags)]
        return Trace(self.problem(index, split), tuple(threads))

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        return [Verdict.WRONG for _ in items]


class Asked(Task):
    """A task without a puzzle's supply: problems come from files."""

    template = Count.template

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return make_tokenizer(eos_token="<eos>")

    def adapt(self, problem: Problem) -> Problem:
        return Problem(problem.id, f"test {problem.facts['number']}", problem.answer, problem.facts)

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        return [Verdict.WRONG for _ in items]


class Recorder(LightningModule):
    """Appends the content of each training batch to a file; can die in the middle of one."""

    def __init__(self, path: Path, die_at: int = -1, kill: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.path, self.die_at, self.kill = path, die_at, kill

    def training_step(self, batch: TraceBatch | list[Problem], batch_idx: int) -> torch.Tensor:
        if self.global_step == self.die_at and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.global_step == self.die_at:
            raise RuntimeError("power cut")
        content = batch.input_ids.tolist() if isinstance(batch, TraceBatch) else [problem.id for problem in batch]
        entry = [self.current_epoch, batch_idx, content, float(torch.rand(()))]
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        assert isinstance(batch[0], Problem)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        torch.set_rng_state(getattr(self, "rng", torch.get_rng_state()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def make_data(kind: str, num_workers: int = 0, fresh: bool = True, **options: Any) -> TraceData | ProblemData:
    common = {"num_problems": 3, "batch_size": 3, "num_workers": num_workers, "seed": 5, "fresh": fresh} | options
    if kind == "problems":
        return ProblemData(Count(), num_train_problems=13, **common)
    return TraceData(Count(), num_traces=13, jitter=2, **common)


def fit(folder: Path, data: TraceData | ProblemData, resume: bool = False, **options: Any) -> list[Any]:
    """Train 3 epochs of 5 batches, with a checkpoint after every second step, and read what was recorded."""
    torch.manual_seed(0)
    record = folder / f"{'resumed' if resume else 'first'}.jsonl"
    folder.mkdir(exist_ok=True)
    on_exception = options.pop("on_exception", False)
    every = options.pop("every", 2)
    keep = ModelCheckpoint(folder, "last", every_n_train_steps=every, save_on_exception=on_exception)
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[keep], logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options.pop("trainer", {}),
    )  # fmt: skip
    try:
        trainer.fit(Recorder(record, **options), data, ckpt_path=str(folder / "last.ckpt") if resume else None)
    except RuntimeError as error:
        assert str(error) == "power cut"
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("die_at", [3, 8, 11])
def test_resumed_run_continues_with_the_very_next_batch(tmp_path: Path, die_at: int, num_workers: int) -> None:
    whole = fit(tmp_path / "whole", make_data("traces"))
    fit(tmp_path / "cut", make_data("traces", num_workers), die_at=die_at)
    resumed = fit(tmp_path / "cut", make_data("traces", num_workers), resume=True)
    assert len(whole) == 15
    assert resumed == whole[die_at // 2 * 2 :]


def test_run_killed_in_mid_epoch_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", make_data("problems"))
    job = multiprocessing.get_context("fork").Process(
        target=fit, args=(tmp_path / "cut", make_data("problems")), kwargs={"die_at": 7, "kill": True}
    )
    job.start()
    job.join(60)
    assert job.exitcode == -signal.SIGKILL
    assert fit(tmp_path / "cut", make_data("problems"), resume=True) == whole[6:]


def test_batch_that_was_interrupted_comes_again(tmp_path: Path) -> None:
    """A checkpoint that is saved because of an exception knows one batch more handed out than finished."""
    whole = fit(tmp_path / "whole", make_data("traces"))
    fit(tmp_path / "cut", make_data("traces"), die_at=7, every=100, on_exception=True)
    assert fit(tmp_path / "cut", make_data("traces"), resume=True) == whole[7:]


def test_shortened_epochs_and_validation_between_batches_keep_the_place(tmp_path: Path) -> None:
    trainer = {"limit_train_batches": 4, "val_check_interval": 2}
    whole = fit(tmp_path / "whole", make_data("traces"), every=3, trainer=dict(trainer))
    fit(tmp_path / "cut", make_data("traces"), every=3, trainer=dict(trainer), die_at=7)
    resumed = fit(tmp_path / "cut", make_data("traces"), every=3, trainer=dict(trainer), resume=True)
    assert len(whole) == 12 and resumed == whole[6:]


def test_workers_leave_the_global_random_stream_alone(tmp_path: Path) -> None:
    assert fit(tmp_path / "0", make_data("traces")) == fit(tmp_path / "2", make_data("traces", num_workers=2))


def test_each_epoch_is_reshuffled_and_whole_and_fresh_puzzles_never_repeat(tmp_path: Path) -> None:
    for fresh in (False, True):
        entries = fit(tmp_path / str(fresh), make_data("problems", fresh=fresh))
        epochs = [[name for e, _, names, _ in entries if e == epoch for name in names] for epoch in range(3)]
        numbers = [{int(name.removeprefix("train-")) for name in epoch} for epoch in epochs]
        assert numbers == [{index + 13 * epoch * fresh for index in range(13)} for epoch in range(3)]
        orders = {tuple(int(name.removeprefix("train-")) % 13 for name in epoch) for epoch in epochs}
        assert len(orders) == 3 and tuple(range(13)) not in orders


def test_overfitting_serves_the_same_batches_in_every_epoch(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        entries = fit(tmp_path, make_data("traces"), trainer={"overfit_batches": 2})
    contents = [content for _, _, content, _ in entries]
    assert contents[:2] == contents[2:4] == contents[4:] and contents[0] != contents[1]


@settings(deadline=None)
@given(
    size=st.integers(1, 40), batch_size=st.integers(1, 5), world_size=st.integers(1, 4), epoch=st.integers(0, 3)
)  # fmt: skip
def test_ranks_together_take_the_steps_of_one_rank_with_a_larger_batch(
    size: int, batch_size: int, world_size: int, epoch: int
) -> None:
    def batches(**place: int) -> list[list[int]]:
        sampler = EpochSampler(size, seed=3, **place)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    alone = batches(batch_size=batch_size * world_size)
    shares = [batches(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(part for share in shares for part in share)  # every rank has something to do in every step
    counted = [[serial for part in step for serial in part if serial >= 0] for step in zip(*shares, strict=True)]
    assert [sorted(step) for step in alone] == [sorted(step) for step in counted]
    stand_ins = [part for step in zip(*shares, strict=True) for part in step if part[0] < 0]
    assert all(len(part) == 1 and ~part[0] == alone[-1][0] for part in stand_ins)
    assert sorted(serial for step in alone for serial in step) == [epoch * size + index for index in range(size)]


def test_a_changed_order_is_refused_in_mid_epoch_only() -> None:
    def make_loader(batch_size: int) -> ResumableLoader[int, list[tuple[int, int]]]:
        return ResumableLoader(SerialDataset(int, 12), EpochSampler(12, batch_size), list)

    loader = make_loader(3)
    batches = iter(loader)
    next(batches)
    inside = loader.state_dict()
    list(batches)
    with pytest.raises(ValueError, match=r"batch_size=4 \(was 3\)\. Resume with .*init_from"):
        make_loader(4).load_state_dict(inside)
    loader.sampler.set_epoch(1)  # as when a checkpoint is saved before the first batch of an epoch
    next_epoch = make_loader(4)
    next_epoch.load_state_dict(loader.state_dict())
    next_epoch.sampler.set_epoch(1)
    assert len(list(next_epoch)) == 3


@pytest.mark.parametrize("kind", ["traces", "problems"])
def test_evaluation_serves_test_problems_in_order_each_to_one_process(kind: str) -> None:
    data = make_data(kind, num_problems=7, val_batch_size=2)
    data.setup("validate")
    expected = [data.task.problem(index, "test") for index in range(7)]  # type: ignore[attr-defined]
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert [len(batch) for batch in loader] == [2, 2, 2, 1]
        assert [problem for batch in loader for problem in batch] == expected
    data._place = lambda: (1, 2)  # type: ignore[method-assign]
    assert [problem for batch in data.val_dataloader() for problem in batch] == expected[1::2]
    data._place = lambda: (0, 8)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="7 problems cannot feed 8 processes: raise num_problems"):
        data.val_dataloader()


def test_lightning_validates_and_predicts_on_problems() -> None:
    class Names(Recorder):
        def predict_step(self, batch: list[Problem], batch_idx: int) -> list[str]:
            return [problem.id for problem in batch]

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(Names(Path()), make_data("problems"))
    assert trainer.predict(Names(Path()), make_data("problems")) == [["test-0", "test-1", "test-2"]]


def write_problems(path: Path, count: int) -> str:
    rows = [{"id": str(i), "problem": "asked", "answer": "1", "number": i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_are_adapted_by_the_task_and_cut_to_the_wanted_number(tmp_path: Path) -> None:
    problems = write_problems(tmp_path / "p.jsonl", 5)
    rows = [replace(Count().trace(i, 2), problem=Problem(str(i), "asked", "1", {"number": i})) for i in range(4)]
    write_traces(rows, tmp_path / "t.jsonl")
    data = TraceData(
        Asked(), str(tmp_path / "t.jsonl"), num_traces=3, problems=problems, num_problems=2, num_threads=2, batch_size=9
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    starts = data.tokenizer.batch_decode(batch.input_ids[:, 0, : batch.prompt_length])
    assert sorted(starts) == ["test 0", "test 1", "test 2"]
    assert [problem.text for problem in next(iter(data.val_dataloader()))] == ["test 0", "test 1"]
    grpo = ProblemData(Asked(), problems, num_train_problems=4, batch_size=9)
    grpo.setup("fit")
    assert sorted(problem.text for problem in next(iter(grpo.train_dataloader()))) == [f"test {i}" for i in range(4)]
    assert grpo.val_dataloader() == []
    with pytest.raises(ValueError, match="problems=None: Asked makes no problems of its own to test on; set problems"):
        grpo.setup("test")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_threads": 3}, r"t.jsonl:1: trace 'train-0' has 2 threads, but num_threads=3"),
        ({"max_length": 7}, r"t.jsonl:2: trace 'train-1' takes up to 8 columns.*max_length=7"),
        ({"max_length": 9, "jitter": 2}, r"t.jsonl:2: trace 'train-1' takes up to 10 columns"),
    ],
)
def test_a_trace_that_does_not_fit_the_run_is_named_before_it_starts(
    tmp_path: Path, options: dict[str, int], reason: str
) -> None:
    write_traces([Count().trace(index, 2) for index in range(2)], tmp_path / "t.jsonl")
    data = TraceData(Count(), str(tmp_path / "t.jsonl"), num_problems=1, **({"num_threads": 2} | options))
    with pytest.raises(BadDataError, match=reason):
        data.setup("fit")


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (TraceData, {"num_threads": 0}, "num_threads=0: must be at least 1"),
        (TraceData, {"jitter": -1}, "jitter=-1: must be at least 0"),
        (ProblemData, {"seed": -1}, "seed=-1: must be at least 0"),
        (ProblemData, {"num_train_problems": 0}, "num_train_problems=0: must be at least 1"),
        (TraceData, {"task": Asked()}, "traces=None: Asked makes no traces of its own; set traces"),
        (ProblemData, {"task": Asked()}, "train_problems=None: Asked makes no problems of its own; set train_problems"),
        (ProblemData, {"problems": "none.jsonl"}, "problems='none.jsonl': no such file"),
        (ProblemData, {"train_problems": "none.jsonl"}, "train_problems='none.jsonl': no such file"),
        (TraceData, {"traces": "none.jsonl"}, "traces='none.jsonl': no such file"),
        (ProblemData, {"max_length": 2}, "the prompt of problem 'test-0' has 2 tokens.*max_length=2"),
        (TraceData, {"tokenizer": "./none"}, "tokenizer='./none': no such folder"),
    ],
)
def test_a_bad_option_ends_the_run_at_once(data: type, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        data(**({"task": Count()} | options)).setup("fit")


@pytest.mark.parametrize(
    ("tokenizer", "opening", "reason"),
    [
        (None, " assess ", "tokenizer=None: Count brings no tokenizer; set tokenizer"),
        (make_tokenizer(pad_token="<pad>"), " assess ", "tokenizer=None: has no end-of-sequence token"),
        (make_tokenizer(eos_token="<eos>"), " unheard ", "tokenizer=None: template.opening=' unheard ' has no token"),
    ],
)
def test_a_tokenizer_without_the_needed_tokens_is_refused(tokenizer: Any, opening: str, reason: str) -> None:
    task = Count()
    task.tokenizer = lambda: tokenizer  # type: ignore[method-assign]
    task.template = Template(opening=opening)
    with pytest.raises(ValueError, match=reason):
        TraceData(task)


def test_end_of_sequence_pads_where_the_tokenizer_has_no_padding_token() -> None:
    tokenizer = TraceData(Asked(), traces="t.jsonl").tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_real_tokenizer_is_loaded_from_its_folder_and_aligns_the_answers() -> None:
    if not TOKENIZER_FOLDER.exists():
        pytest.skip(f"{TOKENIZER_FOLDER} is not there")
    task = Count()
    task.template = Template()
    data = TraceData(task, num_traces=4, num_problems=1, tokenizer=str(TOKENIZER_FOLDER), batch_size=4)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    opening = task.template.encode_opening(data.tokenizer)
    for ids, segments in zip(batch.input_ids, batch.segments, strict=True):
        columns = [(row == Segment.ASSESSMENT).nonzero().flatten().tolist() for row in segments]
        assert [row[own[: len(opening)]].tolist() for row, own in zip(ids, columns, strict=True)] == [opening] * 4
        assert len({own[len(opening)] for own in columns}) == 1 < len({own[0] for own in columns})
        answers = [data.tokenizer.decode(row[own[len(opening)] :]) for row, own in zip(ids, columns, strict=True)]
        assert all(re.match(r"\\boxed\{\d+\} \[\[", answer) for answer in answers)

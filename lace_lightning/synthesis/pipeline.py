"""The whole way from problems to traces: stages in order, shards, merging, and the data card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lace_lightning.embedding import Embedder, NgramEmbedder
from lace_lightning.synthesis.assembly import AssemblyOptions, assemble, to_trace
from lace_lightning.synthesis.card import Prices, make_card
from lace_lightning.synthesis.card_page import to_markdown
from lace_lightning.synthesis.compression import CompressionOptions, TokenCounter, compress
from lace_lightning.synthesis.debate import debate
from lace_lightning.synthesis.difficulty import DifficultyOptions, measure
from lace_lightning.synthesis.judging import JudgingOptions, rank
from lace_lightning.synthesis.problems import ProblemOptions, collect, fingerprint, shard_of
from lace_lightning.synthesis.publish import publish
from lace_lightning.synthesis.rows import Row, describe
from lace_lightning.synthesis.sampling import SamplingOptions, sample
from lace_lightning.synthesis.solver import Solver
from lace_lightning.synthesis.teacher import Teacher
from lace_lightning.synthesis.work_folder import Outcome, WorkFolder
from lace_lightning.tasks import Task
from lace_lightning.traces.writing import write_traces
from lace_lightning.whole_file import write_text

STAGES = ("problems", "difficulty", "sampling", "compression", "judging", "assembly")
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")


class Stage(NamedTuple):
    """A stage after the first: its name, what its outcome depends on besides its rows, and its work."""

    name: str
    settings: Any
    work: Callable[[Sequence[Row]], Iterable[Row]]


@dataclass(frozen=True)
class Synthesis:
    """From problems and a teacher to verified, diverse, tagged traces (LACE.md §5).

    Every outcome is a function of the options, the seed and each problem by itself: how many problems are worked on at
    once, what is in other shards, and how often the run was killed changes nothing.

    Args:
        folder: where the stages' files, the traces and the data card go.
        task: words and judges the problems.
        teacher: solves, shortens and ranks.
        problems: which problems to take.
        solver: the model to be trained, to measure difficulty; null: every problem is kept.
        difficulty: which success rates to keep.
        sampling: how to sample solutions.
        compression: what is too long.
        judging: how often to rank.
        assembly: which threads make a trace.
        embedder: tells how alike solutions are; null: by word n-grams.
        prices: of tokens, for the card.
        traces: name of the trace file in the folder, ``.jsonl``, ``.jsonl.gz`` or ``.parquet``.
        seed: of everything random.
        width: problems worked on at once.
        tracking_uri: MLflow store that also gets the card; null: none.
        experiment_name: MLflow experiment.

    Raises:
        ValueError: the options contradict each other.
    """

    folder: str
    task: Task
    teacher: Teacher
    problems: ProblemOptions
    solver: Solver | None = None
    difficulty: DifficultyOptions = DifficultyOptions()
    sampling: SamplingOptions = SamplingOptions()
    compression: CompressionOptions = CompressionOptions()
    judging: JudgingOptions = JudgingOptions()
    assembly: AssemblyOptions = AssemblyOptions()
    embedder: Embedder | None = None
    prices: Prices = Prices()
    traces: str = "traces.jsonl"
    seed: int = 0
    width: int = 16
    tracking_uri: str | None = None
    experiment_name: str = "lace-synth"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: work on at least 1 problem at once")
        if self.sampling.solutions < self.assembly.num_threads:
            raise ValueError(
                f"sampling.solutions={self.sampling.solutions} can never fill "
                f"assembly.num_threads={self.assembly.num_threads}"
            )
        if self.sampling.style == "debate" and type(self.teacher).debate is Teacher.debate:
            name = type(self.teacher).__name__
            raise ValueError(f"sampling.style=debate: {name} holds no debates; choose another teacher")

    def run(self, until: str = STAGES[-1], shard: tuple[int, int] | None = None) -> None:
        """Do every stage up to ``until`` that is not done yet; after the last, write traces and card.

        Args:
            until: name of a stage.
            shard: ``(i, n)``: only every n-th problem, from the i-th on, in a folder of its own.

        Raises:
            ValueError: an unknown stage or an impossible shard, or another process is at work in the folder.
        """
        if until not in STAGES:
            raise ValueError(f"stage={until!r}: there is {', '.join(STAGES)}")
        folder = WorkFolder(Path(self.folder, *([] if shard is None else [_shard_name(*shard)])))
        with folder.alone():
            outcomes = {"problems": self._collect(folder)}
            rows = outcomes["problems"].kept
            rows = rows if shard is None else shard_of(rows, *shard)
            for stage in self._stages():
                if STAGES.index(stage.name) > STAGES.index(until):
                    return
                outcomes[stage.name] = folder.stage(stage.name, stage.settings, rows, stage.work)
                rows = outcomes[stage.name].kept
            self._finish(folder, outcomes, publishes=shard is None)

    def merge(self) -> None:
        """Put the finished shards in this folder together: the same files as one run over everything.

        Raises:
            ValueError: a shard is missing, not finished, or was made with other settings.
        """
        shards = [WorkFolder(path) for path in _find_shards(Path(self.folder))]
        folder = WorkFolder(self.folder)
        with folder.alone():
            outcomes = {"problems": self._collect(folder)}
            rows = outcomes["problems"].kept
            for stage in self._stages():
                outcome = _joined(shards, stage)
                folder.keep(stage.name, stage.settings, rows, outcome)
                outcomes[stage.name], rows = outcome, outcome.kept
            self._finish(folder, outcomes, publishes=True)

    @property
    def _embedder(self) -> Embedder:
        return self.embedder or NgramEmbedder()

    def _collect(self, folder: WorkFolder) -> Outcome:
        settings = {"options": fingerprint(self.problems), "task": describe(self.task)}
        if not folder.has_settings("problems", settings):
            rows = collect(self.problems, self.task)
            kept = [row for row in rows if not row.get("removed")]
            folder.keep("problems", settings, [], Outcome(kept, [row for row in rows if row.get("removed")]))
        return folder.outcome("problems")

    def _stages(self) -> list[Stage]:
        task, teacher, seed, width = self.task, self.teacher, self.seed, self.width
        told = {"task": describe(task), "teacher": teacher.identity, "seed": seed}
        embedder = describe(self._embedder)
        stages = [
            Stage("sampling", {**told, "options": asdict(self.sampling), "embedder": embedder}, self._sample),
            Stage(
                "compression",
                {**told, "options": asdict(self.compression)},
                lambda rows: compress(rows, teacher, task, self.compression, seed, width),
            ),
            Stage(
                "judging",
                {**told, "options": asdict(self.judging)},
                lambda rows: rank(rows, teacher, self.judging, seed, width),
            ),
            Stage(
                "assembly",
                {"teacher": teacher.identity, "seed": seed, "options": asdict(self.assembly)},
                lambda rows: assemble(rows, self.assembly, teacher.identity, seed),
            ),
        ]
        if self.solver is not None:
            settings = {**told, "teacher": self.solver.identity, "options": asdict(self.difficulty)}
            stages.insert(0, Stage("difficulty", settings, self._measure))
        return stages

    def _measure(self, rows: Sequence[Row]) -> Iterable[Row]:
        assert self.solver is not None
        return measure(rows, self.solver, self.task, self.difficulty, self.seed, self.width)

    def _sample(self, rows: Sequence[Row]) -> Iterable[Row]:
        if self.sampling.style == "debate":
            return debate(rows, self.teacher, self.task, self.sampling, self.seed, self.width)
        return sample(rows, self.teacher, self.task, self._embedder, self.sampling, self.seed, self.width)

    def _finish(self, folder: WorkFolder, outcomes: dict[str, Outcome], publishes: bool) -> None:
        """Write traces and card; of a shard, MLflow hears nothing."""
        traces = [to_trace(row) for row in outcomes["assembly"].kept]
        write_traces(traces, folder.path / self.traces)
        made_with = {stage.name: stage.settings for stage in self._stages()}
        made_with["problems"] = fingerprint(self.problems)
        counter = TokenCounter(self.compression.tokenizer)
        card = make_card(outcomes, traces, self.teacher, self._embedder, counter, self.prices, made_with)
        write_text(folder.path / "card.json", json.dumps(card, ensure_ascii=False, indent=1) + "\n")
        write_text(folder.path / "card.md", to_markdown(card, Path(self.folder).name))
        if publishes and self.tracking_uri is not None:
            publish(card, folder.path, Path(self.folder).name, self.tracking_uri, self.experiment_name)


def _shard_name(index: int, count: int) -> str:
    if not 0 <= index < count:
        raise ValueError(f"shard={index}/{count}: give i/n with i from 0 to n-1")
    return f"shard-{index}-of-{count}"


def _find_shards(folder: Path) -> list[Path]:
    """The folders of all shards of one sharding.

    Raises:
        ValueError: there are none, some are missing, or shards of two shardings stand side by side.
    """
    found = {path: match for path in folder.glob("shard-*") if (match := _SHARD.fullmatch(path.name))}
    counts = sorted({int(match[2]) for match in found.values()})
    if len(counts) != 1:
        raise ValueError(f"folder={str(folder)!r} holds shards of {counts or 'no'} shardings: one is needed to merge")
    paths = [folder / _shard_name(index, counts[0]) for index in range(counts[0])]
    missing = [path.name for path in paths if path not in found]
    if missing:
        raise ValueError(f"folder={str(folder)!r} lacks {', '.join(missing)}: run or copy them first")
    return paths


def _joined(shards: Sequence[WorkFolder], stage: Stage) -> Outcome:
    """The outcome of a stage in all shards, in the order of the problems."""
    outcomes = [shard.outcome(stage.name) for shard in shards]
    for shard in shards:
        if not shard.has_settings(stage.name, stage.settings):
            raise ValueError(
                f"{shard.path}: {stage.name!r} was made with other settings than the config has: run it again"
            )
    kept = [row for outcome in outcomes for row in outcome.kept]
    removed = [row for outcome in outcomes for row in outcome.removed]
    return Outcome(sorted(kept, key=_position), sorted(removed, key=_position))


def _position(row: Row) -> int:
    return int(row["position"])

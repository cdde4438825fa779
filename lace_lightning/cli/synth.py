"""``lace synth``: from problems and a teacher to traces; ``lace synth merge`` and ``lace synth report``."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.cli.main import explain
from lace_lightning.cli.next_steps import say_next
from lace_lightning.cli.shipped import with_shipped_configs

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lace_lightning.synthesis.pipeline import Synthesis


def run(argv: Sequence[str]) -> int:
    """Run the pipeline, merge shards or report on a trace file; the exit code: 0, or 2 for what the user can mend."""
    from jsonargparse import ArgumentError

    try:
        if argv[:1] == ["report"]:
            return _report(argv[1:])
        if argv[:1] == ["merge"]:
            synthesis, options = build(argv[1:])
            synthesis.merge()
        else:
            synthesis, options = build(argv)
            synthesis.run(options.stage, None if options.shard is None else _shard(options.shard))
        say_next(*_next(synthesis, options, argv))
        return 0
    except (ArgumentError, ValueError, OSError, RuntimeError) as error:  # of chat models and tracking, too
        return explain(error)


def build(argv: Sequence[str]) -> tuple[Synthesis, Any]:
    """The pipeline that the arguments describe, and the options ``stage`` and ``shard``.

    Raises:
        ArgumentError: an option or a key of a config is unknown, or its value is of a wrong type.
        ValueError: options contradict each other.
    """
    from lace_lightning.synthesis.pipeline import Synthesis

    parser = _parser()
    given = parser.parse_args(with_shipped_configs(argv))
    made = parser.instantiate_classes(given)
    options = {key: value for key, value in made.as_dict().items() if key not in ("config", "stage", "shard")}
    return Synthesis(**options), given


def _next(synthesis: Synthesis, options: Any, argv: Sequence[str]) -> list[tuple[str, str]]:
    """What to do with what the pipeline has written."""
    from lace_lightning.synthesis.pipeline import STAGES

    if getattr(options, "shard", None) is not None and argv[:1] != ["merge"]:
        return [("when all shards are done", "lace synth merge --config …, with the same settings")]
    if options.stage != STAGES[-1]:
        return [("go on to the end", "lace synth with the same settings, without --stage")]
    traces = Path(synthesis.folder, synthesis.traces)
    return [
        ("how diverse and how tagged the traces are", f"lace synth report {shlex.quote(str(traces))}"),
        ("train on them", f"lace fit … --data.traces={shlex.quote(str(traces))}"),
    ]


def _parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from lace_lightning.synthesis.pipeline import STAGES, Synthesis

    parser = ArgumentParser(
        prog="lace synth",
        description="Make traces from problems and a teacher (docs/synthesis.md). Also: lace synth merge --config …, "
        "lace synth report FILE.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML; several are read in order, the last one wins")
    parser.add_argument("--stage", default=STAGES[-1], help=f"stop after this stage: {', '.join(STAGES)}")
    parser.add_argument("--shard", default=None, type=str, help="i/n: every n-th problem, from the i-th on (from 0)")
    parser.add_class_arguments(Synthesis)
    return parser


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise ValueError(f"--shard {text}: give i/n, for example 0/4")
    return int(match[1]), int(match[2])


def _report(argv: Sequence[str]) -> int:
    given = _report_parser().parse_args(argv)
    from lace_lightning.embedding import HuggingFaceEmbedder, NgramEmbedder
    from lace_lightning.synthesis.compression import TokenCounter
    from lace_lightning.synthesis.statistics import trace_statistics
    from lace_lightning.traces.reading import read_traces

    traces = read_traces(given.file, split=given.split, option="FILE")
    embedder = NgramEmbedder() if given.embedder is None else HuggingFaceEmbedder(given.embedder)
    statistics = trace_statistics(traces, embedder, TokenCounter(given.tokenizer))
    if given.run is not None or given.config is not None:
        statistics["cross_ratio"] = _cross_ratio(given, traces)
    print(json.dumps(statistics, indent=1) if given.json else _page(statistics))
    say_next(("train on these traces", f"lace fit … --data.traces={shlex.quote(given.file)}"))
    return 0


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace synth report", description="How diverse, how tagged and how long the threads of traces are."
    )
    parser.add_argument("file", metavar="FILE", help="traces: .jsonl, .jsonl.gz, .parquet or a hub data set")
    parser.add_argument("--split", default="train", help="split of a hub data set (train)")
    parser.add_argument("--embedder", metavar="MODEL", help="a Hugging Face model that embeds threads (word n-grams)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="what counts tokens (words and signs are counted)")
    parser.add_argument("--run", metavar="FOLDER", help="a run of lace fit: measure the cross-attention ratio with it")
    parser.add_argument("--config", metavar="FILE", help="instead: config.yaml of a run, with --ckpt")
    parser.add_argument("--ckpt", metavar="FILE", help="with --run or --config: the checkpoint to use")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _cross_ratio(given: argparse.Namespace, traces: Any) -> float:
    """The ratio that the run's model has on the traces that its data settings would take."""
    from lace_lightning.cli.sources import load_run
    from lace_lightning.synthesis.statistics import cross_ratio
    from lace_lightning.traces.collate import TraceCollator

    model, data = load_run(given)
    collate = TraceCollator(data.tokenizer, data.task.template, model.num_threads, data.max_length)
    return cross_ratio(model, collate, [collate.check(trace) for trace in traces])


def _page(statistics: dict[str, Any]) -> str:
    from lace_lightning.synthesis.card_page import PAPER

    diversity, tokens = statistics["diversity"], statistics["tokens"]
    lines = [f"{statistics['num_traces']} traces, threads per trace: {statistics['num_threads']}"]
    lines += [f"{name:<26}{value:.4f}   (paper's Table 2: {PAPER[name]})" for name, value in diversity.items()]
    if "cross_ratio" in statistics:
        lines.append(f"{'cross_attention_ratio':<26}{statistics['cross_ratio']:.4f}   (paper's Table 2: 0.307 → 0.353)")
    lines += [f"{tag:<26}{share:.4f}" for tag, share in statistics["tags"].items()]
    lines.append(f"{'exactly one best':<26}{statistics['valid_tags']:.4f}")
    lines.append(f"{'different strategies':<26}{statistics['strategies']:.4f}")
    lines += [f"{f'tokens per thread, {name}':<26}{value:.1f}" for name, value in tokens.items()]
    return "\n".join(lines)

"""``lace bench``: what decoding and training take, beside what they must take at least."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.cli.counts import natural, positive
from lace_lightning.cli.main import INTERRUPTED, explain
from lace_lightning.cli.next_steps import say_next

if TYPE_CHECKING:
    from rich.console import Console

    from lace_lightning.bench.bench import Bench, Settings
    from lace_lightning.bench.record import Record

SCOPES = ("causal", "aligned", "window")
PEERS = ("dynamic", "static", "compiled", "continuous", "graph", "plain")
SWEEPS = ("threads", "prompt", "lattice_time", "width", "memory")
RESULTS = Path("benchmarks/results")


def run(argv: Sequence[str]) -> int:
    """Measure, show a table and write JSON; the exit code: 0, 2 for a mistake in the options, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    from rich.console import Console

    try:
        if arguments.theme == "plot":
            return _plot(arguments)
        # A log has no width of its own; there a row of the table is to stay one line.
        return _measure(arguments, argv, Console(width=None if sys.stdout.isatty() else 160))
    except (ValueError, OSError) as error:
        return explain(error)


# ---------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace bench",
        description="Measure decoding and training, exchange on and off in turn, beside the floor of this machine.",
        epilog="example: lace bench decode --shape qwen3-1.7b --threads 4 128 --prompt 50 2048",
    )
    commands = parser.add_subparsers(dest="theme", metavar="COMMAND", required=True)
    shared = _shared()

    def command(name: str, meaning: str, repeats: int | None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=meaning, description=meaning, parents=[shared])
        if repeats is not None:
            _count_of(added, "--repeats", repeats, "rounds that count")
            _count_of(added, "--warmup", 1, "rounds before them that are thrown away", least=0)
        return added

    decode = command("decode", "milliseconds per decoding step and per prefill", 10)
    _counts(decode, "--threads", [4], "N: threads of a group")
    _counts(decode, "--prompt", [50], "prompt tokens")
    _counts(decode, "--lattice-time", [0], "columns that every thread has written when the clock starts", least=0)
    _count_of(decode, "--groups", 1, "B: groups decoded together")
    _count_of(decode, "--columns", 100, "columns that are timed")
    decode.add_argument(
        "--peers", nargs="*", choices=PEERS, metavar="PEER",
        help=f"measure others in the same run: {', '.join(PEERS)}; without a name all of them",
    )  # fmt: skip

    memory = command("memory", "peak memory of decoding", None)
    _counts(memory, "--threads", [1, 4, 16, 64, 128], "N: threads of a group")
    _count_of(memory, "--prompt", 50, "prompt tokens")
    _count_of(memory, "--groups", 1, "B: groups decoded together")
    _count_of(memory, "--columns", 100, "columns that are decoded")

    rollout = command("rollout", "tokens per second of many groups, and whether log-probabilities agree", 3)
    _count_of(rollout, "--groups", 32, "B")
    _count_of(rollout, "--threads", 4, "N")
    _count_of(rollout, "--prompt", 50, "prompt tokens")
    _count_of(rollout, "--new-tokens", 512, "columns")
    _count_of(rollout, "--score-groups", 4, "groups whose log-probabilities are recomputed at once")

    train = command("train", "milliseconds per step of supervised fine-tuning, AdamW included", 10)
    train.add_argument(
        "--grid", nargs="+", type=_grid, default=[(4, 2048)], metavar="NxL", help="threads x tokens of each (4x2048)"
    )
    _count_of(train, "--groups", 2, "B")
    train.add_argument("--no-checkpointing", action="store_true", help="keep all activations (recompute them)")
    train.add_argument("--compile", action="store_true", help="compile the decoder layers one by one (no)")

    growth = command("growth", "step time and memory against N, prompt, lattice time and lattice width", 5)
    _counts(growth, "--threads", [1, 2, 4, 8, 16, 32, 64, 128], "N: one sweep")
    _counts(growth, "--prompts", [50, 512, 2048, 8192, 16384], "prompt tokens: one sweep")
    _counts(growth, "--times", [50, 512, 2048, 8192, 16384], "columns already written: one sweep, one long decoding")
    _counts(growth, "--widths", [32, 64, 128, 256, 512], "lattice widths: one sweep")
    growth.add_argument(
        "--sweep",
        nargs="+",
        choices=SWEEPS,
        default=SWEEPS,
        help="which of them (all); memory: of the others named, or of all",
    )
    _count_of(growth, "--columns", 32, "columns that are timed at once; the other sweeps stay at N=4, prompt 50")

    meaning = "redraw the figures and refill the tables of docs/performance.md from the results"
    plot = commands.add_parser("plot", help=meaning, description=meaning)
    plot.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"JSON files ({RESULTS})")
    plot.add_argument("--docs", type=Path, default=Path("docs"), metavar="FOLDER", help="holds performance.md (docs)")
    return parser


def _grid(text: str) -> tuple[int, int]:
    threads, times, length = text.partition("x")
    if not (times and threads.isdecimal() and length.isdecimal() and int(threads) and int(length) > 1):
        raise argparse.ArgumentTypeError(f"{text}: write threads x tokens, like 4x2048")
    return int(threads), int(length)


def _shared() -> argparse.ArgumentParser:
    """Options of every command that measures."""
    parser = argparse.ArgumentParser(add_help=False)
    model = parser.add_argument_group("model (random weights, made on the device)")
    model.add_argument(
        "--shape", default="tiny", metavar="SHAPE", help="tiny, qwen3-1.7b, qwen3-4b or a config.json (tiny)"
    )
    model.add_argument(
        "--scope", nargs="+", choices=SCOPES, default=["causal", "aligned"], help="a case for each (causal aligned)"
    )
    model.add_argument("--exchange", choices=("both", "on", "off"), default="both", help="which cases (both, in turn)")
    model.add_argument("--width", type=positive, default=128, help="lattice width r (128)")
    model.add_argument(
        "--layers", type=natural, nargs="+", metavar="LAYER", help="lattice layers (every second from the middle on)"
    )
    model.add_argument("--window", type=positive, default=64, help="columns that scope window reads (64)")
    model.add_argument("--backend", default="auto", help="attention backend of the exchange (auto)")
    model.add_argument("--engine", choices=("auto", "fast", "plain"), default="auto", help="decoding engine (auto)")
    machine = parser.add_argument_group("machine and record")
    machine.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA if there is one")
    machine.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: bfloat16 on CUDA, else float32"
    )
    machine.add_argument("--seed", type=int, default=0, help="of weights and prompts (0)")
    machine.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help=f"for the JSON file ({RESULTS})")
    machine.add_argument("--commit", metavar="TEXT", help="recorded instead of the git state (copies)")
    return parser


def _counts(parser: argparse.ArgumentParser, name: str, default: list[int], meaning: str, least: int = 1) -> None:
    shown = " ".join(map(str, default))
    kind = positive if least else natural
    parser.add_argument(name, type=kind, nargs="+", default=default, metavar="COUNT", help=f"{meaning} ({shown})")


def _count_of(parser: argparse.ArgumentParser, name: str, default: int, meaning: str, least: int = 1) -> None:
    kind = positive if least else natural
    parser.add_argument(name, type=kind, default=default, metavar="COUNT", help=f"{meaning} ({default})")


def _settings(given: argparse.Namespace) -> Settings:
    from lace_lightning.bench.bench import Settings

    shared = {field.name for field in fields(Settings)} & set(vars(given))
    return Settings(scopes=tuple(given.scope), **{name: getattr(given, name) for name in shared})


# ---------------------------------------------------------------- commands


def _decode(bench: Bench, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lace_lightning.bench.decode import decode

    peers = PEERS if given.peers == [] else given.peers or ()
    yield from decode(bench, given.threads, given.groups, given.prompt, given.lattice_time, given.columns, peers)


def _memory(bench: Bench, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lace_lightning.bench.memory import memory

    yield from memory(bench, given.threads, given.groups, given.prompt, given.columns)


def _rollout(bench: Bench, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lace_lightning.bench.rollout import Batch, rollout

    batch = Batch(given.groups, given.threads, given.prompt, given.new_tokens)
    yield from rollout(bench, batch, given.score_groups)


def _train(bench: Bench, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lace_lightning.bench.train import Grid, train

    options = {"checkpointing": not given.no_checkpointing, "compile": given.compile}
    yield from train(bench, [Grid(given.groups, threads, length, **options) for threads, length in given.grid])


def _growth(bench: Bench, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lace_lightning.bench.decoding import Point
    from lace_lightning.bench.growth import Sweeps, growth, memory_growth

    base = Point(4, 1, 50, 0, given.columns)
    values = {"threads": given.threads, "prompt": given.prompts, "lattice_time": given.times, "width": given.widths}
    asked = {name: values[name] for name in values if name in given.sweep}
    yield from growth(bench, Sweeps(base, **asked))
    if "memory" in given.sweep:
        yield from memory_growth(bench, Sweeps(base, **(asked or values)))


COMMANDS: dict[str, Callable[[Bench, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "decode": _decode,
    "memory": _memory,
    "rollout": _rollout,
    "train": _train,
    "growth": _growth,
}


def _measure(given: argparse.Namespace, argv: Sequence[str], console: Console) -> int:
    """Take every cell of one command; Ctrl-C ends it and keeps the finished ones."""
    from lace_lightning.bench.bench import Bench
    from lace_lightning.bench.record import Record

    settings, code = _settings(given), 0
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    with console.status("starting") as status:
        bench = Bench(settings, status.update, given.commit)
        record = Record(given.out, given.theme, ["lace", "bench", *argv], options, bench.machine, settings.shape)
        try:
            for count, cell in enumerate(COMMANDS[given.theme](bench, given), 1):
                record.add(cell)
                if not console.is_terminal:  # a log shows that something goes on
                    print(f"lace bench {given.theme}: cell {count} done", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            code = INTERRUPTED
    _show(record, console)
    return code


def _plot(given: argparse.Namespace) -> int:
    """Rewrite what is made from the results."""
    from lace_lightning.bench.plots import draw
    from lace_lightning.bench.record import read_records
    from lace_lightning.bench.report import Results, update

    if not given.results.is_dir():
        raise ValueError(f"--results {given.results} is no folder: measure first, for example lace bench decode")
    results = Results(read_records(given.results))
    figures = draw(results, given.docs / "figures")
    tables = update(given.docs / "performance.md", results, figures)
    print(f"{len(results.records)} results: {len(tables)} tables, figures: {', '.join(map(str, figures)) or 'none'}")
    say_next(("see what changed", f"git diff --stat {shlex.quote(str(given.docs))}"))
    return 0


def _show(record: Record, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from lace_lightning.bench.table import LAYOUTS

    content = record.content
    if not content["cells"]:
        console.print("Nothing was finished, nothing is written.")
        return
    bandwidth, matrix_rate = (content["machine"][name]["median"] / 1e12 for name in ("bandwidth", "matrix_rate"))
    title = f"{content['shape']} on {content['machine']['name']}: {bandwidth:.2f} TB/s, {matrix_rate:.0f} TFLOP/s"
    layout = LAYOUTS[content["theme"]]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in layout.headings:
        table.add_column(heading, justify="right", overflow="fold")
    for cell in content["cells"]:
        for row in layout.rows(cell):
            table.add_row(*row)
    console.print(table)
    console.print(f"Medians (quartiles); all samples: {record.path}", highlight=False, soft_wrap=True)
    say_next(("write tables and figures of all results into docs", "lace bench plot"))

"""``lace generate``: a prompt in, N threads side by side in the terminal."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lace_lightning.cli.counts import natural, positive
from lace_lightning.cli.main import explain
from lace_lightning.cli.next_steps import say_next

if TYPE_CHECKING:
    from lace_lightning.cli.panes import PaneView
    from lace_lightning.cli.plain import PlainView
    from lace_lightning.cli.shading import Shading
    from lace_lightning.cli.sources import Request
    from lace_lightning.cli.transcript import Transcript
    from lace_lightning.decoding import Column

INTERRUPTED = 130
"""Exit code that shells give to a command ended by Ctrl-C."""


def run(argv: Sequence[str]) -> int:
    """Decode one group and show it; the exit code: 0, 2 for a mistake in the options, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        _check(arguments)
        from lace_lightning.cli.sources import make_request

        code = _play(make_request(arguments), arguments.plain)
        if code == 0 and not arguments.quiet:
            say_next(*_next(arguments, argv))
        return code
    except BrokenPipeError:  # the reader of a pipe has seen enough; spare it Python's complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        return explain(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace generate",
        description="Decode one group: N threads side by side, their tags in colour, the winner framed.",
        epilog="examples: "
        "lace generate --config runs/demo/lace/grpo.yaml --ckpt runs/demo/lace/grpo.ckpt --problem 3    "
        "lace generate --model Qwen/Qwen3-1.7B --exchange adapter/ 'How many primes are below 100?'",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the problem's text")
    parser.add_argument(
        "--problem", type=natural, metavar="INDEX", help="instead: a test problem of the run's task, from 0"
    )

    source = parser.add_argument_group("model (one of --model, --run, --config)")
    source.add_argument("--model", metavar="NAME_OR_FOLDER", help="a Hugging Face model")
    source.add_argument("--exchange", metavar="FOLDER", help="with --model: exchange weights by save_exchange (none)")
    source.add_argument("--run", metavar="FOLDER", help="a run of lace fit: its config.yaml and newest checkpoint")
    source.add_argument("--config", metavar="FILE", help="config.yaml of a run, with --ckpt")
    source.add_argument("--ckpt", metavar="FILE", help="with --run or --config: the checkpoint to use")

    decoding = parser.add_argument_group("decoding (default: the run's validation settings; with --model in brackets)")
    decoding.add_argument("--threads", type=positive, metavar="N", help="threads of the group (4)")
    decoding.add_argument("--max-new-tokens", type=positive, metavar="COUNT", help="most tokens of a thread (256)")
    decoding.add_argument("--temperature", type=float, help="0 takes the most probable token (1)")
    decoding.add_argument("--top-p", type=float, help="keep the most probable tokens up to this mass (1)")
    decoding.add_argument("--top-k", type=int, help="keep so many tokens; 0 keeps all (0)")
    decoding.add_argument("--min-p", type=float, help="keep tokens this probable relative to the first (0)")
    decoding.add_argument("--seed", type=int, help="the same seed gives the same group (0)")
    parser.add_argument("--plain", action="store_true", help="lines of text without colours, as in a pipe")
    parser.add_argument("--quiet", action="store_true", help="do not say what to do next")
    return parser


def _next(given: argparse.Namespace, argv: Sequence[str]) -> list[tuple[str, str]]:
    """Another group of the same problem, and where to go from here."""
    seed = 1 if given.seed is None else given.seed + 1
    at = argv.index("--seed") if "--seed" in argv else len(argv)
    before = [part for part in [*argv[:at], *argv[at + 2 :]] if not part.startswith("--seed=")]
    again = ("another group of the same problem", f"lace generate {shlex.join([*before, '--seed', str(seed)])}")
    compare = ("compare methods on many problems", "lace eval --help")
    return [again, compare]


def _check(given: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other, before anything slow is imported."""
    sources = [name for name in ("model", "run", "config") if getattr(given, name) is not None]
    if len(sources) != 1:
        seen = " and ".join(f"--{name}" for name in sources) or "none"
        raise ValueError(f"give one model: --model, --run, or --config with --ckpt (given: {seen})")
    if given.exchange is not None and given.model is None:
        raise ValueError(f"--exchange {given.exchange} goes with --model; a run has its own exchange")
    if given.ckpt is not None and given.model is not None:
        raise ValueError(f"--ckpt {given.ckpt} goes with --run or --config; weights beside --model are --exchange")
    if given.config is not None and given.ckpt is None:
        raise ValueError(f"--config {given.config} needs the checkpoint of its run: --ckpt FILE")
    if (given.prompt is None) == (given.problem is None):
        raise ValueError("give either a PROMPT or --problem INDEX")
    if any("\ud800" <= character <= "\udfff" for character in given.prompt or ""):
        raise ValueError(f"PROMPT {given.prompt!r} is not UTF-8 text")
    if given.problem is not None and given.model is not None:
        raise ValueError(f"--problem {given.problem} needs a run, whose task has problems: use --run, or give a PROMPT")


def _play(request: Request, plain: bool) -> int:
    """Decode and show one group."""
    from lace_lightning.cli.outcome import Outcome
    from lace_lightning.cli.transcript import State, Transcript
    from lace_lightning.decoding import to_groups

    prompt, environment, decoder = request.prompt_ids(), request.environment(), request.decoder()
    transcript = Transcript(request.num_threads, request.tokenizer, decoder.rules.eos_ids)
    with _view(transcript, request.problem.text, plain) as view:
        shading = _shading(request, prompt, transcript) if view.has_shades else None

        def follow(column: Column) -> None:
            ended = transcript.add(column)
            if shading is not None:
                shading.add(column)
            view.update(ended)

        try:
            rollout = decoder.decode([prompt], request.num_threads, [request.seed], environment, on_column=follow)
        except KeyboardInterrupt:
            view.update(transcript.close(State.INTERRUPTED))
            view.finish(None)
            return INTERRUPTED
        view.update(transcript.close(State.LIMIT))
        if shading is not None:
            shading.finish()
        [group] = to_groups(rollout, [request.problem], [request.seed], request.tokenizer, request.template)
        view.finish(Outcome(group, request.judge(group)))
    return 0


def _shading(request: Request, prompt: Sequence[int], transcript: Transcript) -> Shading | None:
    """What reads the gates; None if the threads are isolated."""
    import torch

    from lace_lightning.cli.shading import Shading
    from lace_lightning.decoding.gates import GateReader

    if not request.model.exchanges:
        return None
    ids = torch.tensor([prompt], device=next(request.model.parameters()).device)
    return Shading(
        transcript, GateReader(request.model, ids, torch.ones_like(ids, dtype=torch.bool), request.num_threads)
    )


def _view(transcript: Transcript, problem: str, plain: bool) -> PaneView | PlainView:
    """Panes if a person watches in a terminal that can redraw, else lines."""
    from rich.console import Console

    from lace_lightning.cli.panes import PaneView
    from lace_lightning.cli.plain import PlainView

    console = Console(highlight=False)
    if plain or not sys.stdout.isatty() or console.is_dumb_terminal:
        return PlainView(transcript, problem)
    return PaneView(transcript, problem, console)

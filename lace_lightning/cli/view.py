"""``lace view``: the threads of an evaluation in the browser."""

from __future__ import annotations

import argparse
import shlex
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lace_lightning.cli.main import explain
from lace_lightning.cli.next_steps import say_next

_SAMPLES = "samples/*.html"


def run(argv: Sequence[str]) -> int:
    """Make the page if there is none yet, and open it; the exit code."""
    given = _parser().parse_args(argv)
    try:
        page = _page(given.place, given.out)
    except (ValueError, OSError) as error:
        return explain(error)
    print(page)
    if not given.no_open and not webbrowser.open(page.resolve().as_uri()):
        print("no browser was found: open the file in one; it needs no network and no server")
    say_next(*_next(given.place))
    return 0


def _next(place: Path) -> list[tuple[str, str]]:
    from lace_lightning.evaluation.store import OUTCOMES

    folder = place.parent if place.name == OUTCOMES else place
    if (folder / OUTCOMES).is_file():
        return [("the numbers of the same outcomes", f"lace eval report {shlex.quote(str(folder))}")]
    run = next((part for part in (folder, *folder.parents[:2]) if (part / "config.yaml").is_file()), None)
    watch = [] if run is None else [("watch a group write", f"lace generate --run {shlex.quote(str(run))} --problem 0")]
    return [*watch, ("measure methods on many problems", "lace eval --help")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace view",
        description="Show threads side by side: what each wrote, how far its gates stood open, and what it read.",
        epilog="examples:\n  lace view runs/eval/puzzles\n  lace view runs/demo/RUN          the groups of its last "
        "validation\n  lace view runs/eval/puzzles --out=page.html --no-open",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "place", metavar="FOLDER|FILE", type=Path,
        help="output folder of lace eval or its outcomes.jsonl; the folder of a run; or a page that is there already",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the page here, not beside the outcomes")
    parser.add_argument("--no-open", action="store_true", help="write the page, and only print where it is")
    return parser


def _page(place: Path, out: Path | None) -> Path:
    """The page to open, made anew from outcomes where there are any.

    Raises:
        ValueError: there is nothing to show.
    """
    from lace_lightning.evaluation.store import OUTCOMES
    from lace_lightning.viewer.folder import write_viewer

    folder = place.parent if place.name == OUTCOMES else place
    if (folder / OUTCOMES).is_file():
        return write_viewer(folder, out)
    if out is not None:
        raise ValueError(f"--out={out} needs outcomes to make a page of, and {place} has no {OUTCOMES}")
    if place.is_file() and place.suffix == ".html":
        return place
    if pages := sorted(place.glob(_SAMPLES), key=lambda page: page.stat().st_mtime):
        return pages[-1]
    raise ValueError(
        f"{place} holds neither {OUTCOMES} of lace eval nor {_SAMPLES} of a run: give a folder that does, or a page"
    )

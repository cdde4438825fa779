"""``lace sync``: send to MLflow what earlier runs could not."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lace_lightning.cli.next_steps import say_next


def run(argv: Sequence[str]) -> int:
    """Send every spool at or below the folder; exit code 0 if nothing is left."""
    parser = argparse.ArgumentParser(prog="lace sync", description="Send to MLflow what earlier runs could not.")
    parser.add_argument("folder", nargs="?", default="runs", type=Path, help="a run, or a folder of runs (runs)")
    parser.add_argument("--tracking_uri", default=None, help="the store, if it has moved or needs a password")
    arguments = parser.parse_args(argv)

    from lace_lightning.tracking.resend import find_spools, replay

    spools = find_spools(arguments.folder)
    if not spools:
        print(f"lace sync: no run in {arguments.folder}: name a folder that holds runs", file=sys.stderr)
        return 2
    results = [replay(spool, arguments.tracking_uri) for spool in spools]
    for result in results:
        if result.sent or result.problem:
            print(f"{result.folder.parent}: sent {result.sent} records. {result.problem}".rstrip())
    left = sum(bool(result.problem) for result in results)
    print(f"{len(results) - left} of {len(results)} runs are complete in MLflow.")
    if left:
        say_next(
            ("when the server answers again, or the runs have ended", f"lace sync {shlex.quote(str(arguments.folder))}")
        )
    else:
        say_next(("browse the runs in MLflow", "lace ui"))
    return 1 if left else 0

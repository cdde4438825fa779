"""``lace init``: the shipped configs, to edit."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from lace_lightning.cli.main import explain
from lace_lightning.cli.next_steps import say_next
from lace_lightning.cli.shipped import SHIPPED


def run(argv: Sequence[str]) -> int:
    """Copy the shipped configs to ``DIR/configs``, where ``--config configs/…`` finds them first; the exit code."""
    parser = argparse.ArgumentParser(prog="lace init", description="Copy the shipped configs to DIR/configs, to edit.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where your experiments live; made if it is missing")
    target = parser.parse_args(argv).folder / "configs"
    try:
        shutil.copytree(SHIPPED, target)
    except FileExistsError:
        return explain(ValueError(f"{target} exists already and is left as it is: choose another DIR, or move it away"))
    except OSError as error:
        return explain(error)
    print(f"Copied the shipped configs to {target}. Commands given in {target.parent} use them.")
    train = "lace fit --config configs/demo/base.yaml --config configs/demo/sft.yaml"
    say_next(("train a first stage", f"cd {shlex.quote(str(target.parent))} && {train}"))
    return 0

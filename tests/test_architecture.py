"""Who may import whom, and that docs/architecture.md names what exists and draws what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lace_lightning.puzzles import Doors
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.template import Segment

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()

MECHANISM = ("lattice", "exchange", "packing", "backbone", "compiled_layers", "linear_cross_entropy", "threaded_lm")
MECHANISM += ("adapter", "decoding", "engine")
DATA = ("traces", "tasks", "puzzles", "verification", "synthesis", "agents")
MEASUREMENT = ("embedding", "diversity", "rewards", "policy_loss", "metrics", "figures", "viewer", "bench")
MEASUREMENT += ("evaluation", "tokenizer", "memory")
ABOVE = {
    "datamodules": {"modules", "callbacks", "cli"},
    "modules": {"callbacks", "cli"},
    "callbacks": {"cli"},
}
"""Rooms at the top level, and those above them."""


def imports_of(file: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, for type checkers only included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def intruders(files: Iterator[Path], forbidden: set[str]) -> list[str]:
    """``file: module`` for every import out of a forbidden room of the package."""
    return [
        f"{file.relative_to(ROOT)}: {module}"
        for file in files
        for module in imports_of(file)
        if module.startswith("lace_lightning.") and module.split(".")[1] in forbidden
    ]


def test_mechanism_data_and_measurement_never_load_lightning():
    """Also through what they import from elsewhere: a process with all of them loaded has no Lightning in it."""
    program = f"""
import pkgutil, sys
from importlib import import_module
for name in {MECHANISM + DATA + MEASUREMENT}:
    module = import_module("lace_lightning." + name)
    for part in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        try:
            import_module(part.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton" and ".engine." in part.name, error  # it comes with torch for CUDA
    loaded = {{"lightning", "lightning_fabric", "pytorch_lightning", "mlflow"}} & set(sys.modules)
    assert not loaded, f"lace_lightning.{{name}} loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_library_imports_no_stage_datamodule_or_callback():
    package = ROOT / "lace_lightning"
    files = (file for file in package.rglob("*.py") if file.relative_to(package).parts[0] not in {"cli", *ABOVE})
    assert not intruders(files, set(ABOVE))


@pytest.mark.parametrize("room", ABOVE)
def test_no_room_imports_one_above_it(room):
    assert not intruders((ROOT / room).rglob("*.py"), ABOVE[room])


def test_the_page_names_only_what_exists():
    """Tests that are defined, files and folders that are there, and names that some source file defines."""
    sources = [
        file.read_text() for folder in ("lace_lightning", *ABOVE, "tests") for file in (ROOT / folder).rglob("*.py")
    ]
    words = set(re.findall(r"\w+", "\n".join(sources)))
    defined = set(re.findall(r"^ *(?:def|class) (\w+)", "\n".join(sources), flags=re.MULTILINE))
    for name in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)):
        if re.fullmatch(r"[\w/.]+(\.(py|md|yaml)|/)", name):
            homes = (ROOT, ROOT / "lace_lightning")
            assert any((home / name).exists() for home in homes), f"{name} does not exist"
        elif name.startswith("test_"):
            assert name in defined, f"{name} is no test"
        elif re.fullmatch(r"[A-Za-z_.]+", name):
            assert set(name.split(".")) - {""} <= words, f"{name} is not in the code"


def test_the_page_draws_the_lattice_that_the_collator_makes():
    puzzle = Doors()
    tokenizer = puzzle.tokenizer()
    collate = TraceCollator(tokenizer, puzzle.template, num_threads=4, max_length=32, jitter=3)
    batch = collate([(puzzle.trace(0, 4), 0)])
    assert batch.prompt_length == 6

    def sign(token: int, segment: int) -> str:
        short = {"[[fail]]": "[[f]]", "[[best]]": "[[b]]", "<eos>": "end"}
        word = tokenizer.convert_ids_to_tokens(token)
        return {Segment.NONE: "·", Segment.ENVIRONMENT: f"‹{word}›"}.get(Segment(segment), short.get(word, word))

    for n in range(4):
        row = zip(batch.input_ids[0, n, 6:].tolist(), batch.segments[0, n, 6:].tolist(), strict=True)
        assert f" n = {n}" + "".join(f"{sign(*cell):>7}" for cell in row) in PAGE

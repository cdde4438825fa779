"""The package as others get it: lazy names, one name per class, and wheels that hold everything."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForCausalLM, Qwen3Config

import lace_lightning
from lace_lightning.puzzles.vocabulary import word_tokenizer

ROOT = Path(__file__).parents[1]
LINKED = ("modules", "datamodules", "callbacks", "configs")


def python(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)


# ---------------------------------------------------------------- names


def test_importing_the_package_imports_no_torch():
    script = "import sys, lace_lightning, lace_lightning.cli.main; sys.exit('torch' in sys.modules)"
    assert python("-c", script).returncode == 0


def test_every_exported_name_is_the_object_that_its_own_module_defines():
    for name in lace_lightning.__all__:
        exported = getattr(lace_lightning, name)
        home = importlib.import_module(exported.__module__)
        assert exported.__module__.startswith("lace_lightning.") and exported is getattr(home, name)
        assert name in dir(lace_lightning)
    assert set(lace_lightning._HOME) == set(lace_lightning.__all__)
    with pytest.raises(AttributeError, match="'lace_lightning' has no attribute 'Telepathy'"):
        _ = lace_lightning.Telepathy


def test_every_file_of_ours_is_imported_under_one_name():
    for module in pkgutil.walk_packages(lace_lightning.__path__, "lace_lightning."):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # Triton comes with torch for CUDA
            assert error.name == "triton" and module.name.startswith("lace_lightning.engine."), error
    names = defaultdict(set)
    for name, module in list(sys.modules.items()):
        path = os.path.realpath(getattr(module, "__file__", None) or os.devnull)
        if any(path.startswith(f"{ROOT / folder}{os.sep}") for folder in ("lace_lightning", *LINKED)):
            names[path].add(name)
    assert len(names) > 80
    assert all(len(found) == 1 and found.pop().startswith("lace_lightning") for found in names.values())


@pytest.mark.parametrize("folder", LINKED)
def test_the_package_reaches_the_top_level_folders_by_relative_links(folder):
    assert (ROOT / "lace_lightning" / folder).readlink() == Path("..") / folder
    assert (ROOT / folder).is_dir() and not (ROOT / folder).is_symlink()


@pytest.mark.parametrize("folder", [folder for folder in LINKED if folder != "configs"])
@pytest.mark.parametrize("line", ["import {}", "from {} import base", "from {}.base import Thing", "import {}.base"])
def test_ruff_refuses_imports_past_the_package(folder, line):
    arguments = ["-m", "ruff", "check", "--no-cache", "--select=TID251", "--stdin-filename=tests/x.py", "-"]
    found = python(*arguments, cwd=ROOT, input=line.format(folder) + "\n")
    assert found.returncode == 1 and f"import it as lace_lightning.{folder}" in found.stdout
    allowed = python(*arguments, cwd=ROOT, input=line.format(f"lace_lightning.{folder}") + "\n")
    assert allowed.returncode == 0, allowed.stdout


# ---------------------------------------------------------------- the ten lines


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A saved Hugging Face model with a tokenizer of its own."""
    tokenizer = word_tokenizer(["###", "Assessment", "How", "many", "primes", "are", "below", "100?", "Count", "the"])
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_ten_lines_of_the_readme_run_as_they_stand(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block and '"Qwen/Qwen3-1.7B"' in block[1]
    names: dict = {}
    exec(block[1].replace("Qwen/Qwen3-1.7B", str(small_model)), names)

    ids, logits = names["input_ids"], names["logits"]
    base = AutoModelForCausalLM.from_pretrained(small_model)
    with torch.no_grad():
        assert torch.equal(logits, base(ids[0]).logits[None]) and logits.shape[:3] == ids.shape
    [group] = names["groups"]
    assert len(group.threads) == len(group.tags) == 4 and group.problem.text == "How many primes are below 100?"
    assert max(thread.num_tokens for thread in group.threads) <= 256
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written == {"exchange.safetensors", "exchange.json"}


# ---------------------------------------------------------------- make


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which make finds what its rules depend on."""
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(folder), *arguments], capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""}
    )


def test_make_refuses_an_old_python_before_it_makes_anything(checkout):
    old = checkout / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check ends with there
    old.chmod(0o755)
    refused = make(checkout, "test", f"PYTHON={old}")
    assert refused.returncode != 0 and "needs Python >= 3.11" in refused.stderr and str(old) in refused.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    "goal, command", [("test", "-m pytest"), ("demo", "lace demo"), ("lint", "ruff"), ("types", "mypy")]
)
def test_make_installs_once_and_again_when_dependencies_change(checkout, goal, command):
    first = make(checkout, "--dry-run", goal).stdout
    torch_alone = first.index("install --constraint constraints.txt torch")
    assert torch_alone < first.index("--editable '.[dev]'") < first.index(command)
    installed = checkout / ".venv/installed"
    installed.parent.mkdir()
    installed.touch()
    second = make(checkout, "--dry-run", goal).stdout
    assert "pip" not in second and command in second
    for file in ("constraints.txt", "pyproject.toml"):
        later = installed.stat().st_mtime + 1
        os.utime(checkout / file, (later, later))
        assert "--editable" in make(checkout, "--dry-run", goal).stdout
        installed.touch()
        os.utime(installed, (later, later))


def test_pins_hold_every_dependency_at_a_version_that_the_package_accepts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        asked = Requirement(text)
        assert asked.specifier.contains(pins[canonicalize_name(asked.name)]), text


# ---------------------------------------------------------------- wheel and source distribution


@dataclass
class Built:
    wheel: Path
    source: Path
    log: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, built from a copy, so that the checkout stays clean."""
    checkout = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("lace_lightning", *LINKED):
        shutil.copytree(ROOT / folder, checkout / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, checkout)
    done = python("-m", "build", "--wheel", "--sdist", "--no-isolation", checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [source] = (checkout / "dist").glob("*.whl"), (checkout / "dist").glob("*.tar.gz")
    return Built(wheel, source, done.stdout + done.stderr)


def package_files() -> set[str]:
    """Everything under lace_lightning/, links followed."""
    paths = (
        Path(folder) / file for folder, _, files in os.walk(ROOT / "lace_lightning", followlinks=True) for file in files
    )
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def test_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"lace_lightning/py.typed", "lace_lightning/modules/base.py", "lace_lightning/configs/demo/sft.yaml"} < names
    assert "lace_lightning/configs/slurm/train.sbatch" in names


def test_wheel_is_named_by_the_version_and_carries_the_licence(built):
    assert built.wheel.name == f"lace_lightning-{lace_lightning.__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(built.wheel)
    [licence] = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert archive.read(licence).decode() == (ROOT / "LICENSE").read_text()


def test_source_distribution_holds_real_files_in_place_of_links(built):
    members = tarfile.open(built.source).getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {member.name.split("/", 1)[-1] for member in members if member.isreg()}
    assert package_files() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_building_warns_of_nothing_that_setuptools_will_refuse(built):
    assert not re.search("deprecat|ambiguous", built.log, re.IGNORECASE), built.log


@pytest.mark.slow
def test_installed_wheel_fits_with_the_configs_it_ships(built, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    installed = python("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, built.wheel)
    assert installed.returncode == 0, installed.stderr
    script = (
        "import os, sys\n"
        "from lace_lightning.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        f"checkout = {str(ROOT / 'lace_lightning')!r}, *({str(ROOT)!r} + '/' + f + '/' for f in {LINKED!r})\n"
        "files = [os.path.realpath(getattr(m, '__file__', None) or '/') for m in sys.modules.values()]\n"
        "sys.exit(code or ', '.join(file for file in files if file.startswith(checkout)) or 0)\n"
    )
    configs = [f"--config=configs/demo/{name}.yaml" for name in ("base", "sft")]
    tiny = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = python("-c", script, "fit", *configs, *tiny, cwd=empty, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`max_steps=1` reached" in done.stderr
    command = subprocess.run([site / "bin/lace", "--help"], capture_output=True, text=True, env=environment, cwd=empty)
    assert command.returncode == 0 and command.stdout.startswith("usage: lace")

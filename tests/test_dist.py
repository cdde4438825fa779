"""What others get: distributions with the same bytes everywhere, configs to edit, and a lock of every package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lace_lightning.cli.main import main
from lace_lightning.cli.shipped import SHIPPED, with_shipped_configs

ROOT = Path(__file__).parents[1]
LOCKS = ("lock.txt", "lock-torch.txt")


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> version and hashes, of a lock file."""
    text = (ROOT / "requirements" / name).read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)((?: +--hash=sha256:[0-9a-f]{64})+)", line.strip())
        assert match, line
        found[canonicalize_name(match[1])] = (match[2], re.findall("[0-9a-f]{64}", match[3]))
    return found


# ---------------------------------------------------------------- the lock


def test_the_lock_holds_every_dependency_at_a_version_that_the_package_accepts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    both = locked("lock-torch.txt") | locked("lock.txt")
    for text in project["dependencies"]:
        asked = Requirement(text)
        assert asked.specifier.contains(both[canonicalize_name(asked.name)][0]), text


@pytest.mark.parametrize("bad", ["2.6.2", "2.6.3"])
def test_releases_known_to_be_malicious_are_neither_locked_nor_accepted(bad):
    for name in ("lightning", "pytorch-lightning"):
        assert locked("lock.txt")[name][0] != bad
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [lightning] = [Requirement(text) for text in project["dependencies"] if text.startswith("lightning")]
    assert not lightning.specifier.contains(bad)


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_agrees_with_the_pins_and_every_package_has_a_hash(name):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    for package, (version, hashes) in locked(name).items():
        assert hashes and pins.get(package, version) == version, package
    assert ("torch" in locked(name)) == (name == "lock-torch.txt")


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_names_no_place_to_install_from(name):
    assert not re.search("https?:|file:|index-url|find-links|@ ", (ROOT / "requirements" / name).read_text())


# ---------------------------------------------------------------- configs


def test_lace_init_copies_every_config_and_never_overwrites(tmp_path, monkeypatch, capsys):
    assert main(["init", str(tmp_path / "mine")]) == 0
    copied = tmp_path / "mine/configs"
    files = [path.relative_to(SHIPPED) for path in SHIPPED.rglob("*") if path.is_file()]
    assert len(files) > 50 and all((copied / file).read_bytes() == (SHIPPED / file).read_bytes() for file in files)
    (copied / "demo/sft.yaml").write_text("mine: true\n")
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "left as it is" in capsys.readouterr().err and (copied / "demo/sft.yaml").read_text() == "mine: true\n"
    # A command given there finds the copy first, elsewhere the shipped one.
    monkeypatch.chdir(tmp_path / "mine")
    assert with_shipped_configs(["--config=configs/demo/sft.yaml"]) == ["--config=configs/demo/sft.yaml"]
    monkeypatch.chdir(tmp_path)
    assert with_shipped_configs(["configs/demo/sft.yaml"]) == [str(SHIPPED / "demo/sft.yaml")]


# ---------------------------------------------------------------- the same bytes


def build(folder: Path, umask: int, zone: str) -> dict[str, bytes]:
    """Distributions of the checkout's last commit, built in a clone of its own."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, umask=umask)
    environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": str(umask)}
    command = ["tools/dist.sh", sys.executable, str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, env=environment, umask=umask, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_bytes() for path in (folder / "dist").iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_the_same_commit_gives_the_same_bytes_in_another_folder_zone_and_umask(tmp_path):
    first, second = build(tmp_path / "a", 0o022, "UTC"), build(tmp_path / "deeper/b", 0o077, "Asia/Tokyo")
    assert {Path(name).suffix for name in first} == {".whl", ".gz"}
    assert first == second

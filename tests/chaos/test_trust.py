"""The longer part of what tests/test_fuzz.py, test_dist.py and test_package.py claim: minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz_targets import TARGETS
from tests.test_fuzz import run

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parents[2]
CASES = 40_000


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_tens_of_thousands_of_texts_break_no_reader(target):
    run(target, max(20, CASES * target.millionths // 1_000_000), always_the_same=False)


def test_the_wheel_away_from_the_checkout_runs_the_demo_with_the_configs_it_ships(tmp_path):
    """Its packages are those of this environment, but for ours, which is the wheel's."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    built = subprocess.run(["tools/dist.sh", sys.executable, str(tmp_path / "dist")], cwd=ROOT, capture_output=True)
    assert built.returncode == 0, built.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def lace(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(site / "bin/lace"), *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
        )

    where = "import lace_lightning; print(lace_lightning.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=empty, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))
    assert lace("init", "mine", cwd=empty).returncode == 0 and (empty / "mine/configs/demo/base.yaml").is_file()
    demo = lace("demo", "--quick", cwd=empty / "mine")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "All numbers: runs/demo/summary.json" in demo.stdout
    assert (empty / "mine/runs/demo/summary.json").is_file()

"""A rank ends when its launcher has died, and nobody else watches anybody."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from lace_lightning.cli.orphans import end_with_launcher

ROOT = Path(__file__).parents[1]

RANK = """
import time
from lace_lightning.cli.orphans import end_with_launcher
end_with_launcher({grace})
print("watches", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "LOCAL_RANK": "1"})
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("grace", "ends"), [(0.0, True), (30.0, False)])
def test_a_rank_ends_after_its_killed_launcher(grace: float, ends: bool) -> None:
    command = [sys.executable, "-c", LAUNCHER, RANK.format(grace=grace)]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    try:
        assert launcher.stdout.readline() == "watches\n"
        assert not psutil.wait_procs([rank], timeout=1.5)[0], "while the launcher lives"
        launcher.kill()
        launcher.wait()
        assert bool(psutil.wait_procs([rank], timeout=20 if ends else 3)[0]) == ends
    finally:
        if rank.is_running():
            rank.kill()
        said = launcher.communicate()[1]
    assert (f"process {launcher.pid}, has died" in said) == ends


def test_a_process_of_its_own_watches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = threading.active_count()
    end_with_launcher()
    assert threading.active_count() == before

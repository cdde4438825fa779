"""A rank ends when its launcher has died, and nobody else watches anybody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
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
environment = {**os.environ, "LOCAL_RANK": "1", "LACE_LAUNCHER": sys.argv[2] or str(os.getpid())}
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("grace", "ends"), [(0.0, True), (30.0, False)])
def test_a_rank_ends_after_its_killed_launcher(grace: float, ends: bool) -> None:
    command = [sys.executable, "-c", LAUNCHER, RANK.format(grace=grace), ""]
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


@pytest.mark.parametrize(("lace_is", "ends"), [("gone", True), ("a zombie", True), ("alive", False)])
def test_a_rank_that_starts_after_its_lace_has_died_ends_and_one_below_another_launcher_does_not(
    lace_is: str, ends: bool
) -> None:
    done = subprocess.Popen(["true"])
    if lace_is == "gone":
        done.wait()
    lace = str(os.getpid() if lace_is == "alive" else done.pid)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK.format(grace=0.0), lace], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    try:
        if not ends:
            assert launcher.stdout.readline() == "watches\n"
        deadline = time.monotonic() + (30 if ends else 2)
        while rank.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (rank.status() == psutil.STATUS_ZOMBIE) == ends
    finally:
        rank.kill()
        launcher.kill()
        launcher.communicate()
        done.wait()


def test_a_process_of_its_own_watches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("LACE_LAUNCHER", "0")
    before = threading.active_count()
    end_with_launcher()
    assert threading.active_count() == before

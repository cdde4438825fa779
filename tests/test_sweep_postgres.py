"""A sweep on a real PostgreSQL server: workers share it, and what a dead one left is taken over. Nothing is trained."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'lace-lightning[postgres]'")
INITDB, POSTGRES = shutil.which("initdb"), shutil.which("postgres")
if INITDB is None or POSTGRES is None:
    pytest.skip("PostgreSQL's initdb and postgres are not in PATH", allow_module_level=True)


@pytest.fixture(scope="module")
def server():
    """Address of a database on a unix socket; PostgreSQL refuses to run as root."""
    folder = Path(tempfile.mkdtemp(prefix="lace-pg-", dir="/tmp"))
    user = None
    if os.geteuid() == 0:
        user = "nobody"
        shutil.chown(folder, user)
    name = user or pwd.getpwuid(os.geteuid()).pw_name
    initdb = [INITDB, "-D", str(folder / "db"), "-U", name, "-A", "trust", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, user=user)
    options = ["-D", str(folder / "db"), "-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
    process = subprocess.Popen([POSTGRES, *options], user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"postgresql://{name}@/postgres?host={folder}"
        _wait_for(folder / ".s.PGSQL.5432")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        shutil.rmtree(folder)


def _wait_for(path, seconds=20.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


WORKER = """
import sys, time
from lace_lightning.sweep import worker
from lace_lightning.sweep.study import Ledger
from lace_lightning.sweep.units import Unit

url, name, log, victim = sys.argv[1:]
worker._host = lambda: name                 # as if on machines of their own: only heartbeats tell who lives
ledger = Ledger(url, "shared", "maximize", heartbeat=1)
units = [Unit(f"unit {i}", f"row {i}", (0,)) for i in range(6)]
while True:
    claim = ledger.claim(units)
    if claim is None:
        if not any(state == "running" for state, _ in ledger.states().values()):
            break
        time.sleep(0.1)
        continue
    with ledger.alive(claim):
        with open(log, "a") as lines:
            lines.write(f"{claim.unit.key} begun {name}\\n")
        time.sleep(600 if claim.unit.key == victim else 0.3)
    if ledger.finish(claim, 1.0, {"0": {}}):
        with open(log, "a") as lines:
            lines.write(f"{claim.unit.key} ended {name}\\n")
"""


def test_two_workers_share_a_sweep_and_the_trial_of_a_killed_one_is_taken_over(server, tmp_path):
    log = tmp_path / "log"
    log.touch()

    def start(name, victim):
        return subprocess.Popen([sys.executable, "-c", WORKER, server, name, str(log), victim])

    first = start("first", "unit 2")
    _until(lambda: "unit 2 begun first" in log.read_text())
    second = start("second", "none")
    _until(lambda: "begun second" in log.read_text())
    time.sleep(4)  # longer than the grace period: a living worker keeps its trial
    assert "unit 2 begun second" not in log.read_text() and second.poll() is None
    first.kill()
    first.wait()
    assert second.wait(30) == 0
    lines = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    begun = Counter(event for event, _ in lines)
    assert begun.pop("unit 2 begun") == 2 and set(begun.values()) == {1}
    assert {event for event, _ in lines if event.endswith("ended")} == {f"unit {i} ended" for i in range(6)}
    assert ["unit 2 ended", "second"] in lines


def test_many_workers_that_start_at_once_never_claim_the_same(server, tmp_path):
    from sqlalchemy import create_engine, text

    engine = create_engine(server.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("CREATE DATABASE fresh"))
    log = tmp_path / "log"
    url = server.replace("/postgres?", "/fresh?")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, url, str(i), str(log), "none"]) for i in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    counts = Counter(line.rsplit(" ", 1)[0] for line in log.read_text().splitlines())
    assert len(counts) == 12 and set(counts.values()) == {1}


def _until(is_true, seconds=30.0):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)

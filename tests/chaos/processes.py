"""Real ``lace`` processes for the chaos tests: forked from a server that has imported everything once, so that a kill
costs a second and not a start of Python."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.chaos.processes", "tests.stage_helpers", "lace_lightning.cli.stages", "mlflow.tracking"]
LIMIT = 120.0
"""Seconds that no step of these tests may take, on a busy machine."""


def lace(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """A started ``lace`` command in a session of its own; its output goes to the end of ``log``."""
    SERVER.set_forkserver_preload(PRELOADED)
    process = SERVER.Process(target=_run, args=(list(arguments), str(log), dict(environment or {})))
    process.start()
    return process


def ranks(arguments: Sequence[str], log: Path, number: int = 2) -> list[BaseProcess]:
    """The same command once per rank, as a launcher without any supervision would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number), "NODE_RANK": "0"}
    return [
        lace(arguments, log.with_suffix(f".{rank}.log"), {**common, "LOCAL_RANK": str(rank)}) for rank in range(number)
    ]


def ended(process: BaseProcess, seconds: float = LIMIT) -> int:
    """The exit code, waited for; a process that outlasts the limit is killed and fails the test."""
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds} s")
    return code


def wait_until(condition: Callable[[], bool], process: BaseProcess, pause: float = 0.005) -> bool:
    """Wait for a condition; False if the process ended first."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if process.exitcode is not None:
            return condition()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)
    return True


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    import torch

    from lace_lightning.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))

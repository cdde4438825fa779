"""``lace ui``: MLflow's pages over the runs on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_HOST = "127.0.0.1"
_START_SECONDS = 60.0


def run(argv: Sequence[str]) -> int:
    """Serve MLflow's UI until Ctrl-C; the exit code. Only this machine can reach it."""
    from lace_lightning.tracking.redact import redact_uri

    arguments = _parser().parse_args(argv)
    address = f"http://{_HOST}:{arguments.port}"
    try:
        store = _store(arguments.backend_store)
        if store.startswith("http"):
            print(f"MLflow shows {redact_uri(store)} itself: open that address in a browser")
            return 0
        _require_free(arguments.port)
    except ValueError as error:
        print(f"lace ui: {error}", file=sys.stderr)
        return 2
    # Also SIGINT, which a shell script's background jobs are started to ignore.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    server = _start(store, arguments.port)
    try:
        if _answers(server, arguments.port):
            print(f"MLflow shows {redact_uri(store)} at {address} (Ctrl-C ends it)", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _parser() -> argparse.ArgumentParser:
    from lace_lightning.tracking.store import DEFAULT_TRACKING_URI

    parser = argparse.ArgumentParser(prog="lace ui", description="Show the tracked runs in a browser, on this machine.")
    parser.add_argument("--backend-store", default=None, help=f"the tracking store (default: {DEFAULT_TRACKING_URI})")
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default: 5000)")
    return parser


def _store(uri: str | None) -> str:
    """The store's URI.

    Raises:
        ValueError: it is a file that does not exist.
    """
    from lace_lightning.tracking.store import resolve_tracking_uri

    store = resolve_tracking_uri(uri)
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        raise ValueError(f"--backend-store {store} does not exist yet: run `lace fit` first, or name another store")
    return store


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port} cannot be used ({error}): choose another") from error


def _start(store: str, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1"]
    # Everybody on this machine may read a command line; the store's password is not for everybody.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_BACKEND_STORE_URI": store}
    # A session of its own, so that Ctrl-C reaches us alone and we can end the server with all its workers.
    return subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, start_new_session=True)


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((_HOST, port)) == 0:
                return True
        time.sleep(0.2)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

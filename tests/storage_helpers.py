"""Disks that fill up, files with a bit flipped, and a tracking server behind a line that fails as told."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BLOCK = 4096
"""A tmpfs gives room by pages."""


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of a few megabytes; skips the test where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Leave so many bytes on a disk, rounded up to its blocks; deleting the returned file makes room."""
    ballast = disk / "ballast"
    stat = os.statvfs(disk)
    with ballast.open("ab") as file:
        for _ in range(stat.f_bavail - -(-leave // BLOCK)):
            file.write(bytes(BLOCK))
    return ballast


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the ballast, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "ballast")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flipped(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Copies with one bit flipped each, at places all over."""
    generator = random.Random(seed)
    for position in range(0, len(whole), max(1, len(whole) // count)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.randrange(8)
        yield bytes(damaged)


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TrackingServer:
    """A real ``mlflow server``, which can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
        ]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        self._process = subprocess.Popen([*command, "--workers", "1"], stdout=-3, stderr=-3, start_new_session=True)
        wait_until(self._is_up, 120)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _is_up(self) -> bool:
        with suppress(OSError):
            connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False


_ANY = ["refuse", "lose", "garble", *[None] * 21]


class Line:
    """A proxy before a server, on a port of its own, with one fault at a time.

    Faults: ``refuse`` (answers 500 without asking the server), ``lose`` (the server has done it, the answer is lost),
    ``garble`` (likewise, and the answer is a page of a proxy with status 502), ``hang`` (no answer for ``seconds``),
    ``any`` (one answer of eight is refused, lost or garbled, at random), and None.
    """

    def __init__(self, port: int, seconds: float = 3.0) -> None:
        self.fault: str | None = None
        self.faults_done = 0
        self._seconds, self._random, line = seconds, random.Random(0), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def handle_any(self) -> None:
                line._pass_on(self, port)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _pass_on(self, request: BaseHTTPRequestHandler, port: int) -> None:
        fault = self._random.choice(_ANY) if self.fault == "any" else self.fault
        self.faults_done += fault is not None
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if fault == "hang":
            time.sleep(self._seconds)
        if fault in ("refuse", "hang"):
            _answer(request, 500, b"<html>Internal Server Error</html>")
            return
        try:
            status, answer = _ask(request, port, body)
        except OSError:
            _answer(request, 502, b"<html>Bad Gateway</html>")
            return
        if fault == "garble":
            _answer(request, 502, b"<html>Bad Gateway</html>")
        elif fault != "lose":
            _answer(request, status, answer)


def _ask(request: BaseHTTPRequestHandler, port: int, body: bytes) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    dropped = ("host", "connection", "transfer-encoding")  # an empty file is sent in chunks, of which there are none
    headers = {name: value for name, value in request.headers.items() if name.lower() not in dropped}
    connection.request(request.command, request.path, body, headers | {"Content-Length": str(len(body))})
    response = connection.getresponse()
    return response.status, response.read()


def _answer(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    with suppress(OSError):  # who asked may have given up
        request.send_response(status)
        request.send_header("Content-Type", "application/json" if body[:1] in b"{[" else "text/html")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

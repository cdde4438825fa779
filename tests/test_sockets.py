"""Who listens: nothing that the project starts can be reached from another machine, unless it is told to."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from lightning.pytorch import Callback

from lace_lightning.modules import SupervisedFinetuning
from lace_lightning.tracking import MLflowLogger, store
from lace_lightning.verification import Verifier
from tests.chat_server import chat_server
from tests.stage_helpers import DECODING, quiet_trainer, spec, trace_data
from tests.test_tracking import free_port

ROOT = Path(__file__).parents[1]


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of every socket on which the process or one it started listens, UDP included."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        for connection in one.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or (
                connection.type.name == "SOCK_DGRAM" and not connection.raddr
            ):
                found.add((connection.laddr.ip, connection.laddr.port))
    return found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def test_a_server_on_all_addresses_would_be_noticed():
    import socket

    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        found = {ip for ip, port in listening(psutil.Process()) if port == server.getsockname()[1]}
    assert found == {"0.0.0.0"} and not any(map(is_loopback, found))


def test_the_chat_server_of_the_tests_listens_to_this_machine_only():
    before = listening(psutil.Process())
    with chat_server():
        [(address, _)] = listening(psutil.Process()) - before
    assert is_loopback(address)


def test_training_with_data_workers_tracking_and_verification_listens_nowhere(tmp_path):
    before, seen = listening(psutil.Process()), set()

    class Look(Callback):
        def on_train_batch_end(self, *args: object) -> None:
            seen.update(listening(psutil.Process()) - before)
            seen.add(("looked", len(psutil.Process().children(recursive=True))))

    logger = MLflowLogger("sockets", None, f"sqlite:///{tmp_path}/mlflow.db", save_dir=str(tmp_path))
    trainer = quiet_trainer(2, [Look()], logger=logger)
    with Verifier(1) as verifier:
        verifier.verify([("1/2", r"\frac{2}{4}")])
        trainer.fit(SupervisedFinetuning(spec(), validation=DECODING), datamodule=trace_data())
    addresses = {address for address, _ in seen}
    assert addresses == {"looked"} and max(count for _, count in seen) >= 1


@pytest.mark.slow
def test_lace_ui_listens_to_this_machine_only_and_shows_its_store_to_no_other_user(tmp_path):
    uri, port = f"sqlite:///{tmp_path}/planted-secret.db", free_port()
    store.connect(uri).search_experiments()
    command = [sys.executable, "-m", "lace_lightning", "ui", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    ui = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert ui.stdout is not None and f"http://127.0.0.1:{port}" in ui.stdout.readline()
        process = psutil.Process(ui.pid)
        sockets = listening(process)
        assert ("127.0.0.1", port) in sockets and all(is_loopback(address) for address, _ in sockets)
        lines = [" ".join(one.cmdline()) for one in [process, *process.children(recursive=True)]]
        assert len(lines) > 1 and not any("planted-secret" in line for line in lines)
    finally:
        ui.send_signal(signal.SIGINT)
        ui.wait(timeout=60)

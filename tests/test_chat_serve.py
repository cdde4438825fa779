"""OpenAIChat against a real server: `transformers serve` with a tiny model trained here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from lace_lightning.synthesis.chat import ChatError, ChatRequest
from lace_lightning.synthesis.chats import CachedChat, HuggingFaceChat, OpenAIChat
from tests.chat_models import ANSWERS, save_chat_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="`transformers serve` needs: pip install transformers[serving]"
    ),
]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_chat_model(tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "from transformers.cli.transformers import app; app()"  # without asking the network for a newer version
    command = [sys.executable, "-c", program, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--device", "cpu"], env=env, stdout=output, stderr=output)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


def wait_until_healthy(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            DIRECT.open(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"not healthy after 120 s: {log.read_text()}")


def question(text: str, **options) -> ChatRequest:
    return ChatRequest((("user", text),), **{"max_tokens": 24} | options)


def test_the_served_model_gives_the_answers_it_was_trained_to_give(folder, url):
    """Texts, ends and token counts are those of the same model asked without a server."""
    requests = [question(text, temperature=0) for text in ANSWERS] + [question("2+3?", temperature=0, max_tokens=1)]
    served = OpenAIChat(folder, url, concurrency=4).ask(requests)
    assert [reply.text for reply in served] == [*ANSWERS.values(), "5"]
    assert [reply.finish for reply in served] == ["stop", "stop", "stop", "length"]
    assert served == HuggingFaceChat(folder).ask(requests)


def test_seeds_decide_what_is_sampled(folder, url):
    chat = OpenAIChat(folder, url, concurrency=1)  # the server has one random generator for all requests in flight
    requests = [question("zebra", seed=seed, temperature=1.5) for seed in range(6)]
    first, again = chat.ask(requests), chat.ask(requests)
    assert first == again
    assert len({reply.text for reply in first}) > 3


def test_the_cache_spares_the_server(folder, url, tmp_path):
    requests = [question(text, temperature=0) for text in ANSWERS]
    first = CachedChat(OpenAIChat(folder, url), str(tmp_path / "c")).ask(requests)
    dead = OpenAIChat(folder, "http://127.0.0.1:1/v1", patience=0.1)
    assert CachedChat(dead, str(tmp_path / "c")).ask(requests) == [replace(reply, is_cached=True) for reply in first]


def test_a_wrong_address_and_a_wrong_model_are_named(folder, url):
    with pytest.raises(ChatError, match="base_url"):
        OpenAIChat(folder, url.removesuffix("/v1")).ask([question("x")])
    (reply,) = OpenAIChat("another", url).ask([question("x")])
    assert reply.finish == "error" and "another" in reply.error

"""OpenAIChat against a server that misbehaves: every fault has its outcome, none raises, hangs or tells the key."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lace_lightning.synthesis.chat import ChatError, ChatModel, ChatReply, ChatRequest
from lace_lightning.synthesis.chats import OpenAIChat
from tests.chat_server import ChatServer, chat_server
from tests.storage_helpers import free_port

KEY = "sk-secret-7f3a9b2c1d"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with chat_server() as running:
        yield running


def chat_with(server: ChatServer, **options) -> OpenAIChat:
    """Impatient: three attempts, short waits."""
    options = {"timeout": 0.5, "patience": 5.0, "max_attempts": 3, "backoff": 0.02} | options
    return OpenAIChat("tiny", server.url, **options)


def question(text: str, **options) -> ChatRequest:
    return ChatRequest((("user", text),), **options)


def test_replies_stand_in_the_order_of_the_requests_and_count_the_servers_tokens(server):
    replies = chat_with(server, concurrency=5).ask([question(f"echo {i}") for i in range(40)])
    assert replies == [ChatReply(f"echo: echo {i}", "stop", 7, 3) for i in range(40)]


def test_no_requests_are_no_work(server):
    assert chat_with(server).ask([]) == []


def test_every_option_of_a_request_reaches_the_server(server):
    request = ChatRequest((("system", "be brief"), ("user", "hello")), 41, 99, 0.25, 0.5)
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    chat_with(server, extra=extra).ask([request])
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
            "seed": 41,
            "max_completion_tokens": 99,
            "temperature": 0.25,
            "top_p": 0.5,
            **extra,
        }
    ]


def test_each_request_brings_its_own_seed_and_huge_ones_fit_every_server(server):
    seeds = [0, 1, 2**31 - 1, 2**62 + 5]
    chat_with(server).ask([question("same", seed=seed) for seed in seeds])
    assert sorted(body["seed"] for body in server.bodies) == [0, 1, 5, 2**31 - 1]


def test_old_servers_get_the_limit_under_its_old_name(server):
    chat_with(server, limit_field="max_tokens").ask([question("hi", max_tokens=12)])
    assert server.bodies[0]["max_tokens"] == 12 and "max_completion_tokens" not in server.bodies[0]


# ---------------------------------------------------------------- faults of one request

PASSING = ["429", "500", "hang", "drip", "truncated", "short", "close", "nobody", "html", "binary", "deep", "list"]
PASSING += ["choiceless", "number", "unfinished"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_asked_again_and_one_that_stays_becomes_an_error(server, fault):
    """Side by side with a good request, which never notices."""
    requests = [question(f"{fault}*2 x"), question(f"{fault} x"), question("good")]
    start = time.monotonic()
    healed, lost, good = chat_with(server).ask(requests)
    assert time.monotonic() - start < 5, "three attempts of at most half a second"
    assert healed == ChatReply(f"echo: {fault}*2 x", "stop", 7, 3)
    assert (lost.text, lost.finish, lost.completion_tokens) == ("", "error", 0) and "attempt 3" in lost.error
    assert good == ChatReply("echo: good", "stop", 7, 3)
    assert server.asked == {requests[0].messages[0][1]: 3, requests[1].messages[0][1]: 3, "good": 1}


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("empty", ChatReply("", "stop", 7, 3)),
        ("null", ChatReply("", "length", 7, 3)),
        ("megabyte", ChatReply("x" * 1_000_000, "stop", 7, 3)),
        ("surrogate", ChatReply("a?b\0", "stop", 7, 3)),
        ("usageless", ChatReply("fine", "stop", 0, 0)),
    ],
)
def test_odd_answers_are_answers(server, fault, outcome):
    assert chat_with(server).ask([question(f"{fault} x")]) == [outcome]
    assert server.asked.total() == 1


def test_a_request_that_the_server_will_not_have_is_not_asked_again(server):
    refused, filtered, good = chat_with(server).ask([question("400 x"), question("filtered x"), question("good")])
    assert refused.finish == "error" and "400" in refused.error
    assert filtered.finish == "error" and "content_filter" in filtered.error and filtered.completion_tokens == 3
    assert good.finish == "stop"
    assert set(server.asked.values()) == {1}


def test_a_prompt_that_no_utf8_holds_is_sent_all_the_same(server):
    assert chat_with(server).ask([question("a\ud800")])[0].text == "echo: a?"


def test_retry_after_is_respected(server):
    chat_with(server, backoff=0.001).ask([question("429*2 x")])
    first, second, third = server.arrivals["429*2 x"]
    assert second - first >= 0.3 and third - second >= 0.3


def test_a_wait_beyond_the_patience_is_not_begun(server):
    start = time.monotonic()
    (reply,) = chat_with(server, patience=2.0).ask([question("429forever x")])
    assert time.monotonic() - start < 1 and reply.finish == "error"
    assert server.asked.total() == 1


def test_patience_bounds_all_attempts_together(server):
    start = time.monotonic()
    (reply,) = chat_with(server, timeout=0.4, patience=1.0, max_attempts=100).ask([question("hang x")])
    assert 0.4 < time.monotonic() - start < 1.5 and reply.finish == "error"
    assert server.asked.total() in (2, 3)


def test_waits_grow(server):
    chat_with(server, backoff=0.1, max_attempts=4).ask([question("500 x")])
    arrivals = server.arrivals["500 x"]
    gaps = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
    for gap, longest in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert longest / 2 <= gap < longest + 0.15


@pytest.mark.parametrize("concurrency", [1, 4, 9])
def test_no_more_requests_are_in_flight_than_allowed(concurrency):
    with chat_server(latency=0.03) as server:
        replies = chat_with(server, concurrency=concurrency).ask([question(f"{i}") for i in range(36)])
        assert {reply.finish for reply in replies} == {"stop"}
        assert server.most_in_flight == concurrency


def test_each_reply_is_handed_over_while_others_are_still_on_their_way(server):
    times = {}
    start = time.monotonic()
    requests = [question("hang x"), question("good")]
    chat_with(server, max_attempts=1).ask_each(requests, lambda i, _: times.update({i: time.monotonic() - start}))
    assert times[1] < 0.4 < times[0]


def test_an_error_of_the_receiver_ends_everything_and_comes_out(server):
    def full_disk(index: int, reply: ChatReply) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        chat_with(server, concurrency=2).ask_each([question("good"), question("hang x")] * 10, full_disk)
    assert server.asked.total() <= 3


# ---------------------------------------------------------------- what ends a run


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", ["api_key_env='LACE_TEST_KEY'", "put a valid key"]),
        ("404", ["model='tiny'", "base_url='http://127.0.0.1", "/v1/models"]),
        ("quota", ["api_key_env='LACE_TEST_KEY'", "top up"]),
    ],
)
def test_what_no_retry_mends_ends_the_run_at_once(server, monkeypatch, caplog, fault, words):
    monkeypatch.setenv("LACE_TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    arrived = {}
    requests = [question("good"), question(f"{fault} x")] + [question(f"hang {i}") for i in range(50)]
    chat = chat_with(server, api_key_env="LACE_TEST_KEY", timeout=20.0, concurrency=1)
    start = time.monotonic()
    with pytest.raises(ChatError) as caught:
        chat.ask_each(requests, arrived.__setitem__)
    assert time.monotonic() - start < 5
    assert server.asked.total() == 2 and arrived[0].text == "echo: good"
    assert all(word in str(caught.value) for word in words), caught.value
    assert KEY not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_a_refused_key_ends_requests_that_are_in_flight(server):
    chat = chat_with(server, timeout=20.0, concurrency=4)
    start = time.monotonic()
    with pytest.raises(ChatError):
        chat.ask([question("hang 1"), question("hang 2"), question("401 x")])
    assert time.monotonic() - start < 5


def test_nobody_listening_ends_the_run_when_patience_is_used_up():
    chat = OpenAIChat("tiny", f"http://127.0.0.1:{free_port()}/v1", patience=0.5, backoff=0.02, max_attempts=1)
    start = time.monotonic()
    with pytest.raises(ChatError, match=r"nobody listens at base_url='http://127.*start the server"):
        chat.ask([question("x")])
    assert 0.2 < time.monotonic() - start < 2


def test_a_server_that_starts_late_is_waited_for():
    port = free_port()
    answered = threading.Event()

    def late() -> None:
        time.sleep(0.4)
        with chat_server(port=port):
            answered.wait(10)

    thread = threading.Thread(target=late)
    thread.start()
    chat = OpenAIChat("tiny", f"http://127.0.0.1:{port}/v1", patience=10, backoff=0.05, max_attempts=1)
    try:
        assert chat.ask([question("x")])[0].text == "echo: x"
    finally:
        answered.set()
        thread.join()


def test_a_gateway_whose_server_is_away_is_waited_for_however_often(server):
    """More often than ``max_attempts``, which would make an error of it, and a gap in the data."""
    chat = OpenAIChat("tiny", server.url, patience=10, backoff=0.01, max_attempts=2)
    assert chat.ask([question("503*6 x")])[0].text == "echo: 503*6 x"
    chat = OpenAIChat("tiny", server.url, patience=0.3, backoff=0.02, max_attempts=2)
    with pytest.raises(ChatError, match="503.*start the server"):
        chat.ask([question("503 x")])


# ---------------------------------------------------------------- the key


def test_the_key_reaches_the_server_and_nothing_else(server, monkeypatch, caplog, capfd):
    monkeypatch.setenv("LACE_TEST_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    chat = chat_with(server, api_key_env="LACE_TEST_KEY")
    faults = ["429", "500", "400", "hang", "close", "filtered", "truncated"]
    replies = chat.ask([question(f"{fault} x") for fault in faults] + [question("good")])
    assert set(server.keys) == {f"Bearer {KEY}"}
    printed = capfd.readouterr()
    seen = [repr(chat), str(vars(chat)), str(pickle.dumps(chat)), chat.identity, caplog.text, printed.out, printed.err]
    assert not [text for text in [*seen, *map(repr, replies)] if KEY in text]
    assert "<hidden>" in replies[2].error, "the server sent the key back"


def test_a_key_that_the_server_repeats_is_hidden_before_its_words_are_cut(monkeypatch):
    from lace_lightning.synthesis.chats.failure import _excerpt

    for padding in range(280, 300):
        assert KEY[:8] not in _excerpt("x" * padding + KEY, KEY)


def test_without_api_key_env_no_key_of_the_environment_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat_with(server).ask([question("x")])
    assert server.keys == ["Bearer none"]


@pytest.mark.parametrize("key", ["", "  ", "schlüssel", "two\nlines"])
def test_an_unusable_key_is_an_error_before_any_request(server, monkeypatch, key):
    monkeypatch.setenv("LACE_TEST_KEY", key)
    with pytest.raises(ValueError, match="api_key_env='LACE_TEST_KEY'") as caught:
        chat_with(server, api_key_env="LACE_TEST_KEY")
    assert not key.strip() or key.strip() not in str(caught.value)


def test_a_key_given_in_place_of_its_variables_name_is_not_repeated(server):
    with pytest.raises(ValueError, match="NAME") as caught:
        chat_with(server, api_key_env=KEY)
    assert KEY not in str(caught.value)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="base_url") as caught:
        OpenAIChat("tiny", f"http://user:{KEY}@host/v1")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"patience": float("nan")},
        {"backoff": -1},
        {"concurrency": 0},
        {"concurrency": 1001},
        {"max_attempts": 0},
        {"extra": {"model": "other"}},
    ],
)
def test_options_out_of_range_are_named(server, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        chat_with(server, **options)


def test_identity_tells_models_apart_but_not_ports():
    one, other = (OpenAIChat("tiny", f"http://127.0.0.1:{port}/v1") for port in (1, 2))
    assert one.identity == other.identity
    others = [
        OpenAIChat("small", one.base_url),
        OpenAIChat("tiny", one.base_url, revision="b"),
        OpenAIChat("tiny", one.base_url, extra={"top_k": 5}),
    ]
    assert len({chat.identity for chat in [one, *others]}) == 4


def test_yaml_chooses_a_chat_by_class_path_and_saves_no_key(server, monkeypatch, tmp_path):
    monkeypatch.setenv("LACE_TEST_KEY", KEY)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--chat", type=ChatModel)
    text = f"""
chat:
  class_path: lace_lightning.synthesis.chats.CachedChat
  init_args:
    path: {tmp_path / "c"}
    chat:
      class_path: lace_lightning.synthesis.chats.OpenAIChat
      init_args: {{model: tiny, base_url: "{server.url}", api_key_env: LACE_TEST_KEY}}
"""
    config = parser.parse_string(text)
    assert parser.instantiate(config).chat.ask([question("x")])[0].text == "echo: x"
    assert "LACE_TEST_KEY" in parser.dump(config) and KEY not in parser.dump(config)
    assert KEY.encode() not in (tmp_path / "c").read_bytes()


# ---------------------------------------------------------------- signals

PROGRAM = """
import json, os, signal, sys
from lace_lightning.synthesis.chat import ChatRequest
from lace_lightning.synthesis.chats import OpenAIChat
for number in (signal.SIGINT, signal.SIGTERM):  # as the command line does; a background job starts with SIGINT ignored
    signal.signal(number, signal.default_int_handler)
requests = [ChatRequest((("user", text),)) for text in ["one", "two", "hang x", "hang y"]]
def on_reply(index, reply):
    print(index, flush=True)
try:
    OpenAIChat("tiny", sys.argv[1], timeout=60).ask_each(requests, on_reply)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_asking_at_once_and_keep_what_has_arrived(server, number):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, server.url]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        arrived = {process.stdout.readline(), process.stdout.readline()}
        while server.in_flight < 2:
            time.sleep(0.01)
        process.send_signal(number)
        try:
            rest, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert arrived == {"0\n", "1\n"} and rest == "interrupted\n"
    assert not errors, "no complaint about tasks or connections left behind"


def test_a_signal_never_cuts_in_between_a_reply_and_its_storing(server):
    """The handler raises in the main thread, whatever the receiver is doing."""
    stored = []

    def slow_disk(index: int, reply: ChatReply) -> None:
        if index == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
        stored.append(index)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            chat_with(server, concurrency=1).ask_each([question(str(i)) for i in range(20)], slow_disk)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stored[0] == 0 and len(stored) < 20
    assert "chat" not in {t.name for t in threading.enumerate()}


def test_it_asks_from_within_a_running_event_loop_too(server):
    async def notebook() -> list[ChatReply]:
        return chat_with(server).ask([question("x")])

    assert asyncio.run(notebook())[0].text == "echo: x"


def test_a_reply_survives_json(server):
    """What the cache relies on."""
    (reply,) = chat_with(server).ask([question("surrogate x")])
    assert ChatReply(**json.loads(json.dumps(vars(reply)))) == reply

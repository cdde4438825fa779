"""CachedChat: nothing that was paid for is lost or paid for again, whatever kills the run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lace_lightning.synthesis.chat import ChatError, ChatModel, ChatReply, ChatRequest, EagerChatModel
from lace_lightning.synthesis.chats import CachedChat, OpenAIChat
from lace_lightning.synthesis.chats.store import ReplyStore, request_key
from tests.chat_server import chat_server

ROOT = Path(__file__).parents[1]


class Teacher(EagerChatModel):
    """Answers, and counts what it was paid for. Replies differ from one payment to the next."""

    def __init__(self, identity: str = "teacher", dies_after: int = 10**9) -> None:
        self.identity, self.dies_after = identity, dies_after
        self.paid: list[ChatRequest] = []

    def ask_each(self, requests, on_reply) -> None:
        for index, request in enumerate(requests):
            if len(self.paid) == self.dies_after:
                raise KeyboardInterrupt
            self.paid.append(request)
            if "bad" in request.messages[0][1]:
                on_reply(index, ChatReply("", "error", error="no"))
            else:
                on_reply(index, ChatReply(f"{request.messages[0][1]}, payment {len(self.paid)}", "stop", 5, 2))


class PlainTeacher(ChatModel):
    """Knows nothing but :meth:`ask`."""

    identity = "plain"

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        return [ChatReply(request.messages[0][1], "length") for request in requests]


def question(text: str, **options) -> ChatRequest:
    return ChatRequest((("user", text),), **options)


def test_what_is_stored_is_not_asked_again(tmp_path):
    teacher, requests = Teacher(), [question(text) for text in "abc"]
    first = CachedChat(teacher, str(tmp_path / "new" / "replies.sqlite")).ask(requests)
    second = CachedChat(teacher, str(tmp_path / "new" / "replies.sqlite")).ask(requests[::-1])
    assert len(teacher.paid) == 3
    assert second == [replace(reply, is_cached=True) for reply in reversed(first)]
    assert not any(reply.is_cached for reply in first)


def test_a_model_that_only_asks_can_be_cached(tmp_path):
    chat = CachedChat(PlainTeacher(), str(tmp_path / "c"))
    assert [chat.ask([question("x")])[0].is_cached for _ in range(2)] == [False, True]


def test_equal_requests_of_one_call_are_paid_for_once(tmp_path):
    teacher = Teacher()
    replies = CachedChat(teacher, str(tmp_path / "c")).ask([question("a"), question("b"), question("a")])
    assert [request.messages[0][1] for request in teacher.paid] == ["a", "b"]
    assert replies[2] == replace(replies[0], is_cached=True)


def test_any_difference_makes_another_request(tmp_path):
    base = ChatRequest((("user", "ab"), ("assistant", "c")))
    variants = [
        base,
        replace(base, messages=(("user", "ab"), ("user", "c"))),
        replace(base, messages=(("user", "a"), ("assistant", "bc"))),
        replace(base, messages=(("user", "ab"),)),
        replace(base, seed=1),
        replace(base, max_tokens=1),
        replace(base, temperature=0.0),
        replace(base, top_p=0.5),
    ]
    teacher = Teacher()
    CachedChat(teacher, str(tmp_path / "c")).ask(variants)
    assert len(teacher.paid) == len(variants)
    other = Teacher(identity="another teacher")
    CachedChat(other, str(tmp_path / "c")).ask(variants)
    assert len(other.paid) == len(variants)


def test_errors_are_asked_again(tmp_path):
    teacher = Teacher()
    for _ in range(2):
        good, bad = CachedChat(teacher, str(tmp_path / "c")).ask([question("good"), question("bad")])
        assert (good.finish, bad.finish, bad.is_cached) == ("stop", "error", False)
    assert Counter(request.messages[0][1] for request in teacher.paid) == {"good": 1, "bad": 2}


@pytest.mark.parametrize("text", ["", "\0 null", "x" * 1_000_000, "naïve ∑ 🂡", "lone \ud800"])
def test_any_text_comes_out_as_it_went_in(tmp_path, text):
    class Says(PlainTeacher):
        def ask(self, requests):
            return [ChatReply(text, "stop", 1, 2) for _ in requests]

    chat = CachedChat(Says(), str(tmp_path / "c"))
    assert [chat.ask([question(text)])[0] for _ in range(2)] == [
        ChatReply(text, "stop", 1, 2),
        ChatReply(text, "stop", 1, 2, is_cached=True),
    ]


def test_what_arrived_before_an_interruption_is_stored(tmp_path):
    requests = [question(str(i)) for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        CachedChat(Teacher(dies_after=6), str(tmp_path / "c")).ask(requests)
    second = Teacher()
    CachedChat(second, str(tmp_path / "c")).ask(requests)
    assert second.paid == requests[6:]


def test_the_key_of_a_request_never_changes():
    """A change would make every reply that was ever paid for unfindable."""
    request = ChatRequest((("system", "Sei präzise."), ("user", "1+1?")), 3, 64, 0.7, 0.9)
    assert request_key("m", request) == "77bbd17a45788cc8252fd9fcaf6239c7446d862cae7a85a010c00c1efc0df5ae"


# ---------------------------------------------------------------- processes


def ask_in_process(path: str, start: int, done) -> None:
    teacher = Teacher(identity="shared")
    replies = CachedChat(teacher, path).ask([question(str(i)) for i in range(start, start + 30)])
    done.put((len(teacher.paid), [reply.text for reply in replies]))


def test_processes_that_open_and_fill_one_file_together_agree(tmp_path):
    """Forty requests, each wanted by up to six processes at once: whoever stores first is what all of them return."""
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    starts = [0, 0, 0, 10, 10, 10]
    processes = [context.Process(target=ask_in_process, args=(str(tmp_path / "c"), s, done)) for s in starts]
    for process in processes:
        process.start()
    results = [done.get(timeout=60) for _ in starts]
    for process in processes:
        process.join()
    stored = CachedChat(Teacher(identity="shared"), str(tmp_path / "c")).ask([question(str(i)) for i in range(40)])
    assert all(reply.is_cached for reply in stored)
    texts = {reply.text for reply in stored}
    assert {text for _, replies in results for text in replies} == texts and len(texts) == 40


KILLABLE = """
import os, sys
from lace_lightning.synthesis.chat import ChatRequest
from lace_lightning.synthesis.chats import CachedChat, OpenAIChat
import openai.resources.chat
url, path = sys.argv[1:]
for line in sys.stdin:  # each line: one run, in a process of its own that has its imports done
    if not (child := os.fork()):
        requests = [ChatRequest((("user", f"question {i}"),)) for i in range(40)]
        replies = CachedChat(OpenAIChat("tiny", url, concurrency=4), path).ask(requests)
        os._exit(0 if [reply.text for reply in replies] == [f"echo: question {i}" for i in range(40)] else 1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def stored_questions(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with ReplyStore(path) as store:
        keys = {request_key(store_identity(), question(f"question {i}")): f"question {i}" for i in range(40)}
        return {keys[key] for key in store.load(keys)}


def store_identity() -> str:
    return OpenAIChat("tiny", "http://127.0.0.1:1/v1").identity


def test_runs_killed_at_ten_random_points_lose_no_reply_and_pay_none_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path, chance = tmp_path / "c", random.Random(8)
    with (
        chat_server(latency=0.05) as server,
        subprocess.Popen(
            [sys.executable, "-c", KILLABLE, server.url, str(path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as runner,
    ):
        assert runner.stdin is not None and runner.stdout is not None

        def run(kill_after: float | None) -> int:
            runner.stdin.write("\n")
            runner.stdin.flush()
            child = int(runner.stdout.readline())
            if kill_after is not None:
                time.sleep(kill_after)
                os.kill(child, signal.SIGKILL)
            return int(runner.stdout.readline())

        killed_with_work_left = 0
        for _ in range(10):
            already, before = stored_questions(path), server.asked.copy()
            assert run(chance.uniform(0.0, 0.35)) == -signal.SIGKILL
            time.sleep(0.05)  # what was sent last may not have been read yet
            while server.in_flight:  # it may still be working for the dead
                time.sleep(0.01)
            asked = server.asked - before
            assert not already & set(asked), "paid for again although it was stored"
            assert set(asked.values()) <= {1}
            unstored = set(asked) - stored_questions(path)
            assert len(unstored) <= 4, "more was lost than was in flight"
            killed_with_work_left += len(stored_questions(path)) < 40
        already, before = stored_questions(path), server.asked.copy()
        assert run(None) == 0
        assert not already & set(server.asked - before)
        assert stored_questions(path) == {f"question {i}" for i in range(40)}
        runner.stdin.close()
    assert killed_with_work_left >= 3, "the kills came too late to try anything"
    assert server.asked.total() <= 40 + 10 * 4


# ---------------------------------------------------------------- files that are none


def fill(path: Path, number: int = 400) -> None:
    CachedChat(PlainTeacher(), str(path)).ask([question(f"{i} " + "x" * 500) for i in range(number)])


def test_a_file_cut_off_in_the_middle_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "c"
    fill(path)
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.01):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ChatError, match="recover|move it away") as caught:
            CachedChat(PlainTeacher(), str(path))
        assert str(path) in str(caught.value)


def test_a_file_overwritten_in_the_middle_is_found_out_at_the_start(tmp_path):
    path = tmp_path / "c"
    fill(path)
    content = bytearray(path.read_bytes())
    content[4096 * 5 : 4096 * 40] = os.urandom(4096 * 35)
    path.write_bytes(content)
    with pytest.raises(ChatError, match="damaged"):
        CachedChat(PlainTeacher(), str(path))


def test_foreign_files_are_left_alone(tmp_path):
    text, foreign = tmp_path / "notes.txt", tmp_path / "mlflow.db"
    text.write_text("my notes " * 1000)
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE runs (id)")
    db.close()
    before = text.read_bytes(), foreign.read_bytes()
    with pytest.raises(ChatError, match="not, or no longer, a sqlite file"):
        CachedChat(PlainTeacher(), str(text))
    with pytest.raises(ChatError, match="another program or version"):
        CachedChat(PlainTeacher(), str(foreign))
    assert before == (text.read_bytes(), foreign.read_bytes())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ChatError, match="name a file in a folder"):
        CachedChat(PlainTeacher(), str(tmp_path / "file" / "c"))
    with pytest.raises(ChatError, match="name a file in a folder"):
        CachedChat(PlainTeacher(), str(tmp_path))


def test_a_run_killed_while_it_made_the_file_leaves_one_that_can_be_used(tmp_path):
    (tmp_path / "c").write_bytes(b"")  # sqlite makes an empty file first
    fill(tmp_path / "c", 3)


def test_a_full_disk_ends_the_run_and_keeps_what_was_stored(tmp_path, monkeypatch):
    path = tmp_path / "c"
    fill(path, 5)

    def with_little_room(self: ReplyStore) -> None:
        prepare(self)
        size = self._db.execute("PRAGMA page_count").fetchone()[0]
        self._db.execute(f"PRAGMA max_page_count = {size + 3}")

    prepare = ReplyStore._prepare
    with monkeypatch.context() as patch:
        patch.setattr(ReplyStore, "_prepare", with_little_room)
        with pytest.raises(ChatError, match="full.*free some space"):
            fill(path, 100)
    chat = CachedChat(PlainTeacher(), str(path))
    assert sum(reply.is_cached for reply in chat.ask([question(f"{i} " + "x" * 500) for i in range(100)])) >= 6

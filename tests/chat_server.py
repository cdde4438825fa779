"""A chat server on 127.0.0.1 that misbehaves as the question's first word says, and keeps count."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: Any, finish: Any = "stop") -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class ChatServer(ThreadingHTTPServer):
    """Answers ``echo: <question>`` unless the first word of the question names a fault.

    ``429*2``: that fault the first two times, then an answer; without a number always.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latency: float = 0.0, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.latency = latency
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.arrivals: dict[str, list[float]] = {}
        self.in_flight = self.most_in_flight = 0
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked[question] += 1
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["authorization"])
            self.server.arrivals.setdefault(question, []).append(time.monotonic())
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            fault, _, times = question.split()[0].partition("*")
            is_faulty = not times or self.server.asked[question] <= int(times)
        try:
            time.sleep(self.server.latency)
            getattr(self, f"fault_{fault}" if is_faulty else "", self.answer)(question)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, question: str) -> None:
        self.send(200, json.dumps(completion(f"echo: {question}")).encode())

    def refuse(self, status: int, code: str | None = None, **headers: str) -> None:
        # What a careless server does: it repeats the key it was given.
        message = f"no, not with {self.headers['authorization']}"
        self.send(status, json.dumps({"error": {"message": message, "code": code}}).encode(), **headers)

    def fault_429(self, _: str) -> None:
        self.refuse(429, Retry_After="0.3")

    def fault_429forever(self, _: str) -> None:
        self.refuse(429, Retry_After="3600")

    def fault_quota(self, _: str) -> None:
        self.refuse(429, "insufficient_quota")

    def fault_500(self, _: str) -> None:
        self.refuse(500)

    def fault_503(self, _: str) -> None:
        self.refuse(503)

    def fault_400(self, _: str) -> None:
        self.refuse(400)

    def fault_401(self, _: str) -> None:
        self.refuse(401)

    def fault_404(self, _: str) -> None:
        self.refuse(404)

    def fault_hang(self, _: str) -> None:
        self.server.closing.wait(30)

    def fault_drip(self, _: str) -> None:
        self.send(200, b"", length=1000)
        while not self.server.closing.wait(0.05):
            self.wfile.write(b" ")

    def fault_truncated(self, _: str) -> None:
        self.send(200, json.dumps(completion("half")).encode()[:60])

    def fault_short(self, _: str) -> None:
        """Fewer bytes than were announced, then the connection closes."""
        self.send(200, b'{"choices": [', length=500)
        self.close_connection = True

    def fault_close(self, _: str) -> None:
        self.close_connection = True

    def fault_nobody(self, _: str) -> None:
        self.send(200, b"")

    def fault_html(self, _: str) -> None:
        self.send(200, b"<html>a gateway's page</html>")

    def fault_binary(self, _: str) -> None:
        self.send(200, bytes(range(256)))

    def fault_deep(self, _: str) -> None:
        self.send(200, b"[" * 100_000)

    def fault_list(self, _: str) -> None:
        self.send(200, b"[1, 2, 3]")

    def fault_choiceless(self, _: str) -> None:
        self.send(200, json.dumps(completion("x") | {"choices": []}).encode())

    def fault_number(self, _: str) -> None:
        self.send(200, json.dumps(completion(12)).encode())

    def fault_unfinished(self, _: str) -> None:
        self.send(200, json.dumps(completion("x", None)).encode())

    def fault_filtered(self, _: str) -> None:
        self.send(200, json.dumps(completion("x", "content_filter")).encode())

    def fault_empty(self, _: str) -> None:
        self.send(200, json.dumps(completion("")).encode())

    def fault_null(self, _: str) -> None:
        self.send(200, json.dumps(completion(None, "length")).encode())

    def fault_megabyte(self, _: str) -> None:
        self.send(200, json.dumps(completion("x" * 1_000_000)).encode())

    def fault_surrogate(self, _: str) -> None:
        self.send(200, json.dumps(completion("a\ud800b\0")).encode())

    def fault_usageless(self, _: str) -> None:
        self.send(200, json.dumps(completion("fine") | {"usage": {"prompt_tokens": "many"}}).encode())


@contextmanager
def chat_server(latency: float = 0.0, port: int = 0) -> Iterator[ChatServer]:
    server = ChatServer(latency, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()

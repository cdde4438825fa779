"""Chat replies in one sqlite file, by the content hash of what was asked."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from lace_lightning.synthesis.chat import ChatError, ChatReply, ChatRequest

_APPLICATION = 0x4C414345
"""Marks the file as ours: "LACE"."""

_VERSION = 1
_PATIENCE = 60.0
"""Seconds to wait for another process that is writing."""

_STORED = ("text", "finish", "prompt_tokens", "completion_tokens")
_REMEDIES = {
    "CORRUPT": "it is damaged or cut off: rescue what is left by `sqlite3 OLD .recover | sqlite3 NEW`, or move it away "
    "to start anew; the replies in it are paid for again then",
    "NOTADB": "it is not, or no longer, a sqlite file: move it away to start anew, or name another file",
    "FULL": "free some space and run again; all replies before this one are stored",
    "BUSY": f"another process has kept it locked for {_PATIENCE:.0f} s: give every machine a file of its own, on a "
    "local disk",
    "CANTOPEN": "name a file in a folder that you may write to",
    "READONLY": "name a file that you may write to",
}


def request_key(identity: str, request: ChatRequest) -> str:
    """Hexadecimal SHA-256 of all that a reply depends on."""
    return hashlib.sha256(_canonical({"identity": identity, "request": asdict(request)}).encode()).hexdigest()


class ReplyStore:
    """An open file of replies, made if there is none.

    Any number of processes of one machine may use it at once. When :meth:`save` returns, a reply outlives the end of
    its process, however sudden; a power failure may take the last ones.

    Args:
        path: of the sqlite file.

    Raises:
        ChatError: the file cannot be opened or written, is damaged, or belongs to another program. So do all methods.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ReplyStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def check(self) -> None:
        """Read the whole file and see whether it is sound."""
        with self._explained():
            verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise ChatError(_describe(self.path, verdict, "CORRUPT"))

    def load(self, keys: Iterable[str]) -> dict[str, ChatReply]:
        """Those of the replies that are stored."""
        with self._explained():
            found = ((key, self._load(key)) for key in keys)
            return {key: reply for key, reply in found if reply is not None}

    def save(self, identity: str, request: ChatRequest, reply: ChatReply) -> ChatReply:
        """Store a reply; returns the one that is stored: another process's, if that came first."""
        key, stored = request_key(identity, request), {name: getattr(reply, name) for name in _STORED}
        row = (key, identity, _canonical(asdict(request)), _canonical(stored), time.time())
        with self._explained():
            is_new = self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", row).rowcount
            first = None if is_new else self._load(key)
        return reply if first is None else replace(first, is_cached=False)

    def _load(self, key: str) -> ChatReply | None:
        row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else _reply(row[0], self.path)

    def _prepare(self) -> None:
        with self._explained():
            # FULL took 18 ms per reply, and asking stood still meanwhile.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA trusted_schema = OFF")  # a file of somebody else's runs no functions
            self._db.execute("BEGIN IMMEDIATE")  # one process makes the table, others wait
            if self._is_empty():
                self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
                self._db.execute(
                    "CREATE TABLE replies (key TEXT PRIMARY KEY, identity TEXT, request TEXT, reply TEXT, time REAL)"
                )
            self._db.execute("COMMIT")
            marks = (self._pragma("application_id"), self._pragma("user_version"))
        if marks != (_APPLICATION, _VERSION):
            raise ChatError(
                f"{self.path} is a sqlite file of another program or version (application, version: {marks}, expected "
                f"{(_APPLICATION, _VERSION)}): name another file"
            )
        with self._explained():
            self._db.execute("PRAGMA journal_mode = WAL")

    def _is_empty(self) -> bool:
        return self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            kind = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").split("_")[0]
            raise ChatError(_describe(self.path, str(error), kind)) from error
        except OSError as error:
            raise ChatError(_describe(self.path, str(error), "CANTOPEN")) from error


def _describe(path: Path, reason: str, kind: str) -> str:
    return f"the reply cache {path} cannot be used ({reason}): {_REMEDIES.get(kind, 'name another file')}"


def _reply(stored: object, path: Path) -> ChatReply:
    """The reply in a row, whoever wrote it.

    Raises:
        ChatError: it is none of ours.
    """
    try:
        fields = json.loads(stored) if isinstance(stored, str) else None
    except (ValueError, RecursionError):
        fields = None
    types = {"text": str, "finish": str, "prompt_tokens": int, "completion_tokens": int}
    if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != types:
        raise ChatError(_describe(path, "a row of it is no reply", "CORRUPT"))
    return ChatReply(**fields, is_cached=True)


def _canonical(value: object) -> str:
    """JSON in ASCII: whatever text a model wrote goes in and comes out as it was."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))

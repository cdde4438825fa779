"""What comes from others is data: models with code, reply caches, run folders and texts for the terminal."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import lace_lightning
from lace_lightning.bench.shapes import load_config
from lace_lightning.cli.main import explain
from lace_lightning.model_spec import ModelSpec
from lace_lightning.puzzles import Doors
from lace_lightning.puzzles.vocabulary import word_tokenizer
from lace_lightning.synthesis.chat import ChatError, ChatReply, ChatRequest
from lace_lightning.synthesis.chats.store import ReplyStore
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.tokenizer import load_tokenizer
from lace_lightning.tracking.run_info import git_diff

REQUEST = ChatRequest((("user", "what?"),))


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder whose code, if anything runs it, leaves a file behind."""
    folder = tmp_path_factory.mktemp("trap")
    tokenizer = word_tokenizer(["a", "b"])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "trap.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Trap: pass\n")
    for name, classes in {
        "config.json": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"},
        "tokenizer_config.json": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]},
    }.items():
        settings = json.loads((folder / name).read_text())
        changed = {"model_type": "trap"} if name == "config.json" else {"tokenizer_class": "Trap"}
        (folder / name).write_text(json.dumps({**settings, **changed, "auto_map": classes}))
    return folder


LOADERS: dict[str, Callable[[Path], object]] = {
    "backbone": lambda folder: ModelSpec(backbone=str(folder)).build(word_tokenizer(["a"])),
    "tokenizer": lambda folder: load_tokenizer(str(folder), Doors()),
    "ThreadedLM": ThreadedLM.from_pretrained,
    "bench": lambda folder: load_config(str(folder)),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_that_comes_with_a_model_is_refused_without_asking(trap, loader, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers' own default would ask for
    try:
        LOADERS[loader](trap)
    except ValueError as error:  # a tokenizer may also be loaded without its code
        assert "trust_remote_code" in str(error)
    assert not (trap / "ran").exists()


def test_every_call_that_loads_a_model_says_whether_it_trusts_its_code():
    calls = [
        (file, node)
        for file in Path(lace_lightning.__path__[0]).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func))
    ]
    silent = [f"{file}:{c.lineno}" for file, c in calls if "trust_remote_code" not in {k.arg for k in c.keywords}]
    assert len(calls) > 10 and not silent, silent


# ---------------------------------------------------------------- reply caches


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "replies.sqlite"
    with ReplyStore(path) as store:
        store.save("model", REQUEST, ChatReply("fine", "stop", 1, 2))
    return path


HOSTILE_ROWS = [
    "[" * 100_000, "5", "null", "{}", '{"text": "x"}',
    '{"text": 5, "finish": "stop", "prompt_tokens": 1, "completion_tokens": 2}',
    '{"text": "x", "finish": "stop", "prompt_tokens": 1, "completion_tokens": 2, "is_cached": false}',
]  # fmt: skip


@pytest.mark.parametrize("row", HOSTILE_ROWS, ids=lambda row: row[:40])
def test_a_row_that_is_no_reply_is_an_error_that_names_the_file(cache, row):
    with sqlite3.connect(cache) as database:
        database.execute("UPDATE replies SET reply = ?", (row,))
        [key] = database.execute("SELECT key FROM replies").fetchone()
    with ReplyStore(cache) as store, pytest.raises(ChatError, match="replies.sqlite.*no reply"):
        store.load([key])


# ---------------------------------------------------------------- terminal and git


def test_an_error_that_quotes_data_cannot_act_on_the_terminal(capsys):
    explain(ValueError("row 1: unknown tag \x1b]0;owned\x07\x1b[2J\u202e"))
    shown = capsys.readouterr().err
    assert "␛]0;owned␇␛[2J" in shown and "\x1b" not in shown and "\u202e" not in shown


def test_a_checkout_cannot_have_git_run_its_programs(tmp_path):
    import subprocess

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one\n")
    git("add", ".")
    git("commit", "-m", "start")
    script = tmp_path / "trap.sh"
    script.write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\ncat "$1" 2>/dev/null\n')
    script.chmod(0o755)
    (tmp_path / ".gitattributes").write_text("* diff=trap\n")
    for key in ("diff.external", "diff.trap.textconv", "core.fsmonitor"):
        git("config", key, str(script))
    (tmp_path / "ran").unlink(missing_ok=True)
    (tmp_path / "file").write_text("two\n")
    assert "+two" in git_diff(tmp_path) and not (tmp_path / "ran").exists()

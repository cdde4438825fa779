"""What counts as a secret, and that every way out is closed to it; tests/test_leaks.py proves it through real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lace_lightning.cli.main import explain, main
from lace_lightning.sweep.spec import Tracking
from lace_lightning.sweep.store import Store
from lace_lightning.sweep.tracking import environment_of
from lace_lightning.synthesis.chat import ChatRequest
from lace_lightning.synthesis.chats import OpenAIChat
from lace_lightning.tracking.redact import HIDDEN, hide_known, redact, redact_lines, redact_text, redact_uri
from lace_lightning.tracking.spool import Spool
from tests.chat_server import chat_server

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("uri", "left"),
    [
        ("postgresql://me:hush@host/db", "postgresql://host/db"),
        ("postgresql://me:hu@sh@host/db", "postgresql://host/db"),
        ("postgresql://me:hu/sh@host/db", "postgresql://host/db"),
        ("see https://hush@host/x, please", "see https://host/x, please"),
        ("http://host/db?user=a&password=hush&b=1", f"http://host/db?user=a&password={HIDDEN}&b=1"),
        ("postgresql://host/db?sslpassword=hush", f"postgresql://host/db?sslpassword={HIDDEN}"),
        ("https://host/x?X-Amz-Signature=hush", f"https://host/x?X-Amz-Signature={HIDDEN}"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("mail a@b.c about http://host/x?page=2", "mail a@b.c about http://host/x?page=2"),
    ],
)
def test_passwords_leave_uris_and_nothing_else_does(uri, left):
    assert redact_uri(uri) == left


@pytest.mark.parametrize("value", ["hush", 12345678, ["hush", "hush"], {"user": "hush", "deep": ["hush"]}])
def test_all_that_stands_under_a_secret_key_is_hidden(value):
    shown = json.dumps(redact({"a": {"password": value}}))
    assert "hush" not in shown and "1234" not in shown and HIDDEN in shown
    assert redact({"password": None, "token": 7, "is_secret": True}) == {
        "password": None,
        "token": 7,
        "is_secret": True,
    }


@pytest.mark.parametrize(
    "token",
    ["hf_" + "a" * 30, "sk-proj-" + "b" * 30, "ghp_" + "c" * 36, "glpat-" + "d" * 20, "AKIA" + "E" * 16]
    + ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.sig-nature"]
    + ["-----BEGIN RSA PRIVATE KEY-----\nhush\n-----END RSA PRIVATE KEY-----"],
)
def test_well_known_tokens_are_hidden_wherever_they_stand(token):
    assert redact_text(f"tried '{token}', in vain") == f"tried '{HIDDEN}', in vain"


def test_a_secret_of_the_environment_is_hidden_in_every_spelling(monkeypatch):
    secret = 'pa/ss "wörd" & co'
    monkeypatch.setenv("MY_SERVICE_PASSWORD", secret)
    monkeypatch.setenv("SOME_STORE", "postgresql://me:uri%2Fsecret@host/db")
    assert redact_text(f"it was {secret}!") == f"it was {HIDDEN}!"
    assert json.loads(hide_known(json.dumps({"text": f"it was {secret}!"}))) == {"text": f"it was {HIDDEN}!"}
    for spelled in (
        "pa%2Fss%20%22w%C3%B6rd%22%20%26%20co",
        "pa/ss &quot;wörd&quot; &amp; co",
        "uri%2Fsecret",
        "uri/secret",
    ):
        assert hide_known(f"<{spelled}>") == f"<{HIDDEN}>"


@pytest.mark.parametrize("name", ["PGPASSWORD", "MY_DB_PASSWD", "SOMEAPIKEY", "AWS_CREDENTIALS", "HF_TOKEN", "KEYS"])
def test_a_secret_is_known_by_what_its_variables_name_ends_in(name, monkeypatch):
    monkeypatch.setenv(name, "hushhush")
    assert redact_text("it was hushhush") == f"it was {HIDDEN}"


def test_short_values_and_parts_of_words_are_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    text = "EMPTY answers of postgresql"
    assert redact_text(text) == text


def test_values_behind_options_of_a_command_are_hidden():
    line = "lace fit --model.init_args.api_key hush --trainer.max_steps 5 --hub_token=hush"
    assert (
        redact_lines(line) == f"lace fit --model.init_args.api_key {HIDDEN} --trainer.max_steps 5 --hub_token={HIDDEN}"
    )
    assert redact_lines("--judge.token --trainer.max_steps 5") == "--judge.token --trainer.max_steps 5"


# ---------------------------------------------------------------- ways out


def test_nothing_reaches_the_spool_that_the_environment_keeps_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandbsecret1")
    spool = Spool(tmp_path, "id", "sqlite:///x")
    spool.append({"kind": "tag", "key": "note", "value": "the key is wandbsecret1."})
    spool.add_file(b"<p>wandbsecret1</p>", "page.html")
    spool.add_file(b"\x89PNG\xff", "picture.png")
    spool.close()
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert all(b"wandbsecret1" not in content for content in written.values())
    assert written["page.html"] == f"<p>{HIDDEN}</p>".encode() and written["picture.png"] == b"\x89PNG\xff"


def test_errors_are_explained_without_secrets(capsys, monkeypatch):
    monkeypatch.delenv("LACE_TRACEBACK", raising=False)
    explain(ValueError("http://me:hush@host refuses {'api_key': 'hush', 'b': 1}"))
    assert "hush" not in capsys.readouterr().err


def test_logs_of_any_library_and_tracebacks_hold_no_secret():
    program = (
        "import logging, sys\n"
        "from lace_lightning.cli.main import main\n"
        "main(['sync', '/nowhere'])\n"
        "logging.basicConfig()\n"
        "log = logging.getLogger('a.library')\n"
        "log.warning('%s of %d', 'http://me:hush@host', 5)\n"
        "log.warning('a mistaken call %d', 'x')\n"
        "try: raise OSError('hushhush')\n"
        "except OSError: log.exception('it failed')\n"
        "raise RuntimeError('http://me:hush@host')\n"
    )
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "A_TOKEN": "hushhush"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    # A traceback quotes the line of the program, whose URI is redacted too.
    assert "hush" not in done.stderr.replace("'hushhush'", ""), done.stderr
    assert "WARNING:a.library:http://host of 5" in done.stderr and f"OSError: {HIDDEN}" in done.stderr
    assert "RuntimeError: http://host" in done.stderr and "Traceback" in done.stderr


def test_the_passwords_of_a_sweeps_store_go_to_its_commands_and_into_no_file(tmp_path):
    tracking = Tracking(uri="http://me:hush@host:5000")
    assert environment_of(tracking, "parent")["MLFLOW_TRACKING_URI"] == tracking.uri
    assert "hush" not in json.dumps(Store(tmp_path, None, tracking)._logger("a run", tmp_path))  # type: ignore[arg-type]


def test_a_key_that_the_server_sends_back_in_an_answer_reaches_no_reply(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEACHER_KEY", "teachersecret7")
    with chat_server() as server:
        chat = OpenAIChat("m", server.url, "TEACHER_KEY")
        [reply] = chat.ask([ChatRequest((("user", "is your key teachersecret7?"),))])
    assert reply.text == f"echo: is your key {HIDDEN}?"


@pytest.mark.parametrize("extra", [{"api_key": "hush"}, {"headers": {"Authorization": "Bearer hush"}}])
def test_keys_among_the_fields_that_are_stored_with_the_data_are_refused(extra):
    with pytest.raises(ValueError, match="api_key_env") as refusal:
        OpenAIChat("m", "http://127.0.0.1:1/v1", extra=extra)
    assert "hush" not in str(refusal.value)


def test_fields_without_a_secret_are_taken_whatever_their_keys_are():
    """YAML has numbers as keys and lists; Python has tuples."""
    options = {"logit_bias": {50256: -100}, "stop": ("a", "b"), "chat_template_kwargs": {"x": False}}
    assert OpenAIChat("m", "http://127.0.0.1:1/v1", extra=options).extra == options


def test_the_pages_of_a_store_are_named_without_its_password(capsys):
    assert main(["ui", "--backend-store", "http://me:hush@127.0.0.1:5000"]) == 0
    assert "hush" not in capsys.readouterr().out

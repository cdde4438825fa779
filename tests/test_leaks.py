"""Planted secrets through real runs of fit, synth, eval and sweep: nothing that is written or printed holds one."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.chat_server import chat_server
from tests.synth_helpers import write_problems
from tests.test_tracking import free_port, kill_server, start_server

ROOT = Path(__file__).parents[1]
PLANTED = {
    "TEACHER_API_KEY": "sk-teacherPLANTED4f1d7a90c2",
    "OPENAI_API_KEY": "sk-openaiPLANTED88d1e2f3a4",
    "HF_TOKEN": "hf_hubPLANTEDaQ7cV9xT2bN5mK",
    "MLFLOW_TRACKING_PASSWORD": 'env/track+PLANTED ü"1',
    "MLFLOW_TRACKING_TOKEN": "bearerPLANTED5512",
    "AWS_SECRET_ACCESS_KEY": "awsPLANTED/abc+def0123456789",
}
"""Variables of the environment."""
IN_URIS = {"tracking URI": "urlPLANTED%2F77", "git remote": "glpat-remotePLANTED0011223344", "query": "queryPLANTED93"}
IN_DIFF = {"diff": "diffPLANTED1208"}
SECRETS = PLANTED | IN_URIS | IN_DIFF


class Runs(NamedTuple):
    """What the runs left: a folder, the tracking server's folder, and all that was printed."""

    folder: Path
    server: Path
    printed: str
    codes: dict[str, int]


def lace(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A ``lace`` of its own process, whose main file lies in a git checkout, as MLflow looks for it there."""
    environment = {**os.environ, **PLANTED, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "checkout/run.py"), *arguments]
    return subprocess.run(command, cwd=folder / "checkout", env=environment, capture_output=True, text=True)


def make_checkout(folder: Path) -> None:
    """A dirty checkout whose remote has a token in its address."""
    checkout = folder / "checkout"
    checkout.mkdir()
    (checkout / "run.py").write_text(
        "import sys\nfrom lace_lightning.cli.main import main\nif __name__ == '__main__': sys.exit(main())\n"
    )
    (checkout / "notes.yaml").write_text("nothing: 0\n")

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(checkout), *author, *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "start")
    git("remote", "add", "origin", f"https://oauth2:{IN_URIS['git remote']}@127.0.0.1/repo.git")
    planted = [f"client_secret: {IN_DIFF['diff']}", f"an innocent name: {PLANTED['HF_TOKEN']}"]
    (checkout / "notes.yaml").write_text("\n".join(planted) + "\n")


def sweep_file(folder: Path, uri: str) -> Path:
    path = folder / "inputs/sweep.yaml"
    tiny = {"trainer.max_steps": 2, "data.init_args.num_traces": 32, "trainer.accelerator": "cpu"}
    settings = {
        "name": "leaks",
        "stages": {"sft": {"configs": ["configs/demo/base.yaml", "configs/demo/sft.yaml"], "set": tiny}},
        "evaluation": {
            "configs": ["configs/sweeps/ground/doors_eval.yaml"],
            "set": {"benchmarks.doors.num_problems": 4},
        },
        "search": "list",
        "rows": {"base": {}},
        "output": str(folder / "out/sweep"),
        "tracking": {"uri": uri},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def synth_file(folder: Path, uri: str, url: str) -> Path:
    chat = {
        "class_path": "lace_lightning.synthesis.chats.CachedChat",
        "init_args": {
            "path": str(folder / "out/replies.sqlite"),
            "chat": {
                "class_path": "lace_lightning.synthesis.chats.OpenAIChat",
                "init_args": {
                    "model": "m", "base_url": url, "api_key_env": "TEACHER_API_KEY", "max_attempts": 2, "backoff": 0.01
                },
            },
        },
    }  # fmt: skip
    settings = {
        "folder": str(folder / "out/synth"),
        "task": {"class_path": "lace_lightning.verification.MathTask"},
        "teacher": {"class_path": "lace_lightning.synthesis.teachers.LanguageTeacher", "init_args": {"chat": chat}},
        "problems": {"source": str(write_problems(folder / "inputs/problems.jsonl", 3))},
        "sampling": {"solutions": 2, "max_attempts": 2},
        "assembly": {"num_threads": 2},
        "tracking_uri": uri,
    }
    path = folder / "inputs/synth.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("leaks")
    for name in ("inputs", "out", "server"):
        (folder / name).mkdir()
    make_checkout(folder)
    port = free_port()
    server = start_server(folder / "server", port)
    uri = f"http://me:{IN_URIS['tracking URI']}@127.0.0.1:{port}"
    base = ["--config=configs/demo/base.yaml", "--config=configs/demo/sft.yaml", "--trainer.accelerator=cpu"]
    tiny = ["--trainer.max_steps=2", "--data.init_args.num_traces=32", "--trainer.val_check_interval=2"]
    tiny += ["--data.init_args.num_problems=4", *logger_to(uri, folder)]
    commands = {
        "fit": ["fit", *base, *tiny],
        "crash": ["fit", *base, *tiny, "--model.init_args.init_from=[sk-openaiPLANTED88d1e2f3a4.ckpt]"],
        "mistake": ["fit", *base, f"--data.init_args.api_key={IN_DIFF['diff']}"],
        "no server": ["fit", *base, *logger_to(f"http://me:{IN_URIS['tracking URI']}@127.0.0.1:9", folder)],
        "sweep": ["sweep", str(sweep_file(folder, uri))],
        "eval": [
            "eval", "--config=configs/eval/puzzles.yaml", "--config=configs/eval/benchmarks/doors.yaml",
            "--sweeps.lace.num_threads=[2]", "--sweeps.vote.num_threads=[2]", "--reference=lace@2",
            "--benchmarks.doors.num_problems=4", f"--output={folder}/out/eval",
            f"--tracking.uri={uri}",
        ],
        "ui": ["ui", "--backend-store", f"{uri}/?api_key={IN_URIS['query']}"],
    }  # fmt: skip
    done = {}
    try:
        with chat_server() as chat:
            done["synth"] = lace(folder, "synth", f"--config={synth_file(folder, uri, chat.url)}")
            assert f"Bearer {PLANTED['TEACHER_API_KEY']}" in chat.keys
        done |= {name: lace(folder, *command) for name, command in commands.items()}
    finally:
        kill_server(server)
    printed = "\n".join(f"== {name}\n{run.stdout}{run.stderr}" for name, run in done.items())
    yield Runs(folder, folder / "server", printed, {name: run.returncode for name, run in done.items()})


def logger_to(uri: str, folder: Path) -> list[str]:
    return [f"--trainer.logger.init_args.tracking_uri={uri}", f"--trainer.logger.init_args.save_dir={folder}/out/runs"]


def everything(runs: Runs) -> Iterator[tuple[str, bytes]]:
    """(place, content) of all that the runs wrote, archives taken apart, and of what they printed."""
    yield "the terminal", runs.printed.encode()
    for folder in (runs.folder / "out", runs.server):
        for path in folder.rglob("*"):
            if path.is_file():
                yield str(path), str(path).encode() + path.read_bytes()
                if zipfile.is_zipfile(path):
                    archive = zipfile.ZipFile(path)
                    yield from ((f"{path}:{name}", archive.read(name)) for name in archive.namelist())


@pytest.mark.slow
def test_the_runs_did_what_they_should(runs):
    failed = {name for name, code in runs.codes.items() if code}
    assert failed == {"crash", "mistake", "no server"}, runs.printed
    files = [str(path.relative_to(runs.folder)) for path in runs.folder.rglob("*") if path.is_file()]
    for part in (
        "config.yaml",
        "stage.yaml",
        "evaluation.json",
        "viewer.html",
        "card.md",
        ".ckpt",
        "git.diff",
        "log.txt",
    ):
        assert any(file.endswith(part) for file in files), part
    database = (runs.server / "mlflow.db").read_bytes()
    for part in (b"mlflow.source.git.repoURL", b"127.0.0.1/repo.git", b"Repeat it", b"lace.kind"):
        assert part in database, part


@pytest.mark.slow
@pytest.mark.parametrize("name", SECRETS)
def test_a_planted_secret_is_in_no_file_no_database_and_no_output(runs, name):
    secret = SECRETS[name]
    spellings = {secret, base64.b64encode(f"me:{secret}".encode()).decode(), secret.replace("%2F", "/")}
    middle = secret[secret.index("PLANTED") - 3 : secret.index("PLANTED") + 9].replace("%2F", "")
    places = [place for place, content in everything(runs) if any(s.encode() in content for s in (*spellings, middle))]
    assert not places, (name, places)

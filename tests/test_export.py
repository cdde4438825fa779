"""What ``lace export`` writes is what was trained, loads with ``transformers`` alone, and is whole or absent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lace_lightning.export as exporting
from lace_lightning.adapter import read_exchange_config
from lace_lightning.checkpoints import RUN, TRAINED
from lace_lightning.cli.main import main
from lace_lightning.exchange import ExchangeConfig, Isolated
from lace_lightning.shards import frozen, split, write
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.tracking import MLflowLogger
from lace_lightning.whole_folder import whole_folder
from tests.helpers import wake
from tests.stage_helpers import LATTICE, NUM_THREADS, QWEN, UnevenDoors, spec

# ---------------------------------------------------------------- a run on disk


@dataclass(frozen=True)
class Run:
    """A run with random weights, in the folder layout of ``lace fit``."""

    folder: Path
    model: ThreadedLM

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoints" / "last.ckpt")

    def save(self, **more: Any) -> None:
        state = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        Path(self.checkpoint).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": state, TRAINED: sorted(state), **more}, self.checkpoint)


def made(folder: Path, exchange: ExchangeConfig = LATTICE, **options: Any) -> Run:
    named = {"class_path": f"lace_lightning.exchange.{type(exchange).__name__}", "init_args": asdict(exchange)}
    settings = {"architecture": QWEN, "exchange": named, "num_threads": NUM_THREADS, "layers": [0, 1], **options}
    model = {"spec": settings, "validation": {"max_new_tokens": 12}}
    data = {"task": {"class_path": "tests.stage_helpers.UnevenDoors"}, "num_threads": NUM_THREADS, "max_length": 24}
    config = {
        "model": {"class_path": "lace_lightning.modules.SupervisedFinetuning", "init_args": model},
        "data": {"class_path": "lace_lightning.datamodules.TraceData", "init_args": data},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(1)
    run = Run(folder, wake(spec(exchange, **options).build(UnevenDoors().tokenizer())).eval())
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter)
    run.save()
    return run


def in_shards(run: Run) -> Path:
    """The run's checkpoint as the processes of FSDP2 write it."""
    tensors, rest = split(torch.load(run.checkpoint, weights_only=True))
    folder = run.folder / "checkpoints" / "sharded.ckpt"
    write(tensors, frozen(rest), folder, "shards-1", None, is_first=True)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made(tmp_path / "run")


def plain_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


IDS = torch.tensor([[1, 5, 6, 7, 8, 5]])

# ---------------------------------------------------------------- what is in it

FRESH = """
import sys, torch
FOLDER, ids = sys.argv[1], torch.tensor([[1, 5, 6, 7, 8, 5]])
{plain}
assert "lace_lightning" not in sys.modules
torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.detach(), sys.argv[2])
print("GROUP")
{threaded}
torch.save(model(ids.expand(1, 3, -1)).detach(), sys.argv[3])
"""


def test_the_cards_own_lines_load_the_same_model_in_a_fresh_process(run: Run, tmp_path: Path) -> None:
    """The first lines with nothing but ``transformers``; both models give their logits exactly."""
    out = tmp_path / "out"
    assert main(["export", run.checkpoint, str(out)]) == 0
    plain, threaded = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    files = [tmp_path / "plain.pt", tmp_path / "threaded.pt"]
    script = FRESH.format(plain=plain, threaded=threaded)
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), *map(str, files)], capture_output=True, text=True, check=True
    )
    logits, group_logits = (torch.load(file, weights_only=True) for file in files)
    assert torch.equal(logits, plain_logits(run.model.backbone, IDS))
    assert torch.equal(group_logits, run.model(IDS.expand(1, NUM_THREADS, -1)))
    assert not torch.equal(group_logits[0, :1], logits), "the exchange does something"
    assert len(done.stdout.split("GROUP\n")[1].splitlines()) == NUM_THREADS


def test_a_checkpoint_in_shards_is_exported_as_the_same_files(run: Run, tmp_path: Path) -> None:
    for source, out in ((run.checkpoint, "file"), (str(in_shards(run)), "shards")):
        assert main(["export", source, str(tmp_path / out)]) == 0
    for name in ("model.safetensors", "exchange/exchange.safetensors", "config.json"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "shards" / name).read_bytes()


def test_lora_weights_are_merged_into_the_backbone(tmp_path: Path) -> None:
    run = made(tmp_path / "run", lora={"r": 2, "target_modules": "all-linear", "lora_alpha": 64})
    assert main(["export", run.checkpoint, str(tmp_path / "out")]) == 0
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "lora" in name]
    merged = plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), IDS)
    torch.testing.assert_close(merged, plain_logits(run.model.backbone, IDS), rtol=1e-4, atol=1e-4)
    with run.model.backbone.disable_adapter():
        assert (merged - plain_logits(run.model.backbone, IDS)).abs().max() > 0.1, "LoRA did nothing here"


def test_isolated_threads_have_an_exchange_to_load_too(tmp_path: Path) -> None:
    run = made(tmp_path / "run", exchange=Isolated())
    assert main(["export", run.checkpoint, str(tmp_path / "out")]) == 0
    config, layers = read_exchange_config(tmp_path / "out" / "exchange")
    model = ThreadedLM.from_pretrained(tmp_path / "out", config, NUM_THREADS, layers)
    model.load_exchange(tmp_path / "out" / "exchange")


def test_the_card_tells_what_the_model_is_and_how_it_did(run: Run, tmp_path: Path) -> None:
    (run.folder / "test_summary.json").write_text(json.dumps({"metrics": {"acc": 0.625, "expl": None}}))
    assert main(["export", run.checkpoint, str(tmp_path / "doors-lace")]) == 0
    card = (tmp_path / "doors-lace" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front
    shown = {
        "# doors-lace",
        "N = 3",
        "SupervisedFinetuning on UnevenDoors",
        '"scope": "aligned"',
        "| test/acc | 0.625 |",
    }
    assert [text for text in shown if text not in card] == []
    assert "expl" not in card and str(tmp_path) not in card


@pytest.mark.slow
def test_the_card_shows_what_mlflow_knows_of_the_weights(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    logger = MLflowLogger(save_dir=str(tmp_path / "runs"), system_seconds=0)
    logger.log_metrics({"val/acc": 0.25, "val/fmt": 0.5, "train/loss": 2.0})
    logger.log_weights(1, {})
    logger.finalize("success")
    run.save(**{RUN: logger.run_id})
    assert main(["export", run.checkpoint, str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert [text for text in ("| val/acc | 0.25 |", "| val/fmt | 0.5 |", str(logger.run_id)) if text not in card] == []
    assert "train/loss" not in card


def test_a_store_that_cannot_be_read_is_named_and_nothing_is_written(run: Run, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run.save(**{RUN: "0" * 32})
    assert main(["export", run.checkpoint, str(tmp_path / "out")]) == 2
    assert "mlflow.db" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- whole or absent


def test_an_earlier_export_is_replaced_only_with_the_flag(run: Run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["export", run.checkpoint, str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    wake(run.model, seed=9)
    run.save()
    assert main(["export", run.checkpoint, str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and (out / "model.safetensors").read_bytes() == before
    assert main(["export", run.checkpoint, str(out), "--overwrite"]) == 0
    exchange = load_file(out / "exchange" / "exchange.safetensors")
    assert all(torch.equal(exchange[name], value) for name, value in run.model.exchanges.state_dict().items())


def test_a_folder_that_is_no_export_is_never_replaced(run: Run, capsys) -> None:
    assert main(["export", run.checkpoint, str(run.folder), "--overwrite"]) == 2
    assert "is no export" in capsys.readouterr().err
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "config.yaml"]


def test_a_folder_that_a_killed_process_of_this_id_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """In containers the first process always has the same id."""
    left = tmp_path / f".out.{os.getpid()}.part"
    left.mkdir()
    (left / "half").touch()
    with whole_folder(tmp_path / "out") as unfinished:
        (unfinished / "whole").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


def test_a_failure_in_the_middle_leaves_the_earlier_export_and_nothing_else(
    run: Run, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    assert main(["export", run.checkpoint, str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_exchange", full)
    assert main(["export", run.checkpoint, str(out), "--overwrite"]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "foreign"])
def test_a_damaged_checkpoint_is_named_before_anything_is_written(
    run: Run, tmp_path: Path, damage: str, capsys
) -> None:
    path = Path(run.checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    new = {"flipped": bytes(content), "cut": bytes(content[: len(content) // 2]), "foreign": b"not a checkpoint"}
    path.write_bytes(new[damage])
    assert main(["export", run.checkpoint, str(tmp_path / "out")]) == 2
    assert str(path) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_config_asks_for_it(run: Run, tmp_path: Path, capsys) -> None:
    lone = tmp_path / "a" / "b" / "lone.ckpt"
    lone.parent.mkdir(parents=True)
    Path(run.checkpoint).rename(lone)
    assert main(["export", str(lone), str(tmp_path / "out")]) == 2
    assert "--config" in capsys.readouterr().err
    assert main(["export", str(lone), str(tmp_path / "out"), "--config", str(run.folder / "config.yaml")]) == 0


# ---------------------------------------------------------------- the hub


class Hub:
    """Stands in for ``huggingface_hub.HfApi``: knows one token, and keeps what is uploaded."""

    token: str | None = "hf_known"
    calls: list[tuple[str, Any]] = []

    def whoami(self) -> dict[str, str]:
        if self.token is None:
            raise huggingface_hub.errors.LocalTokenNotFoundError("no token")
        return {"name": "me"}

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", (repo, private, exist_ok)))
        return f"https://hub.example/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        self.calls.append(("upload", (repo_id, files)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.mark.parametrize("public", [False, True])
def test_push_makes_a_private_repository_unless_told_otherwise(run: Run, tmp_path: Path, hub, public, capsys) -> None:
    more = ["--public"] if public else []
    assert main(["export", run.checkpoint, str(tmp_path / "out"), "--push_to_hub", "me/doors", *more]) == 0
    [(_, created), (_, (repo, files))] = hub.calls
    assert created == ("me/doors", not public, True) and repo == "me/doors"
    assert len(files) == sum(path.is_file() for path in (tmp_path / "out").rglob("*"))
    assert {"README.md", "config.json", "model.safetensors", "exchange/exchange.safetensors"} <= files
    assert "https://hub.example/me/doors" in capsys.readouterr().out


@pytest.mark.parametrize(("repo", "token", "said"), [("me/doors", None, "hf auth login"), ("a b//c", "hf", "a b//c")])
def test_what_keeps_a_push_from_working_is_said_before_the_work(
    run: Run, tmp_path: Path, hub, repo: str, token: str | None, said: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(Hub, "token", token)
    assert main(["export", run.checkpoint, str(tmp_path / "out"), "--push_to_hub", repo]) == 2
    assert said in capsys.readouterr().err and hub.calls == [] and not (tmp_path / "out").exists()


def test_nothing_is_pushed_unless_asked_for(run: Run, tmp_path: Path, hub, capsys) -> None:
    assert main(["export", run.checkpoint, str(tmp_path / "out")]) == 0
    assert hub.calls == [] and "--push_to_hub" in capsys.readouterr().err
    assert main(["export", run.checkpoint, str(tmp_path / "other"), "--public"]) == 2

"""The shell around the stages: quick help, short errors, exit codes, shipped configs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lace_lightning.callbacks.graceful_stop import Interrupted
from lace_lightning.cli import stages
from lace_lightning.cli.main import STAGES, TOOLS, main
from lace_lightning.cli.shipped import SHIPPED, with_shipped_configs
from lace_lightning.modules.base import NonFiniteLossError
from lace_lightning.tracking import TrackingError

FIT = ["fit", "--config", "configs/demo/base.yaml", "--config", "configs/demo/sft.yaml", "--trainer.logger=false"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LACE_TRACEBACK", raising=False)
    return tmp_path


# ---------------------------------------------------------------- help


def test_help_names_every_command_and_leaves_heavy_packages_unimported():
    script = (
        "import sys\n"
        "from lace_lightning.cli.main import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in [*STAGES, *TOOLS])


@pytest.mark.parametrize("tool", ["init", "generate", "bench", "ui", "sync"])
def test_help_of_a_tool_leaves_torch_unimported(tool):
    script = (
        "import sys\n"
        "from lace_lightning.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tool, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: lace {tool}")


# ---------------------------------------------------------------- mistakes


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``lace`` says about a mistake: a short message, no traceback, no pages of usage, exit code 2."""
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if not line.startswith("Seed set to")]
    assert lines[0].startswith("lace: error: ") and "LACE_TRACEBACK=1" in lines[-1]
    assert len(lines) <= 6 and "usage:" not in message and "Traceback" not in message and "NoneType" not in message
    return message


@pytest.mark.parametrize(
    "options, told",
    [
        (["--trainer.max_stepz=3"], ["trainer.max_stepz"]),
        (["--model.init_args.spec.layerz=[1]"], ["layerz", "SupervisedFinetuning"]),
        (["--model.init_args.spec.dtype=int3"], ["spec.dtype", "bfloat16", "int3"]),
        (["--model.init_args.spec.exchange.class_path=lace_lightning.exchange.Telepathy"], ["Telepathy"]),
        (["--model.init_args.spec.exchange.init_args.width=5"], ["width=5", "heads=8"]),
        (["--data.init_args.batch_size=0"], ["batch_size=0: must be at least 1"]),
        (["--data.init_args.num_threads=3"], ["data.num_threads=3", "model.spec.num_threads=4", "same N"]),
        (["--data.init_args.traces=gone.jsonl"], ["gone.jsonl"]),
        (["--model.init_args.init_from=[gone.ckpt]"], ["gone.ckpt", "does not exist"]),
        (["--ckpt_path=gone.ckpt"], ["gone.ckpt"]),
        (["--trainer.accelerator=abacus"], ["accelerator='abacus'"]),
        (["--config=gone.yaml"], ["gone.yaml", "does not exist"]),
        (["--config=unknown.yaml"], ["trainer.max_stepz"]),
        (["--optimizer=torch.optim.SGD"], ["--optimizer"]),  # Lightning's own would silently replace model.optimizer
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_a_mistake_ends_as_one_message_that_names_option_and_value(options, told, capsys):
    Path("unknown.yaml").write_text("trainer: {max_stepz: 3}\n")
    message = error_of(capsys, *FIT, *options)
    assert all(part in message for part in told), message


def test_a_stage_without_model_and_data_says_what_is_missing(capsys):
    message = error_of(capsys, "fit")
    assert "data" in message and "model" in message


def test_an_unknown_command_is_named_beside_those_that_exist(capsys):
    assert main(["fitt"]) == 2
    message = capsys.readouterr().err
    assert "'fitt'" in message and all(name in message for name in [*STAGES, *TOOLS])


def test_lace_traceback_shows_where_a_mistake_was_found(monkeypatch):
    monkeypatch.setenv("LACE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="batch_size=0"):
        main([*FIT, "--data.init_args.batch_size=0"])


# ---------------------------------------------------------------- how a run ends


@pytest.mark.parametrize(
    "error",
    [NonFiniteLossError("lower lr"), TrackingError("start the server"), OSError("disk full"), ValueError("bad")],
)
def test_what_a_user_can_mend_is_one_message(error, monkeypatch, capsys):
    monkeypatch.setattr(stages, "build", raising(error))
    assert str(error) in error_of(capsys, "fit")


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, ZeroDivisionError, AssertionError])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(stages, "build", raising(error("a bug")))
    with pytest.raises(error, match="a bug"):
        main(["fit"])


def test_a_stopped_run_keeps_the_exit_code_of_its_signal(monkeypatch):
    monkeypatch.setattr(stages, "build", raising(Interrupted(143)))
    with pytest.raises(SystemExit) as end:
        main(["fit"])
    assert end.value.code == 143


def test_ctrl_c_before_the_run_has_begun_ends_quietly_with_130(monkeypatch, capsys):
    monkeypatch.setattr(stages, "build", raising(KeyboardInterrupt()))
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == ""


def test_a_demo_whose_folder_is_a_file_says_so(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert main(["demo", "--quick", "--folder", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"


def raising(error: BaseException):
    def build(arguments: object) -> None:
        raise error

    return build


# ---------------------------------------------------------------- shipped configs


def test_a_missing_config_is_the_shipped_one_and_a_present_one_wins():
    shipped = str(SHIPPED / "demo/base.yaml")
    asked = ["fit", "--config", "configs/demo/base.yaml", "--config=configs/demo/base.yaml"]
    assert with_shipped_configs(asked) == ["fit", "--config", shipped, f"--config={shipped}"]
    Path("configs/demo").mkdir(parents=True)
    Path("configs/demo/base.yaml").write_text("trainer: {max_steps: 1}\n")
    assert with_shipped_configs(asked) == asked


@pytest.mark.parametrize("argument", ["configs/demo/gone.yaml", "configs/demo", "demo/base.yaml", "--x=configs/y.yaml"])
def test_what_is_not_shipped_is_left_as_it_was_given(argument):
    assert with_shipped_configs([argument]) == [argument]


def test_init_copies_every_shipped_config_where_commands_then_find_it(in_empty_folder, monkeypatch, capsys):
    assert main(["init", "lab"]) == 0
    copied = files_under(in_empty_folder / "lab/configs")
    assert copied == files_under(SHIPPED) and "demo/base.yaml" in copied
    assert str(Path("lab/configs")) in capsys.readouterr().out
    monkeypatch.chdir("lab")
    assert with_shipped_configs(["configs/demo/base.yaml"]) == ["configs/demo/base.yaml"]


def test_init_leaves_what_exists_alone(in_empty_folder, capsys):
    mine = in_empty_folder / "configs/demo/base.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "configs exists already" in error_of(capsys, "init", ".")
    assert files_under(in_empty_folder / "configs") == {"demo/base.yaml": b"mine"}


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- what comes next

SAYS_NOTHING = {"ui"}
"""It runs until it is stopped."""


@pytest.mark.parametrize("command", [name for name in TOOLS if name not in SAYS_NOTHING])
def test_every_tool_has_something_to_say_on_what_comes_next(command):
    source = Path(import_module(TOOLS[command][0]).__file__).read_text()
    assert "say_next(" in source


def test_after_init_the_command_that_is_named_trains_with_the_copied_configs(capsys):
    assert main(["init", "my work"]) == 0
    printed = capsys.readouterr()
    assert "cd 'my work' && lace fit --config configs/demo/base.yaml" in printed.err and "next" not in printed.out
    assert Path("my work/configs/demo/base.yaml").is_file()


def test_a_plan_is_followed_by_the_command_that_runs_it(capsys):
    assert main(["sweep", "configs/sweeps/tiny.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err.endswith("  run it:\n    lace sweep configs/sweeps/tiny.yaml\n") and "next" not in printed.out

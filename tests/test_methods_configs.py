"""The comparison on Countdown: its configs agree, and its whole path needs neither MLflow nor math-verify."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml

from lace_lightning.cli.eval_config import parse, read_settings
from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.evaluation.methods import IndependentVote
from lace_lightning.evaluation.policy import ModelPolicy
from lace_lightning.puzzles import Countdown, CountdownDrills
from tests.test_methods_search import ALL

COUNTDOWN = SHIPPED / "countdown"
FILES = ["eval.yaml", "eval_causal.yaml", "eval_grpo.yaml"]


def load(name):
    return yaml.safe_load((COUNTDOWN / name).read_text())


@pytest.mark.parametrize("file", FILES)
def test_all_policies_have_the_backbone_and_the_exchange_that_were_trained(file):
    spec = load("base.yaml")["model"]["init_args"]["spec"]
    for name, policy in load(file)["policies"].items():
        own = policy["spec"]
        assert own["architecture"] == spec["architecture"], name
        if name.startswith("lace"):
            assert own["layers"] == spec["layers"] and own["num_threads"] == spec["num_threads"]
            scope = {"scope": "causal"} if name == "lace_causal" else {}
            assert own["exchange"] == {**spec["exchange"], "init_args": spec["exchange"]["init_args"] | scope}
        else:
            assert own["exchange"]["class_path"].endswith("Isolated")


def test_the_comparison_parses_and_a_method_is_there_at_every_budget(tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "problems.jsonl"
    weights.touch(), data.touch()
    names = [name for file in FILES for name in load(file)["policies"]]
    options = [f"--policies.{name}.init_from=[{weights}]" for name in names]
    settings = read_settings([str(COUNTDOWN / file) for file in FILES], [*options, f"--output={tmp_path}"])
    spec, _ = parse(settings)
    assert spec.reference in spec.methods and isinstance(spec.methods["vote@8"], IndependentVote)
    assert spec.methods["vote@8"].num_threads == 8 and spec.methods["tree@1"].samples == 1
    assert {type(method) for method in spec.methods.values()} == {type(method) for method in ALL.values()}


def test_every_prompt_of_the_comparison_leaves_room_for_the_reply():
    """The longest: seven earlier attempts at refinement, however long a model made them."""
    puzzle, settings = Countdown(tries=1), load("eval.yaml")
    assert all(policy["max_length"] == load("drills.yaml")["data"]["init_args"]["max_length"]
               for policy in settings["policies"].values())  # fmt: skip
    problem = puzzle.problem(0, "test")
    text = puzzle.follow_up("refine", problem, ["7 " * 99] * 7)
    length = len(puzzle.template.encode_prompt(text, puzzle.tokenizer()))
    policy = settings["policies"]["single"]
    assert length + policy["decoding"]["max_new_tokens"] <= policy["max_length"]
    assert max(settings["sweeps"]["refine"]["rounds"]) - 1 <= CountdownDrills().attempts == 7


WITHOUT_PACKAGES = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in ("mlflow", "math_verify") else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Hiding, sys.meta_path)
from lace_lightning.cli.main import main
"""


@pytest.mark.slow
def test_neither_mlflow_nor_math_verify_is_needed(tmp_path):
    """A step of training and an evaluation with its report, where both are missing."""
    fit = [f"--config=configs/countdown/{name}.yaml" for name in ("base", "sft", "drills", "small")]
    fit += ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    fit += ["--data.init_args.batch_size=2", f"--trainer.default_root_dir={tmp_path}"]
    run = ["--config=configs/eval/puzzles.yaml", "--config=configs/eval/benchmarks/countdown.yaml"]
    run += [f"--output={tmp_path / 'eval'}", "--benchmarks.countdown.num_problems=1"]
    for arguments in (["fit", *fit], ["eval", *run], ["eval", "report", str(tmp_path / "eval")]):
        script = f"{WITHOUT_PACKAGES}sys.exit(main({arguments!r}))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=SHIPPED.parent)
        assert done.returncode == 0, done.stdout + done.stderr
    missing = subprocess.run([sys.executable, "-c", f"{WITHOUT_PACKAGES}import mlflow"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in missing.stderr


@pytest.mark.parametrize("name", ALL)
def test_methods_run_with_a_model_and_are_independent_of_the_batch(name, tiny_policy):
    problems = [tiny_policy.task.problem(number, "test") for number in range(3)]
    outcomes = ALL[name].solve(tiny_policy, problems, [5, 6, 7])
    (alone,) = ALL[name].solve(tiny_policy, problems[1:2], [6])
    assert outcomes[1].chosen == alone.chosen
    tokens = [[passage.thread.token_ids for passage in outcome.passages] for outcome in (outcomes[1], alone)]
    assert tokens[0] == tokens[1]
    assert (outcomes[1].cost.tokens, outcomes[1].cost.columns) == (alone.cost.tokens, alone.cost.columns)


@pytest.fixture(scope="module")
def tiny_policy() -> ModelPolicy:
    """Random weights."""
    from lace_lightning.decoding import DecodingSpec
    from lace_lightning.model_spec import ModelSpec

    torch.manual_seed(0)
    task = Countdown(tries=1, max_number=20, max_value=40)
    tokenizer = task.tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = {"model_type": "qwen3", **sizes, "num_key_value_heads": 2, "head_dim": 16}
    model = ModelSpec(architecture=architecture).build(tokenizer).eval()
    return ModelPolicy(model, task, tokenizer, DecodingSpec(max_new_tokens=24), max_length=256)

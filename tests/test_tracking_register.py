"""A registered model gives the decoder's groups in a process that knows nothing but MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lace_lightning.decoding import DecodingSpec, GroupDecoder, Sampling, group_seed, to_groups
from lace_lightning.exchange import Isolated
from lace_lightning.puzzles import Doors
from lace_lightning.tracking import MLflowLogger, TrackingError
from lace_lightning.tracking.group_model import group_values, input_row
from lace_lightning.tracking.register import register
from tests.helpers import wake
from tests.stage_helpers import spec

NEW_TOKENS = 12
TASK = {"class_path": "lace_lightning.puzzles.Doors", "init_args": {"doors": [4], "tries": [1]}}
PUZZLE = Doors(doors=(4,), tries=(1,))
PROBLEMS = [PUZZLE.problem(index, "test") for index in range(3)]
LOAD = """
import json, sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print("GROUPS" + json.dumps(model.predict(json.loads(sys.argv[3]), params={"seed": 5})))
"""


def decoded(model, problem, seed):
    """The reference: the decoder, told everything by hand."""
    tokenizer, template = model.tokenizer, PUZZLE.template
    opening = template.encode_opening(tokenizer)
    rules = (NEW_TOKENS, [tokenizer.eos_token_id], tokenizer.pad_token_id, opening)
    decoder = GroupDecoder(model, Sampling(temperature=0.9), *rules)
    seeds = [group_seed("validation", seed, problem.id)]
    prompt = template.encode_prompt(problem.text, tokenizer)
    rollout = decoder.decode([prompt], 3, seeds, PUZZLE.environment([problem], 3, tokenizer))
    return group_values(to_groups(rollout, [problem], seeds, tokenizer, template)[0])


@pytest.mark.parametrize("exchange", ["lattice", pytest.param("isolated", marks=pytest.mark.slow)])
def test_a_registered_model_gives_the_decoders_groups_in_a_fresh_process(tmp_path: Path, exchange: str) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    model = (spec() if exchange == "lattice" else spec(Isolated())).build(PUZZLE.tokenizer())
    wake(model).eval()
    logger = MLflowLogger("registry", "trained", uri, save_dir=str(tmp_path), system_seconds=0)
    logger.log_weights(1, {})
    logger.finalize("success")
    decoding = DecodingSpec(NEW_TOKENS, Sampling(temperature=0.9))
    version, model_uri = register(model, TASK, decoding, 32, PROBLEMS[0], "doors", str(logger.run_id), uri)
    rows = json.dumps([input_row(problem) for problem in PROBLEMS])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, uri, model_uri, rows],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout.partition("GROUPS")[2])
    assert groups == [decoded(model, problem, 5) for problem in PROBLEMS]
    assert len({json.dumps(thread) for group in groups for thread in group["threads"]}) > 3
    registered = MlflowClient(uri).get_model_version("doors", version)
    assert registered.run_id == logger.run_id
    files = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert "input_example.json" in files and "model.safetensors" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]


def test_a_run_that_the_store_does_not_know_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    model = spec().build(PUZZLE.tokenizer())
    with pytest.raises(TrackingError, match="lace sync"):
        register(model, TASK, DecodingSpec(), 32, PROBLEMS[0], "doors", "0" * 32, f"sqlite:///{tmp_path}/mlflow.db")

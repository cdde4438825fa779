"""Every shipped sweep and paper recipe is planned to the last key; a typo fails before anything runs."""

from __future__ import annotations

import re

import pytest

from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.stages import resolve
from lace_lightning.sweep.plan import plan, plan_trial
from lace_lightning.sweep.points import point_of
from lace_lightning.sweep.reading import read_sweep
from lace_lightning.sweep.spec import SweepError

FILES = sorted(path.name for path in (SHIPPED / "sweeps").glob("*.yaml"))
SMALL = [file for file in FILES if (SHIPPED / "sweeps" / file.replace(".yaml", "_paper.yaml")).exists()]
TOPICS = {
    "exchange",
    "layers",
    "width",
    "gate",
    "rotary",
    "prompt",
    "shuffle",
    "threads",
    "stages",
    "data",
    "assessment",
}
TOPICS |= {"selection", "objective"}


def trials_of(sweep):
    if sweep.search != "tpe":
        return plan(sweep)
    first = {name: axis.range[0] if axis.range else axis.values[0] for name, axis in sweep.axes.items()}
    return [plan_trial(sweep, point_of(sweep, first), seed) for seed in sweep.seeds]


def test_every_topic_has_a_small_sweep_and_one_of_the_papers_size():
    assert {file.removesuffix(".yaml") for file in SMALL} == TOPICS


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=[pytest.mark.slow] if "paper" in file else []) for file in FILES]
)
def test_every_sweep_is_planned_with_every_key_known(file):
    sweep = read_sweep(str(SHIPPED / "sweeps" / file))
    trials = trials_of(sweep)
    labels = list(dict.fromkeys(trial.point.label for trial in trials))
    assert len(trials) == len(sweep.seeds) * len(labels)
    assert sweep.name.replace("-", "_") == file.removesuffix(".yaml").replace("-", "_")
    digests = {trial.digest for trial in trials}
    assert len(digests) == len(trials), "two rows are the same"


@pytest.mark.parametrize("file", ["exchange.yaml", "width.yaml", "objective.yaml"])
def test_a_typo_in_any_place_is_found_before_anything_runs(file, tmp_path):
    text = (SHIPPED / "sweeps" / file).read_text()
    text = re.sub(r"extends: (\S+)", lambda found: f"extends: {SHIPPED}/sweeps/{found[1]}", text)
    places = ["exchange.init_args.s", "init_args.width", "init_args.advantage_scale", "AccuracyReward}"]
    broken = [text.replace(place, place.replace("a", "aa", 1), 1) for place in places if place in text]
    broken.append(text + "\nmetrik: acc\n")
    broken.append(text + "\nmetric: akk\n")
    for number, sweep in enumerate(broken):
        path = tmp_path / f"{number}.yaml"
        path.write_text(sweep)
        with pytest.raises(SweepError):
            plan(read_sweep(str(path)))


@pytest.mark.parametrize("stage", ["cpt", "sft", "grpo"])
@pytest.mark.parametrize("size", [(), ("qwen3_4b",)], ids=["1.7B", "4B"])
def test_paper_recipes_parse_as_they_are(stage, size):
    configs = [f"--config={SHIPPED}/paper/{name}.yaml" for name in ("base", stage, *size)]
    settings = resolve(configs)
    spec = settings["model"]["init_args"]["spec"]
    name = "Qwen/Qwen3-4B" if size else "Qwen/Qwen3-1.7B"
    assert spec["backbone"] == settings["data"]["init_args"]["tokenizer"] == name
    assert spec["gradient_checkpointing"] and spec["compile"] and settings["trainer"]["precision"] == "bf16-mixed"

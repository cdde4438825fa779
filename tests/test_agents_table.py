"""The callback that reports players' scores, in a real validation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from lightning import Trainer

from lace_lightning.agents.game import Standing, Status
from lace_lightning.agents.scores import SCORES
from lace_lightning.callbacks import GameScoreTable
from lace_lightning.modules import SupervisedFinetuning
from lace_lightning.puzzles import Doors
from tests.stage_helpers import DECODING, spec, trace_data


class ScoredDoors(Doors):
    """Doors whose problems say how many points there are."""

    def problem(self, index, split="train"):
        problem = super().problem(index, split)
        return replace(problem, facts=problem.facts | {"max_score": 1})


@pytest.mark.parametrize(("do", "phase"), [("validate", "val"), ("test", "test")])
def test_scores_of_all_groups_are_printed_and_written(do, phase, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lace_lightning.agents.scores.last_standing", lambda observations: Standing(1, Status.WON))
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[GameScoreTable()], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    module = SupervisedFinetuning(spec(), validation=DECODING)
    getattr(trainer, do)(module, trace_data(ScoredDoors()), verbose=False)
    printed = capsys.readouterr().out
    assert f"{phase} scores" in printed and all(name in printed for name in SCORES)
    written = json.loads((tmp_path / "checkpoints" / f"{phase}_scores.json").read_text())
    assert written["num_groups"] == 10
    assert [written["metrics"][name] for name in ("best_score", "mean_score", "win_rate", "lost")] == [1, 1, 1, 0]

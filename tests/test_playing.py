"""Playing problems: how many are decoded at once and what training's precision is have no say they should not have."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from lace_lightning.checkpoints import CheckpointError
from lace_lightning.decoding import DecodingSpec, play_groups, playing
from lace_lightning.modules import LatticeGRPO
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import wake
from tests.stage_helpers import MAX_LENGTH, UnevenDoors, fitted, problem_data, quiet_trainer, saved, spec

TASK = UnevenDoors()
PROBLEMS = [TASK.problem(index, "test") for index in range(5)]
DECODING = DecodingSpec(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> ThreadedLM:
    torch.manual_seed(0)
    return wake(spec().build(TASK.tokenizer()))


def play(model: ThreadedLM, decoding: DecodingSpec):
    return play_groups(model, TASK, TASK.tokenizer(), PROBLEMS, range(5), decoding, MAX_LENGTH)


@pytest.mark.parametrize("at_once", [1, 2, 4, 99])
def test_groups_decoded_a_few_at_a_time_are_those_decoded_together(model, at_once):
    groups, rollout = play(model, DECODING)
    few, joined = play(model, replace(DECODING, groups_at_once=at_once))
    assert len({len(TASK.template.encode_prompt(p.text, TASK.tokenizer())) for p in PROBLEMS}) > 1, "unequal prompts"
    assert [[t.token_ids for t in group.threads] for group in few] == [
        [t.token_ids for t in group.threads] for group in groups
    ]
    assert joined.prompt_length == rollout.prompt_length
    columns = min(joined.input_ids.shape[-1], rollout.input_ids.shape[-1])  # beyond the last token nothing stands
    for name in ("input_ids", "attention_mask", "forced"):
        assert torch.equal(getattr(joined, name)[..., :columns], getattr(rollout, name)[..., :columns])
    torch.testing.assert_close(joined.logprobs[..., :columns], rollout.logprobs[..., :columns])
    assert torch.equal(joined.finished, rollout.finished)


def test_a_group_ends_at_its_own_limit_whatever_room_others_have(model):
    """A longer prompt leaves fewer columns; a thread that would have ended behind them has not."""
    lengths = [len(TASK.template.encode_prompt(p.text, TASK.tokenizer())) for p in PROBLEMS]
    rooms = [max(lengths) - length for length in lengths]
    assert len(set(rooms)) > 1
    ends_late = False
    for room in range(1, 9):
        max_length = max(lengths) + room
        together, rollout = play_groups(model, TASK, TASK.tokenizer(), PROBLEMS, range(5), DECODING, max_length)
        for index, (problem, group) in enumerate(zip(PROBLEMS, together, strict=True)):
            [alone], _ = play_groups(model, TASK, TASK.tokenizer(), [problem], [index], DECODING, max_length)
            assert [t.token_ids for t in group.threads] == [t.token_ids for t in alone.threads]
            assert [t.finished for t in group.threads] == [t.finished for t in alone.threads]
            ends_late |= any(t.finished == "length" for t in group.threads)
    assert ends_late


def test_under_autocast_weights_of_its_dtype_decode_and_the_models_own_stay(model):
    halved = spec().build(TASK.tokenizer())
    halved.load_state_dict(model.state_dict())
    for parameter in halved.parameters():
        parameter.data = parameter.data.bfloat16()
    groups, rollout = play(halved, DECODING)
    with torch.autocast("cpu", torch.bfloat16):
        found, under_autocast = play(model, DECODING)
    assert [[t.token_ids for t in group.threads] for group in found] == [
        [t.token_ids for t in group.threads] for group in groups
    ]
    assert torch.equal(under_autocast.logprobs, rollout.logprobs)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_copy_that_decodes_under_autocast_is_gone_afterwards(model, monkeypatch):
    """With it its engine's caches: on a GPU they are larger than what is trained."""
    copies, cast = [], playing._cast

    def noted(*arguments):
        made = cast(*arguments)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(playing, "_cast", noted)
    with torch.autocast("cpu", torch.bfloat16):
        play(model, DECODING)
    assert len(copies) == 1 and copies[0]() is None


def test_a_resumed_run_may_decode_fewer_groups_at_once_but_not_longer_ones(tmp_path):
    def stage(**options):
        return LatticeGRPO(spec(), rollout=replace(DECODING, **options), groups_per_problem=2)

    first = stage()
    fitted(first, problem_data(), max_steps=1)
    path = str(saved(first, tmp_path / "grpo.ckpt"))
    quiet_trainer(max_steps=2).fit(stage(groups_at_once=1), problem_data(), ckpt_path=path)
    with pytest.raises(CheckpointError, match="max_new_tokens was 12 and is 11"):
        quiet_trainer(max_steps=2).fit(stage(max_new_tokens=11), problem_data(), ckpt_path=path)


def test_no_groups_at_once_is_refused():
    with pytest.raises(ValueError, match="groups_at_once=0 must be at least 1"):
        DecodingSpec(groups_at_once=0)

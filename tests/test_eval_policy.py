"""Models as policies: the groups of `lace validate`, costs that add up, and gates at every token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lace_lightning.decoding import DecodingSpec, Sampling
from lace_lightning.evaluation.policy import ModelPolicy, PolicySpec
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules import SupervisedFinetuning
from tests.helpers import wake
from tests.stage_helpers import (
    MAX_LENGTH,
    QWEN,
    UnevenDoors,
    fitted,
    quiet_trainer,
    saved,
    spec,
    trace_data,
)

TASK = UnevenDoors()
PROBLEMS = [TASK.problem(index, "test") for index in range(5)]
SEEDS = list(range(5))
DECODING = DecodingSpec(max_new_tokens=12)


@pytest.fixture(scope="module")
def policy() -> ModelPolicy:
    torch.manual_seed(0)
    made = PolicySpec(spec(), decoding=DECODING, max_length=MAX_LENGTH, device="cpu").build(TASK)
    wake(made.model)
    return made


def test_a_policy_plays_the_groups_that_validation_samples(tmp_path):
    module = SupervisedFinetuning(spec(), validation=DECODING)
    data = trace_data()
    fitted(module, data, max_steps=1)
    checkpoint = saved(module, tmp_path / "sft.ckpt")
    quiet_trainer().validate(module, data, verbose=False)
    ours = PolicySpec(spec(), [str(checkpoint)], decoding=DECODING, max_length=MAX_LENGTH, device="cpu").build(TASK)
    theirs = module.sample(PROBLEMS, DECODING, SEEDS)
    played = [thread for group in ours.play(PROBLEMS, SEEDS).groups for thread in group.threads]
    sampled = [thread for group in theirs.groups for thread in group.threads]
    for one, other in zip(played, sampled, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert replace(one, logprobs=()) == replace(other, logprobs=())


def test_a_group_is_the_same_alone_as_in_a_batch(policy):
    together = policy.play(PROBLEMS, SEEDS)
    for index in range(5):
        (alone,) = policy.play(PROBLEMS[index : index + 1], SEEDS[index : index + 1]).groups
        ids = [thread.token_ids for thread in together.groups[index].threads]
        assert [thread.token_ids for thread in alone.threads] == ids


def test_costs_are_counted_from_the_groups(policy):
    played = policy.play(PROBLEMS, SEEDS)
    for group, cost in zip(played.groups, played.costs, strict=True):
        prompt = TASK.template.encode_prompt(group.problem.text, policy.tokenizer)
        assert cost.prompt_tokens == len(prompt) == policy.prompt_tokens(group.problem.text)
        assert cost.tokens == sum(len(thread.token_ids) for thread in group.threads)
        assert cost.columns == 1 + max(max(thread.columns) for thread in group.threads) <= MAX_LENGTH - len(prompt)
    assert len({cost.seconds for cost in played.costs}) == 1 and played.costs[0].seconds > 0


def test_width_length_and_text_can_be_asked_for(policy):
    played = policy.play(PROBLEMS[:2], SEEDS[:2], num_threads=2, texts=["tries tries", "doors"], max_new_tokens=3)
    assert [len(group.threads) for group in played.groups] == [2, 2]
    assert [cost.prompt_tokens for cost in played.costs] == [4, 3]  # with the beginning of the sequence and a colon
    assert all(cost.columns <= 3 for cost in played.costs)
    assert [group.problem for group in played.groups] == PROBLEMS[:2]
    assert policy.play([], []).groups == []


def test_a_prompt_that_leaves_no_room_is_refused(policy):
    with pytest.raises(ValueError, match=r"about problem .* has 32 tokens, .* max_length=24: raise max_length"):
        policy.play(PROBLEMS[:1], SEEDS[:1], texts=["tries " * 30])


def test_gates_are_those_that_decoding_opened(policy):
    """Of a trained-like exchange, at every token, against one reading of each group by itself."""
    keeping = ModelPolicy(policy.model, TASK, policy.tokenizer, DECODING, MAX_LENGTH, keep_gates=True)
    played = keeping.play(PROBLEMS, SEEDS)
    threads = [thread for group in played.groups for thread in group.threads]
    gates = [inspection.gates for inspection in keeping.take_inspections(threads)]
    assert keeping.take_inspections(threads) == [None] * len(threads)  # forgotten
    for index, group in enumerate(played.groups):
        prompt = TASK.template.encode_prompt(group.problem.text, policy.tokenizer)
        length = len(prompt) + max(thread.columns[-1] for thread in group.threads) + 1
        ids, mask = torch.zeros(1, 3, length, dtype=torch.long), torch.zeros(1, 3, length, dtype=torch.bool)
        ids[..., : len(prompt)], mask[..., : len(prompt)] = torch.tensor(prompt), True
        for n, thread in enumerate(group.threads):
            at = torch.tensor(thread.columns) + len(prompt)
            ids[0, n, at], mask[0, n, at] = torch.tensor(thread.token_ids), True
        mean = torch.stack([r.gate for r in policy.model.read(ids, mask, len(prompt))]).mean(0)
        for n, thread in enumerate(group.threads):
            own = gates[index * 3 + n]
            assert len(own) == thread.num_tokens
            torch.testing.assert_close(torch.tensor(own), mean[0, n, list(thread.columns)], atol=1e-5, rtol=0)


def test_a_model_without_an_exchange_has_no_gates():
    bare = ModelSpec(architecture=QWEN, num_threads=2)
    made = PolicySpec(bare, decoding=DECODING, max_length=MAX_LENGTH, device="cpu").build(TASK, keep_gates=True)
    played = made.play(PROBLEMS[:1], [0])
    inspections = made.take_inspections(played.groups[0].threads)
    assert [inspection.gates for inspection in inspections] == [None, None]


def test_exchange_weights_of_a_folder_are_loaded(tmp_path, policy):
    policy.model.save_exchange(tmp_path)
    made = PolicySpec(spec(), exchange=str(tmp_path), device="cpu").build(TASK)
    for name, tensor in policy.model.exchanges.state_dict().items():
        assert torch.equal(made.model.exchanges.state_dict()[name], tensor)


def test_greedy_policies_ignore_seeds(policy):
    greedy = ModelPolicy(
        policy.model, TASK, policy.tokenizer, DecodingSpec(max_new_tokens=4, sampling=Sampling(0)), MAX_LENGTH
    )
    first, second = (greedy.play(PROBLEMS[:1], [seed], num_threads=1).groups[0] for seed in (1, 2))
    assert first.threads == second.threads


def test_each_group_stops_where_its_own_prompt_leaves_no_more_room(policy):
    """Prompts of several lengths in one batch, and threads that would go on."""
    played = policy.play(PROBLEMS, SEEDS, max_new_tokens=100)
    room = [MAX_LENGTH - cost.prompt_tokens for cost in played.costs]
    assert len(set(room)) > 1 and all(cost.columns <= most for cost, most in zip(played.costs, room, strict=True))
    assert any(cost.columns == most for cost, most in zip(played.costs, room, strict=True))

"""Several processes train with the numbers of one: on Gloo and CPUs here, on NCCL and GPUs in benchmarks/ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lace_lightning.dealing import deal
from lace_lightning.policy_loss import PolicyLoss
from lace_lightning.sharding import whole
from lace_lightning.threaded_lm import num_predictable
from lace_lightning.traces.collate import TraceCollator
from tests.helpers import EXCHANGES, ragged_groups, tiny_lm
from tests.ranks_worker import main
from tests.stage_helpers import MAX_LENGTH, NUM_THREADS, UnevenDoors

TOLERANCE = 1e-5
"""On losses, rewards and metrics, absolute and relative, in float32: sums are taken in another order."""


# ---------------------------------------------------------------- sharing out


@settings(deadline=None, max_examples=200)
@given(
    problems=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    copies=st.integers(2, 8),
    processes=st.integers(1, 9),
)
def test_groups_are_dealt_once_and_evenly_in_number_and_length(
    problems: list[int], copies: int, processes: int
) -> None:
    lengths = [length for length in problems for _ in range(copies)]
    hands = deal(lengths, processes)
    assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    counts = [Counter(lengths[index] for index in hand) for hand in hands]
    for length in set(lengths):
        assert max(count[length] for count in counts) - min(count[length] for count in counts) <= 1
    sums = [sum(lengths[index] for index in hand) for hand in hands]
    assert max(sums) - min(sums) <= max(lengths)


def test_a_stand_in_is_its_example_without_targets() -> None:
    task = UnevenDoors()
    collate = TraceCollator(task.tokenizer(), task.template, NUM_THREADS, MAX_LENGTH, jitter=3)
    trace = task.trace(0, NUM_THREADS)
    batch, served = collate([(trace, 7), (trace, ~7)]), collate([(trace, 7)])
    assert torch.equal(batch.input_ids[:1], batch.input_ids[1:]) and served.unforced.any() and served.written.any()
    assert torch.equal(batch.attention_mask[:1], batch.attention_mask[1:])
    assert not batch.unforced[1].any() and not batch.written[1].any()
    assert torch.equal(batch.unforced[:1], served.unforced)


@pytest.mark.parametrize("average", ["grpo", "dr_grpo", "dapo"])
def test_parts_of_a_batch_weigh_their_tokens_as_the_whole_does(average: str) -> None:
    loss = PolicyLoss(average=average)
    mask = torch.rand(5, 3, 7) < 0.6
    expected = loss.token_weights(mask, 9)
    parts = mask[:4], mask[4:], mask[5:]  # the last process has nothing
    counts: list[list[torch.Tensor]] = [[], [], []]
    for part, noted in zip(parts, counts, strict=True):
        loss.token_weights(part, 9, lambda count, noted=noted: noted.append(count) or count)
    totals = [sum(of_all) for of_all in zip(*counts, strict=True)]
    found = [loss.token_weights(part, 9, lambda count: totals[0]) for part in parts]
    torch.testing.assert_close(torch.cat(found), expected)


def test_parts_of_a_batch_add_up_to_its_mean_loss() -> None:
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    targets = tokens.attention_mask.clone()
    targets[0, :, 8:] = False  # unequal parts
    count = num_predictable(tokens.attention_mask, targets)

    def loss(rows: slice, count: torch.Tensor | None = None) -> torch.Tensor:
        parts = tokens.input_ids[rows], tokens.attention_mask[rows], targets[rows]
        return model.mean_nll(*parts, tokens.prompt_length, count)

    expected = loss(slice(None))
    torch.testing.assert_close(loss(slice(0, 1), count) + loss(slice(1, 2), count), expected)
    assert not torch.isclose((loss(slice(0, 1)) + loss(slice(1, 2))) / 2, expected)  # what a mean of means would be
    nothing = torch.zeros_like(targets[:1])
    assert model.mean_nll(tokens.input_ids[:1], tokens.attention_mask[:1], nothing, 0, count) == 0


def test_weights_that_nobody_sharded_are_whole_already() -> None:
    model = tiny_lm()
    before = list(model.parameters())
    with whole(model):
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


# ---------------------------------------------------------------- the same numbers


def run(folder: Path, stage: str, strategy: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process of a run noted: several under torchrun or, without a strategy, this one alone."""
    folder.mkdir()
    options = {"processes": 2} | options
    if not strategy:
        main(stage, "auto", str(folder), options | {"processes": 1})
        return [json.loads((folder / "0.json").read_text())]
    size = str(options["processes"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size]
    worker = ["-m", "tests.ranks_worker", stage, strategy, str(folder), json.dumps(options)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *worker], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(options["processes"])]


def assert_same_numbers(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    assert alone["batches"] and alone["validation"]
    for rank in ranks:
        for then, now in zip(alone["batches"], rank["batches"], strict=True):
            assert now == pytest.approx(then, rel=TOLERANCE, abs=TOLERANCE)
        assert rank["validation"] == pytest.approx(alone["validation"], rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)


SIZE = 9
"""Examples in an epoch: batches of 4, 4 and 1, the last of which leaves one of two processes without an example."""


SMALL_STEPS = {"average": "grpo", "kl_weight": 0.1, "passes": 2, "minibatches": 3, "microbatch_size": 1, "steps": 18}
"""Three batches of six optimizer steps: some minibatches leave a process without a group."""


UNEVEN = {"average": "dr_grpo", "groups_per_problem": 2, "batch": 3, "size": 4, "processes": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "stage", "options"),
    [
        ("ddp", "sft", {}),
        ("ddp", "grpo", SMALL_STEPS),
        ("fsdp", "sft", {"checkpointing": True}),
        pytest.param("fsdp", "sft", {"exchange": "top-k"}, marks=pytest.mark.cluster),
        pytest.param("fsdp", "sft", {"exchange": "shared-gated"}, marks=pytest.mark.cluster),
        pytest.param("ddp", "cpt", {}, marks=pytest.mark.cluster),
        pytest.param("ddp", "pretrain", {"exchange": "isolated"}, marks=pytest.mark.cluster),
        pytest.param("ddp", "grpo", UNEVEN, marks=pytest.mark.cluster),
        pytest.param("fsdp", "cpt", {}, marks=pytest.mark.cluster),
        pytest.param("fsdp", "grpo", SMALL_STEPS, marks=pytest.mark.cluster),
    ],
)
def test_several_processes_have_the_numbers_of_one_also_with_a_ragged_last_batch(
    tmp_path: Path, strategy: str, stage: str, options: dict[str, Any]
) -> None:
    options = {"size": SIZE} | options
    (alone,) = run(tmp_path / "alone", stage, "", options)
    ranks = run(tmp_path / "ranks", stage, strategy, options)
    assert_same_numbers(alone, ranks)
    if stage != "grpo":
        return
    for number, groups in enumerate(alone["groups"]):
        shares = [rank["groups"][number] for rank in ranks]
        assert Counter(groups) == Counter(group for share in shares for group in share)
        lengths = [sum(rank["lengths"][number]) for rank in ranks]
        assert max(lengths) - min(lengths) <= max(alone["lengths"][number])


@pytest.mark.slow
@pytest.mark.cluster
def test_parameters_that_a_batch_does_not_reach_stop_nobody_under_ddp(tmp_path: Path) -> None:
    ranks = run(tmp_path / "ranks", "sft", "ddp", {"size": SIZE, "unreached": 1})
    assert len(ranks[0]["batches"]) == 5 and ranks[0]["batches"] == ranks[1]["batches"]

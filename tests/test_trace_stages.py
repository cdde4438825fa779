"""What the stages that learn from traces minimise, what of the model they change, and their validation."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lace_lightning.decoding import Group, Sampling
from lace_lightning.exchange import Isolated
from lace_lightning.metrics.names import GROUP_METRICS, TAG_METRICS
from lace_lightning.modules import (
    BackbonePretraining,
    ContinuedPretraining,
    SupervisedFinetuning,
    ThreadedModule,
)
from lace_lightning.modules.base import NonFiniteLossError
from lace_lightning.traces.batch import TraceBatch
from lace_lightning.traces.template import Segment
from tests.helpers import wake
from tests.stage_helpers import (
    DECODING,
    FAST,
    MAX_LENGTH,
    NUM_THREADS,
    QWEN,
    SHORTEST_PROMPT,
    Recorder,
    assert_same,
    fitted,
    quiet_trainer,
    ready,
    spec,
    trace_data,
    values,
)

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def first_batch(module: ThreadedModule) -> TraceBatch:
    return next(iter(module.data.train_dataloader()))


def reference_loss(module: ThreadedModule, batch: TraceBatch, learned: set[Segment]) -> float:
    """Mean cross-entropy of the tokens of some segments, from full logits, one token at a time."""
    assert module.model is not None
    logits = module.model(batch.input_ids, batch.attention_mask, batch.prompt_length)
    losses = []
    for b, n in product(range(len(logits)), range(NUM_THREADS)):
        columns = batch.attention_mask[b, n].nonzero().flatten().tolist()
        for before, column in zip(columns[:-1], columns[1:], strict=True):  # the first token is predicted by nothing
            if Segment(batch.segments[b, n, column].item()) in learned:
                row = logits[b, n, before].double()
                losses.append((row.exp().sum().log() - row[batch.input_ids[b, n, column]]).item())
    return sum(losses) / len(losses)


OWN = {Segment.THOUGHT, Segment.ASSESSMENT, Segment.TAG}


@pytest.mark.parametrize(
    ("stage", "learned"),
    [
        (BackbonePretraining, OWN | {Segment.PROMPT}),
        (ContinuedPretraining, OWN | {Segment.PROMPT}),
        (SupervisedFinetuning, OWN),
    ],
)
def test_loss_is_the_cross_entropy_of_the_stages_targets(stage: type[ThreadedModule], learned: set[Segment]) -> None:
    module = ready(stage(spec()), trace_data(jitter=2))
    wake(module.model)
    batch = first_batch(module)
    assert set(batch.segments.unique().tolist()) == set(Segment)  # holes, prompts and verdicts are all there
    assert module.training_step(batch, 0).item() == pytest.approx(reference_loss(module, batch, learned), abs=1e-5)


@pytest.mark.parametrize("stage", [BackbonePretraining, ContinuedPretraining, SupervisedFinetuning])
def test_what_an_environment_wrote_is_never_a_target(stage: type[ThreadedModule]) -> None:
    module = ready(stage(spec()), trace_data())
    batch = first_batch(module)
    forced = batch.segments == Segment.ENVIRONMENT
    assert forced.any() and not module.targets(batch)[forced].any()


def changed_names(module: ThreadedModule, **options) -> set[str]:
    """The parameters that some steps of training change; all others stay the same bit for bit."""
    start = ready(module, trace_data())
    wake(start.model)
    before = values(module)
    fitted(module, trace_data(), max_steps=3, **options)
    return {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}


def names(module: ThreadedModule, *parts: str) -> set[str]:
    return {name for name, _ in module.named_parameters() if any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("stage", "options", "parts"),
    [
        (ContinuedPretraining, {}, ["exchanges."]),
        (SupervisedFinetuning, {"learn": "exchange"}, ["exchanges."]),
        (SupervisedFinetuning, {"learn": "lora", "lora": LORA}, ["exchanges.", "lora_"]),
        (SupervisedFinetuning, {"learn": "all"}, [""]),
        (BackbonePretraining, {}, [""]),
    ],
)
def test_each_stage_changes_what_it_says_and_nothing_else(stage, options: dict, parts: list[str]) -> None:
    module = stage(spec(lora=options.pop("lora", None)), FAST, **options)
    assert changed_names(module) == names(module, *parts)


def test_gradients_are_clipped_in_mixed_precision_too() -> None:
    """Lightning refuses to clip for optimizers that unscale gradients by themselves, and takes fused ones for such."""

    class Norm(Recorder):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.outputs += [torch.cat(gradients).norm().item()] if gradients else []

    norm = Norm()
    fitted(
        SupervisedFinetuning(spec(), FAST),
        trace_data(),
        precision="bf16-mixed",
        gradient_clip_val=0.01,
        callbacks=[norm],
    )
    assert [n for n in norm.outputs if isinstance(n, float)] == pytest.approx([0.01], rel=1e-3)


def test_pretraining_lowers_its_loss() -> None:
    recorder = Recorder()
    module = BackbonePretraining(spec(Isolated(), num_threads=1), FAST)
    fitted(module, trace_data(num_threads=1, batch_size=16, num_traces=320), max_steps=20, callbacks=[recorder])
    losses = [output["loss"].item() for output in recorder.outputs]
    assert losses[0] > math.log(10) and losses[-1] < losses[0] / 2  # from guessing among 25 words


def test_a_stage_without_anything_to_learn_says_so() -> None:
    with pytest.raises(ValueError, match="ContinuedPretraining has nothing to train: exchange Isolated"):
        fitted(ContinuedPretraining(spec(Isolated())), trace_data())


def test_lora_without_settings_names_the_option() -> None:
    with pytest.raises(ValueError, match="learn=lora needs model.spec.lora"):
        SupervisedFinetuning(spec(), learn="lora")


def test_different_numbers_of_threads_are_named_before_the_model_is_built() -> None:
    module = SupervisedFinetuning(spec(num_threads=5))
    with pytest.raises(ValueError, match=rf"data.num_threads={NUM_THREADS} and model.spec.num_threads=5 differ"):
        fitted(module, trace_data())
    assert module.model is None


# ---------------------------------------------------------------- a loss that is not finite


class Poison(Callback):
    """Makes one weight infinite before a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.model.backbone.lm_head.weight[0, 0] = math.inf
            self.before = values(pl_module)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights() -> None:
    poison = Poison(step=2)
    module = SupervisedFinetuning(spec(), FAST)
    with pytest.raises(NonFiniteLossError, match=r"the loss is (nan|inf) at step 2\. .*lower model.optimizer.lr"):
        fitted(module, trace_data(), max_steps=5, callbacks=[poison])
    assert_same(values(module), poison.before)


# ---------------------------------------------------------------- validation


class Sampled(Callback):
    """The groups of every evaluation batch."""

    def __init__(self) -> None:
        self.groups: list[Group] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.groups += outputs["sampled"].groups

    on_test_batch_end = on_validation_batch_end

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.groups += outputs.groups


def validated(module: ThreadedModule, stage: str = "validate", **options) -> tuple[list[Group], dict[str, float]]:
    """The groups that a stage validates on, and what it logged; the same weights each time."""
    sampled = Sampled()
    trainer = quiet_trainer(callbacks=[sampled], limit_val_batches=1.0)
    torch.manual_seed(0)
    [logged] = getattr(trainer, stage)(module, trace_data(**options), verbose=False)
    return sampled.groups, dict(logged)


def sft(**validation) -> SupervisedFinetuning:
    return SupervisedFinetuning(spec(), validation=replace(DECODING, **validation))


def tokens(groups: list[Group]) -> list[list[tuple[int, ...]]]:
    return [[thread.token_ids for thread in group.threads] for group in groups]


@pytest.mark.parametrize("max_length", [MAX_LENGTH, 12])
def test_groups_of_validation_do_not_depend_on_its_batch_size(max_length: int) -> None:
    """Prompts have 6 to 9 tokens: in 12 columns every group has another limit."""
    alone, together = (validated(sft(), val_batch_size=size, max_length=max_length)[0] for size in (1, 7))
    assert [group.problem.id for group in alone] == [f"doors-test-{i}" for i in range(10)]
    assert tokens(alone) == tokens(together)
    assert [[t.finished for t in group.threads] for group in alone] == [
        [t.finished for t in group.threads] for group in together
    ]


def test_groups_keep_within_max_length_and_max_new_tokens() -> None:
    for max_length in (MAX_LENGTH, 12):
        groups, _ = validated(sft(), val_batch_size=10, max_length=max_length)
        used = [max(max(thread.columns) for thread in group.threads) + 1 for group in groups]
        room = [min(DECODING.max_new_tokens, max_length - SHORTEST_PROMPT - index % 4) for index in range(10)]
        assert all(columns <= most for columns, most in zip(used, room, strict=True))
        assert sum(columns == most for columns, most in zip(used, room, strict=True)) > 5  # untrained threads ramble


def test_groups_of_validation_follow_its_seed() -> None:
    first, second, third = (tokens(validated(sft(seed=seed))[0]) for seed in (0, 0, 1))
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))


def test_validation_takes_another_number_of_threads() -> None:
    groups, logged = validated(sft(num_threads=5))
    assert {len(group.threads) for group in groups} == {5}
    assert 0 <= logged["val/fmt"] <= 1


def test_sampling_settings_of_validation_are_used() -> None:
    """The most probable token: every thread of a fresh model, whose exchange does nothing yet, proposes the same."""
    groups, _ = validated(sft(sampling=Sampling(temperature=0.0)))
    assert all(len({thread[:2] for thread in threads}) == 1 for threads in tokens(groups))


@pytest.mark.parametrize(("stage", "family"), [("validate", "tags/"), ("test", "test/tags/")])
def test_evaluation_logs_the_metrics_of_the_paper(stage: str, family: str) -> None:
    groups, logged = validated(sft(), stage)
    prefix = "val/" if stage == "validate" else "test/"
    assert set(logged) == {f"{prefix}{name}" for name in GROUP_METRICS} | {f"{family}{name}" for name in TAG_METRICS}
    assert logged[f"{prefix}tokens"] == pytest.approx(sum(t.num_tokens for g in groups for t in g.threads) / 10)


def test_predictions_are_the_groups_of_validation() -> None:
    module, predicted = sft(), Sampled()
    groups, _ = validated(module)
    quiet_trainer(callbacks=[predicted]).predict(module, trace_data(), return_predictions=False)
    assert tokens(predicted.groups) == tokens(groups)


def test_validation_leaves_training_alone() -> None:
    """Same weights after training with and without validation, dropout included."""
    dropout = spec(architecture={**QWEN, "attention_dropout": 0.3})
    ends = []
    for limit in (0, 1.0):
        torch.manual_seed(0)
        module = SupervisedFinetuning(dropout, FAST, DECODING)
        fitted(module, trace_data(), max_steps=3, limit_val_batches=limit, val_check_interval=1)
        ends.append(values(module))
    assert_same(*ends)

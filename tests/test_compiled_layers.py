"""Compiled decoder layers: same numbers, few graphs however many layers and lengths, and nothing else compiled."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from lace_lightning import compiled_layers
from lace_lightning.compiled_layers import compile_layers
from lace_lightning.exchange import LatticeAttentionConfig
from lace_lightning.modules import SupervisedFinetuning
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES, Tokens, ragged_groups, random_ids, tiny_lm
from tests.stage_helpers import FAST, Recorder, fitted, spec, trace_data


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The graphs that are compiled; traced and differentiated like any, but run without Inductor's code."""
    seen: list[object] = []

    def compiler(graph: object, example: object) -> Callable[..., object]:
        seen.append(graph)
        return lookup_backend("aot_eager")(graph, example)

    compiled: dict[Callable[..., object], Callable[..., object]] = {}

    def compile_once(forward: Callable[..., object]) -> Callable[..., object]:
        return compiled.setdefault(forward, torch.compile(forward, backend=compiler, fullgraph=True))

    monkeypatch.setattr(compiled_layers, "_compiled", compile_once)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def groups_of(columns: int) -> Tokens:
    tokens = ragged_groups()
    extra = torch.ones(2, 3, columns - tokens.input_ids.shape[-1], dtype=torch.bool)
    ids = torch.cat([tokens.input_ids, random_ids(*extra.shape)], dim=-1)
    return Tokens(ids, torch.cat([tokens.attention_mask, extra], dim=-1), tokens.prompt_length)


def loss_and_gradients(model: ThreadedLM, tokens: Tokens) -> list[Tensor]:
    model.zero_grad()
    loss = model.mean_nll(tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        *(EXCHANGES[name] for name in ("aligned-others", "same-step", "top-k", "shared-slots")),
        # By name: "auto" changes its mind within these lengths.
        *(LatticeAttentionConfig(scope="causal", width=16, heads=2, backend=backend) for backend in ("sdpa", "flash")),
    ],
    ids=lambda config: f"{type(config).__name__}-{getattr(config, 'scope', '')}-{getattr(config, 'backend', '')}",
)
def test_all_layers_and_lengths_share_few_graphs_and_keep_their_numbers(graphs, config):
    """One graph with and one without exchange, for the first length and once more for all others."""
    model = tiny_lm(config, layers=(1, 2, 3))
    batches = [groups_of(columns) for columns in (13, 14, 15, 18, 23)]
    expected = [loss_and_gradients(model, batch) for batch in batches]
    compile_layers(model.backbone)
    for batch, true in zip(batches, expected, strict=True):
        assert_equal(loss_and_gradients(model, batch), true)
    assert 0 < len(graphs) <= 4


def test_compiled_layers_recompute_activations_as_before(graphs):
    model, tokens = tiny_lm(EXCHANGES["causal"]).train(), ragged_groups()
    expected = loss_and_gradients(model, tokens)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(model.backbone)
    assert_equal(loss_and_gradients(model, tokens), expected)
    assert len(graphs) == 2


def test_decoding_and_reading_stay_uncompiled(graphs):
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    compile_layers(model.backbone)
    with torch.no_grad():
        model.read(tokens.input_ids, tokens.attention_mask, tokens.prompt_length)
        model.backbone.generate(tokens.input_ids[:, 0], max_new_tokens=3, do_sample=False, use_cache=True)
    assert not graphs


def test_a_copied_model_runs_its_own_compiled_layers(graphs):
    """GRPO's reference model is a copy: run with the policy's layers it would follow the policy."""
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    compile_layers(model.backbone)
    reference = copy.deepcopy(model)
    before = tokens.logits(reference)
    assert graphs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(tokens.logits(reference), before)
    assert not torch.equal(tokens.logits(model), before)


def test_a_stage_trains_compiled_as_it_does_otherwise(graphs):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        recorder = Recorder()
        module = SupervisedFinetuning(spec(compile=compiled), FAST)
        fitted(module, trace_data(), max_steps=3, callbacks=[recorder])
        losses.append([output["loss"].item() for output in recorder.outputs])
        assert bool(graphs) == compiled and not any("forward" in name for name in module.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(set(losses[0])) == 3

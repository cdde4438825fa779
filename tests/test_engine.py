"""The fast engine: the plain engine's rollouts wherever it decodes, and a reason wherever it does not."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lace_lightning.decoding import Engine, GroupDecoder, Rollout, Sampling, make_decoder, playing
from lace_lightning.engine import obstacle, weights
from lace_lightning.exchange import ExchangeConfig, Isolated, LatticeAttentionConfig
from lace_lightning.modules import DecodingSpec, SupervisedFinetuning
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES, tiny_backbone, tiny_lm, wake
from tests.stage_helpers import quiet_trainer, spec, trace_data
from tests.test_decoding import EOS, PAD, PROMPTS, eventful

CLOSE = 1e-5
FULL = {"layer_types": ["full_attention"] * 4, "use_sliding_window": False, "sliding_window": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),  # norms of queries and keys, heads of another width than hidden / heads
    "qwen2": ("qwen2", FULL),  # biases
    "llama": ("llama", {}),  # tied embeddings
    "llama-mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),  # rotary tables with a factor
    "mistral": ("mistral", {"sliding_window": None}),
}
LEFT = ("shared", "shared-slots", "shared-gated")
"""Exchanges that act within the backbone's own attention."""
TAKEN = {"isolated": Isolated(), **{n: c for n, c in EXCHANGES.items() if not c.reads_prompt and n not in LEFT}}


def model_of(base: str, changes: dict[str, Any], exchange: ExchangeConfig) -> ThreadedLM:
    """A model on a changed configuration, with nothing at a start value that would hide a mistake."""
    config = tiny_backbone(base).config
    config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return wake(ThreadedLM(backbone, exchange, 3, (1, 2)).eval())


@cache
def body(name: str, exchange: str = "causal") -> ThreadedLM:
    """Shared by all tests: read it, never change it."""
    return model_of(*BODIES[name], TAKEN[exchange])


def assert_same(found: Rollout, expected: Rollout) -> None:
    for name in ("input_ids", "attention_mask", "forced", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.prompt_length == expected.prompt_length
    assert (found.logprobs - expected.logprobs).abs().max() < CLOSE


def decoded(model: ThreadedLM, engine: Engine, **sampling: Any) -> Rollout:
    return GroupDecoder(model, Sampling(**sampling), 9, EOS, PAD, engine=engine).decode(PROMPTS, 3, [4, 5, 6])


# ---------------------------------------------------------------- fast = plain


@pytest.mark.parametrize("exchange", TAKEN)
@pytest.mark.parametrize("name", BODIES)
def test_the_fast_engine_decodes_what_the_plain_one_does(name, exchange):
    """Tokens, flags and log-probabilities, with forced tokens, waits at the barrier, early ends and padded prompts."""
    model = body(name, exchange)
    assert_same(eventful(model, "fast"), eventful(model, "plain"))


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}]
)
def test_the_fast_engine_draws_by_the_same_rules(sampling):
    model = body("qwen3")
    assert_same(eventful(model, "fast", **sampling), eventful(model, "plain", **sampling))


def test_the_fast_engine_follows_weights_that_are_trained():
    model = model_of(*BODIES["qwen3"], TAKEN["causal"])
    before = decoded(model, "fast")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = decoded(model, "fast")
    assert_same(after, decoded(model, "plain"))
    assert before.logprobs.shape != after.logprobs.shape or not torch.allclose(before.logprobs, after.logprobs)


def test_the_fast_engine_decodes_a_few_columns_at_a_time():
    model = body("llama")
    whole = GroupDecoder(model, Sampling(), 9, EOS, PAD, engine="fast")
    decoding = whole.start(PROMPTS, 3, [4, 5, 6])
    for columns in (1, 4, 100):
        decoding.advance(columns)
    assert decoding.is_over()
    assert_same(decoding.rollout(), whole.decode(PROMPTS, 3, [4, 5, 6]))


# ---------------------------------------------------------------- who is refused


def with_lora() -> ThreadedLM:
    from peft import LoraConfig, get_peft_model

    backbone = get_peft_model(tiny_backbone("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    return ThreadedLM(backbone, TAKEN["causal"], 3, (1, 2))  # type: ignore[arg-type]


def mixed(model: ThreadedLM) -> ThreadedLM:
    model.exchanges.double()
    return model


def lattice(**options: Any) -> LatticeAttentionConfig:
    return LatticeAttentionConfig(**{"width": 64, "heads": 2, **options})


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[Callable[[], ThreadedLM], str]] = {
    "family": (lambda: tiny_lm(TAKEN["causal"], "gemma2", "eager"), "not gemma2"),
    "adapter": (with_lora, "no plain nn.Linear"),
    "o-bias": (lambda: model_of("llama", {"attention_bias": True}, Isolated()), "biases"),
    "mlp-bias": (lambda: model_of("llama", {"mlp_bias": True}, Isolated()), "biases"),
    "window": (lambda: tiny_lm(TAKEN["causal"], "qwen2"), "sliding window"),
    "mistral-window": (lambda: tiny_lm(TAKEN["causal"], "mistral"), "sliding window"),
    "activation": (lambda: model_of("llama", {"hidden_act": "gelu"}, Isolated()), "activation is gelu"),
    "rotary": (lambda: model_of("llama", {"rope_parameters": DYNAMIC}, Isolated()), "depend on the length .dynamic"),
    "dtype": (lambda: mixed(tiny_lm(TAKEN["causal"], "llama")), "differ in dtype"),
    "prompt": (lambda: tiny_lm(EXCHANGES["on-prompt"]), "on the prompt"),
    "shared": (lambda: tiny_lm(EXCHANGES["shared-slots"]), "the backbone's own attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_fast_engine_cannot_decode_is_refused_with_its_reason_and_left_to_the_plain_one(case):
    make, reason = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=f"engine='fast' cannot decode with this model: .*{reason}.*auto or plain"):
        GroupDecoder(model, Sampling(), 5, EOS, PAD, engine="fast")
    if case != "dtype":  # torch refuses to multiply these
        assert_same(decoded(model, "auto"), decoded(model, "plain"))


WIDE = {"head_dim": 16, "hidden_size": 64}


@pytest.mark.parametrize(
    "changes, exchange, reason",
    [
        (WIDE, lattice(), None),
        (WIDE, Isolated(), None),
        ({}, lattice(), "backbone's heads are 12 wide"),
        ({"head_dim": 8}, Isolated(), "backbone's heads are 8 wide"),
        (WIDE, lattice(width=16), "lattice's heads are 8 wide"),
        (WIDE, lattice(width=96), "lattice's heads are 48 wide"),
        (WIDE, EXCHANGES["same-step"], "know LatticeAttention, not SameStepExchange"),
        (WIDE, EXCHANGES["top-k"], "know LatticeAttention, not ConfidentAttention"),
        (WIDE, lattice(gate="none"), "need a gate"),
    ],
)
def test_kernels_have_their_own_reasons_on_cuda(changes, exchange, reason, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: name)
    model = model_of("qwen3", changes, exchange)
    assert obstacle(model) is None
    found = obstacle(model, "cuda")
    assert found is None if reason is None else reason in (found or "")


def test_kernels_need_triton(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    model = model_of("qwen3", WIDE, lattice())
    assert obstacle(model) is None and "triton, which is not installed" in (obstacle(model, "cuda") or "")


def test_kernels_need_a_triton_with_gluon(monkeypatch):
    def find(name):
        if name != "triton":
            raise ModuleNotFoundError(name)
        return name

    monkeypatch.setattr(weights, "find_spec", find)
    assert "Gluon (3.6 or newer)" in (obstacle(model_of("qwen3", WIDE, lattice()), "cuda") or "")


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match="engine='warp' is unknown.*auto, fast, plain"):
        GroupDecoder(body("qwen3"), Sampling(), 5, EOS, PAD, engine="warp")  # type: ignore[arg-type]


# ---------------------------------------------------------------- in a stage


@pytest.mark.parametrize("engine", ["plain", "fast", "auto"])
def test_stages_decode_on_the_engine_that_their_settings_name(engine, monkeypatch):
    made = []
    monkeypatch.setattr(playing, "make_decoder", lambda *args: made.append(make_decoder(*args)) or made[-1])
    decoding = DecodingSpec(max_new_tokens=6, engine=engine)
    quiet_trainer(limit_val_batches=1).validate(SupervisedFinetuning(spec(), validation=decoding), trace_data())
    assert made and all(decoder._is_fast == (engine != "plain") for decoder in made)

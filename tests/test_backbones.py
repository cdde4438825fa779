"""Backbones: what carries an exchange, what cannot and says why, and what must not disturb it."""

import copy
import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lace_lightning.backbone import BackboneError, default_layers
from lace_lightning.exchange import Isolated, LatticeAttentionConfig, SameStepConfig
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import (
    BACKBONES,
    BODIES,
    EXCHANGES,
    Tokens,
    ragged_groups,
    random_ids,
    reference_lattice_attention,
    tiny_backbone,
    tiny_lm,
    wake,
)


def loss_and_gradients(model: ThreadedLM, tokens: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logprobs = model.token_logprobs(
        tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length
    )
    loss = -logprobs.sum() / tokens.attention_mask.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- what it lives with


@pytest.mark.parametrize("exchange", ["causal", "same-step"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_keeps_loss_and_gradients(backbone, reentrant, exchange):
    model, tokens = tiny_lm(EXCHANGES[exchange], backbone, "eager").train(), ragged_groups()
    loss, gradients = loss_and_gradients(model, tokens)
    model.backbone.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames this method; torch would rather have non-reentrant
        model.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed_loss, checkpointed = loss_and_gradients(model, tokens)
    assert torch.equal(checkpointed_loss, loss)
    assert checkpointed.keys() == gradients.keys()
    assert any(name.startswith("exchanges") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("exchange", ["causal", "aligned-others", "same-step"])
def test_a_compiled_backbone_is_one_graph_and_keeps_the_exchange(exchange):
    torch._dynamo.reset()
    model, tokens = tiny_lm(EXCHANGES[exchange]), ragged_groups()
    expected = tokens.logits(model)
    without = tokens.logits(ThreadedLM(model.backbone))
    decoder = model.backbone.get_decoder()
    decoder.forward = torch.compile(decoder.forward, backend="aot_eager", fullgraph=True)
    for shift in range(2):  # the second call meets a new Lattice, with other numbers in it
        longer = Tokens(tokens.input_ids.roll(shift, 0), tokens.attention_mask.roll(shift, 0), tokens.prompt_length)
        torch.testing.assert_close(longer.logits(model).roll(-shift, 0), expected, rtol=1e-5, atol=1e-4)
    assert (expected - without)[tokens.attention_mask].abs().max() > 1e-2
    torch._dynamo.reset()


@pytest.mark.parametrize("exchange", ["causal", "same-step"])
def test_a_compiled_backbone_has_the_same_gradients(exchange):
    torch._dynamo.reset()
    model, tokens = tiny_lm(EXCHANGES[exchange]), ragged_groups()
    loss, gradients = loss_and_gradients(model, tokens)
    decoder = model.backbone.get_decoder()
    decoder.forward = torch.compile(decoder.forward, backend="aot_eager", fullgraph=True)
    compiled_loss, compiled = loss_and_gradients(model, tokens)
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch._dynamo.reset()


@pytest.mark.parametrize("backbone, attn", BODIES)
def test_bfloat16_models_are_the_float32_models_within_rounding(backbone, attn):
    exact = tiny_lm(EXCHANGES["causal"], backbone, attn)
    rounded = ThreadedLM(copy.deepcopy(exact.backbone).bfloat16(), EXCHANGES["causal"], layers=exact.layers).eval()
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    rounded.exchanges.load_state_dict(exact.exchanges.state_dict())
    exact.backbone.load_state_dict(rounded.backbone.state_dict())
    exact.exchanges.load_state_dict(rounded.exchanges.state_dict())
    tokens = ragged_groups()
    real = tokens.attention_mask
    expected, found = tokens.logits(exact)[real], tokens.logits(rounded)[real]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("exchange", ["causal", "same-step"])
def test_autocast_trains_float32_exchanges(exchange):
    model, tokens = tiny_lm(EXCHANGES[exchange]).train(), ragged_groups()
    loss, gradients = loss_and_gradients(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_loss, rounded = loss_and_gradients(model, tokens)
    assert abs(rounded_loss - loss) < 0.05 * loss
    for name, gradient in gradients.items():
        assert rounded[name].dtype == torch.float32
        cosine = torch.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.9, f"{name}: {cosine:.3f}"


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["qv", "all-linear"])
@pytest.mark.parametrize("lora_first", [True, False], ids=["lora-then-lace", "lace-then-lora"])
@pytest.mark.parametrize("exchange", ["causal", "same-step"])
def test_lora_on_the_backbone_leaves_the_exchange_alone_and_acting(exchange, lora_first, targets):
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    plain = tiny_lm(EXCHANGES[exchange])
    tokens = ragged_groups()
    torch.manual_seed(8)
    if lora_first:
        model = ThreadedLM(get_peft_model(tiny_backbone(), lora), EXCHANGES[exchange], layers=plain.layers).eval()
        model.exchanges.load_state_dict(plain.exchanges.state_dict())
    else:
        model = tiny_lm(EXCHANGES[exchange])
        model.backbone = get_peft_model(model.backbone, lora).eval()
    assert model.exchanges.state_dict().keys() == plain.exchanges.state_dict().keys()
    assert not any("lora" in name for name, _ in model.exchanges.named_modules())
    assert all(parameter.requires_grad for parameter in model.exchange_parameters())
    with_lora = tokens.logits(model)
    with model.backbone.disable_adapter():
        torch.testing.assert_close(tokens.logits(model), tokens.logits(plain), rtol=1e-5, atol=1e-4)
    assert (with_lora - tokens.logits(plain)).abs().max() > 1e-2
    silenced = tokens.logits(ThreadedLM(model.backbone))
    assert (with_lora - silenced)[tokens.attention_mask].abs().max() > 1e-2
    _, gradients = loss_and_gradients(model, tokens)
    trained = {name.split(".")[0] for name in gradients}
    assert trained == {"backbone", "exchanges"}
    assert all("lora" in name for name in gradients if name.startswith("backbone"))


def test_tied_embeddings_stay_tied():
    model = tiny_lm(EXCHANGES["causal"], "llama")
    assert model.backbone.get_output_embeddings().weight is model.backbone.get_input_embeddings().weight
    names = [name for name, _ in model.named_parameters()]
    assert "backbone.lm_head.weight" not in names
    _, gradients = loss_and_gradients(model, ragged_groups())
    assert gradients["backbone.model.embed_tokens.weight"].any()


@pytest.mark.parametrize("backbone, attn", BODIES)
def test_the_backbone_saves_as_the_plain_model_it_is(backbone, attn, tmp_path):
    model = tiny_lm(EXCHANGES["causal"], backbone, attn)
    model.backbone.save_pretrained(tmp_path)
    assert "lace_" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model.backbone).__name__]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attn, dtype=torch.float32).eval()
    assert type(plain) is type(model.backbone) and plain.config._attn_implementation == attn
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model.backbone(input_ids=ids, use_cache=False).logits)
    assert plain.state_dict().keys() == model.backbone.state_dict().keys()


def test_from_pretrained_reads_a_folder(tmp_path):
    backbone, tokenizer = tiny_backbone(), word_tokenizer()
    backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = ThreadedLM.from_pretrained(tmp_path, EXCHANGES["causal"], num_threads=2, dtype=torch.float32)
    assert model.num_threads == 2 and model.layers == [2]
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        ids = random_ids(1, 2, 5)
        assert torch.equal(model.eval()(ids)[0], backbone(input_ids=ids[0]).logits)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "one", "two"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


# ---------------------------------------------------------------- several models at once


def test_two_models_in_one_process_do_not_disturb_each_other():
    tokens = ragged_groups()
    first = tiny_lm(EXCHANGES["causal"], "qwen3")
    before = tokens.logits(first)
    second = tiny_lm(EXCHANGES["same-step"], "gemma3", "eager")
    expected_second = tokens.logits(second)
    assert torch.equal(tokens.logits(first), before)
    assert torch.equal(tokens.logits(second), expected_second)
    bare = tiny_backbone("gemma3", "eager")
    with torch.no_grad():
        ids = random_ids(2, 9)
        assert torch.equal(bare(input_ids=ids).logits, second.backbone(input_ids=ids).logits)


@pytest.mark.parametrize("exchange", ["causal", "same-step"])
def test_wrapping_a_backbone_again_replaces_the_exchange_instead_of_doubling_it(exchange):
    """Isolated and exchanging models may share one backbone."""
    tokens = ragged_groups()
    once = tiny_lm(EXCHANGES[exchange])
    expected = tokens.logits(once)
    isolated = ThreadedLM(once.backbone, Isolated()).eval()
    again = ThreadedLM(once.backbone, EXCHANGES[exchange], layers=once.layers).eval()
    again.exchanges.load_state_dict(once.exchanges.state_dict())
    assert torch.equal(tokens.logits(again), expected)
    assert torch.equal(tokens.logits(once), expected)
    bare = ThreadedLM(tiny_backbone(), Isolated()).eval()
    assert torch.equal(tokens.logits(isolated), tokens.logits(bare))


def test_a_deep_copy_acts_like_the_original():
    model, tokens = tiny_lm(EXCHANGES["same-step"]), ragged_groups()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.exchanges["1"].up.weight.zero_()
        twin.exchanges["2"].up.weight.zero_()
    before = tokens.logits(model)
    assert (tokens.logits(twin) - before)[tokens.attention_mask].abs().max() > 1e-2
    assert torch.equal(tokens.logits(model), before)


# ---------------------------------------------------------------- placement and counts


@pytest.mark.parametrize(
    "num_layers, expected", [(28, [14, 16, 18, 20, 22, 24, 26]), (4, [2]), (5, [2, 4]), (2, [1]), (1, [0])]
)
def test_default_placement_is_every_second_layer_from_the_middle(num_layers, expected):
    assert default_layers(num_layers) == expected


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1], [0, 9]])
def test_layers_that_do_not_exist_are_named(layers):
    with pytest.raises(BackboneError, match=rf"layers=\{str(layers)[:-1]}\].*between 0 and 3"):
        ThreadedLM(tiny_backbone(), EXCHANGES["causal"], layers=layers)


def test_only_the_named_layers_carry_a_block_and_take_effect():
    tokens, outputs = ragged_groups(), []
    for layers in ([0], [3], [0, 3]):
        model = tiny_lm(EXCHANGES["causal"], layers=tuple(layers))
        assert sorted(model.exchange_at) == layers
        outputs.append(tokens.logits(model))
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[2])


def test_extra_parameters_are_counted_and_the_default_stays_below_one_per_cent_of_qwen3_1_7b():
    def count(width: int, attention_width: int) -> int:  # down, qkv, gate with bias, up
        return attention_width * width + 3 * width * width + (2 * width + 1) * width + width * attention_width

    model = tiny_lm(EXCHANGES["causal"])
    backbone = sum(p.numel() for p in tiny_backbone().parameters())
    assert model.parameter_counts() == {"backbone": backbone, "exchange": 2 * count(16, 48)}
    config = transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        large = ThreadedLM(AutoModelForCausalLM.from_config(config), LatticeAttentionConfig(scope="causal"))
    counts = large.parameter_counts()
    assert counts["exchange"] == 7 * count(128, 2048)
    assert counts["exchange"] / counts["backbone"] == pytest.approx(0.0025, abs=2e-4)  # LACE.md §3: 0.25 %


# ---------------------------------------------------------------- gates and shares through the model


def test_read_reports_every_lattice_layer_as_the_reference_does():
    """The input of each block is caught on its way; the reference then says what its gates and shares must be."""
    config = EXCHANGES["causal"]
    model, tokens = tiny_lm(config), ragged_groups()
    inputs = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args: inputs.update({args[2]: args[0].double()}))
        for block in model.exchanges.values()
    ]
    readings = model.read(tokens.input_ids, tokens.attention_mask, tokens.prompt_length)
    for hook in hooks:
        hook.remove()
    assert [reading.layer_idx for reading in readings] == [1, 2]
    visible = tokens.attention_mask[..., tokens.prompt_length :]
    own = torch.arange(visible.shape[1])
    for reading in readings:
        assert torch.equal(reading.visible, visible)
        block = model.exchanges[str(reading.layer_idx)]
        weights = {name: p.detach().double() for name, p in block.named_parameters()}
        expected = reference_lattice_attention(inputs[reading.layer_idx], weights, config, visible)
        cross = 1 - expected.mass[:, own, :, own].transpose(0, 1)
        torch.testing.assert_close(reading.gate.double()[visible], expected.gate[visible], rtol=0, atol=1e-5)
        torch.testing.assert_close(reading.cross_share.double()[visible], cross[visible], rtol=0, atol=1e-5)
        mass = expected.mass * visible[..., None]
        shares = mass.sum(2) / visible.sum(2)[..., None]
        torch.testing.assert_close(reading.thread_share.double(), shares, rtol=0, atol=1e-5)


def test_read_records_nothing_in_other_passes_and_changes_no_logits():
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    before = tokens.logits(model)
    model.read(tokens.input_ids, tokens.attention_mask, tokens.prompt_length)
    assert torch.equal(tokens.logits(model), before)
    assert model.lattice(tokens.attention_mask).readings is None


# ---------------------------------------------------------------- FlashAttention in the backbone


def plain_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, **options: Any) -> torch.Tensor:
    """What ``flash_attn_func`` does for (rows, columns, heads, width)."""
    assert causal
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    window = options.get("window_size", (-1, -1))[0]
    query, key = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None]
    allowed = (key <= query) & ((key >= query - window) if window >= 0 else True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = options["softmax_scale"]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(1, 2)


def plain_flash_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, **options: Any
) -> torch.Tensor:
    """What ``flash_attn_varlen_func`` does for rows of different lengths, one behind the other."""
    lengths = cu_seqlens_q.diff().tolist()
    rows = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([plain_flash(*(x[None] for x in row), **options)[0] for row in rows])


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("backbone", ["qwen3", "mistral"])
def test_flash_attention_in_the_backbone_gives_the_logits_of_sdpa(backbone, version, monkeypatch):
    """With padding, waiting columns and sliding windows; the package itself is replaced, transformers' part is real."""
    library, name = transformers.modeling_flash_attention_utils, f"flash_attention_{version}"

    def functions(implementation: str | None) -> Any:
        assert implementation == name
        process = library._lazy_define_process_function(signature_of_flash)
        plain = (plain_flash, plain_flash_varlen, None, library._pad_input, library._unpad_input)
        return plain, (process, process)

    monkeypatch.setattr(library, "lazy_import_flash_attention", functions)
    base = tiny_backbone(backbone)
    base.config._attn_implementation_internal = name
    model = wake(ThreadedLM(base, EXCHANGES["causal"], 3, [1, 2]).eval())
    expected, tokens = tiny_lm(EXCHANGES["causal"], backbone), ragged_groups()
    real = tokens.attention_mask
    wake(expected)
    torch.testing.assert_close(tokens.logits(model)[real], tokens.logits(expected)[real], rtol=0, atol=1e-4)


def signature_of_flash(dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    """The options that transformers looks for."""


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("chunk_size", [3, 2048])
@pytest.mark.parametrize("backbone", ["qwen3", "gemma2"])
def test_token_logprobs_are_those_of_the_threads_previous_real_token(backbone, chunk_size):
    model, tokens = tiny_lm(EXCHANGES["causal"], backbone, "eager"), ragged_groups()
    targets = tokens.attention_mask.clone()
    targets[0, 1, 7] = False
    logits = tokens.logits(model).double()
    found = model.token_logprobs(
        tokens.input_ids, tokens.attention_mask, targets, tokens.prompt_length, chunk_size
    ).detach()
    for b, n, c in torch.ones(targets.shape).nonzero().tolist():
        earlier = [p for p in range(c) if tokens.attention_mask[b, n, p]]
        if not earlier or not targets[b, n, c]:
            assert found[b, n, c] == 0
            continue
        expected = logits[b, n, earlier[-1]].log_softmax(-1)[tokens.input_ids[b, n, c]]
        assert found[b, n, c].item() == pytest.approx(expected.item(), abs=1e-4)


def test_token_logprobs_never_hold_more_logits_than_one_chunk():
    """Neither forward nor backward computes more than chunk_size rows at once, and autograd keeps none of them."""
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    head, vocabulary = model.backbone.get_output_embeddings(), model.backbone.config.vocab_size
    computed, kept = [], []
    hook = head.register_forward_hook(lambda module, args, logits: computed.append(len(logits)))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.dim() > 1 and tensor.shape[-1] == vocabulary)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.token_logprobs(
            tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length, chunk_size=5
        ).sum()
    in_forward = len(computed)
    loss.backward()
    hook.remove()
    assert max(computed) == 5 and len(computed) == 2 * in_forward
    assert kept and not any(kept)


def test_nothing_to_score_gives_zeros():
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    nothing = torch.zeros_like(tokens.attention_mask)
    found = model.token_logprobs(tokens.input_ids, tokens.attention_mask, nothing, tokens.prompt_length)
    assert not found.any() and found.dtype == torch.float32


# ---------------------------------------------------------------- what cannot carry an exchange

_TINY = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
)


def t5():
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4))


def xglm():
    config = transformers.XGLMConfig(vocab_size=40, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    return transformers.XGLMForCausalLM(config)


def mamba():
    config = transformers.MambaConfig(vocab_size=40, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **_TINY, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"] * 2,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def lfm2():
    config = transformers.Lfm2Config(**_TINY, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2)
    return transformers.Lfm2ForCausalLM(config)


def granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**_TINY, num_key_value_heads=2, logits_scaling=3.0)
    )


def deepseek():
    config = transformers.DeepseekV3Config(
        **_TINY, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=6, first_k_dense_replace=4, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    "make, reason",
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (bart, "BartForConditionalGeneration is an encoder-decoder"),
        (gpt2, "GPT2LMHeadModel has no decoder with a list of layers"),
        (xglm, "XGLMForCausalLM does not go through transformers' attention interface"),
        (mamba, "MambaForCausalLM"),
        (qwen3_next, "Qwen3NextForCausalLM does not go through transformers' attention interface"),
        (granite, "not its output embedding"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_cannot_carry_an_exchange_say_why(make, reason):
    with pytest.raises(BackboneError, match=reason):
        ThreadedLM(make(), LatticeAttentionConfig(scope="causal", width=8, heads=2))


@pytest.mark.parametrize("layers", [[0, 1], [1, 3], []], ids=str)
def test_hybrid_models_are_refused_also_where_no_exchange_touches_their_other_layers(layers):
    """A convolution or a recurrent state moves on over waiting columns: an isolated thread with holes would differ."""
    with pytest.raises(BackboneError, match="Lfm2ForCausalLM has layers of type conv"):
        ThreadedLM(lfm2(), LatticeAttentionConfig(scope="causal", width=8, heads=2), layers=layers)


def test_a_layer_whose_attention_is_not_reached_is_named():
    backbone = tiny_backbone()
    backbone.model.layers[2].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(BackboneError, match=r"layers \[2\] of Qwen3ForCausalLM"):
        ThreadedLM(backbone, EXCHANGES["causal"], layers=[1, 2])


def test_attention_of_another_width_than_the_config_says_is_refused():
    with pytest.raises(BackboneError, match="DeepseekV3ForCausalLM cannot carry the exchange on layers"):
        ThreadedLM(deepseek(), LatticeAttentionConfig(scope="causal", width=8, heads=2))


def test_an_unknown_attention_implementation_is_named():
    backbone = tiny_backbone()
    backbone.config._attn_implementation = "paged|sdpa"
    with pytest.raises(BackboneError, match="paged"):
        ThreadedLM(backbone, EXCHANGES["causal"])


@pytest.mark.parametrize("shape", [(2, 5), (5,), (1, 2, 3, 4)])
def test_input_that_is_no_group_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match="B groups, N threads, L columns"):
        tiny_lm(EXCHANGES["causal"])(torch.ones(shape, dtype=torch.long))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="attention_mask"):
        tiny_lm(EXCHANGES["causal"])(torch.ones(1, 2, 3, dtype=torch.long), torch.ones(1, 2, 4))


def test_a_group_needs_a_thread():
    with pytest.raises(ValueError, match="num_threads=0"):
        ThreadedLM(tiny_backbone(), num_threads=0)


def test_more_or_fewer_threads_than_configured_run_on_the_same_weights():
    model = tiny_lm(SameStepConfig(width=16, heads=2), num_threads=3)
    aligned = tiny_lm(replace(EXCHANGES["aligned"], thread_dims=0))
    for num_threads in (1, 2, 5):
        ids = random_ids(2, num_threads, 6)
        assert model(ids).shape == aligned(ids).shape == (2, num_threads, 6, 40)


def test_a_pass_over_the_prompt_alone_is_the_bare_model():
    model = wake(ThreadedLM(tiny_backbone(), EXCHANGES["causal"], layers=[1, 2])).eval()
    ids = random_ids(2, 3, 5)
    with torch.no_grad():
        expected = tiny_backbone()(input_ids=ids.flatten(0, 1)).logits.view(2, 3, 5, -1)
        assert torch.equal(model(ids, prompt_length=5), expected)

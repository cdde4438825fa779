"""On CUDA: every backend in values and gradients, FlexAttention as it is compiled, bfloat16, and whole models."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from lace_lightning.compiled_layers import compile_layers
from lace_lightning.decoding import GroupDecoder, Rollout, Sampling
from lace_lightning.decoding.random import uniform
from lace_lightning.exchange import Geometry, LatticeAttentionConfig, backends, flash
from lace_lightning.lattice import Lattice, LatticeCache, LatticeMask, Topology
from lace_lightning.linear_cross_entropy import linear_cross_entropy
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES, Tokens, influence, ragged_groups, random_ids, tiny_backbone, wake
from tests.test_lattice_attention import WIDTH, apply, assert_same, build, values_and_gradients

pytestmark = pytest.mark.gpu

# Heads of 16, the least that FlexAttention's kernels take.
CONFIGS = {
    "causal": LatticeAttentionConfig(scope="causal", width=32, heads=2),
    "causal-others": LatticeAttentionConfig(scope="causal", width=32, heads=2, own="exclude"),
    "window": LatticeAttentionConfig(width=32, heads=2, scope="window", window=9),
    "window-others": LatticeAttentionConfig(width=32, heads=2, scope="window", window=9, own="exclude"),
    "aligned-others": LatticeAttentionConfig(width=32, heads=2, scope="aligned", own="exclude"),
}
# From float64 on the same numbers: in float32 the largest difference, as a share of the largest entry; in bfloat16,
# whose 8 bits make single entries noisy, the norm of the difference as a share of the norm.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32: the float32 claims are about float32."""
    torch.set_float32_matmul_precision("highest")


def long_input(columns: int = 75) -> tuple[Tensor, Tensor]:
    """(2, 4, columns, WIDTH) float64 and a ragged visibility: over 128 positions, and no multiple of them."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(2, 4, columns, WIDTH, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, 4, columns, generator=generator) > 0.2
    visible[0, :, :3] = False
    visible[1, 2:] = False
    return hidden, visible


def compare(config: LatticeAttentionConfig, dtype: torch.dtype, columns: int = 75) -> None:
    """Values and gradients on CUDA against the float64 eager backend on the CPU, for the same (rounded) numbers."""
    hidden, visible = long_input(columns)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    hidden, weights = hidden.to(dtype), (weights * visible[..., None]).to(dtype)
    block, exact = build(config, dtype), build(replace(config, backend="eager"))
    exact.load_state_dict(block.state_dict())
    expected = values_and_gradients(exact, hidden.double(), visible, weights.double())
    found = values_and_gradients(block.cuda(), hidden.cuda(), visible.cuda(), weights.cuda())
    if dtype == torch.float32:
        assert_same(found, expected, TOLERANCES[dtype])
    for name, value in found.items():
        error = ((value - expected[name]).norm() / expected[name].norm()).item()
        assert error <= TOLERANCES[dtype], f"{name}: the difference has {error:.3g} of the norm"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "pointwise", "flex"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_backends_equal_float64_in_values_and_gradients(config, backend, dtype):
    compare(replace(config, backend=backend), dtype)


@pytest.fixture(params=["torch", "flash-attn-4"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel of FlashAttention that is installed."""
    if request.param == "flash-attn-4" and flash.INSTALLED != "flash-attn-4":
        pytest.skip("flash-attn-4 is not installed")
    monkeypatch.setattr(flash, "INSTALLED", request.param)
    return request.param


@pytest.mark.parametrize("columns", [75, 300])
@pytest.mark.parametrize("config", [c for c in CONFIGS.values() if c.scope != "aligned"], ids=lambda c: c.scope + c.own)
def test_flash_equals_float64_in_values_and_gradients(config, columns, kernel):
    compare(replace(config, backend="flash"), torch.bfloat16, columns)


@pytest.mark.parametrize("width", [32, 64, 128, 256], ids=lambda width: f"head-width-{width // 2}")
def test_flash_takes_many_head_widths(width, kernel):
    compare(LatticeAttentionConfig(scope="causal", width=width, heads=2, backend="flash"), torch.bfloat16)


@pytest.mark.parametrize("columns", [200, 2048])
def test_flash_reads_all_visible_lattices_without_a_wider_head(columns, kernel):
    """No padded head: the kernel sees the plain width, and agrees with float64 attention."""
    size = 4 * columns
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, size, 32, device="cuda").bfloat16().unbind(0))
    mask = LatticeMask(Topology(), 4, torch.ones(1, size, dtype=torch.bool, device="cuda"), 0, size)
    grad = torch.randn_like(q)
    out = backends.BACKENDS["flash"].attend(q, k, v, mask)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = backends.eager(*exact, mask)
    found = (out, *torch.autograd.grad(out, (q, k, v), grad))
    true = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for one, other in zip(found, true, strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("heads", [2, 4, 8], ids=lambda heads: f"head-width-{32 // heads}")
def test_auto_runs_long_lattices_whatever_the_head_width(heads):
    compare(LatticeAttentionConfig(scope="causal", width=32, heads=heads), torch.float32, columns=300)


@pytest.mark.parametrize(
    "topology, columns, name",
    [
        (Topology("aligned"), 2048, "pointwise"),
        (Topology("aligned"), 8, "sdpa"),
        (Topology(), 8, "sdpa"),
        (Topology(), 2048, "flash" if flash.INSTALLED == "flash-attn-4" else "flex"),
    ],
)
def test_auto_takes_the_fastest(topology, columns, name):
    model = LatticeAttentionConfig(scope=topology.scope).build(Geometry(64, 64, torch.bfloat16, torch.device("cuda")))
    lattice = Lattice({0: model}, torch.ones(2, 4, columns, dtype=torch.bool, device="cuda"))
    mask = lattice.mask(topology)
    assert backends.choose("auto", mask, backends.Heads(4, 32, torch.bfloat16)) is backends.BACKENDS[name]
    model.prepare(lattice)
    assert mask.made or mask._dense is not None


def test_flex_stays_compiled_over_many_lengths():
    """Batches of a training run differ in length: falling back to the uncompiled kernel would be silent and slow."""
    backends._compiled_flex.cache_clear()
    block = build(replace(CONFIGS["causal"], backend="flex"), torch.float32, "cuda")
    exact = build(replace(CONFIGS["causal"], backend="eager"), torch.float32, "cuda")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for columns in (*range(40, 52), 64, 96, 100, 128, 200, 201, 300):
            hidden, visible = (x.cuda() for x in long_input(columns))
            found, expected = (apply(b, hidden.float(), visible) for b in (block, exact))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex", "flash"])
def test_queries_that_may_read_nothing_get_exactly_zero_and_no_gradient(backend):
    config = LatticeAttentionConfig(scope="causal", width=32, heads=2, own="exclude", backend=backend)
    block = build(config, torch.bfloat16, "cuda")
    hidden = torch.randn(1, 2, 80, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    visible = torch.ones(1, 2, 80, dtype=torch.bool, device="cuda")
    visible[:, 1] = False
    out = apply(block, hidden, visible)
    assert torch.equal(out, hidden)
    (out - hidden).float().square().sum().backward()
    assert not any(parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
def test_columns_fed_one_by_one_read_what_one_pass_reads(backend):
    hidden, visible = (x.cuda()[:, :, :40] for x in long_input())
    block = build(replace(CONFIGS["window-others"], backend=backend), torch.float32, "cuda")
    cache = LatticeCache()
    with torch.no_grad():
        whole = apply(block, hidden.float(), visible)
        steps = [
            apply(block, hidden[:, :, [t]].float(), visible[:, :, [t]], first_time=t, cache=cache) for t in range(40)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole, rtol=0, atol=1e-4)


def cuda_lm(config: LatticeAttentionConfig, dtype: str = "float32", backbone: str = "qwen3") -> ThreadedLM:
    model = ThreadedLM(tiny_backbone(backbone, dtype=dtype), config, num_threads=3, layers=[1, 2])
    return wake(model).cuda().eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backbone", ["qwen3", "mistral"])
def test_a_fresh_exchange_gives_the_logits_of_the_bare_model_bitwise(backbone, dtype):
    bare = tiny_backbone(backbone, dtype=dtype).cuda()
    model = ThreadedLM(tiny_backbone(backbone, dtype=dtype), CONFIGS["causal"], layers=[1, 2]).cuda().eval()
    ids = random_ids(2, 3, 40).cuda()
    with torch.no_grad():
        assert torch.equal(model(ids).flatten(0, 1), bare(input_ids=ids.flatten(0, 1)).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex", "flash"])
def test_no_future_and_no_neighbour(backend, dtype):
    model = cuda_lm(replace(CONFIGS["causal"], backend=backend), dtype)
    tokens = ragged_groups().to("cuda")
    before, real = tokens.logits(model), tokens.attention_mask
    changed = tokens.input_ids.clone()
    changed[:, 1, 9] = changed[:, 1, 9] % 39 + 1
    after = tokens.with_ids(changed).logits(model)
    assert torch.equal(after[..., :9, :][real[..., :9]], before[..., :9, :][real[..., :9]])
    assert not torch.equal(after[:, 0, 9:], before[:, 0, 9:])
    changed = tokens.input_ids.clone()
    changed[1] = random_ids(*changed[1].shape, seed=77).cuda()
    assert torch.equal(tokens.with_ids(changed).logits(model)[0][real[0]], before[0][real[0]])
    watched = real.clone()
    watched[1] = watched[..., 9:] = False
    reached = influence(model, tokens, watched)
    assert reached[0].any() and not reached[1].any() and not reached[..., 9:].any()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.3)])
@pytest.mark.parametrize("exchange", ["causal", "window-others", "aligned-others"])
def test_cached_decoding_gives_the_logprobs_of_one_full_forward_pass(exchange, dtype, tolerance):
    model = cuda_lm(CONFIGS[exchange], dtype)
    rollout = GroupDecoder(model, Sampling(), 24, [36, 37], 0).decode([[7, 8, 9], [10, 11, 12, 13, 14]], 3, [1, 2])
    with torch.no_grad():
        expected = model.token_logprobs(
            rollout.input_ids, rollout.attention_mask, rollout.chosen, rollout.prompt_length
        )
    difference = (expected - rollout.logprobs)[rollout.chosen].abs()
    assert difference.max() < tolerance if dtype == "float32" else difference.mean() < tolerance


def test_draws_are_the_same_numbers_as_on_the_cpu():
    seeds = torch.arange(1000) * 7919
    for column in (0, 3, 5000):
        assert torch.equal(uniform(seeds.cuda(), 8, column).cpu(), uniform(seeds, 8, column))


def test_models_on_the_gpu_give_the_logits_of_the_cpu():
    for name in ("causal", "aligned-others", "window", "same-step", "ungated", "top-k", "shared-slots"):
        config = EXCHANGES[name]
        on_cpu = wake(ThreadedLM(tiny_backbone(), config, layers=[1, 2])).eval()
        tokens = ragged_groups()
        expected = tokens.logits(on_cpu)
        found = tokens.to("cuda").logits(on_cpu.cuda()).cpu()
        difference = (found - expected)[tokens.attention_mask].abs().max()
        assert difference < 1e-3, f"{name}: {difference:.3g}"


def test_a_model_compiled_by_inductor_keeps_loss_and_gradients():
    model, tokens = cuda_lm(CONFIGS["causal"]), ragged_groups().to("cuda")

    def loss_and_gradients() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        arguments = (tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length)
        loss = model.token_logprobs(*arguments).mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.exchange_parameters()]

    loss, gradients = loss_and_gradients()
    decoder = model.backbone.get_decoder()
    decoder.forward = torch.compile(decoder.forward, fullgraph=True)
    compiled_loss, compiled = loss_and_gradients()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-4)
    for found, expected in zip(compiled, gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
def test_layers_compiled_by_inductor_keep_loss_and_gradients_at_every_length(backend, checkpointing):
    """bfloat16 with fused steps rounds elsewhere: the norm of a gradient's difference counts."""
    model = cuda_lm(replace(CONFIGS["causal"], backend=backend), "bfloat16").train()
    torch._dynamo.reset()

    def loss_and_gradients(columns: int) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        ids = random_ids(2, 3, columns, seed=columns).cuda()
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, 1, columns // 2 :] = False
        loss = model.mean_nll(ids, mask, mask, prompt_length=4)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])

    lengths = (40, 60, 150, 97)
    expected = [loss_and_gradients(columns) for columns in lengths]
    if checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(model.backbone)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for columns, (loss, gradient) in zip(lengths, expected, strict=True):
            compiled_loss, compiled = loss_and_gradients(columns)
            torch.testing.assert_close(compiled_loss, loss, rtol=0.02, atol=0.02)
            assert (compiled - gradient).norm() < 0.1 * gradient.norm()


def test_layers_compiled_by_inductor_take_long_groups_with_prompts_of_any_length():
    """From 4,096 rows on Inductor fuses both gradients of a norm; torch 2.11 does it wrong where rows are a sum."""
    model = cuda_lm(CONFIGS["causal"], "bfloat16").train()
    torch._dynamo.reset()

    def gradient(prompt: int, columns: int) -> Tensor:
        model.zero_grad()
        ids = random_ids(2, 3, columns, seed=columns).cuda()
        ids[..., :prompt] = ids[:, :1, :prompt]
        mask = torch.ones_like(ids, dtype=torch.bool)
        model.mean_nll(ids, mask, mask, prompt_length=prompt).backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    sizes = ((300, 2000), (411, 2333), (57, 1801))
    expected = [gradient(*size) for size in sizes]
    compile_layers(model.backbone)
    for size, one in zip(sizes, expected, strict=True):
        assert (gradient(*size) - one).norm() < 0.1 * one.norm()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_fused_cross_entropy_is_that_of_float64_logits(softcap):
    hidden, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((300, 64), (1000, 64)))
    tokens, weights = torch.randint(1000, (300,), device="cuda"), torch.rand(300, device="cuda")
    tensors = [x.requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(hidden, weight, tokens, weights, softcap, chunk_size=128)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    logits = exact[0] @ exact[1].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (torch.nn.functional.cross_entropy(logits, tokens, reduction="none") * weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for one, other in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, exact), strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_groups_of_different_prompts_decode_alike_alone_and_together():
    model = cuda_lm(CONFIGS["causal"])
    rules = GroupDecoder(model, Sampling(), 16, [36, 37], 0)
    alone = rules.decode([[7, 8, 9]], 3, [21])
    beside = rules.decode([[10, 11, 12, 13, 14], [7, 8, 9]], 3, [5, 21])
    for n in range(3):
        mine, theirs = alone.input_ids[0, n][alone.chosen[0, n]], beside.input_ids[1, n][beside.chosen[1, n]]
        assert mine.tolist() == theirs.tolist()


def test_tokens_on_the_gpu_are_scored_there():
    model, tokens = cuda_lm(CONFIGS["causal"], "bfloat16"), ragged_groups().to("cuda")
    found = model.token_logprobs(tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length)
    assert found.is_cuda and found.dtype == torch.float32 and found.requires_grad
    assert isinstance(tokens, Tokens) and torch.isfinite(found).all()


# ---------------------------------------------------------------- the fast engine

ENGINE = LatticeAttentionConfig(scope="causal", width=64, heads=2)
ENGINE_CASES = {
    "none": (None, 4),
    "small": (ENGINE, 4),  # all of a group in one program
    "parts": (ENGINE, 24),  # the lattice cut into parts, joined in two steps
    "aligned": (replace(ENGINE, scope="aligned", own="exclude"), 4),
    "aligned-many": (replace(ENGINE, scope="aligned"), 40),
    "window": (replace(ENGINE, scope="window", window=7), 12),
    "wide": (LatticeAttentionConfig(scope="causal", width=512, heads=16), 4),  # the gate passes in blocks
}


def engine_lm(config: LatticeAttentionConfig | None, num_threads: int, dtype: torch.dtype) -> ThreadedLM:
    """Sizes that the engine's own products take, and weights wide enough for decided distributions."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=3008, head_dim=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    backbone = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads), dtype=dtype)
    for parameter in backbone.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    model = ThreadedLM(backbone, config, num_threads=num_threads)
    return (wake(model) if config else model).cuda().eval()


def engine_rollout(model: ThreadedLM, engine: str, **sampling: float) -> Rollout:
    """Prompts of 5 and 140 tokens, ends at different times, a barrier."""
    rules = GroupDecoder(model, Sampling(**sampling), 40, list(range(2900, 2910)), 0, [5, 6], engine=engine)
    return rules.decode([list(range(7, 12)), list(range(10, 150))], model.num_threads, [1, 2])


@pytest.mark.parametrize("case", ENGINE_CASES)
def test_the_fast_engine_decodes_what_the_plain_one_does(case):
    """In float32 the same tokens, and log-probabilities equal to those of one full forward pass."""
    model = engine_lm(*ENGINE_CASES[case], torch.float32)
    plain, fast = engine_rollout(model, "plain"), engine_rollout(model, "fast")
    for name in ("input_ids", "attention_mask", "finished"):
        assert torch.equal(getattr(fast, name), getattr(plain, name)), name
    with torch.no_grad():
        full = model.token_logprobs(fast.input_ids, fast.attention_mask, fast.chosen, fast.prompt_length)
    assert (full - fast.logprobs)[fast.chosen].abs().max() < 1e-4


@pytest.mark.parametrize("case", ENGINE_CASES)
def test_the_fast_engine_rounds_no_worse_than_the_plain_one_in_bfloat16(case):
    """Against float32 weights of the same values: our products, norms and merged weights lose nothing more."""
    model = engine_lm(*ENGINE_CASES[case], torch.bfloat16)
    exact = copy.deepcopy(model).float()
    gaps = {}
    for engine in ("plain", "fast"):
        rollout = engine_rollout(model, engine)
        with torch.no_grad():
            full = exact.token_logprobs(
                rollout.input_ids, rollout.attention_mask, rollout.chosen, rollout.prompt_length
            )
        gaps[engine] = (full - rollout.logprobs)[rollout.chosen].abs().mean().item()
    assert gaps["fast"] < 1.2 * gaps["plain"], gaps


@pytest.mark.parametrize("rule", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 0.7}], ids=str)
def test_truncated_sampling_in_the_graph_draws_what_the_plain_engine_draws(rule):
    model = engine_lm(*ENGINE_CASES["small"], torch.float32)
    plain, fast = (engine_rollout(model, engine, **rule) for engine in ("plain", "fast"))
    assert torch.equal(fast.input_ids, plain.input_ids)
    torch.testing.assert_close(fast.logprobs, plain.logprobs, rtol=0, atol=1e-4)


def test_trained_weights_reach_graphs_that_were_captured_before():
    model = engine_lm(*ENGINE_CASES["small"], torch.float32)
    before = engine_rollout(model, "fast")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    plain, fast = engine_rollout(model, "plain"), engine_rollout(model, "fast")
    assert torch.equal(fast.input_ids, plain.input_ids)
    assert fast.input_ids.shape != before.input_ids.shape or not torch.equal(fast.input_ids, before.input_ids)


def test_a_batch_does_not_go_on_in_the_place_of_a_later_one():
    """Both would write into the same caches."""
    model = engine_lm(*ENGINE_CASES["small"], torch.float32)
    rules = GroupDecoder(model, Sampling(), 40, [2900], 0, engine="fast")
    first = rules.start([[7, 8, 9]], 4, [1])
    first.advance(2)
    rules.start([[7, 8, 9]], 4, [1]).advance(2)
    with pytest.raises(RuntimeError, match="one at a time"):
        first.advance(1)

"""Shared visibility and confident attention by themselves: the float64 reference, what they refuse, the cache."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lace_lightning.exchange import (
    ConfidentAttentionConfig,
    Geometry,
    LatticeAttentionConfig,
    OwnAttention,
    SharedVisibilityConfig,
)
from lace_lightning.lattice import Lattice, LatticeCache
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES, ragged_groups, reference_lattice_attention, tiny_backbone, tiny_lm
from tests.test_lattice_attention import WIDTH, apply, build, functional, lattice_input, values_and_gradients

CLOSE = 1e-12


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


# ---------------------------------------------------------------- shared visibility

B, N, P, L, H, HKV, DIM = 2, 3, 2, 4, 4, 2, 3


def own_attention(seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, N, H, P + L, d), keys and values (B, N, H_kv, P + L, d), float64; one prompt for all threads."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(B, N, heads, P + L, DIM, generator=generator, dtype=torch.float64) for heads in (H, HKV, HKV)
    )
    for x in (key, value):
        x[..., :P, :] = x[:, :1, :, :P]
    return query, key, value


def prompt_and_visible() -> tuple[Tensor, Tensor]:
    prompt = torch.ones(B, P, dtype=torch.bool)
    prompt[1, 0] = False
    visible = lattice_input()[1]
    visible[0, 1:, 0] = False  # thread 0 begins alone
    return prompt, visible


def reference(
    query: Tensor, key: Tensor, value: Tensor, prompt: Tensor, visible: Tensor, scale: float, with_others: bool = True
) -> Tensor:
    """(B, N, L, H * d) softmax attention over prompt, own past and others' columns up to t, one query at a time."""
    out = torch.zeros(B, N, L, H * DIM, dtype=torch.float64)
    for b, n, t in visible.nonzero().tolist():
        threads = range(N) if with_others else [n]
        places = [(n, p) for p in range(P) if prompt[b, p]]
        places += [(m, P + s) for m in threads for s in range(t + 1) if visible[b, m, s]]
        for h in range(H):
            shared = h // (H // HKV)
            scores = [float(query[b, n, h, P + t] @ key[b, m, shared, c]) * scale for m, c in places]
            total = sum(math.exp(score) for score in scores)
            for score, (m, c) in zip(scores, places, strict=True):
                out[b, n, t, h * DIM : (h + 1) * DIM] += math.exp(score) / total * value[b, m, shared, c]
    return out


def shared(config: SharedVisibilityConfig = SharedVisibilityConfig(stride=0)):  # noqa: B008  (frozen)
    return config.build(Geometry(H * DIM, WIDTH, torch.float64, torch.device("cpu")))


def read_together(block, tensors, prompt: Tensor, visible: Tensor, hidden: Tensor, **options: float) -> Tensor:
    """``hidden`` (B, N, P + L, H * d) with what the block adds after the prompt, (B, N, L, H * d)."""
    lattice = Lattice({0: block}, visible, skip=P, prompt=prompt)
    own = OwnAttention(*(x.flatten(0, 1) for x in tensors), options)
    return lattice.apply(block, 0, hidden.flatten(0, 1), own).view(hidden.shape)[:, :, P:]


@pytest.mark.parametrize("scale", [0.3, 1.1])
def test_shared_visibility_is_one_softmax_over_the_prompt_and_all_threads_up_to_now(scale):
    tensors, (prompt, visible) = own_attention(), prompt_and_visible()
    hidden = torch.randn(B, N, P + L, H * DIM, dtype=torch.float64)
    found = read_together(shared(), tensors, prompt, visible, hidden, scaling=scale)
    expected = reference(*tensors, prompt, visible, scale)
    alone = torch.tensor([not visible[b, [m for m in range(N) if m != n], : t + 1].any() for b, n, t in positions()])
    alone = alone.view(B, N, L)
    assert (alone & visible).any()
    kept = torch.where((visible & ~alone)[..., None], expected, hidden[:, :, P:])
    assert_close(found, kept)
    assert not torch.equal(expected, reference(*tensors, prompt, visible, scale, with_others=False))


def positions() -> list[tuple[int, int, int]]:
    return list(itertools.product(range(B), range(N), range(L)))


def test_a_gate_adds_its_share_of_what_the_others_change():
    tensors, (prompt, visible) = own_attention(), prompt_and_visible()
    hidden = reference(*tensors, prompt, visible, 1.0, with_others=False)
    hidden = torch.cat([torch.zeros(B, N, P, H * DIM, dtype=torch.float64), hidden], dim=2)
    block = shared(SharedVisibilityConfig(stride=0, gated=True))
    closed = read_together(block, tensors, prompt, visible, hidden, scaling=1.0)
    assert torch.equal(closed, hidden[:, :, P:])
    with torch.no_grad():
        block.gate.fill_(0.25)
    ajar = read_together(block, tensors, prompt, visible, hidden, scaling=1.0)
    both = reference(*tensors, prompt, visible, 1.0)
    assert_close(ajar[visible], (0.75 * hidden[:, :, P:] + 0.25 * both)[visible])


def test_keys_that_nobody_may_read_reach_nothing_even_if_not_finite():
    tensors, (prompt, visible) = own_attention(), prompt_and_visible()
    real = torch.cat([prompt[:, None].expand(-1, N, -1), visible], dim=2)
    hidden = torch.randn(B, N, P + L, H * DIM, dtype=torch.float64)
    results = []
    for spoil in (0.0, torch.nan):
        leaves = [torch.where(real[:, :, None, :, None], x, spoil).requires_grad_() for x in tensors]
        out = read_together(shared(), leaves, prompt, visible, hidden, scaling=1.0)[visible]
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_slots_set_the_positions_of_threads_apart_after_the_prompt():
    model, tokens = tiny_lm(SharedVisibilityConfig(stride=100)), ragged_groups()
    seen = []
    decoder = model.backbone.get_decoder()
    decoder.register_forward_pre_hook(lambda *args: seen.append(args[2]["position_ids"]), with_kwargs=True)
    tokens.logits(model)
    found = seen[0].view(tokens.input_ids.shape)
    own = (tokens.attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    assert torch.equal(found[..., : tokens.prompt_length], own[..., : tokens.prompt_length])
    after = slice(tokens.prompt_length, None)
    assert torch.equal(found[..., after] - own[..., after], torch.tensor([0, 100, 200])[:, None].expand(2, 3, 9))


def test_threads_set_apart_read_their_own_past_as_before():
    """Rotary positions are relative: a thread's slot moves its tokens away from the prompt, not from each other."""
    tokens = ragged_groups()
    tokens.prompt_length = 0
    apart, together = (tiny_lm(SharedVisibilityConfig(stride=s, gated=True)) for s in (50, 0))
    for model in (apart, together):
        for block in model.exchanges.values():
            torch.nn.init.zeros_(block.gate)
    difference = tokens.logits(apart) - tokens.logits(together)
    assert difference[tokens.attention_mask].abs().max() < 1e-3


@pytest.mark.parametrize("backbone, named", [("mistral", "sliding_window"), ("gemma2", "softcap")])
def test_shared_visibility_refuses_layers_that_attend_otherwise(backbone, named):
    with pytest.raises(ValueError, match=f"{named}.*SharedVisibility knows plain"):
        ThreadedLM(tiny_backbone(backbone, "eager"), SharedVisibilityConfig(), layers=[1, 2])


@pytest.mark.parametrize("settings, named", [(dict(stride=-1), "stride=-1"), (dict(reads_prompt=True), "reads_prompt")])
def test_settings_of_shared_visibility_that_do_not_fit_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        SharedVisibilityConfig(**settings)


# ---------------------------------------------------------------- confident attention


def reference_confident(
    hidden: Tensor, weights: dict[str, Tensor], config: ConfidentAttentionConfig, visible: Tensor
) -> Tensor:
    """Lattice attention of the reference, with log a(m) put into the scores through an extra dim of Q and K.

    The rule itself is written once more, by sorting, one reader at a time.
    """
    batch, threads, columns = visible.shape
    mean = torch.zeros(batch, threads, columns, dtype=torch.float64)
    rows = []
    for b, n, t in itertools.product(range(batch), range(threads), range(columns)):
        own = [s for s in range(t + 1) if visible[b, n, s]]
        z = [weights["down.weight"] @ hidden[b, n, s] for s in own]
        values = [torch.sigmoid(weights["confidence.weight"][0] @ x) for x in z]
        rows.append(sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64))
    mean = torch.stack(rows).view(batch, threads, columns)
    out = hidden.clone()
    for b, n, t in visible.nonzero().tolist():
        window = {"causal": columns, "aligned": 1, "window": config.window}[config.scope]
        spans = range(max(0, t - window + 1), t + 1)
        others = [m for m in range(threads) if m != n and any(visible[b, m, s] for s in spans)]
        ranked = sorted(others, key=lambda m: -mean[b, m, t].item())
        cut = mean[b, ranked[config.top_k], t] if len(ranked) > config.top_k else 0.0
        share = {m: 1 - torch.exp(-(mean[b, m, t] - cut) / config.margin) for m in ranked[: config.top_k]} | {n: 1.0}
        out[b, n, t] = out[b, n, t] + weighted_read(hidden, weights, config, visible, (b, n, t), share, spans)
    return out


def weighted_read(hidden, weights, config, visible, place, share, spans) -> Tensor:
    """What one token adds: each thread's exponentials times its share."""
    b, n, t = place
    z = {(m, s): weights["down.weight"] @ hidden[b, m, s] for m in share for s in spans if visible[b, m, s]}
    r, d = config.width, config.dim
    qkv = {key: weights["qkv.weight"] @ x for key, x in z.items()}
    read = []
    for h in range(config.heads):
        part = slice(h * d, (h + 1) * d)
        terms = {
            (m, s): share[m] * torch.exp(qkv[n, t][:r][part] @ qkv[m, s][r : 2 * r][part] / math.sqrt(d)) for m, s in z
        }
        read.append(sum(term * qkv[key][2 * r :][part] for key, term in terms.items()) / sum(terms.values()))
    read = torch.cat(read)
    gate = torch.sigmoid(weights["gate.weight"] @ torch.cat([z[n, t], read]) + weights["gate.bias"])
    return weights["up.weight"] @ (gate * read)


STILL = dict(width=8, heads=2, time_dims=0, thread_dims=0, margin=0.1)
CONFIDENT = [
    ConfidentAttentionConfig(**STILL, scope=scope, window=window, top_k=top_k)
    for (scope, window), top_k in itertools.product([("causal", None), ("aligned", None), ("window", 2)], [1, 2, 9])
]


def name_of(config: ConfidentAttentionConfig) -> str:
    return f"{config.scope}-{config.top_k}"


@pytest.mark.parametrize("config", CONFIDENT, ids=name_of)
def test_confident_attention_equals_the_reference_in_values_and_gradients(config):
    hidden, visible = lattice_input()
    block = build(config)
    found = values_and_gradients(block, hidden, visible, functional())
    weights = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    hidden.requires_grad_()
    out = reference_confident(hidden, weights, config, visible)
    gradients = torch.autograd.grad((out * functional()).sum(), [hidden, *weights.values()])
    for name, expected in zip(("output", "hidden", *weights), (out, *gradients), strict=True):
        torch.testing.assert_close(found[name], expected.detach(), rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("config", CONFIDENT, ids=name_of)
def test_columns_fed_one_by_one_read_what_one_pass_reads(config):
    hidden, visible = lattice_input()
    block, cache = build(replace(config, time_dims=2, thread_dims=2)), LatticeCache()
    steps = [
        apply(block, hidden[:, :, [t]], visible[:, :, [t]], first_time=t, cache=cache) for t in range(hidden.shape[2])
    ]
    assert_close(torch.cat(steps, dim=2), apply(block, hidden, visible))


def test_equal_confidences_leave_every_token_to_its_own_thread():
    hidden, visible = lattice_input()
    block = build(ConfidentAttentionConfig(**STILL, scope="causal"))
    torch.nn.init.zeros_(block.confidence.weight)
    alone = build(LatticeAttentionConfig(scope="causal", width=8, heads=2, time_dims=0, thread_dims=0, own="only"))
    full = torch.ones_like(visible)
    assert_close(apply(block, hidden, full), apply(alone, hidden, full))


def test_the_choice_is_continuous_where_two_threads_change_places():
    """A nudge of rounding's size moves the output by about as much, not by a whole thread's share."""
    hidden, visible = (x[:, :, :1] for x in lattice_input())
    block = build(ConfidentAttentionConfig(**STILL, scope="causal"))
    same = hidden.clone()
    same[:, 1] = same[:, 0]
    up, down = same.clone(), same.clone()
    up[:, 0] += 1e-9
    down[:, 0] -= 1e-9
    full = torch.ones_like(visible)
    assert (apply(block, up, full) - apply(block, down, full)).abs().max() < 1e-6


def test_gradients_are_finite_however_hard_the_choice():
    hidden, visible = lattice_input()
    block = build(ConfidentAttentionConfig(**STILL | {"margin": 1e-4}, scope="causal"), torch.float32)
    for gradient in values_and_gradients(block, hidden.float(), visible, functional().float()).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(top_k=0), "top_k=0"),
        (dict(margin=0.0), "margin=0.0"),
        (dict(own="exclude"), "own='exclude'"),
        (dict(backend="flex"), "backend='flex'"),
    ],
)
def test_settings_of_confident_attention_that_do_not_fit_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        ConfidentAttentionConfig(**settings)


# ---------------------------------------------------------------- without a gate


@pytest.mark.parametrize("scope", ["causal", "aligned"])
def test_without_a_gate_all_that_was_read_is_added(scope):
    config = LatticeAttentionConfig(width=8, heads=2, scope=scope, gate="none")
    hidden, visible = lattice_input()
    block = build(config)
    assert not any("gate" in name for name, _ in block.named_parameters())
    weights = {name: p.detach() for name, p in block.named_parameters()}
    # A gate whose bias is beyond what a sigmoid can tell from 1.
    always = {"gate.weight": torch.zeros(8, 16).double(), "gate.bias": torch.full((8,), 60.0).double()}
    expected = reference_lattice_attention(hidden, weights | always, config, visible)
    assert_close(apply(block, hidden, visible), hidden + expected.added)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", EXCHANGES)
def test_no_weight_is_a_scalar_which_fsdp2_could_not_divide(name):
    assert all(parameter.dim() for parameter in tiny_lm(EXCHANGES[name]).exchange_parameters())

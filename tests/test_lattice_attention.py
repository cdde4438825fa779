"""Exchange blocks by themselves against the float64 reference (LACE.md §3, claim 7)."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from lace_lightning.exchange import (
    Exchange,
    ExchangeConfig,
    Geometry,
    LatticeAttentionConfig,
    SameStepConfig,
)
from lace_lightning.exchange.backends import Heads, choose
from lace_lightning.lattice import Lattice, LatticeCache, Topology
from tests.helpers import BACKENDS, may_read, reference_lattice_attention, reference_same_step

WIDTH = 6
EPS = 1e-6
SCOPES = [("causal", None), ("aligned", None), ("window", 2)]
OWN = ["include", "exclude", "only"]


def build(config: ExchangeConfig, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Exchange:
    """A block with random weights everywhere, W_up and gate bias too; the same numbers in every dtype."""
    block = config.build(Geometry(WIDTH, WIDTH, torch.float64, torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            scale = 1.5 * parameter.shape[-1] ** -0.5  # some contrast, and the same one at every width
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return block.to(device, dtype)


def lattice_input() -> tuple[Tensor, Tensor]:
    """Hidden states (B, N, L, D) float64 and a ragged visibility (B, N, L), with one column nobody stands in."""
    hidden = torch.randn(2, 3, 4, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    visible[0, 0, 1] = visible[0, 2, 3] = False
    visible[-1, :, 2] = False
    visible[-1, 1, 0] = False
    return hidden, visible


def apply(block: Exchange, hidden: Tensor, visible: Tensor, **lattice: object) -> Tensor:
    """``hidden`` plus what the block reads, through the same door that a backbone uses."""
    rows = Lattice({0: block}, visible, **lattice).apply(block, 0, hidden.flatten(0, 1))
    return rows.view(hidden.shape)


def flex_on_cpu(backend: str, device: str = "cpu") -> bool:
    """FlexAttention has no backward pass on CPUs: there its values are tested; its gradients are in test_gpu.py."""
    return backend == "flex" and device == "cpu"


def values_and_gradients(
    block: Exchange, hidden: Tensor, visible: Tensor, loss_weights: Tensor, gradients: bool = True
) -> dict[str, Tensor]:
    """Output, and gradients of a random functional of it, by name, as float64 on the CPU."""
    if not gradients:
        with torch.no_grad():
            return {"output": apply(block, hidden, visible).double().cpu()}
    hidden = hidden.detach().requires_grad_()
    out = apply(block, hidden, visible)
    names, parameters = zip(*block.named_parameters(), strict=True)
    found = torch.autograd.grad((out * loss_weights).sum(), [hidden, *parameters])
    results = dict(zip(("output", "hidden", *names), (out, *found), strict=True))
    return {name: value.detach().double().cpu() for name, value in results.items()}


@cache
def expected_values_and_gradients(config: ExchangeConfig, is_full: bool = False) -> dict[str, Tensor]:
    """The same from the reference, for :func:`lattice_input` (nobody waits if it is full) and :func:`functional`."""
    hidden, visible = lattice_input()
    visible = visible | is_full
    weights = {name: p.detach().clone().requires_grad_() for name, p in build(config).named_parameters()}
    hidden.requires_grad_()
    if isinstance(config, SameStepConfig):
        added = reference_same_step(hidden, weights, config, visible, EPS)
    else:
        added = reference_lattice_attention(hidden, weights, config, visible).added
    out = hidden + added
    found = torch.autograd.grad((out * functional()).sum(), [hidden, *weights.values()])
    results = dict(zip(("output", "hidden", *weights), (out, *found), strict=True))
    return {name: value.detach() for name, value in results.items()}


def functional() -> Tensor:
    """Weights of the random functional whose gradients are compared."""
    hidden, _ = lattice_input()
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """``tolerance`` is relative to the largest entry of each tensor."""
    for name, value in found.items():
        error = ((value - expected[name]).abs().max() / expected[name].abs().max()).item()
        assert error <= tolerance, f"{name}: largest difference is {error:.3g} of the largest entry"


TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}
CONFIGS = [
    LatticeAttentionConfig(width=8, heads=2, scope=scope, window=window, own=own, rotary_base=50.0)
    for (scope, window), own in itertools.product(SCOPES, OWN)
] + [
    LatticeAttentionConfig(
        scope="causal", width=12, heads=2, time_dims=time_dims, thread_dims=thread_dims, rotary_base=50.0
    )
    for time_dims, thread_dims in [(0, 0), (6, 0), (0, 6), (2, 4), (2, 2)]
]


def name_of(value: object) -> str | None:
    if isinstance(value, LatticeAttentionConfig):
        return f"{value.scope}-{value.own}-{value.rotary_dims}of{value.dim}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_lattice_attention_equals_the_reference_in_values_and_gradients(config, dtype, backend):
    hidden, visible = lattice_input()
    block = build(replace(config, backend=backend), dtype)
    found = values_and_gradients(
        block, hidden.to(dtype), visible, functional().to(dtype), gradients=not flex_on_cpu(backend)
    )
    assert_same(found, expected_values_and_gradients(config), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
@pytest.mark.parametrize("own", OWN)
def test_same_step_exchange_equals_the_reference_in_values_and_gradients(own, dtype):
    config = SameStepConfig(width=8, heads=2, own=own)
    hidden, visible = lattice_input()
    block = build(config, dtype)
    block.norm.eps = EPS  # the reference's; by default it is the smallest of the dtype
    found = values_and_gradients(block, hidden.to(dtype), visible, functional().to(dtype))
    assert_same(found, expected_values_and_gradients(config), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_lattices_in_which_nobody_waits_equal_the_reference_too(config, dtype):
    hidden, visible = lattice_input()
    full = torch.ones_like(visible)
    found = values_and_gradients(build(config, dtype), hidden.to(dtype), full, functional().to(dtype))
    assert_same(found, expected_values_and_gradients(config, is_full=True), TOLERANCES[dtype])


def test_auto_folds_the_heads_of_small_columns_into_one_matrix():
    def chosen(num_threads: int, scope: str = "aligned"):
        visible = torch.ones(1, num_threads, 9, dtype=torch.bool)
        mask = Lattice({}, visible).mask(Topology(scope))
        return choose("auto", mask, Heads(8, 4, torch.float32)).attend.__name__

    assert chosen(4) == chosen(8) == "folded"
    assert chosen(9) == chosen(4, "causal") == "sdpa"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
def test_backends_agree_on_long_lattices(dtype):
    """Beyond one block of 128 positions, where the reference's loops would take minutes."""
    config = LatticeAttentionConfig(width=32, heads=2, scope="window", window=20, own="exclude")
    hidden = torch.randn(2, 4, 75, WIDTH, dtype=torch.float64)
    visible = torch.rand(2, 4, 75) > 0.2
    outputs = {
        backend: apply(build(replace(config, backend=backend), dtype), hidden.to(dtype), visible).detach().double()
        for backend in BACKENDS
        if not flex_on_cpu(backend)
    }
    with torch.no_grad():
        outputs["flex"] = apply(build(replace(config, backend="flex"), dtype), hidden.to(dtype), visible).double()
    for backend, output in outputs.items():
        assert_same({backend: output}, {backend: outputs["eager"]}, TOLERANCES[dtype])


@pytest.mark.parametrize(
    "config",
    [
        LatticeAttentionConfig(scope="causal", width=4, heads=1, own="exclude", backend="eager"),
        LatticeAttentionConfig(scope="causal", width=4, heads=1, own="exclude", backend="sdpa"),
        LatticeAttentionConfig(width=4, heads=1, scope="window", window=1, backend="sdpa"),
        LatticeAttentionConfig(scope="causal", width=4, heads=1, own="exclude", backend="flash"),
        LatticeAttentionConfig(width=4, heads=2, scope="window", window=2, backend="flash"),
        LatticeAttentionConfig(width=4, heads=1, scope="aligned", own="exclude", backend="eager"),
        LatticeAttentionConfig(width=8, heads=2, scope="aligned", own="exclude", backend="auto"),
        SameStepConfig(width=4, heads=2, own="exclude"),
    ],
    ids=lambda config: f"{type(config).__name__}-{getattr(config, 'scope', '')}-{getattr(config, 'backend', '')}",
)
def test_gradcheck_also_where_a_query_may_read_nothing(config):
    """Analytic gradients equal finite differences; thread 0 stands alone in column 1, so there it reads nothing."""
    block = build(config)
    hidden = torch.randn(1, 2, 3, WIDTH, dtype=torch.float64)
    visible = torch.tensor([[[False, True, True], [False, False, True]]])
    names = [name for name, _ in block.named_parameters()]
    fixed = [parameter.detach().clone().requires_grad_() for parameter in block.parameters()]

    def function(hidden: Tensor, *parameters: Tensor) -> Tensor:
        # functional_call replaces the weights for one call: the block itself stays as it is
        def exchange(*args: object) -> Tensor:
            return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), args)

        return Lattice({}, visible).apply(exchange, 0, hidden.flatten(0, 1))

    assert gradcheck(function, (hidden.requires_grad_(), *fixed))


@pytest.mark.parametrize("scope, backend", [*(("causal", backend) for backend in BACKENDS), ("aligned", "auto")])
def test_a_query_that_may_read_nothing_gets_exactly_zero_and_no_gradient(scope, backend):
    config = LatticeAttentionConfig(width=8, heads=2, scope=scope, own="exclude", backend=backend)
    hidden = torch.randn(1, 2, 3, WIDTH, dtype=torch.float64)
    visible = torch.tensor([[[True, True, True], [False, False, False]]])  # the only other thread is not there
    block = build(config)
    with torch.set_grad_enabled(not flex_on_cpu(backend)):
        hidden.requires_grad_(not flex_on_cpu(backend))
        out = apply(block, hidden, visible)
        assert torch.equal(out, hidden)
        if out.requires_grad:
            (out - hidden).square().sum().backward()
            assert not any(parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("config", [*CONFIGS[::3], SameStepConfig(width=8, heads=2)], ids=lambda c: type(c).__name__)
def test_whatever_invisible_positions_hold_reaches_nothing_even_if_not_finite(config):
    hidden, visible = lattice_input()
    spoiled = torch.where(visible[..., None], hidden, torch.nan)
    block = build(config)
    clean = values_and_gradients(block, hidden, visible, functional() * visible[..., None])
    dirty = values_and_gradients(block, spoiled, visible, functional() * visible[..., None])
    assert torch.equal(dirty.pop("output")[visible], clean.pop("output")[visible])
    for name, gradient in clean.items():
        assert torch.equal(dirty[name], gradient), name


@pytest.mark.parametrize("config", CONFIGS[:9], ids=name_of)
def test_columns_fed_one_by_one_through_the_cache_read_what_one_pass_reads(config):
    hidden, visible = lattice_input()
    block = build(config)
    whole = apply(block, hidden, visible)
    cache = LatticeCache()
    steps = [
        apply(block, hidden[:, :, [t]], visible[:, :, [t]], first_time=t, cache=cache) for t in range(hidden.shape[2])
    ]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole, rtol=0, atol=1e-13)


def test_only_differences_of_lattice_time_matter():
    hidden, visible = lattice_input()
    block = build(LatticeAttentionConfig(scope="causal", width=8, heads=2))
    early, late = (apply(block, hidden, visible, first_time=t) for t in (-7, 900))
    torch.testing.assert_close(early, late, rtol=0, atol=1e-11)


def test_rotation_by_time_and_thread_both_change_the_result():
    hidden, visible = lattice_input()
    outputs = [
        apply(
            build(LatticeAttentionConfig(scope="causal", width=8, heads=2, time_dims=t, thread_dims=n)), hidden, visible
        )
        for t, n in [(0, 0), (2, 0), (0, 2), (2, 2)]
    ]
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("scope, window", SCOPES)
@pytest.mark.parametrize("own", OWN)
def test_topology_is_the_rule_of_the_paper_position_by_position(scope, window, own):
    num_threads, columns = 3, 5
    positions = [(t, n) for t in range(columns) for n in range(num_threads)]  # time-major
    expected = torch.tensor([[may_read(scope, own, window, n, t, m, s) for s, m in positions] for t, n in positions])
    index = torch.arange(len(positions))
    found = Topology(scope, own, window).allows(index[:, None], index[None], num_threads)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("config", CONFIGS[:9], ids=name_of)
def test_readings_are_the_gates_and_attention_shares_of_the_reference(config):
    hidden, visible = lattice_input()
    block = build(config)
    readings = []
    apply(block, hidden, visible, readings=readings)
    (reading,) = readings
    weights = {name: p.detach() for name, p in block.named_parameters()}
    reference = reference_lattice_attention(hidden, weights, config, visible)
    torch.testing.assert_close(reading.gate[visible], reference.gate[visible], rtol=0, atol=1e-12)
    batch, num_threads, columns = visible.shape
    for b, n in itertools.product(range(batch), range(num_threads)):
        reads = [t for t in range(columns) if visible[b, n, t] and reference.mass[b, n, t].sum() > 0]
        for t in range(columns):
            found = reading.cross_share[b, n, t]
            if t not in reads:
                assert found.isnan()
                continue
            assert found.item() == pytest.approx(1 - reference.mass[b, n, t, n].item(), abs=1e-12)
        shares = sum((reference.mass[b, n, t] for t in reads), torch.zeros(num_threads)) / max(len(reads), 1)
        torch.testing.assert_close(reading.thread_share[b, n], shares, rtol=0, atol=1e-12, check_dtype=False)
    assert torch.equal(reading.visible, visible)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(width=10, heads=4), "heads=4"),
        (dict(heads=0), "heads=0"),
        (dict(scope="future"), "'future'"),
        (dict(own="mine"), "'mine'"),
        (dict(scope="window"), "window=None"),
        (dict(scope="window", window=0), "window=0"),
        (dict(scope="causal", window=3), "window=3"),
        (dict(width=16, heads=2, time_dims=3), "time_dims=3"),
        (dict(width=16, heads=2, time_dims=6, thread_dims=4), "thread_dims=4"),
        (dict(gate="open"), "'open'"),
        (dict(gate="none", gate_bias=1.0), "gate_bias=1.0"),
        (dict(backend="turbo"), "'turbo'"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        LatticeAttentionConfig(**settings)


def test_bfloat16_blocks_stay_near_the_reference():
    """bf16 keeps 8 bits: outputs within two per cent of their size, far times told apart by float32 angles."""
    config = LatticeAttentionConfig(scope="causal", width=8, heads=2)
    hidden, visible = lattice_input()
    found = apply(build(config, torch.bfloat16), hidden.bfloat16(), visible).double()
    assert_same({"output": found}, expected_values_and_gradients(config), 0.02)

"""Attention backends: blocks against the dense mask, who is chosen and why, and the pairs of FlashAttention."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lace_lightning.exchange import LatticeAttentionConfig, backends, flash
from lace_lightning.lattice import LatticeMask, Topology
from tests.helpers import PLAIN_KERNEL, tiny_lm
from tests.test_lattice_attention import OWN, apply, build, lattice_input

SCOPES = [("causal", None), ("window", 7), ("window", 90), ("aligned", None)]


def mask_of(
    topology: Topology, num_threads: int = 3, columns: int = 200, first_column: int = 0, hidden: bool = True
) -> LatticeMask:
    """Two groups, one with single holes, one with a long one, unless nothing is hidden."""
    visible = torch.ones(2, columns * num_threads, dtype=torch.bool)
    if hidden:
        visible[0] = torch.rand(columns * num_threads) > 0.01
        visible[1, 130:420] = False
    first = first_column * num_threads
    return LatticeMask(topology, num_threads, visible, first, columns * num_threads - first)


def in_blocks(dense: Tensor, queries_beyond: bool) -> Tensor:
    """(B, Q, K) -> (B, query blocks, key blocks, pairs in a block); no keys beyond the last, queries as one says."""
    size = backends.BLOCK
    padded = F.pad(dense, (0, -dense.shape[2] % size))
    padded = F.pad(padded, (0, 0, 0, -dense.shape[1] % size), value=queries_beyond)
    return padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("scope, window", SCOPES)
@pytest.mark.parametrize("num_threads, first_column", [(1, 0), (3, 0), (4, 0), (5, 105)])
def test_no_block_is_skipped_or_taken_whole_that_the_dense_mask_would_not(
    own, scope, window, num_threads, first_column
):
    mask = mask_of(Topology(scope, own, window), num_threads, 60 * 5, first_column)
    some, full = backends.block_relations(mask)
    dense = mask.dense[:, 0]
    assert some[in_blocks(dense, False).any(-1)].all()
    assert in_blocks(dense, True).all(-1)[full].all()


@pytest.mark.parametrize("scope, window", [("causal", None), ("window", 90)])
def test_blocks_are_found_where_all_is_visible(scope, window):
    """Neither too cautious: with threads that fill blocks evenly, the borders tell all there is to know."""
    mask = mask_of(Topology(scope, "include", window), 4, 320, hidden=False)
    some, full = backends.block_relations(mask)
    dense = in_blocks(mask.dense[:, 0], False)
    assert torch.equal(some, dense.any(-1)) and torch.equal(full, dense.all(-1)) and full.any()


def test_the_block_mask_of_long_lattices_is_made_once_and_without_looking_at_every_pair():
    mask = mask_of(Topology(), 8, 4096, hidden=False)
    blocks = backends.block_mask(mask)
    assert backends.block_mask(mask) is blocks
    assert blocks.kv_indices.shape == (2, 1, 256, 256)
    assert mask._dense is None


# ---------------------------------------------------------------- who is chosen


def chosen(backend: str, mask: LatticeMask, dtype: torch.dtype = torch.float32, dim: int = 8) -> str:
    attention = backends.choose(backend, mask, backends.Heads(2, dim, dtype))
    return next(name for name, known in backends.BACKENDS.items() if known is attention)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    backends._announce.cache_clear()
    caplog.set_level(logging.INFO, logger=backends.__name__)
    return caplog


@pytest.mark.parametrize(
    "mask, dtype, dim, reason",
    [
        (mask_of(Topology("aligned")), torch.float32, 8, "scope aligned"),
        (mask_of(Topology(), first_column=9), torch.float32, 8, "cached pass"),
        (mask_of(Topology()), torch.float16, 8, "plain needs cpu and float64 or float32 or bfloat16"),
        (mask_of(Topology()), torch.float32, 256, "no heads of width 256"),
    ],
)
def test_flash_gives_way_with_a_reason_and_says_so_once(mask, dtype, dim, reason, log):
    for _ in range(3):
        assert chosen("flash", mask, dtype, dim) == "sdpa"
    (record,) = log.records
    assert "backend=flash: sdpa" in record.message and reason in record.message


def test_flash_is_taken_where_it_can_be_used(monkeypatch):
    calls = []

    def forward(*args: object) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return PLAIN_KERNEL.forward(*args)

    monkeypatch.setitem(flash.KERNELS, "plain", replace(PLAIN_KERNEL, forward=forward))
    hidden, visible = lattice_input()
    apply(build(LatticeAttentionConfig(scope="causal", width=8, heads=2, backend="flash")), hidden, visible)
    assert len(calls) == 1 and chosen("flash", mask_of(Topology())) == "flash"


def test_cuda_kernels_are_refused_on_cpus(monkeypatch):
    monkeypatch.setattr(flash, "INSTALLED", "torch")
    assert "torch needs cuda and bfloat16 or float16" in flash.refusal(mask_of(Topology()), torch.bfloat16, 32)


def test_auto_takes_sdpa_on_cpus(log):
    assert chosen("auto", mask_of(Topology(), columns=600)) == "sdpa"
    assert "backend=auto: sdpa (not on CUDA)" in log.text


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'turbo'.*auto.*flash"):
        backends.choose("turbo", mask_of(Topology()), backends.Heads(2, 8, torch.float32))


# ---------------------------------------------------------------- pairs of threads


def thread_inputs(dim: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, N, L, h, d) float64 and a visibility that leaves some queries nothing to read."""
    q, k, v = torch.randn(3, 2, 3, 5, 2, dim, dtype=torch.float64).unbind(0)
    visible = torch.rand(2, 3, 5) > 0.3
    visible[0, :, 0] = False
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), visible


@pytest.mark.parametrize("own, window", list(itertools.product(OWN, [0, 2])))
@pytest.mark.parametrize("all_visible", [True, False])
def test_pairs_of_threads_have_the_gradients_of_finite_differences(own, window, all_visible):
    *tensors, visible = thread_inputs(dim=3)
    settings = (None if all_visible else visible, own, window, "plain")
    assert torch.autograd.gradcheck(lambda q, k, v: flash.thread_attention(q, k, v, *settings)[0], tensors)


def test_the_operator_keeps_the_promises_that_compilers_rely_on():
    q, k, v, visible = thread_inputs()
    tensors = [x.detach().float().requires_grad_() for x in (q, k, v)]
    for shown in (None, visible):
        torch.library.opcheck(flash.thread_attention, (*tensors, shown, "exclude", 2, "plain"))


def test_the_gradients_have_the_dtypes_that_compilers_are_promised(monkeypatch):
    """A compiled program reads what it is handed as what it was promised."""
    kernel = replace(PLAIN_KERNEL, backward=lambda grad, q, k, v, *rest: (q.clone(), k.clone(), v.clone()))
    monkeypatch.setitem(flash.KERNELS, "plain", kernel)
    q, k, v = (x.detach().bfloat16() for x in thread_inputs()[:3])
    given = (q, q, k, v, None, q, torch.zeros(q.shape[:-1]), "include", 0, "plain")
    torch.library.opcheck(flash._thread_attention_backward, given, test_utils=("test_schema", "test_faketensor"))


def test_kernels_get_whole_steps_of_eight_and_plain_widths_where_all_is_visible(monkeypatch):
    widths = []

    def forward(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        widths.append(q.shape[-1])
        return PLAIN_KERNEL.forward(q, *args)

    monkeypatch.setitem(flash.KERNELS, "plain", replace(PLAIN_KERNEL, forward=forward))
    q, k, v, visible = thread_inputs(dim=16)
    for shown in (None, visible):
        flash.thread_attention(q, k, v, shown, "include", 0, "plain")
    assert widths == [16, 24]


def test_a_single_thread_that_excludes_itself_reads_nothing():
    block = build(LatticeAttentionConfig(scope="causal", width=8, heads=2, own="exclude", backend="flash"))
    hidden, visible = (x[:, :1] for x in lattice_input())
    assert torch.equal(apply(block, hidden, visible), hidden)


def test_models_take_flash_like_any_other_backend():
    model = tiny_lm(LatticeAttentionConfig(scope="causal", width=16, heads=2, backend="flash"))
    other = tiny_lm(LatticeAttentionConfig(scope="causal", width=16, heads=2, backend="eager"))
    ids = torch.randint(1, 40, (2, 3, 9))
    torch.testing.assert_close(model(ids), other(ids), rtol=0, atol=1e-4)

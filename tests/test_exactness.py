"""What must hold exactly (LACE.md §3, claims 1, 2, 3, 5 and 6) through whole models; 4 is in test_decoding.py,
7 in test_lattice_attention.py.

"Bitwise" claims compare passes of one shape, so that every sum adds up in the same order; passes of different shapes
agree within float32 rounding, ``CLOSE`` for logits of a few tens; what really acts moves them by 0.01 and more.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lace_lightning.backbone import token_positions
from lace_lightning.exchange import Isolated, LatticeAttentionConfig
from lace_lightning.lattice import Topology
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import (
    BACKBONES,
    BODIES,
    CASES,
    EXCHANGES,
    VOCAB,
    WITHOUT_IDENTITY_START,
    Case,
    Tokens,
    can_join,
    influence,
    lm_of,
    ragged_groups,
    random_ids,
    tiny_backbone,
    tiny_lm,
    wake,
)

CLOSE = 1e-4
# FlexAttention has no backward pass on CPUs.
WITH_GRADIENTS = [case for case in CASES if case.backend != "flex"]


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


# ---------------------------------------------------------------- 1. identity


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name not in WITHOUT_IDENTITY_START])
@pytest.mark.parametrize("backbone, attn", BODIES)
def test_a_fresh_exchange_gives_the_logits_of_the_bare_model_bitwise(backbone, attn, exchange):
    if not can_join(exchange, backbone):
        pytest.skip(f"{backbone} cannot carry {exchange}: test_backbones.py")
    bare = tiny_backbone(backbone, attn)
    model = ThreadedLM(copy.deepcopy(bare), EXCHANGES[exchange], num_threads=3, layers=[0, 1, 2, 3]).eval()
    ids = random_ids(2, 3, 9)
    with torch.no_grad():
        expected = bare(input_ids=ids.flatten(0, 1)).logits.view(2, 3, 9, -1)
        assert torch.equal(model(ids, prompt_length=4), expected)
        # not vacuous: the same blocks, once trained, do change the logits
        assert largest(wake(model)(ids, prompt_length=4) - expected) > 1e-2


@pytest.mark.parametrize("backbone, attn", BODIES)
def test_left_padded_prompts_give_the_logits_of_the_bare_model_bitwise(backbone, attn):
    bare = tiny_backbone(backbone, attn)
    model = ThreadedLM(copy.deepcopy(bare), EXCHANGES["causal"], layers=[1, 3]).eval()
    ids, mask = random_ids(2, 1, 9), torch.ones(2, 1, 9, dtype=torch.bool)
    mask[1, 0, :3] = False
    positions = (mask[:, 0].long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = bare(input_ids=ids[:, 0], attention_mask=mask[:, 0], position_ids=positions).logits
    assert torch.equal(Tokens(ids, mask, 4).logits(model)[mask], expected[mask[:, 0]])


@pytest.mark.parametrize(
    "exchange", ["causal-others", "aligned-others", "window-others", "same-step-others", "shared", "shared-slots"]
)
@pytest.mark.parametrize("backbone, attn", BODIES)
def test_a_single_thread_without_its_own_positions_is_the_bare_model_bitwise(backbone, attn, exchange):
    if not can_join(exchange, backbone):
        pytest.skip(f"{backbone} cannot carry {exchange}: test_backbones.py")
    bare = tiny_backbone(backbone, attn)
    model = wake(ThreadedLM(copy.deepcopy(bare), EXCHANGES[exchange], num_threads=1, layers=[1, 2])).eval()
    ids = random_ids(2, 1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids), bare(input_ids=ids[:, 0]).logits[:, None])


# ---------------------------------------------------------------- 2. no future


def assert_no_future(model: ThreadedLM, tokens: Tokens, gradients: bool = True) -> None:
    """Changing a token changes no logit of an earlier column in any thread, in values and in gradients."""
    before = tokens.logits(model)
    for t in range(1, tokens.input_ids.shape[-1]):
        real = tokens.attention_mask[..., :t]
        n = t % tokens.input_ids.shape[1]
        changed = tokens.input_ids.clone()
        changed[:, n, t] = changed[:, n, t] % (VOCAB - 1) + 1
        after = tokens.with_ids(changed).logits(model)
        assert torch.equal(after[..., :t, :][real], before[..., :t, :][real]), f"({n}, {t}) reaches back"
        if gradients:
            watched = tokens.attention_mask.clone()
            watched[..., t:] = False
            assert not influence(model, tokens, watched)[..., t:].any(), f"gradients flow back from t'={t}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_token_reaches_back_in_lattice_time(case):
    assert_no_future(lm_of(case), ragged_groups(), gradients=case in WITH_GRADIENTS)


@pytest.mark.parametrize("exchange", ["causal", "window-others", "on-prompt", "top-k", "shared"])
def test_a_mask_that_lets_the_future_through_is_caught(exchange, monkeypatch):
    allows = Topology.allows

    def one_column_too_many(self, query, key, num_threads):
        return allows(self, query + num_threads, key, num_threads)

    model = lm_of(Case("qwen3", "sdpa", exchange))
    monkeypatch.setattr(Topology, "allows", one_column_too_many)
    with pytest.raises(AssertionError, match="reaches back"):
        assert_no_future(model, ragged_groups(), gradients=False)
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    with pytest.raises(AssertionError, match="gradients flow back"):
        assert_no_future(model, ragged_groups())


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=str)
def test_threads_reach_each_other_exactly_where_the_exchange_says_so(case):
    """Gradients of one token's logits on the other threads: non-zero in its own column if they stand there, zero on
    their futures, zero everywhere under the control that reads only its own thread."""
    model, tokens = lm_of(case), ragged_groups()
    t, n = 9, 1
    watched = torch.zeros_like(tokens.attention_mask)
    watched[:, n, t] = True
    reached = influence(model, tokens, watched)
    others = torch.ones(tokens.input_ids.shape[1], dtype=torch.bool)
    others[n] = False
    assert (reached[:, n, t] > 0).all()
    if not case.crosses:
        assert not reached[:, others].any()
        return
    standing = tokens.attention_mask[:, others, t]
    assert standing.all()
    assert (reached[:, others, t] > 1e-7).all()
    assert not reached[:, others, t + 1 :].any()


# ---------------------------------------------------------------- 3. no neighbour


@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_groups_change_nothing(case):
    model, tokens = lm_of(case), ragged_groups()
    before = tokens.logits(model)[0]
    changed = tokens.input_ids.clone()
    changed[1] = random_ids(*changed[1].shape, seed=77)
    assert torch.equal(tokens.with_ids(changed).logits(model)[0], before)
    alone = Tokens(tokens.input_ids[:1], tokens.attention_mask[:1], tokens.prompt_length).logits(model)[0]
    real = tokens.attention_mask[0]
    assert largest((alone - before)[real]) < CLOSE
    if case in WITH_GRADIENTS:
        watched = tokens.attention_mask.clone()
        watched[1] = False
        assert not influence(model, tokens, watched)[1].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_stands_at_padding_and_waiting_columns_changes_nothing(case):
    model, tokens = lm_of(case), ragged_groups()
    real = tokens.attention_mask
    junk = torch.where(real, tokens.input_ids, random_ids(*real.shape, seed=78))
    assert torch.equal(tokens.with_ids(junk).logits(model)[real], tokens.logits(model)[real])
    if case in WITH_GRADIENTS:
        assert not influence(model, tokens, real)[~real].any()


@pytest.mark.parametrize("backbone, attn", BODIES)
def test_an_isolated_thread_with_holes_is_the_thread_without_them(backbone, attn):
    """Padding and waiting columns cost no position and no room in a sliding window."""
    model = tiny_lm(Isolated(), backbone, attn)
    bare, tokens = model.backbone, ragged_groups()
    logits = tokens.logits(model)
    for b, n in torch.ones(tokens.input_ids.shape[:2]).nonzero().tolist():
        real = tokens.attention_mask[b, n]
        with torch.no_grad():
            compact = bare(input_ids=tokens.input_ids[b, n, real][None]).logits[0]
        assert largest(logits[b, n, real] - compact) < CLOSE


def insert_empty_columns(tokens: Tokens, at: int, count: int) -> tuple[Tokens, Tensor]:
    """The same groups with ``count`` columns in which everybody waits; and where the old columns went."""
    columns = torch.arange(tokens.input_ids.shape[-1])
    places = columns + count * (columns >= at)
    shape = (*tokens.input_ids.shape[:2], len(columns) + count)
    ids, mask = random_ids(*shape, seed=79), torch.zeros(shape, dtype=torch.bool)
    ids[..., places], mask[..., places] = tokens.input_ids, tokens.attention_mask
    return Tokens(ids, mask, tokens.prompt_length), places


@pytest.mark.parametrize("case", [case for case in CASES if "sdpa" in (case.backend, case.attn)], ids=str)
def test_columns_after_the_end_change_nothing(case):
    model, tokens = lm_of(case), ragged_groups()
    longer, places = insert_empty_columns(tokens, at=tokens.input_ids.shape[-1], count=3)
    difference = longer.logits(model)[..., places, :] - tokens.logits(model)
    assert largest(difference[tokens.attention_mask]) < CLOSE


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("exchange", ["aligned", "same-step", "timeless"])
def test_a_column_in_which_everybody_waits_changes_nothing(backbone, exchange):
    """Exchanges that read one column, or that do not know lattice time, cannot tell that it was there."""
    timeless = replace(EXCHANGES["causal"], time_dims=0)
    model = tiny_lm(timeless if exchange == "timeless" else EXCHANGES[exchange], backbone, "eager")
    tokens = ragged_groups()
    longer, places = insert_empty_columns(tokens, at=8, count=2)
    difference = longer.logits(model)[..., places, :] - tokens.logits(model)
    assert largest(difference[tokens.attention_mask]) < CLOSE


# ---------------------------------------------------------------- 5. prompt once


@pytest.mark.parametrize("case", [case for case in CASES if "on-prompt" not in case.exchange], ids=str)
def test_the_prompt_computed_once_is_the_prompt_computed_n_times(case):
    """Inside the N threads the prompt columns get what one plain pass over the prompt gives, bitwise across threads."""
    model, tokens = lm_of(case), ragged_groups()
    prompt, mask = (x[:, 0, : tokens.prompt_length] for x in (tokens.input_ids, tokens.attention_mask))
    with torch.no_grad():
        once = model.head(model.run(prompt, mask, lattice=None))
    in_threads = tokens.logits(model)[:, :, : tokens.prompt_length]
    for n in range(in_threads.shape[1]):
        assert torch.equal(in_threads[:, n][mask], in_threads[:, 0][mask])
        assert largest((in_threads[:, n] - once)[mask]) < CLOSE


@pytest.mark.parametrize("exchange", ["on-prompt", "aligned-on-prompt"])
def test_with_the_exchange_on_prompt_columns_the_prompt_does_change(exchange):
    model, tokens = lm_of(Case("qwen3", "sdpa", exchange)), ragged_groups()
    prompt, mask = (x[:, 0, : tokens.prompt_length] for x in (tokens.input_ids, tokens.attention_mask))
    with torch.no_grad():
        once = model.head(model.run(prompt, mask, lattice=None))
    assert largest((tokens.logits(model)[:, 0, : tokens.prompt_length] - once)[mask]) > 1e-2


# ---------------------------------------------------------------- 6. permutation


def permutation_error(model: ThreadedLM, tokens: Tokens) -> float:
    """How far permuting the threads is from permuting their logits."""
    order = torch.tensor([2, 0, 1])
    permuted = Tokens(tokens.input_ids[:, order], tokens.attention_mask[:, order], tokens.prompt_length)
    difference = permuted.logits(model) - tokens.logits(model)[:, order]
    return largest(difference[permuted.attention_mask])


def without_thread_dims(name: str):
    config = EXCHANGES[name]
    return replace(config, thread_dims=0) if isinstance(config, LatticeAttentionConfig) else config


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "shared-slots"])
def test_without_thread_dims_permuting_threads_permutes_the_outputs(exchange):
    assert permutation_error(tiny_lm(without_thread_dims(exchange)), ragged_groups()) < CLOSE


@pytest.mark.parametrize("backbone, attn", BODIES)
def test_on_every_backbone_permuting_threads_permutes_the_outputs(backbone, attn):
    assert permutation_error(tiny_lm(without_thread_dims("causal"), backbone, attn), ragged_groups()) < CLOSE


@pytest.mark.parametrize("exchange", ["causal", "aligned", "window-others", "top-k", "shared-slots"])
def test_with_thread_dims_the_order_of_threads_matters(exchange):
    assert permutation_error(lm_of(Case("qwen3", "sdpa", exchange)), ragged_groups()) > 1e-3


# ---------------------------------------------------------------- positions


def test_positions_count_only_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0]], dtype=torch.bool)
    assert token_positions(mask).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]

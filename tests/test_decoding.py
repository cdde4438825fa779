"""Group decoding: cached lock-step decoding is the full forward pass (LACE.md §3, claim 4), who writes when, and what
comes out as text."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lace_lightning.decoding import (
    FREE,
    Column,
    Engine,
    Environment,
    GroupDecoder,
    Rollout,
    Sampling,
    generate_groups,
    group_seed,
    make_decoder,
    to_groups,
)
from lace_lightning.decoding import gates as gates_file
from lace_lightning.decoding.decoder import left_pad
from lace_lightning.decoding.gates import GateReader
from lace_lightning.decoding.plain import PlainSteps
from lace_lightning.puzzles.vocabulary import word_tokenizer
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem, Tag
from lace_lightning.traces.template import Template
from tests.helpers import CASES, EXCHANGES, VOCAB, Case, Tokens, lm_of, tiny_lm

CLOSE = 1e-4
PAD, EOS, OPENING = 0, [36, 37, 38, 39], [5, 6]
PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14], [15]]


class Script(Environment):
    """Dictates tokens: thread n of group b gets the next of ``lines[b][n]`` whenever it has written; None is free."""

    def __init__(self, lines: list[list[list[int | None]]]) -> None:
        self._lines = [[list(thread) for thread in group] for group in lines]
        self.seen: list[tuple[Tensor, Tensor]] = []

    def step(self, tokens: Tensor, written: Tensor) -> Tensor:
        self.seen.append((tokens.clone(), written.clone()))
        forced = torch.full_like(tokens, FREE)
        for b, n in written.nonzero().tolist():
            if self._lines[b][n]:
                token = self._lines[b][n].pop(0)
                forced[b, n] = FREE if token is None else token
        return forced


def decoder(
    model: ThreadedLM,
    max_new_tokens: int = 14,
    opening: list[int] | None = None,
    engine: Engine = "auto",
    **sampling,
) -> GroupDecoder:
    return GroupDecoder(model, Sampling(**sampling), max_new_tokens, EOS, PAD, opening, engine)


def eventful(model: ThreadedLM, engine: Engine = "auto", **sampling) -> Rollout:
    """Three groups with prompts of 3, 5 and 1 tokens: forced tokens, waits at the barrier, early ends, the limit."""
    script = Script(
        [
            [[20, *OPENING, 21], [None, None, None, *OPENING, None, 22], [None, EOS[0]]],
            [[None, None, *OPENING], [*OPENING, None], [None, None, None, 23, *OPENING]],
            [[24, 25], [None, EOS[1]], [None] * 4 + [26]],
        ]
    )
    return decoder(model, opening=OPENING, engine=engine, **sampling).decode(PROMPTS, 3, [11, 12, 13], script)


def rescored(model: ThreadedLM, rollout: Rollout) -> Tensor:
    with torch.no_grad():
        return model.token_logprobs(rollout.input_ids, rollout.attention_mask, rollout.chosen, rollout.prompt_length)


def has_fast_engine(case: Case) -> bool:
    return case.backbone in ("qwen3", "llama") and "on-prompt" not in case.exchange and "shared" not in case.exchange


ON_ENGINES = [(case, "plain") for case in CASES if case.backend != "flex"]
ON_ENGINES += [(case, "fast") for case, _ in ON_ENGINES if has_fast_engine(case)]


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_the_eventful_rollout_has_all_events(engine):
    rollout = eventful(lm_of(CASES[0]), engine)
    response = rollout.attention_mask[..., rollout.prompt_length :]
    assert not rollout.attention_mask[..., : rollout.prompt_length].all(), "no padded prompt"
    resumed = (~response[..., :-1] & response[..., 1:]).any(-1)
    assert resumed.sum() >= 3, "hardly any thread waited and went on"
    ends = response.sum(-1)
    assert rollout.finished.any() and not rollout.finished.all() and ends.unique().numel() > 3
    assert rollout.forced.any() and rollout.chosen.sum() > 40


# ---------------------------------------------------------------- 4. decode = train


@pytest.mark.parametrize("case, engine", ON_ENGINES, ids=str)
def test_cached_decoding_gives_the_logprobs_of_one_full_forward_pass(case, engine):
    model = lm_of(case)
    rollout = eventful(model, engine)
    assert (rescored(model, rollout) - rollout.logprobs).abs().max() < CLOSE
    assert torch.equal(rollout.logprobs != 0, rollout.chosen)


def test_cached_decoding_on_flex_gives_the_logprobs_of_one_full_forward_pass():
    """A query of one column against a longer cache, through FlexAttention's block masks."""
    model = lm_of(Case("qwen3", "sdpa", "window-others", "flex"))
    rollout = eventful(model)
    assert (rescored(model, rollout) - rollout.logprobs).abs().max() < CLOSE


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_every_column_comes_from_the_logits_of_a_full_forward_pass_over_what_stood_before(engine, monkeypatch):
    """All logits, not only those of drawn tokens; a waiting thread keeps those of its last token."""
    model, seen = lm_of(CASES[0]), []
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda self, logits, u: (seen.append(logits), draw(self, logits, u))[1])
    rollout = eventful(model, engine)
    full = Tokens(rollout.input_ids, rollout.attention_mask, rollout.prompt_length).logits(model)
    for time, logits in enumerate(seen):
        column = rollout.prompt_length + time
        for b, n in rollout.attention_mask[..., column].nonzero().tolist():
            previous = rollout.attention_mask[b, n, :column].nonzero().max()
            assert (logits[b, n] - full[b, n, previous]).abs().max() < CLOSE


def test_temperature_does_not_change_the_logprobs_that_are_recorded():
    model = lm_of(CASES[0])
    rollout = eventful(model, temperature=0.5, top_k=7, top_p=0.9, min_p=0.01)
    assert (rescored(model, rollout) - rollout.logprobs).abs().max() < CLOSE


@pytest.mark.parametrize(
    "exchange, engine, rows",
    [
        ("causal", "plain", len(PROMPTS)),
        ("causal", "fast", len(PROMPTS)),
        ("on-prompt", "plain", 3 * len(PROMPTS)),
    ],
)
def test_the_prompt_is_computed_once_per_group_unless_threads_exchange_on_it(exchange, engine, rows):
    """What passes through the Hugging Face model: on the fast engine nothing but the prompt."""
    model, shapes = lm_of(Case("qwen3", "sdpa", exchange, "sdpa")), []
    hook = model.backbone.get_input_embeddings().register_forward_hook(
        lambda m, a, o: shapes.append(tuple(o.shape[:2]))
    )
    eventful(model, engine)
    hook.remove()
    assert shapes[0] == (rows, 5)
    assert set(shapes[1:]) == ({(9, 1)} if engine == "plain" else set())


# ---------------------------------------------------------------- who writes when


def written(rollout: Rollout, b: int = 0) -> list[list[int]]:
    """Response columns that each thread of group b wrote in."""
    response = rollout.attention_mask[b, :, rollout.prompt_length :]
    return [row.nonzero().flatten().tolist() for row in response]


def tokens_of(rollout: Rollout, b: int, n: int) -> list[int]:
    real = rollout.attention_mask[b, n].clone()
    real[: rollout.prompt_length] = False
    return rollout.input_ids[b, n, real].tolist()


BARRIER_SCRIPT = [[[*OPENING, 21, 22, EOS[0]], [20, 20, 20, *OPENING, 23, EOS[0]], [20, EOS[0]]]]
"""The first column is free: openings are complete in columns 2 and 5, thread 2 ends in column 2."""


def test_a_thread_that_has_opened_its_assessment_waits_until_all_have_opened_or_ended():
    rollout = decoder(lm_of(CASES[0]), opening=OPENING).decode([[7]], 3, [1], Script(BARRIER_SCRIPT))
    assert written(rollout) == [[0, 1, 2, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2]]
    assert rollout.finished.all()


def test_what_is_due_for_a_waiting_thread_is_written_when_it_goes_on():
    rollout = decoder(lm_of(CASES[0]), opening=OPENING).decode([[7]], 3, [1], Script(BARRIER_SCRIPT))
    assert tokens_of(rollout, 0, 0)[1:] == [*OPENING, 21, 22, EOS[0]]
    assert tokens_of(rollout, 0, 1)[1:] == [20, 20, 20, *OPENING, 23, EOS[0]]
    start = rollout.prompt_length
    assert rollout.forced[0, 0, start:].tolist() == [t in (1, 2, 6, 7, 8) for t in range(9)]


def test_without_a_barrier_no_thread_waits():
    rollout = decoder(lm_of(CASES[0]), opening=None).decode([[7]], 3, [1], Script(BARRIER_SCRIPT))
    assert written(rollout) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2]]


def test_groups_do_not_wait_for_each_other():
    lines = [*BARRIER_SCRIPT, [[*OPENING, 21, EOS[0]], [*OPENING, EOS[0]], [*OPENING, EOS[0]]]]
    rollout = decoder(lm_of(CASES[0]), opening=OPENING).decode([[7], [8]], 3, [1, 1], Script(lines))
    assert written(rollout, 0) == [[0, 1, 2, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2]]
    assert written(rollout, 1) == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_an_interrupted_opening_does_not_count():
    lines = [[[OPENING[0], 20, OPENING[1], 20, EOS[0]], [20, *OPENING, EOS[0]], [20, 20, 20, *OPENING, EOS[0]]]]
    rollout = decoder(lm_of(CASES[0]), opening=OPENING).decode([[7]], 3, [1], Script(lines))
    assert written(rollout) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_an_opening_in_the_prompt_does_not_count():
    rollout = decoder(lm_of(CASES[0]), opening=OPENING).decode([OPENING], 2, [1], Script([[[20] * 13, [20] * 13]]))
    assert rollout.attention_mask.all()


def test_the_environment_sees_every_column_once_and_nothing_after_the_end():
    script = Script(BARRIER_SCRIPT)
    rollout = decoder(lm_of(CASES[0]), opening=OPENING).decode([[7]], 3, [1], script)
    start = rollout.prompt_length
    assert len(script.seen) == rollout.input_ids.shape[-1] - start
    for time, (tokens, mask) in enumerate(script.seen):
        assert torch.equal(mask, rollout.attention_mask[..., start + time])
        assert torch.equal(tokens[mask], rollout.input_ids[..., start + time][mask])


def test_forced_tokens_carry_no_logprob_and_are_not_chosen():
    rollout = eventful(lm_of(CASES[0]))
    assert not rollout.logprobs[rollout.forced].any()
    assert not (rollout.chosen & rollout.forced).any()
    assert not rollout.chosen[..., : rollout.prompt_length].any()
    assert torch.equal(
        rollout.chosen | rollout.forced, rollout.attention_mask & (torch.arange(19) >= rollout.prompt_length)
    )


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_the_limit_of_new_tokens_is_respected(limit):
    nobody_ends = GroupDecoder(lm_of(CASES[0]), Sampling(), limit, [VOCAB + 7], PAD)
    rollout = nobody_ends.decode(PROMPTS, 3, [1, 2, 3])
    assert rollout.input_ids.shape == (3, 3, 5 + limit)
    assert rollout.attention_mask[..., 5:].all() and not rollout.finished.any()


def test_decoding_stops_once_every_thread_has_ended():
    rollout = decoder(lm_of(CASES[0]), 50).decode([[7]], 2, [1], Script([[[20, EOS[2]], [EOS[3]]]]))
    assert rollout.input_ids.shape[-1] == 1 + 3 and rollout.finished.all()
    assert rollout.attention_mask[0, :, 1:].tolist() == [[True, True, True], [True, True, False]]
    assert rollout.input_ids[0, 1, -1] == PAD


def test_prompts_are_left_padded_and_shared_by_all_threads():
    rollout = eventful(lm_of(CASES[0]))
    for b, n in itertools.product(range(3), range(3)):
        real = rollout.attention_mask[b, n, : rollout.prompt_length]
        assert rollout.input_ids[b, n, : rollout.prompt_length][real].tolist() == PROMPTS[b]
        assert real.tolist() == sorted(real.tolist())


@pytest.mark.parametrize("exchange", ["causal", "aligned-others", "same-step", "on-prompt"])
def test_a_group_is_the_same_whatever_else_is_in_the_batch(exchange):
    """Also beside longer prompts, and beside groups that go on after it has ended."""
    backend = "auto" if exchange == "same-step" else "sdpa"
    rules = decoder(lm_of(Case("qwen3", "sdpa", exchange, backend)))
    alone = rules.decode([PROMPTS[0]], 3, [21])
    for prompts, seeds in [([PROMPTS[1], PROMPTS[0]], [5, 21]), ([PROMPTS[0], PROMPTS[2]], [21, 21])]:
        beside = rules.decode(prompts, 3, seeds)
        b = prompts.index(PROMPTS[0])
        for n in range(3):
            assert tokens_of(beside, b, n) == tokens_of(alone, 0, n)
        found = beside.logprobs[b][beside.chosen[b]]
        torch.testing.assert_close(found, alone.logprobs[0][alone.chosen[0]], rtol=0, atol=CLOSE)


def test_another_seed_gives_another_group_and_threads_differ():
    rules = decoder(lm_of(CASES[0]))
    one, same, other = (rules.decode([PROMPTS[0]], 3, [seed]) for seed in (1, 1, 2))
    assert torch.equal(one.input_ids, same.input_ids) and torch.equal(one.logprobs, same.logprobs)
    assert [tokens_of(one, 0, n) for n in range(3)] != [tokens_of(other, 0, n) for n in range(3)]
    assert len({tuple(tokens_of(one, 0, n)) for n in range(3)}) == 3


def test_at_temperature_zero_isolated_threads_agree_and_take_the_most_probable_tokens():
    model = tiny_lm()
    rollout = decoder(model, temperature=0).decode(PROMPTS, 3, [1, 2, 3])
    assert all(tokens_of(rollout, b, n) == tokens_of(rollout, b, 0) for b in range(3) for n in range(3))
    logits = Tokens(rollout.input_ids, rollout.attention_mask, rollout.prompt_length).logits(model)
    best = logits.argmax(-1)[..., rollout.prompt_length - 1 : -1]
    response = rollout.chosen[..., rollout.prompt_length :]
    assert torch.equal(best[response], rollout.input_ids[..., rollout.prompt_length :][response])


def test_streaming_sees_exactly_what_the_rollout_holds():
    columns: list[Column] = []
    rollout = decoder(lm_of(CASES[0])).decode(PROMPTS, 3, [1, 2, 3], on_column=columns.append)
    start = rollout.prompt_length
    assert [column.time for column in columns] == list(range(rollout.input_ids.shape[-1] - start))
    for name, held in [
        ("tokens", rollout.input_ids),
        ("written", rollout.attention_mask),
        ("forced", rollout.forced),
        ("logprobs", rollout.logprobs),
    ]:
        assert torch.equal(torch.stack([getattr(column, name) for column in columns], -1), held[..., start:])


@pytest.mark.parametrize("case", [case for case in CASES if case.backend in ("sdpa", "auto")], ids=str)
@pytest.mark.parametrize("at_once", [1, 5])
def test_gates_read_while_decoding_are_those_of_one_full_forward_pass(case, at_once, monkeypatch):
    """With waits, early ends and forced tokens; columns come one by one or several at once, in short passes."""
    model, columns = lm_of(case), []
    prompts = left_pad(PROMPTS, PAD, torch.device("cpu"))
    reader, passes = GateReader(model, *prompts, 3), []
    read = PlainSteps.read
    monkeypatch.setattr(
        PlainSteps, "read", lambda self, *args: (passes.append(args[0].shape[-1]), read(self, *args))[1]
    )
    monkeypatch.setattr(gates_file, "MAX_PAIRS", 800)  # one or two columns of 3 groups of 3 threads
    rollout = decoder(model, opening=OPENING).decode(PROMPTS, 3, [1, 2, 3], on_column=columns.append)
    readings = model.read(rollout.input_ids, rollout.attention_mask, rollout.prompt_length)
    batches = [columns[at : at + at_once] for at in range(0, len(columns), at_once)]
    found = [
        reader.read(*(torch.stack([getattr(c, name) for c in batch], -1) for name in ("tokens", "written")))
        for batch in batches
    ]
    assert set(passes) == {1, 2} if at_once == 5 else {1}
    assert reader._length == rollout.input_ids.shape[-1], "what it takes room for"
    if not readings:
        assert found == [None] * len(batches)
        return
    written = rollout.attention_mask[..., rollout.prompt_length :]
    full = torch.stack([reading.gate for reading in readings]).mean(0)[..., -written.shape[-1] :]
    assert (torch.cat(found, dim=-1) - full)[written].abs().max() < 1e-5
    assert full[written].std() > 1e-3 or case.exchange == "ungated", "gates that are all alike show nothing"


def test_rules_that_cannot_work_are_refused():
    model = lm_of(CASES[0])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        GroupDecoder(model, Sampling(), 0, EOS, PAD)
    with pytest.raises(ValueError, match="eos_token"):
        GroupDecoder(model, Sampling(), 5, [], PAD)
    with pytest.raises(ValueError, match="prompt has no tokens"):
        decoder(model).decode([[7], []], 2, [1, 2])


# ---------------------------------------------------------------- as text

WORDS = ["assess", ":", *Tag, *(f"w{i}" for i in range(VOCAB - 9))]
TEMPLATE = Template(prompt="{text}", opening="assess :", answer="{answer}", separator=" ")


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


def spelled(tokenizer, *threads: str) -> tuple[Tensor, Tensor]:
    """(1, N, L) ids and mask of threads written as words, ``_`` for a column without a token."""
    columns = max(len(thread.split()) for thread in threads)
    ids = torch.zeros(1, len(threads), columns, dtype=torch.long)
    for n, thread in enumerate(threads):
        for c, word in enumerate(thread.split()):
            ids[0, n, c] = 0 if word == "_" else tokenizer.convert_tokens_to_ids(word)
    return ids, ids != 0


def test_groups_spell_out_answers_tags_observations_and_columns(tokenizer):
    ids, mask = spelled(
        tokenizer,
        "<bos> w0 w1 w2 w3 assess : _ w7 [[best]] <eos>",
        "<bos> w0 w1 w2 w4 w5 assess : w8 w9 [[fail]]",
        "<bos> w0 w1 assess : [[success]] [[fail]] <eos> _ _ _",
        "<bos> w0 w1 w6 <eos>",
    )
    forced = torch.zeros_like(mask)
    forced[0, 0, 3] = forced[0, 1, 3] = forced[0, 1, 5] = forced[0, 1, 8] = True
    logprobs = -torch.arange(ids.shape[-1], dtype=torch.float32).expand(ids.shape)
    finished = torch.tensor([[True, False, True, True]])
    rollout = Rollout(ids, mask, forced, logprobs, 2, finished)
    problem = Problem("p", "w0", "w7")
    (group,) = to_groups(rollout, [problem], [99], tokenizer, TEMPLATE)
    first, second, third, fourth = group.threads
    assert (group.problem, group.seed) == (problem, 99)
    assert first.text == "w1 w2 w3 assess : w7 [[best]]"
    assert first.thought == "w1 w3" and first.observations == ("w2",)
    assert (first.answer, first.tag, first.finished) == ("w7", Tag.BEST, "eos")
    assert first.columns == (0, 1, 2, 3, 4, 6, 7, 8) and first.num_tokens == 8
    assert first.logprobs == (-2, -3, -4, -5, -6, -8, -9, -10)
    assert first.forced == (False, True, False, False, False, False, False, False)
    assert first.token_ids == tuple(ids[0, 0, 2:][mask[0, 0, 2:]].tolist())
    assert (second.answer, second.tag, second.finished) == ("w8 w9", Tag.FAIL, "length")
    assert second.thought == "w1 w4" and second.observations == ("w2", "w5", "w8")
    assert third.tag is None
    assert (fourth.thought, fourth.answer, fourth.tag) == ("w1 w6", None, None)
    assert group.tags == [Tag.BEST, Tag.FAIL, None, None]
    assert not group.has_valid_tags and group.best is None


@pytest.fixture
def writer(tokenizer) -> ThreadedLM:
    model = tiny_lm(EXCHANGES["causal"])
    model.tokenizer = tokenizer
    return model


def test_generate_groups_end_to_end(writer):
    prompts = ["w0 w1 w2", "w3"]
    groups = writer.generate_groups(prompts, max_new_tokens=12, seed=3, template=TEMPLATE, temperature=1.3)
    assert [group.problem.text for group in groups] == prompts
    for group in groups:
        assert len(group.threads) == writer.num_threads
        for thread in group.threads:
            assert 1 <= thread.num_tokens <= 12 and max(thread.columns) < 12
            assert list(thread.columns) == sorted(set(thread.columns))
            assert len(thread.logprobs) == len(thread.forced) == thread.num_tokens
            assert (thread.finished == "eos") == (thread.token_ids[-1] == writer.tokenizer.eos_token_id)
            shown = [i for i in thread.token_ids if i not in writer.tokenizer.all_special_ids]
            assert thread.text == writer.tokenizer.decode(shown)
    # its log-probabilities are those of the full forward pass
    thread_ids = [thread.token_ids for thread in groups[0].threads]
    prompt = TEMPLATE.encode_prompt(prompts[0], writer.tokenizer)
    length = len(prompt) + 12
    ids, mask = torch.zeros(1, 3, length, dtype=torch.long), torch.zeros(1, 3, length, dtype=torch.bool)
    for n, thread in enumerate(groups[0].threads):
        places = torch.tensor([*range(len(prompt)), *(len(prompt) + c for c in thread.columns)])
        ids[0, n, places], mask[0, n, places] = torch.tensor([*prompt, *thread_ids[n]]), True
    targets = mask & (torch.arange(length) >= len(prompt))
    with torch.no_grad():
        expected = writer.token_logprobs(ids, mask, targets, len(prompt))
    for n, thread in enumerate(groups[0].threads):
        torch.testing.assert_close(torch.tensor(thread.logprobs), expected[0, n][targets[0, n]], rtol=0, atol=CLOSE)


def test_generate_groups_depends_on_prompt_and_seed_not_on_place_or_company(writer):
    def texts(prompts: list[str], seed: int = 0) -> list[list[str]]:
        groups = writer.generate_groups(prompts, max_new_tokens=8, seed=seed, template=TEMPLATE)
        return [[thread.text for thread in group.threads] for group in groups]

    one, two = texts(["w0 w1"])[0], texts(["w2 w3 w4 w5"])[0]
    assert texts(["w0 w1", "w2 w3 w4 w5"]) == [one, two]
    assert texts(["w2 w3 w4 w5", "w0 w1"]) == [two, one]
    first, second = texts(["w0 w1", "w0 w1"])
    assert first == one and second != one, "copies of a prompt are further samples, not repetitions"
    assert texts(["w0 w1"], seed=1)[0] != one


def test_generate_groups_takes_environment_and_streaming(writer, tokenizer):
    word = tokenizer.convert_tokens_to_ids("w5")
    columns: list[Column] = []
    (group,) = generate_groups(
        writer, ["w0"], 4, 0, TEMPLATE, Script([[[word], [None, word], []]]), columns.append, temperature=0.5
    )
    assert len(columns) == max(thread.columns[-1] for thread in group.threads) + 1
    assert group.threads[0].token_ids[1] == word and group.threads[0].forced[1]
    assert group.threads[0].observations == ("w5",)


@pytest.mark.parametrize("training", [True, False])
def test_generate_groups_decodes_in_eval_mode_and_restores_the_models_mode(writer, training):
    writer.train(training)
    modes = []
    generate_groups(writer, ["w0"], 2, 0, TEMPLATE, on_column=lambda _: modes.append(writer.training))
    assert not any(modes) and writer.training == training

    def fail(column: Column) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate_groups(writer, ["w0"], 2, 0, TEMPLATE, on_column=fail)
    assert writer.training == training


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="has no tokenizer"):
        tiny_lm().generate_groups(["w0"], max_new_tokens=2)


def test_a_tokenizer_without_end_token_or_opening_is_refused(writer, tokenizer):
    with pytest.raises(ValueError, match="template.opening='unheard of'"):
        make_decoder(writer, tokenizer, replace(TEMPLATE, opening="unheard of"), 4, Sampling())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        make_decoder(writer, tokenizer, TEMPLATE, 4, Sampling())


def test_make_decoder_takes_its_rules_from_tokenizer_and_template(writer, tokenizer):
    rules = make_decoder(writer, tokenizer, TEMPLATE, 4, Sampling()).rules
    assert (rules.eos_ids, rules.pad_id) == ((2,), 0)
    assert list(rules.opening_ids) == tokenizer.convert_tokens_to_ids(["assess", ":"])
    assert make_decoder(writer, tokenizer, TEMPLATE, 4, Sampling(), barrier=False).rules.opening_ids == ()
    assert group_seed(0, "w0", 0) != group_seed(0, "w0", 1)

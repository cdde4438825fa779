"""HuggingFaceChat: the same request gives the same reply, the template is the model's own, bad requests are errors."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lace_lightning.synthesis.chat import ChatError, ChatRequest
from lace_lightning.synthesis.chats import CachedChat, HuggingFaceChat
from lace_lightning.traces.template import Template
from tests.chat_models import ANSWERS, POSITIONS, byte_tokenizer, save_chat_model, tiny_llama


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Writes noise: every draw matters."""
    return str(save_chat_model(tmp_path_factory.mktemp("untrained"), is_trained=False))


def question(text: str, **options) -> ChatRequest:
    return ChatRequest((("user", text),), **{"max_tokens": 24} | options)


def test_a_trained_model_gives_its_answers_through_its_template(trained):
    replies = HuggingFaceChat(trained).ask([question(text, temperature=0) for text in ANSWERS])
    assert [reply.text for reply in replies] == list(ANSWERS.values())
    for reply, (asked, answer) in zip(replies, ANSWERS.items(), strict=True):
        assert reply.finish == "stop"
        prompt = f"user\n{asked}assistant\n"
        assert reply.prompt_tokens == len(prompt.encode()) + 3, "each special token is one, each byte is one"
        assert reply.completion_tokens == len(answer.encode()) + 1, "the end of the turn counts"


def test_greedy_replies_are_those_of_transformers(untrained):
    chat, tokenizer = HuggingFaceChat(untrained), byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(untrained)
    texts = ["a", "a longer question", "why?"]
    replies = chat.ask([question(text, temperature=0) for text in texts])
    for text, reply in zip(texts, replies, strict=True):
        ids = tokenizer.encode(f"<|start|>user\n{text}<|end|><|start|>assistant\n", return_tensors="pt")
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert reply.text == tokenizer.decode(out, skip_special_tokens=True)


def mixed_requests() -> list[ChatRequest]:
    settings = [{"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.8}, {"max_tokens": 9}]
    return [question("x" * (1 + i % 7), seed=i, **settings[i % 3]) for i in range(18)]


def test_asked_one_at_a_time_the_same_request_has_exactly_the_same_reply(untrained):
    requests = mixed_requests()
    order = random.Random(1).sample(range(18), 18)
    in_order = HuggingFaceChat(untrained, batch_size=1).ask(requests)
    shuffled = HuggingFaceChat(untrained, batch_size=1).ask([requests[i] for i in order])
    assert shuffled == [in_order[i] for i in order]


@pytest.mark.parametrize("batch_size", [5, 18])
def test_in_any_batch_the_same_request_has_the_same_reply_up_to_rounding(untrained, batch_size):
    """Rounding turns a draw in about one reply of a hundred; one that hung on the batch would be another at once."""
    requests = mixed_requests()
    alone = HuggingFaceChat(untrained, batch_size=1).ask(requests)
    batched = HuggingFaceChat(untrained, batch_size=batch_size).ask(requests[::-1])[::-1]
    assert sum(one == other for one, other in zip(alone, batched, strict=True)) >= 16


def test_seeds_and_contents_each_have_draws_of_their_own(untrained):
    requests = [question("x", seed=seed) for seed in range(8)] + [question("x")]
    texts = [reply.text for reply in HuggingFaceChat(untrained).ask(requests)]
    assert len(set(texts[:8])) == 8 and texts[8] == texts[0]


def test_replies_are_handed_over_a_batch_at_a_time(untrained, monkeypatch):
    chat, arrived = HuggingFaceChat(untrained, batch_size=2), []

    def stop(index, reply):
        arrived.append(index)
        if len(arrived) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask_each([question(str(i)) for i in range(9)], stop)
    assert len(arrived) == 4


def test_without_a_template_the_prompt_is_that_of_training_here(tmp_path):
    chat = HuggingFaceChat(str(save_chat_model(tmp_path, has_template=False, is_trained=False)))
    tokenizer = byte_tokenizer(has_template=False)
    assert chat._encode(question("2 + 3 = ?")) == Template().encode_prompt("2 + 3 = ?", tokenizer)
    several = ChatRequest((("system", "Be brief."), ("user", "2?")))
    assert tokenizer.decode(chat._encode(several)) == "Be brief.\n\n2?\n\n"


def test_one_bad_request_is_an_error_and_the_others_are_answered(trained):
    bad = {
        "need": question("x", max_tokens=POSITIONS),
        "max_tokens=0": question("x", max_tokens=0),
        "temperature=-1": question("x", temperature=-1),
        "top_p=0": question("x", top_p=0),
        "system comes first": ChatRequest((("user", "x"), ("system", "y")), max_tokens=5),
    }
    *errors, good, odd = HuggingFaceChat(trained).ask(
        [*bad.values(), question("2+3?", temperature=0), question("a\ud800")]
    )
    for words, reply in zip(bad, errors, strict=True):
        assert reply.finish == "error" and words in reply.error and not reply.text
    assert good.text == "5" and odd.finish != "error"


def test_special_tokens_of_the_reply_are_no_text(untrained):
    for reply in HuggingFaceChat(untrained).ask([question("x", seed=seed, max_tokens=60) for seed in range(16)]):
        assert "<|" not in reply.text and "<pad>" not in reply.text


def test_identity_follows_the_weights_of_a_folder(tmp_path):
    folder = save_chat_model(tmp_path / "a", is_trained=False)
    before = HuggingFaceChat(str(folder)).identity
    assert HuggingFaceChat(str(save_chat_model(tmp_path / "b", is_trained=False))).identity == before
    model = tiny_llama(byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(folder)
    assert HuggingFaceChat(str(folder)).identity != before
    one = HuggingFaceChat("org/model", revision="abc")
    assert one.identity != HuggingFaceChat("org/model", revision="abd").identity
    assert one.identity != HuggingFaceChat("org/model", revision="abc", dtype="bfloat16").identity


def test_a_run_whose_replies_are_all_stored_needs_no_model(trained, tmp_path):
    request = question("2+3?", temperature=0)
    (first,) = CachedChat(HuggingFaceChat(trained), str(tmp_path / "c")).ask([request])
    chat = HuggingFaceChat(trained)
    assert CachedChat(chat, str(tmp_path / "c")).ask([request]) == [replace(first, is_cached=True)]
    assert "_loaded" not in vars(chat)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ChatError, match=r"model='.*nowhere'.*give the folder"):
        HuggingFaceChat(str(tmp_path / "nowhere")).ask([question("x")])
    with pytest.raises(ValueError, match="batch_size=0"):
        HuggingFaceChat("x", batch_size=0)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder, trap = save_chat_model(tmp_path / "m", is_trained=False), tmp_path / "ran"
    config = (folder / "config.json").read_text()
    auto = '"auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}, "model_type": "trap",'
    config = config.replace('"model_type": "llama",', auto)
    assert auto in config
    (folder / "config.json").write_text(config)
    (folder / "trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass Trap: pass\n")
    with pytest.raises(ChatError):
        HuggingFaceChat(str(folder)).ask([question("x")])
    assert not trap.exists()


def test_a_model_that_cannot_carry_threads_points_to_an_endpoint(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ChatError, match="OpenAIChat"):
        HuggingFaceChat(str(tmp_path)).ask([question("x")])


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_replies(untrained):
    requests = [question("x" * (1 + i), seed=i) for i in range(12)]
    on_gpu = HuggingFaceChat(untrained, device="cuda", batch_size=5).ask(requests)
    on_cpu = HuggingFaceChat(untrained, device="cpu").ask(requests)
    assert sum(a == b for a, b in zip(on_gpu, on_cpu, strict=True)) >= 10, "up to rounding"


def test_sampled_tokens_follow_the_models_distribution(untrained):
    """2,000 seeds of one question against the softmax of the first logits."""
    chat = HuggingFaceChat(untrained, batch_size=500)
    replies = chat.ask([question("x", seed=seed, max_tokens=1) for seed in range(2000)])
    ids = torch.tensor([chat._encode(question("x"))])
    with torch.no_grad():
        probs = AutoModelForCausalLM.from_pretrained(untrained)(ids).logits[0, -1].softmax(-1)
    likeliest = int(probs.argmax())
    letter = byte_tokenizer().decode([likeliest], skip_special_tokens=True)
    alike = [i for i in range(len(probs)) if byte_tokenizer().decode([i], skip_special_tokens=True) == letter]
    expected = float(probs[alike].sum())
    share = sum(reply.text == letter for reply in replies) / 2000
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5

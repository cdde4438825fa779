"""Distances between threads, worked out by hand or by a slow reference, and the embedders behind them."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lace_lightning.diversity import edit_diversity, embedding_diversity, mean_cosine_distance, mean_edit_distance
from lace_lightning.embedding import HuggingFaceEmbedder, NgramEmbedder
from tests.hand_built import group, thread


def thoughts(*texts):
    return group([thread(thought=text) for text in texts])


def test_mean_cosine_distance_is_the_mean_over_pairs():
    # Angles 0°, 90°, 180°: the pairs are at distance 1, 2 and 1; lengths do not count.
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    assert mean_cosine_distance(embeddings).item() == pytest.approx(4 / 3)


def test_batched_cosine_distance_equals_a_loop_over_pairs():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(5, 4, 7, generator=generator)
    valid = torch.rand(5, 4, generator=generator) > 0.3
    expected = [
        sum(
            float(valid[b, i] and valid[b, j]) * (1 - cosine_similarity(embeddings[b, i], embeddings[b, j], dim=0))
            for i in range(4)
            for j in range(i)
        )
        / 6
        for b in range(5)
    ]
    torch.testing.assert_close(
        mean_cosine_distance(embeddings, valid), torch.stack(list(map(torch.as_tensor, expected)))
    )


def test_equal_threads_and_a_single_thread_are_at_distance_zero():
    assert mean_cosine_distance(torch.randn(1, 8).expand(4, 8)).item() == pytest.approx(0, abs=1e-6)
    assert mean_cosine_distance(torch.randn(3, 1, 8)).tolist() == [0, 0, 0]
    assert mean_edit_distance(["same"] * 3) == 0 == mean_edit_distance(["alone"])


def test_mean_edit_distance_by_hand():
    # kitten/sitting: 3 edits of 7; kitten/kitten: 0; kitten/sitting again: 3 of 7.
    assert mean_edit_distance(["kitten", "sitting", "kitten"]) == pytest.approx((3 / 7 + 3 / 7) / 3)
    # Token ids: one substitution of three; one deletion of three.
    assert mean_edit_distance([[1, 2, 3], [1, 9, 3]]) == pytest.approx(1 / 3)
    assert mean_edit_distance([(1, 2, 300), (1, 2)]) == pytest.approx(1 / 3)


def test_a_silent_thread_earns_no_diversity():
    talking, silent = thoughts("try door one", "try door two"), thoughts("try door one", "try door two", "", " \n")
    embedder = NgramEmbedder()
    alone = embedding_diversity([talking], embedder).item()
    assert alone > 0.1
    # One pair of six talks.
    assert embedding_diversity([silent], embedder).item() == pytest.approx(alone / 6)
    assert edit_diversity(silent) == pytest.approx(edit_diversity(talking) / 6)
    assert embedding_diversity([thoughts("", "")], embedder).tolist() == [0]


def test_groups_of_any_width_are_measured_apart():
    same, different = thoughts("a b", "a b"), thoughts("a b", "c d", "e f")
    values = embedding_diversity([same, different, thoughts("a")], NgramEmbedder(dim=4096))
    assert values.tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert embedding_diversity([], NgramEmbedder()).shape == (0,)


def test_ngram_embedding_is_the_signed_count_of_ngrams_by_direction():
    # Wide enough for no collision here: "a b" and "a c" share 1 of their n-grams {a, b, a·b} and {a, c, a·c}.
    embeddings = NgramEmbedder(dim=1 << 16, sizes=(1, 2)).embed(["a b", "A  c", "b a", "a b"])
    similarity = embeddings @ embeddings.T
    assert similarity[0].tolist() == pytest.approx([1, 1 / 3, 2 / 3, 1])


def test_ngram_embeddings_are_the_same_in_another_process():
    texts = ["The prize is behind door 3", "√2 \ud800 ٤", ""]
    program = (
        f"from lace_lightning.embedding import NgramEmbedder\nprint(NgramEmbedder(dim=16).embed({texts!a}).tolist())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert other.stdout.decode().strip() == str(NgramEmbedder(dim=16).embed(texts).tolist())


def test_unrelated_long_texts_do_not_look_alike_for_their_length():
    words = [[f"{name}{index}" for index in range(3000)] for name in ("alpha", "beta")]
    assert embedding_diversity([thoughts(*map(" ".join, words))], NgramEmbedder(dim=256)).item() > 0.7


@pytest.mark.parametrize("arguments", [{"dim": 0}, {"sizes": []}, {"sizes": [2, 0]}])
def test_ngram_options_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NgramEmbedder(**arguments)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    folder = tmp_path_factory.mktemp("embedder")
    vocabulary = {word: index for index, word in enumerate(["<eos>", "?", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3Model(config).eval()
    model.save_pretrained(folder)
    return str(folder), model


def test_hugging_face_embedding_is_the_mean_hidden_state_whatever_the_batch(tiny_model):
    folder, model = tiny_model
    texts = {"a b c d e": [2, 3, 4, 5, 6], "h": [9], "c c": [4, 4]}
    embeddings = HuggingFaceEmbedder(folder, batch_size=2).embed(list(texts))
    for embedding, ids in zip(embeddings, texts.values(), strict=True):
        mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-5, rtol=1e-5)


def test_hugging_face_embedder_loads_nothing_before_the_first_text_and_cuts_long_ones(tiny_model):
    HuggingFaceEmbedder("/no/such/model")
    embedder = HuggingFaceEmbedder(tiny_model[0], max_length=2)
    first, second = embedder.embed(["a b c d", "a b h h"])
    torch.testing.assert_close(first, second)


def test_hugging_face_embedder_gives_the_empty_text_no_direction(tiny_model):
    assert HuggingFaceEmbedder(tiny_model[0]).embed(["", "a"]).norm(dim=-1).tolist() == pytest.approx([0, 1])
    assert HuggingFaceEmbedder(tiny_model[0]).embed([""]).tolist() == [[0.0] * 16]

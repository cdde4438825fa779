"""Word-level tokenizers."""

import pytest

from lace_lightning.puzzles.vocabulary import SPECIAL, word_tokenizer
from lace_lightning.traces.schema import Tag

WORDS = ["door", ":", ";", ",", ".", "don't", "ab+", "(", ")", "10", *map(str, Tag)]


def test_every_word_is_one_token_in_the_order_given():
    ids = word_tokenizer(WORDS).encode(" ".join(WORDS), add_special_tokens=False)
    assert ids == list(range(len(SPECIAL), len(SPECIAL) + len(WORDS)))


def test_decoding_joins_words_with_single_spaces_and_keeps_tags():
    tokenizer = word_tokenizer(WORDS)
    text = "( 10 ) , . don't ab+ ; [[best]]"
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_encoding_adds_no_special_tokens_and_unknown_words_become_unk():
    tokenizer = word_tokenizer(WORDS)
    assert tokenizer.encode("door 11") == [4, tokenizer.unk_token_id]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<bos>", "<eos>", "<unk>"]


def test_a_saved_tokenizer_loads_as_the_same_one(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "door : 10 [[fail]] , don't nothing"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2, 3)


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], ["<eos>"], ["a\n"]])
def test_ambiguous_words_are_refused_by_name(words):
    with pytest.raises(ValueError, match="words="):
        word_tokenizer(words)

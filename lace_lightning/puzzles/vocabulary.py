"""Word-level tokenizers for puzzles: every word of a small closed language is one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space, knows exactly ``words`` and decodes by joining them with spaces.

    Ids are deterministic: ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2, ``<unk>`` 3, then ``words`` in their order. Any other
    word becomes ``<unk>``. Needs no file; ``save_pretrained`` and ``from_pretrained`` work as for any tokenizer.

    Raises:
        ValueError: a word is empty, holds white space, stands twice or is a special token.
    """
    vocabulary = [*SPECIAL, *words]
    counts = Counter(vocabulary)
    bad = [word for word in words if word.split() != [word] or counts[word] > 1]
    if bad:
        raise ValueError(
            f"words={bad} of a puzzle's vocabulary are empty, repeated or hold white space: make each unique"
        )

    from tokenizers import Tokenizer, models, pre_tokenizers  # lazy: the CLI's help must not pay for them
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )

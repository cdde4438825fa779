"""A tiny model with a chat template, trained here to answer three questions."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lace_lightning.threaded_lm import ThreadedLM

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ANSWERS = {"1+1?": "2, surely", "2+3?": "5", "Is ∑ Greek?": "Yes: ∑."}
SPECIAL = ["<pad>", "<eos>", "<|start|>", "<|end|>"]
POSITIONS = 128


def byte_tokenizer(has_template: bool = True) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=["<|start|>", "<|end|>"]
    )
    if has_template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = 250) -> None:
    """Teach it ANSWERS word for word."""
    lm = ThreadedLM(model, num_threads=1)
    rows = [f"<|start|>user\n{q}<|end|><|start|>assistant\n{a}<|end|>" for q, a in ANSWERS.items()]
    batch = tokenizer(rows, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    ids, mask = batch["input_ids"][:, None], batch["attention_mask"][:, None].bool()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        loss = lm.mean_nll(ids, mask, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_chat_model(folder: Path, has_template: bool = True, is_trained: bool = True) -> Path:
    """Model, tokenizer and generation config: a turn ends with <|end|>, and servers are to sample."""
    tokenizer = byte_tokenizer(has_template)
    model = tiny_llama(tokenizer)
    if is_trained:
        train(model, tokenizer)
    model.generation_config.eos_token_id = [1, 3]
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Embeddings of threads, to measure how different their ideas are (LACE.md §6, §7)."""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

_WORD = re.compile(r"\w+|[^\w\s]")


class Embedder(ABC):
    """Turns texts into directions."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed M texts.

        Returns:
            (M, E) float32 on the CPU, each row of length 1, or 0 for a text without words (or tokens).
        """


class NgramEmbedder(Embedder):
    """Hashed counts of word n-grams: no model, no download, the same in every process and on every machine.

    A word is a run of letters and digits, or one other sign. Hashes carry a sign, so that collisions cancel on
    average instead of making long texts alike (Weinberger et al. 2009, arXiv 0902.2206).

    Args:
        dim: embedding width E.
        sizes: lengths of the n-grams, in words.

    Raises:
        ValueError: ``dim`` or ``sizes`` not positive.
    """

    def __init__(self, dim: int = 256, sizes: Sequence[int] = (1, 2, 3)) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: an embedding needs at least 1 dimension")
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes={list(sizes)}: give at least one n-gram length, each 1 or more")
        self.dim = dim
        self.sizes = tuple(sizes)

    def embed(self, texts: Sequence[str]) -> Tensor:
        counts = torch.stack([self._count(text) for text in texts]) if texts else torch.zeros(0, self.dim)
        return normalize(counts, dim=-1)

    def _count(self, text: str) -> Tensor:
        hashes = torch.tensor([zlib.crc32(ngram) for ngram in self._ngrams(text)], dtype=torch.long)
        signs = 1.0 - 2.0 * (hashes >> 31)
        return torch.zeros(self.dim).index_add_(0, hashes % self.dim, signs)

    def _ngrams(self, text: str) -> Iterator[bytes]:
        words = [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text.lower())]
        for size in self.sizes:
            yield from (b"\0".join(words[start : start + size]) for start in range(len(words) - size + 1))


class HuggingFaceEmbedder(Embedder):
    """Mean of a Hugging Face model's last hidden states over a text's tokens. Loaded with the first text.

    Only safetensors weights are read and no code of the model's repository is run.

    Args:
        name: model name or folder, for instance ``sentence-transformers/all-MiniLM-L6-v2``.
        device: torch device that the model runs on.
        batch_size: texts per forward pass.
        max_length: tokens after which a text is cut.

    Raises:
        ValueError: ``batch_size`` or ``max_length`` not positive.
    """

    def __init__(self, name: str, device: str = "cpu", batch_size: int = 32, max_length: int = 512) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size={batch_size}, max_length={max_length}: both must be 1 or more")
        self.name = name
        self.device = device
        self.batch_size = batch_size
        self.max_length = max_length

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        batches = [list(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)]
        return torch.cat([torch.zeros(0, self._model.config.hidden_size), *map(self._embed_batch, batches)])

    def _embed_batch(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        if inputs["input_ids"].numel() == 0:  # models fail on sequences without tokens
            return torch.zeros(len(texts), self._model.config.hidden_size)
        hidden = self._model(**inputs).last_hidden_state.float()  # (M, L, E)
        mask = inputs["attention_mask"].unsqueeze(-1)
        return normalize((hidden * mask).sum(1), dim=-1).cpu()  # the mean's direction is that of the sum

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        tokenizer.padding_side = "right"  # so that padding moves no token's position
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(self.name, trust_remote_code=False, use_safetensors=True)
        return model.eval().requires_grad_(False).to(self.device)

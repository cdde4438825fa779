"""A local Hugging Face model as a chat model."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from jinja2 import TemplateError

from lace_lightning.synthesis.chat import ChatError, ChatReply, ChatRequest, EagerChatModel, OnReply
from lace_lightning.synthesis.chats.completion import without_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding import GroupDecoder, Rollout, Sampling
    from lace_lightning.threaded_lm import ThreadedLM

_Batch = list[tuple[int, list[int]]]
"""Index of each request, and its prompt's token ids."""


class HuggingFaceChat(EagerChatModel):
    """Decodes the requests in batches, each as a group of one thread.

    A draw depends on the request and on how many tokens its reply has so far, not on the batch. In float32 a request
    therefore has the same reply in every batch, but for rounding errors in the logits, which differ between shapes of
    batches: ``batch_size: 1`` excludes these.

    The prompt is what the tokenizer's chat template makes of the messages. Without a template it is the contents of all
    messages, a blank line after each, role names left out: what a model that was trained here knows.

    Args:
        model: hub name or folder; no code from there is run.
        revision: of a hub name: commit, tag or branch. Only a commit says for good which weights they are.
        batch_size: most requests that are decoded together; replies come a batch at a time.
        dtype: of the weights. ``bfloat16`` rounds so coarsely that the batch shows in the replies.
        device: ``auto`` takes CUDA if there is any.
        template_options: further arguments of the chat template, such as ``enable_thinking``.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
        template_options: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model, self.revision, self.batch_size = model, revision, batch_size
        self.dtype, self.device = dtype, device
        self.template_options = dict(template_options or {})

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        """Of a folder it holds the hash of the weights: a model that was trained on has replies of its own."""
        folder = Path(self.model)
        origin = _hash_of(folder) if folder.is_dir() else f"{self.model}@{self.revision}"
        return json.dumps({"model": origin, "dtype": self.dtype, "template": self.template_options}, sort_keys=True)

    def ask_each(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> None:
        from lace_lightning.decoding import Sampling, group_seed

        fit: dict[tuple[Sampling, int], _Batch] = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                prompt = self._encode(request)
                self._check_length(request, prompt)
                fit[Sampling(request.temperature, top_p=request.top_p), request.max_tokens].append((index, prompt))
            except (ValueError, TemplateError) as error:  # a role that the template does not know, say
                on_reply(index, ChatReply("", "error", error=str(error)))
        for (sampling, limit), alike in fit.items():
            for batch in _batches(alike, self.batch_size):
                seeds = [group_seed("chat", requests[index].seed, requests[index].messages) for index, _ in batch]
                rollout = self._decoder(sampling, limit).decode([ids for _, ids in batch], 1, seeds)
                for row, (index, ids) in enumerate(batch):
                    on_reply(index, self._read(rollout, row, len(ids)))

    @cached_property
    def _loaded(self) -> tuple[ThreadedLM, PreTrainedTokenizerBase]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from lace_lightning.backbone import BackboneError
        from lace_lightning.threaded_lm import ThreadedLM

        origin: dict[str, Any] = {"revision": self.revision}
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            backbone = AutoModelForCausalLM.from_pretrained(
                self.model, trust_remote_code=False, dtype=getattr(torch, self.dtype), **origin
            )
            tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False, **origin)
            return ThreadedLM(backbone, num_threads=1).to(device).eval(), tokenizer
        except BackboneError as error:
            raise ChatError(
                f"model={self.model!r} cannot be decoded here ({error}): serve it (docs/teachers.md) and ask it "
                "through OpenAIChat"
            ) from error
        except (OSError, ValueError) as error:
            raise ChatError(
                f"model={self.model!r}, revision={self.revision!r} cannot be loaded ({error}): give the folder or hub "
                "name of a causal language model with its tokenizer"
            ) from error

    @property
    def _lm(self) -> ThreadedLM:
        return self._loaded[0]

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens that end a reply: those of the generation config (a turn's end) and the tokenizer's (a text's)."""
        config = getattr(self._lm.backbone, "generation_config", None)
        of_config = getattr(config, "eos_token_id", None)
        several = of_config if isinstance(of_config, list) else [of_config]
        return sorted({token for token in (*several, self._tokenizer.eos_token_id) if token is not None})

    def _encode(self, request: ChatRequest) -> list[int]:
        if self._tokenizer.chat_template is None:
            return self._encode_plain(request)
        messages = [{"role": role, "content": without_surrogates(content)} for role, content in request.messages]
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self.template_options
        )
        return list(cast(list[int], ids))

    def _encode_plain(self, request: ChatRequest) -> list[int]:
        text = "".join(f"{without_surrogates(content)}\n\n" for _, content in request.messages)
        begin = self._tokenizer.bos_token_id
        return ([] if begin is None else [begin]) + list(self._tokenizer.encode(text, add_special_tokens=False))

    def _check_length(self, request: ChatRequest, prompt: list[int]) -> None:
        from lace_lightning.backbone import text_config

        needed = len(prompt) + request.max_tokens
        longest = getattr(text_config(self._lm.backbone), "max_position_embeddings", None)
        if not prompt or request.max_tokens < 1:
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_tokens={request.max_tokens}: both must be at least 1"
            )
        if longest is not None and needed > longest:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens={request.max_tokens} need {needed} positions, the "
                f"model has {longest}: lower max_tokens or shorten the prompt"
            )

    def _decoder(self, sampling: Sampling, limit: int) -> GroupDecoder:
        from lace_lightning.decoding import GroupDecoder

        pad = self._tokenizer.pad_token_id
        return GroupDecoder(self._lm, sampling, limit, self._ends, 0 if pad is None else pad)

    def _read(self, rollout: Rollout, row: int, prompt_tokens: int) -> ChatReply:
        start = rollout.prompt_length
        ids = rollout.input_ids[row, 0, start:][rollout.attention_mask[row, 0, start:].bool()].tolist()
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return ChatReply(text, "stop" if rollout.finished[row, 0] else "length", prompt_tokens, len(ids))


def _batches(alike: _Batch, size: int) -> Iterator[_Batch]:
    """Prompts of like lengths together: less padding."""
    ordered = sorted(alike, key=lambda pair: len(pair[1]))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _hash_of(folder: Path) -> str:
    """Of the names and contents of its files."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as content:
            total.update(f"{file.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()

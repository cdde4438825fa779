"""The tokenizer of a run: that of a model, or of a task with a closed vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lace_lightning.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str | None, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, or else the task's own, made fit for padding.

    Raises:
        ValueError: there is none, it cannot be loaded, or it lacks a token that threads need.
    """
    tokenizer = task.tokenizer() if source is None else _pretrained_tokenizer(source)
    name = f"tokenizer={source!r}"
    if tokenizer is None:
        raise ValueError(f"{name}: {type(task).__name__} brings no tokenizer; set tokenizer to a folder or a hub name")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: has no end-of-sequence token, which ends every thread; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        task.template.encode_opening(tokenizer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return tokenizer


def _pretrained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # slow to import

    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ValueError(f"tokenizer={source!r}: no such folder")
    try:
        name = str(Path(source).expanduser()) if source.startswith("~") else source
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # the default would ask whoever watches
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={source!r}: cannot be loaded; give a folder or a hub name ({error})") from error

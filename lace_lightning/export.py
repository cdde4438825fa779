"""A model as plain files: a backbone that ``transformers`` loads, its exchange beside it, and a card for people."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.adapter import SETTINGS, save_exchange
from lace_lightning.whole_file import write_text
from lace_lightning.whole_folder import whole_folder

if TYPE_CHECKING:
    from lace_lightning.threaded_lm import ThreadedLM

EXCHANGE = "exchange"
"""Folder of the exchange in an export; away from the backbone's files, since some engines load whatever lies there."""
CARD = "README.md"


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless ``folder`` may be written: it is absent, empty, or an export that may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / EXCHANGE / SETTINGS).is_file():
        raise ValueError(f"OUT {folder} is there already and is no export: choose another folder")
    if not overwrite:
        raise ValueError(f"OUT {folder} holds an export already: choose another folder, or replace it with --overwrite")


def export(model: ThreadedLM, folder: Path, card: str) -> None:
    """Write backbone, tokenizer, exchange and card; the folder appears, or is replaced, whole or not at all.

    LoRA weights are merged into the model's backbone, which stays so.
    """
    with whole_folder(folder) as unfinished:
        _plain(model.backbone).save_pretrained(unfinished)
        assert model.tokenizer is not None
        model.tokenizer.save_pretrained(unfinished)
        save_exchange(model, unfinished / EXCHANGE)
        write_text(unfinished / CARD, card)
        for file in unfinished.rglob("*.safetensors"):  # readable by their owner alone, as safetensors makes them
            shutil.copymode(unfinished / CARD, file)


def _plain(backbone: Any) -> Any:
    """The Hugging Face model without a PEFT wrapper around it."""
    return backbone.merge_and_unload() if hasattr(backbone, "merge_and_unload") else backbone

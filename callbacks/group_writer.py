"""Predicted groups as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.decoding import Group
from lace_lightning.modules import SampledGroups
from lace_lightning.tasks import Verdict
from lace_lightning.whole_file import append_lines


class GroupWriter(Callback):
    """Writes the groups of ``lace predict`` as JSON lines, one per group, as soon as they are decoded.

    The trainer then keeps none of them: all their tensors would pile up in memory.

    With several processes each writes a file of its own: ``groups.rank0.jsonl`` and so on for ``groups.jsonl``.

    Args:
        path: the file.
        overwrite: replace a file that is there already.

    Raises:
        ValueError: ``path`` is a folder, or a file that must not be replaced; raised before anything is decoded.
    """

    def __init__(self, path: str, overwrite: bool = False) -> None:
        if Path(path).is_dir():
            raise ValueError(f"path={path!r} of GroupWriter is a folder: name a file, say {path}/groups.jsonl")
        self.path = path
        self.overwrite = overwrite
        self._stream: FileIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file."""
        if stage != "predict":
            return
        trainer.predict_loop.return_predictions = False
        path = Path(self.path)
        if trainer.world_size > 1:
            path = path.with_suffix(f".rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stream = FileIO(path, "w" if self.overwrite else "x")
        except FileExistsError:
            raise ValueError(
                f"path='{path}' of GroupWriter is there already: choose another, or set overwrite: true"
            ) from None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's groups."""
        assert self._stream is not None and isinstance(outputs, SampledGroups)
        for group, verdicts in zip(outputs.groups, outputs.verdicts, strict=True):
            append_lines(self._stream, json.dumps(group_record(group, verdicts)) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def group_record(group: Group, verdicts: Sequence[Verdict]) -> dict[str, object]:
    """A judged group as JSON values; ``best`` is the index of the chosen thread, null if the tags are not valid."""
    return {
        "problem": group.problem.id,
        "source": group.problem.source,
        "text": group.problem.text,
        "answer": group.problem.answer,
        "seed": group.seed,
        "best": group.best_index,
        "threads": [
            {
                "text": thread.text,
                "answer": thread.answer,
                "tag": thread.tag,
                "verdict": verdict,
                "finished": thread.finished,
                "token_ids": thread.token_ids,
                "columns": thread.columns,
                "forced": [index for index, forced in enumerate(thread.forced) if forced],
            }
            for thread, verdict in zip(group.threads, verdicts, strict=True)
        ],
    }

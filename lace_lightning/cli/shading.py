"""Gates of a group that is being decoded, for the panes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lace_lightning.cli.transcript import Transcript
    from lace_lightning.decoding import Column
    from lace_lightning.decoding.gates import GateReader

MAX_READING_SHARE = 0.1
"""Of the time while decoding goes on; gates of the latest tokens come the later the longer they take to read."""


class Shading:
    """Shades a transcript of one group while it grows.

    Args:
        transcript: what is shaded.
        reader: reads the gates of the same group.
    """

    def __init__(self, transcript: Transcript, reader: GateReader) -> None:
        self._transcript, self._reader = transcript, reader
        self._gates: list[list[float]] = [[] for _ in range(transcript.num_threads)]
        self._waiting: list[Column] = []
        self._next_reading = 0.0

    def add(self, column: Column) -> None:
        """Take a column that the transcript holds, and read what waits unless that would slow decoding down."""
        self._waiting.append(column)
        start = time.monotonic()
        if start >= self._next_reading:
            self.finish()
            now = time.monotonic()
            self._next_reading = now + (now - start) / MAX_READING_SHARE

    def finish(self) -> None:
        """Read and shade all columns that wait."""
        columns, self._waiting = self._waiting, []
        if not columns:
            return
        written = torch.stack([column.written for column in columns], dim=-1)
        gates = self._reader.read(torch.stack([column.tokens for column in columns], dim=-1), written)
        if gates is not None:
            for known, values, is_token in zip(self._gates, gates[0], written[0], strict=True):
                known += values[is_token].tolist()
            self._transcript.shade(self._gates)

"""The tokens of one outcome in few bytes: planes of numbers, deflated; ``viewer.js`` takes them apart again."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from lace_lightning.decoding.group import Thread
from lace_lightning.evaluation.inspection import MOST_READS, SEGMENTS, Inspection
from lace_lightning.evaluation.judged import JudgedPassage

ANSWER = len(SEGMENTS)
"""What an answer's tokens are marked with, beside the numbers of the segments."""
_MOST_THREADS = 255
"""Of a group; a read of a later one is left out."""
_FULL = 100
"""The byte that stands for 1: no more is shown, and fewer values take fewer bytes."""


class Number(Protocol):
    """Gives each text a number, the same text the same one."""

    def __call__(self, text: str, /) -> int: ...


def block_of(passages: Sequence[JudgedPassage], number: Number) -> str:
    """The tokens of all passages, base64.

    The planes of each passage follow each other, a byte per token each: number of the text (3 planes, low byte first),
    columns since the token before (2), segment, gate, and of each of ``MOST_READS`` reads the thread + 1, columns back
    (2) and share. Gates and reads are there if any is recorded (``has_gates`` and ``has_reads`` of the passage).
    """
    planes = b"".join(plane.tobytes() for passage in passages for plane in _planes(passage, number))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(deflate.compress(planes) + deflate.flush()).decode()


def tokens_of(passage: JudgedPassage) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Pieces, columns and segments of a passage; one that was not inspected is a single piece."""
    thread, inspection = passage.passage.thread, passage.inspection
    if inspection is None:
        return (thread.text,), (0,), "t"
    return inspection.pieces, thread.columns, inspection.segments


def _planes(passage: JudgedPassage, number: Number) -> Iterator[np.ndarray]:
    pieces, columns, segments = tokens_of(passage)
    yield from _bytes([number(piece) for piece in pieces], 3)
    yield from _bytes(np.diff(columns, prepend=0), 2)
    yield np.array(_kinds(passage.passage.thread, pieces, segments), dtype=np.uint8)
    inspection = passage.inspection
    if inspection is not None and inspection.gates is not None:
        yield _byte_shares(inspection.gates)
    if inspection is not None and inspection.reads is not None:
        yield from _reads(inspection, columns)


def _kinds(thread: Thread, pieces: Sequence[str], segments: str) -> list[int]:
    """The segment of each token; those of the assessment that spell the answer are marked as the answer."""
    kinds = [SEGMENTS.index(segment) for segment in segments]
    first, end = segments.find("a"), segments.rfind("a") + 1
    place = "".join(pieces[first:end]).rfind(thread.answer) if first >= 0 and thread.answer else -1
    if place < 0 or thread.answer is None:
        return kinds
    stop, offset = place + len(thread.answer), 0
    for index in range(first, end):
        begin, offset = offset, offset + len(pieces[index])
        if begin < stop and offset > place and pieces[index].strip():
            kinds[index] = ANSWER
    return kinds


def _reads(inspection: Inspection, columns: Sequence[int]) -> Iterator[np.ndarray]:
    reads = inspection.reads or ()
    for rank in range(MOST_READS):
        ranked = [token[rank] if len(token) > rank and token[rank][0] < _MOST_THREADS else None for token in reads]
        yield np.array([0 if read is None else read[0] + 1 for read in ranked], dtype=np.uint8)
        back = [0 if read is None else time - read[1] for read, time in zip(ranked, columns, strict=True)]
        yield from _bytes(back, 2)
        yield _byte_shares([0.0 if read is None else read[2] for read in ranked])


def _byte_shares(values: Sequence[float]) -> np.ndarray:
    return np.nan_to_num(np.clip(np.asarray(values, dtype=float), 0, 1) * _FULL).round().astype(np.uint8)


def _bytes(values: Sequence[int] | np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Planes of bytes, the low one first; values beyond what they hold are cut to that."""
    whole = np.clip(np.asarray(values, dtype=np.int64), 0, 256**count - 1)
    for place in range(count):
        yield ((whole >> (8 * place)) & 255).astype(np.uint8)

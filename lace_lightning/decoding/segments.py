"""Which part of a decoded thread each of its tokens belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lace_lightning.decoding.group import Rollout
from lace_lightning.traces.schema import Tag
from lace_lightning.traces.template import Segment, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segmenter:
    """Tells the segments of decoded threads apart by the ids that the template writes.

    A thread is thought up to its first assessment opening, assessment up to the tag or end of sequence that follows,
    and tag from there on; what an environment wrote is environment wherever it stands. A tag that was spelled with
    other ids than the template's own counts to the assessment.

    Args:
        template: spelling of openings and tags.
        tokenizer: with an end-of-sequence token.

    Raises:
        ValueError: the tokenizer has no ids for the opening.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._opening = [template.encode_opening(tokenizer)]
        self._closings = [tokenizer.encode(str(tag), add_special_tokens=False) for tag in Tag]
        self._closings.append([tokenizer.eos_token_id])

    def thread(self, ids: Sequence[int], forced: Sequence[bool]) -> list[Segment]:
        """The segment of each of a thread's tokens after the prompt."""
        ids = list(ids)
        assessment = _first(self._opening, ids, 0)
        tag = _first(self._closings, ids, assessment)
        segments = [Segment.THOUGHT] * assessment
        segments += [Segment.ASSESSMENT] * (tag - assessment)
        segments += [Segment.TAG] * (len(ids) - tag)
        return [Segment.ENVIRONMENT if by else own for own, by in zip(segments, forced, strict=True)]

    def rollout(self, rollout: Rollout) -> Tensor:
        """(B, N, L) uint8 values of :class:`Segment`, on the CPU, 0 where no token stands; as a TraceBatch has them."""
        mask = rollout.attention_mask.cpu()
        segments = torch.zeros(mask.shape, dtype=torch.uint8)
        segments[..., : rollout.prompt_length] = Segment.PROMPT * mask[..., : rollout.prompt_length]
        ids, forced = rollout.input_ids.cpu(), rollout.forced.cpu()
        for b, n in torch.ones(mask.shape[:2]).nonzero().tolist():
            columns = mask[b, n, rollout.prompt_length :].nonzero()[:, 0] + rollout.prompt_length
            parts = self.thread(ids[b, n, columns].tolist(), forced[b, n, columns].tolist())
            segments[b, n, columns] = torch.tensor(parts, dtype=torch.uint8)
        return segments


def _first(needles: Sequence[list[int]], haystack: list[int], start: int) -> int:
    """Index at or after ``start`` of the first occurrence of any needle; the haystack's length if there is none."""
    for index in range(start, len(haystack)):
        if any(haystack[index : index + len(needle)] == needle for needle in needles):
            return index
    return len(haystack)

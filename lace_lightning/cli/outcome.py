"""How a group ended, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lace_lightning.printable import one_line
from lace_lightning.traces.schema import Tag

if TYPE_CHECKING:
    from lace_lightning.decoding import Group
    from lace_lightning.tasks import Verdict


@dataclass(frozen=True)
class Outcome:
    """A decoded group and, where its problem can be judged, one verdict per thread."""

    group: Group
    verdicts: Sequence[Verdict] | None = None

    def of_thread(self, index: int) -> str:
        """Tag, answer and verdict of one thread."""
        thread = self.group.threads[index]
        parts = [
            thread.tag or "no valid tag",
            "no answer" if thread.answer is None else f"answer {one_line(thread.answer)}",
        ]
        return ", ".join(map(str, parts if self.verdicts is None else [*parts, self.verdicts[index]]))

    def sentence(self) -> str:
        """Which thread won with which answer, or why none did."""
        if self.group.best_index is None:
            return f"no winner, the tags are not valid: {why_invalid(self.group.tags)}"
        return f"winner: thread {self.group.best_index} ({self.of_thread(self.group.best_index)})"


def why_invalid(tags: Sequence[Tag | None]) -> str:
    """What keeps the tags of a group from being valid (LACE.md §6); empty if they are."""
    untagged = [index for index, tag in enumerate(tags) if tag is None]
    best = [index for index, tag in enumerate(tags) if tag is Tag.BEST]
    reasons = []
    if untagged:
        does = "does" if len(untagged) == 1 else "do"
        reasons.append(f"{_threads(untagged)} {does} not end with exactly one tag")
    if len(best) != 1:
        reasons.append(f"{_threads(best)} all say {Tag.BEST}" if best else f"no thread says {Tag.BEST}")
    return "; ".join(reasons)


def _threads(indices: Sequence[int]) -> str:
    return ("thread " if len(indices) == 1 else "threads ") + ", ".join(map(str, indices))

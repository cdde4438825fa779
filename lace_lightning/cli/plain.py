"""Threads as lines of text, for pipes, files and terminals that cannot redraw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lace_lightning.printable import printable

if TYPE_CHECKING:
    from lace_lightning.cli.outcome import Outcome
    from lace_lightning.cli.transcript import Transcript


class PlainView:
    """Prints each thread when it ends, its name before every line; then one line per thread, then who won.

    The same group gives the same bytes. A context manager, like :class:`~lace_lightning.cli.panes.PaneView`.
    """

    has_shades = False

    def __init__(self, transcript: Transcript, problem: str) -> None:
        self._transcript, self._problem = transcript, problem

    def __enter__(self) -> PlainView:
        _print_block("problem", self._problem)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, ended: Sequence[int]) -> None:
        """Print the threads that ended in the last column."""
        for index in ended:
            _print_block(f"thread {index}", self._transcript.text(index))

    def finish(self, outcome: Outcome | None) -> None:
        """Print what is left; None: the group was interrupted."""
        for index in range(self._transcript.num_threads):
            judged = f", {outcome.of_thread(index)}" if outcome else ""
            print(f"thread {index}: {self._transcript.status(index)}{judged}")
        print(outcome.sentence() if outcome else "interrupted: no winner", flush=True)


def _print_block(name: str, text: str) -> None:
    """Print ``name | line`` for each line, at once."""
    print("\n".join(f"{name} | {line}" for line in printable(text).split("\n")), flush=True)

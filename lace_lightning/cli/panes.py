"""Threads side by side: one pane each, redrawn while they are decoded."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import HEAVY, ROUNDED
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lace_lightning.cli.transcript import Span, State
from lace_lightning.printable import one_line, printable
from lace_lightning.traces.schema import Tag

if TYPE_CHECKING:
    from lace_lightning.cli.outcome import Outcome
    from lace_lightning.cli.transcript import Transcript

MIN_WIDTH = 36
"""Narrowest pane, frame included; a terminal too narrow for all threads at this width gets several rows of panes."""
FRAME_WIDTH, FRAME_HEIGHT = 4, 2
SECONDS_PER_FRAME = 0.1
MAX_DRAWING_SHARE = 0.1

FORCED_STYLE = "italic yellow"
SHADE_STYLES = ("", "on grey15", "on grey23", "on grey30", "on grey37")
"""From the least open gates of the group to the most open ones."""
TAG_STYLES = {Tag.BEST: "bold green", Tag.SUCCESS: "bold cyan", Tag.FAIL: "bold red"}
STATE_STYLES = {
    State.WRITING: "cyan",
    State.WAITING: "yellow",
    State.ENDED: "dim",
    State.LIMIT: "red",
    State.INTERRUPTED: "red",
}


class PaneView:
    """Shows a transcript in a terminal while it grows, then once more in full with the winner framed.

    A context manager: inside it the panes are on the screen, and the cursor comes back however it is left.
    """

    has_shades = True

    def __init__(self, transcript: Transcript, problem: str, console: Console) -> None:
        self._transcript, self._problem, self._console = transcript, problem, console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._next_frame = 0.0

    def __enter__(self) -> PaneView:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, ended: Sequence[int]) -> None:
        """Redraw, unless the last frame is too recent for the eye or drawing would slow decoding down."""
        start = time.monotonic()
        if start < self._next_frame:
            return
        self._live.update(growing(self._transcript, self._problem, self._console), refresh=True)
        now = time.monotonic()
        self._next_frame = now + max(SECONDS_PER_FRAME, (now - start) / MAX_DRAWING_SHARE)

    def finish(self, outcome: Outcome | None) -> None:
        """Replace the moving panes by the whole text; None: the group was interrupted."""
        self._live.stop()
        self._console.print(complete(self._transcript, self._problem, outcome, self._console))


def growing(transcript: Transcript, problem: str, console: Console) -> Group:
    """One frame that fits the terminal: the last lines of every thread."""
    rows = _rows(transcript.num_threads, console.width)
    height = max((console.height - 2) // len(rows), FRAME_HEIGHT + 1)
    width = console.width // len(rows[0]) - FRAME_WIDTH
    heading = Text(f"t = {transcript.num_columns - 1}  ", style="bold", no_wrap=True, overflow="ellipsis")
    heading.append_text(_legend(transcript)).append(one_line(problem))
    lines = height - FRAME_HEIGHT
    panes = [
        _pane(transcript, index, _last_lines(transcript.spans(index), width, lines, console), lines)
        for index in range(transcript.num_threads)
    ]
    return Group(heading, _grid(panes, rows))


def complete(transcript: Transcript, problem: str, outcome: Outcome | None, console: Console) -> Group:
    """The whole text of every thread, the winner framed, and who won."""
    rows = _rows(transcript.num_threads, console.width)
    width = console.width // len(rows[0]) - FRAME_WIDTH
    texts = [_wrap(_styled(transcript.spans(index)), width, console) for index in range(transcript.num_threads)]
    panes = []
    for row in rows:
        tallest = max(len(texts[index]) for index in row)
        panes += [_pane(transcript, index, texts[index], tallest, outcome) for index in row]
    heading = Text(printable(problem), style="bold")
    return Group(heading, _grid(panes, rows), _legend(transcript).append_text(_verdict(outcome)))


def _legend(transcript: Transcript) -> Text:
    """Which gates the shades stand for; empty where none are known."""
    legend = Text()
    if transcript.gate_range is not None:
        least, most = transcript.gate_range
        legend.append(f"gate {least:.2f} ", style="dim")
        for style in SHADE_STYLES:
            legend.append(" ", style=style)
        legend.append(f" {most:.2f}  ", style="dim")
    return legend


def _rows(num_threads: int, width: int) -> list[range]:
    """Thread indices row by row: as many panes abreast as fit, the rows as even as possible."""
    abreast = max(1, min(num_threads, width // MIN_WIDTH))
    num_rows = math.ceil(num_threads / abreast)
    abreast = math.ceil(num_threads / num_rows)
    return [range(start, min(start + abreast, num_threads)) for start in range(0, num_threads, abreast)]


def _grid(panes: Sequence[Panel], rows: Sequence[Sequence[int]]) -> Table:
    table = Table.grid(expand=True)
    for _ in rows[0]:
        table.add_column(ratio=1)
    for row in rows:
        table.add_row(*(panes[index] for index in row))
    return table


def _pane(
    transcript: Transcript, index: int, lines: Sequence[Text], height: int, outcome: Outcome | None = None
) -> Panel:
    is_winner = outcome is not None and outcome.group.best_index == index
    style = "bold green" if is_winner else STATE_STYLES[transcript.state(index)]
    title = Text(f"★ thread {index} wins" if is_winner else f"thread {index}", style=style)
    below = outcome.of_thread(index) if outcome else transcript.status(index)
    return Panel(
        Text("\n", no_wrap=True).join(lines),
        title=title,
        subtitle=_tagged(Text(below, style=style)),
        box=HEAVY if is_winner else ROUNDED,
        border_style=style,
        height=height + FRAME_HEIGHT,
    )


def _styled(spans: Iterable[Span]) -> Text:
    """Text in which nothing is markup: words of the environment in their own style, tags in their colours."""
    text = Text()
    for span in spans:
        text.append(printable(span.text), style=f"{FORCED_STYLE if span.is_forced else ''} {SHADE_STYLES[span.shade]}")
    return _tagged(text)


def _tagged(text: Text) -> Text:
    for tag, style in TAG_STYLES.items():
        text.highlight_regex(re.escape(tag), style)
    return text


def _last_lines(spans: Sequence[Span], width: int, height: int, console: Console) -> list[Text]:
    """The last lines of a thread as they stand in its pane.

    Only the end of a long text is styled and wrapped. Where it begins moves in steps of a whole pane, so that the lines
    on the screen do not flow anew with every token.
    """
    area = width * height
    start = max(0, sum(len(span.text) for span in spans) // area - 1) * area
    return _wrap(_styled(_from(start, spans)), width, console)[-height:]


def _from(start: int, spans: Sequence[Span]) -> Iterator[Span]:
    """The spans from that character of their joint text on."""
    for span in spans:
        if start < len(span.text):
            yield span._replace(text=span.text[start:])
        start = max(0, start - len(span.text))


def _wrap(text: Text, width: int, console: Console) -> list[Text]:
    return list(text.wrap(console, max(width, 1), overflow="fold", tab_size=4))


def _verdict(outcome: Outcome | None) -> Text:
    if outcome is None:
        return Text("interrupted: no winner", style="bold red")
    return Text(outcome.sentence(), style="bold red" if outcome.group.best_index is None else "bold green")

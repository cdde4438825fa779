"""The page of groups: aligned in lattice time, complete, bounded, and inert whatever the model wrote."""

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.decoding.segments import Segmenter
from lace_lightning.puzzles import Doors
from lace_lightning.rendering import groups_page, lattice_rows
from lace_lightning.traces.schema import Problem, Tag
from lace_lightning.traces.template import Template
from tests.hand_built import RIGHT, UNPARSABLE, WRONG

TASK = Doors(doors=(8,), tries=(2,))
TOKENIZER = TASK.tokenizer()
REAL_TOKENIZER = Path(__file__).parents[2] / "shared/data/tokenizer"


def spell(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def thread_of(text, tokenizer=TOKENIZER, forced=(), columns=None, answer="3", tag: Tag | None = None) -> Thread:
    ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)
    return Thread(
        text=tokenizer.decode(ids, skip_special_tokens=True),
        thought="",
        answer=answer,
        tag=tag,
        observations=(),
        token_ids=tuple(ids),
        columns=tuple(range(len(ids)) if columns is None else columns),
        logprobs=(0.0,) * len(ids),
        forced=tuple(index in forced for index in range(len(ids))),
        finished="eos",
    )


def group_of(*threads: Thread, text="doors 8 tries 2", answer="3") -> Group:
    return Group(Problem("doors-1", text, answer), threads, seed=0)


# Thread 1 waits in columns 4 and 5, at the barrier.
FIRST = thread_of("1 2 miss 4 3 hit ; 3 [[best]]", forced=(2, 5), tag=Tag.BEST)
SECOND = thread_of("1 4 miss ; 4 [[fail]]", forced=(2,), columns=(0, 1, 2, 3, 6, 7), tag=Tag.FAIL)
GROUP = group_of(FIRST, SECOND)
SEGMENTER = Segmenter(TASK.template, TOKENIZER)


class Page(HTMLParser):
    """Text of every cell of the tables' bodies, all elements with their attributes, and the page's text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag == "td" or (self._in_cell and tag == "span")
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data):
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    @property
    def cells(self) -> list[list[str]]:
        return [row for row in self.rows if row]


def page_of(*groups: Group, verdicts=None, **options) -> str:
    verdicts = verdicts or [[RIGHT, *[WRONG] * (len(group.threads) - 1)] for group in groups]
    return groups_page("val groups", groups, verdicts, SEGMENTER, spell, **options)


# ---------------------------------------------------------------- the lattice


def test_every_token_stands_in_the_row_of_its_column():
    rows = lattice_rows(GROUP, SEGMENTER, spell)
    assert [row.time for row in rows] == list(range(9))
    texts = [["".join(run.text for run in runs).strip() for runs in row.threads] for row in rows]
    assert texts == [
        ["1", "1"],
        ["2", "4"],
        ["miss", "miss"],
        ["4", ";"],
        ["3", ""],
        ["hit", ""],
        [";", "4"],
        ["3", "[[fail]]"],
        ["[[best]]", ""],
    ]
    assert [run.segment for row in rows for run in row.threads[0]] == [
        *("thought", "thought", "environment", "thought", "thought", "environment", "assessment", "assessment", "tag")
    ]


@pytest.mark.parametrize(("length", "width"), [(32, 1), (33, 16), (512, 16), (513, 64)])
def test_long_lattices_get_rows_of_several_columns(length, width):
    long = thread_of("1 2 3 4 " * length, columns=None)
    long = thread_of(list(long.token_ids[:length]))
    times = [row.time for row in lattice_rows(group_of(long, FIRST), SEGMENTER, spell)]
    assert {after - before for before, after in pairwise(times)} == {width}
    assert times[-1] < length <= times[-1] + width


def test_the_rows_of_a_thread_join_to_its_whole_text():
    rows = lattice_rows(GROUP, SEGMENTER, spell)
    for index, thread in enumerate(GROUP.threads):
        assert "".join(run.text for row in rows for run in row.threads[index]) == thread.text


def test_characters_whose_bytes_are_spread_over_rows_are_kept_whole():
    if not REAL_TOKENIZER.is_dir():
        pytest.skip("shared/data/tokenizer is not here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL_TOKENIZER)
    thread = thread_of("Let 𝔸 be 🧑‍🚀 ∪ 🪐: then 漢字 龘 😵‍💫 " * 8, tokenizer)
    rows = lattice_rows(group_of(thread), Segmenter(Template(), tokenizer), tokenizer.decode)
    assert len(rows) > 8
    assert "".join(run.text for row in rows for run in row.threads[0]) == thread.text


def test_a_group_whose_threads_wrote_nothing_has_no_rows():
    empty = thread_of([], answer=None)
    assert lattice_rows(group_of(empty, empty), SEGMENTER, spell) == []
    assert "no valid tag" in page_of(group_of(empty, empty), verdicts=[[UNPARSABLE, UNPARSABLE]])


# ---------------------------------------------------------------- the page


def test_the_page_shows_the_lattice_verdicts_tags_answers_and_the_winner():
    page = Page(page_of(GROUP))
    assert [[cell.strip() for cell in row] for row in page.cells][:3] == [["1", "1"], ["2", "4"], ["miss", "miss"]]
    text = " ".join(" ".join(page.texts).split())
    for shown in (
        "val groups",
        "doors 8 tries 2",
        "★ thread 0",
        "✓ correct: 3",
        "✗ wrong: 3",
        "best",
        "fail",
        "9 tokens",
    ):
        assert shown in text, shown
    assert "★ thread 1" not in text
    classes = [attributes.get("class") for tag, attributes in page.elements if tag == "td"]
    assert classes == ["win", None] * 9
    forced = [attributes for tag, attributes in page.elements if attributes.get("class") == "environment"]
    assert len(forced) == 1 + 3  # one in the legend


def test_without_valid_tags_no_thread_wins():
    page = Page(page_of(group_of(FIRST, thread_of("3 ; 3 [[best]]", tag=Tag.BEST))))
    assert not any(attributes.get("class") == "win" for _, attributes in page.elements)
    assert any("the tags are not valid" in text for text in page.texts)


HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&#60;script&#62;",
    "\x00\x1b[31m\x07\r\n",
    "\u202egnihtyna\u2066",
    "\ud800",
]


@pytest.mark.parametrize("place", ["problem", "reference", "answer", "token"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text_wherever_it_stands(text, place):
    harmless = Page(page_of(GROUP))
    thread = thread_of("1 2", answer=text if place == "answer" else "3", tag=Tag.BEST)
    group = group_of(
        thread, SECOND, text=text if place == "problem" else "p", answer=text if place == "reference" else "3"
    )
    decode = (lambda ids: text * len(ids)) if place == "token" else spell
    raw = groups_page("val groups", [group], [[RIGHT, WRONG]], SEGMENTER, decode)
    page = Page(raw)
    raw.encode()  # no lone surrogate gets through
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in harmless.elements}
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, attributes in page.elements for name in attributes
    )
    shown = "".join(page.texts)
    assert not set(shown) & set("\x00\x07\x1b\r\u202e\u2066")
    if text.isprintable():
        assert text in shown


def test_the_page_has_no_scripts_or_links_and_forbids_them():
    page = page_of(GROUP)
    assert not {"script", "link", "a", "img", "iframe"} & {tag for tag, _ in Page(page).elements}
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("max_bytes", [200_000, 20_000, 8_000])
def test_the_page_keeps_to_its_size_and_says_what_is_missing(max_bytes):
    long = thread_of("1 2 3 4 " * 2000)
    groups = [group_of(long, long, text="<" * 10_000)] * 6
    page = page_of(*groups, max_bytes=max_bytes)
    assert len(page.encode()) <= max_bytes
    assert "left out to keep the page small" in page
    whole = page_of(*groups, max_bytes=10**9)
    assert "left out" not in whole


def test_several_groups_keep_their_own_rows_beside_their_own_verdicts():
    other = group_of(thread_of("5 ; 5 [[fail]]", answer="5"), thread_of("6 7"), text="another")
    page = Page(page_of(GROUP, other))
    assert len(page.cells) == 9 + 4
    assert [cell.strip() for cell in page.cells[9]] == ["5", "6"]

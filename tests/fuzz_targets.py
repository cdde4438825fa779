"""What is fuzzed: for each reader of untrusted text, texts to try and what must hold for every one of them.

``tests/test_fuzz.py`` tries a few hundred of each, ``tests/chaos/test_trust.py`` some 10,000s, and
``benchmarks/fuzz.py`` a million and more. A check fails by raising: an error that the reader does not promise, an
answer that differs from an independent reference, or more than ``MAX_SECONDS`` for one text.
"""

from __future__ import annotations

import ast
import json
import os
import re
import tempfile
import time
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from string import Template
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from lace_lightning.cli.eval_config import read_settings
from lace_lightning.cli.shipped import SHIPPED
from lace_lightning.cli.stages import MISTAKES, resolve
from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.method import Cost, Passage
from lace_lightning.printable import one_line, printable
from lace_lightning.puzzles.countdown import judge_expression
from lace_lightning.puzzles.expression import MAX_CHARACTERS, MAX_DEPTH, parse_expression
from lace_lightning.sweep.reading import read_sweep
from lace_lightning.sweep.spec import SweepError
from lace_lightning.synthesis.chat import ChatReply
from lace_lightning.synthesis.chats.completion import BadAnswer, read_completion
from lace_lightning.synthesis.prompts import NAMES, Prompts
from lace_lightning.synthesis.prompts import SHIPPED as TEMPLATES
from lace_lightning.synthesis.teachers.language import _ranking, _solution
from lace_lightning.tasks import Verdict
from lace_lightning.traces.parsing import parse_problem, parse_trace
from lace_lightning.traces.reading import read_traces
from lace_lightning.traces.schema import Problem, Tag
from lace_lightning.traces.sources import BadDataError
from lace_lightning.traces.tags import parse_answer, parse_tag
from lace_lightning.traces.writing import _row
from lace_lightning.tracking.redact import redact, redact_lines, redact_text
from lace_lightning.tracking.spool_reader import SpoolReader
from lace_lightning.verification import Kind, Reference, Verifier
from lace_lightning.verification.sight import Question, look
from lace_lightning.viewer.page import clip, viewer_page
from tests.eval_helpers import thread

MAX_SECONDS = 2.0
"""Of processor time for one text."""
SECRET = "planted-secret-7f3a"


class Target(NamedTuple):
    """One reader.

    Args:
        name: of the reader.
        cases: what is tried.
        check: raises unless all is well with a case.
        millionths: its share of a million cases: cheap readers get many.
        pieces: of a reader of one text, what it looks for: :func:`random_text` makes cases of them a hundred times as
            fast as hypothesis, which shrinks what it finds.
    """

    name: str
    cases: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    millionths: int
    pieces: tuple[str, ...] = ()

    def timed(self, case: Any) -> None:
        """Check one case, its time included."""
        start = time.process_time()
        self.check(case)
        seconds = time.process_time() - start
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s for one case"


def texts(pieces: list[str], most: int = 14) -> st.SearchStrategy[str]:
    """Any text at all, and texts that consist of what a reader looks for."""
    fitting = st.lists(st.sampled_from(pieces), max_size=most).map("".join)
    mixed = st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=3)), max_size=most).map("".join)
    repeated = st.builds(lambda piece, count: piece * count, st.sampled_from(pieces), st.integers(0, 2000))
    return st.one_of(fitting, fitting, mixed, st.text(max_size=60), repeated)


def random_text(draw: Random, pieces: Sequence[str]) -> str:
    """One text like those of :func:`texts`."""
    kind = draw.random()
    if kind < 0.02:
        return draw.choice(pieces) * draw.randrange(2000)
    chosen = draw.choices(pieces, k=draw.randrange(16))
    if kind < 0.4:
        for _ in range(draw.randrange(1, 4)):
            chosen.insert(draw.randrange(len(chosen) + 1), chr(_any_code(draw)))
    return "".join(chosen)


def _any_code(draw: Random) -> int:
    """Mostly ASCII, controls and what Unicode has of them; half of a surrogate pair, too."""
    return draw.choice(
        [draw.randrange(128), draw.randrange(0x250), draw.randrange(0x2000, 0x2070), draw.randrange(0x110000)]
    )


def of_texts(name: str, pieces: Sequence[str], check: Callable[[str], None], millionths: int) -> Target:
    return Target(name, texts(list(pieces)), check, millionths, tuple(pieces))


# ---------------------------------------------------------------- tags, answers, expressions

TAG_PIECES = [
    *map(str, Tag),
    "[[",
    "]]",
    "best",
    "\\boxed{",
    "{",
    "}",
    " ",
    "\n",
    "42",
    "\\frac{1}{2}",
    "\u202e",
    "[[BEST]]",
]
MATH_PIECES = [
    *r"0123456789+-*/()=,. ",
    "\\frac{",
    "\\sqrt{",
    "\\left(",
    "\\right)",
    "\\cdot",
    "{",
    "}",
    "^",
    "$",
    "\\pm",
]
MATH_PIECES += [
    "\\boxed{",
    "\\text{",
    "the answer is",
    "and",
    "**",
    "9**9",
    "x",
    "%",
    "\\pi",
    "C)",
    "1,000",
    "é",
    "²",
    "−",
]


def check_tag(text: str) -> None:
    found = [tag for tag in Tag for _ in range(text.count(tag))]
    expected = found[0] if len(found) == 1 and text.rstrip().endswith(found[0]) else None
    assert parse_tag(text) is expected


def check_answer(text: str) -> None:
    before, box, rest = text.rpartition("\\boxed{")
    if not box:
        assert parse_answer(text) == (re.sub(r"\[\[(best|success|fail)\]\]", "", text).strip() or None)
        return
    left, content = 1, ""
    for letter in rest:
        left += (letter == "{") - (letter == "}")
        if not left:
            break
        content += letter
    assert parse_answer(text) == ((content.strip() or None) if not left else None)


def value_of(text: str) -> Fraction | None | str:
    """What Python's own parser makes of it: the value, None if it has none, "no" for what is not of our grammar."""
    if len(text) > MAX_CHARACTERS or re.search(r"[^0-9+\-*/() ]|\*\*|//|(?<![0-9])0[0-9]|[0-9]{10}", text):
        return "no"
    try:
        tree = ast.parse(text.strip(" "), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "no"
    return _evaluated(tree)


def _evaluated(node: ast.expr) -> Fraction | None | str:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)  # type: ignore[arg-type]
    if not isinstance(node, ast.BinOp):
        return "no"
    left, right = _evaluated(node.left), _evaluated(node.right)
    if "no" in (left, right):
        return "no"
    if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
        return None
    return {"Add": left + right, "Sub": left - right, "Mult": left * right}.get(  # type: ignore[operator]
        type(node.op).__name__,
        left / right if right else None,  # type: ignore[operator]
    )


def check_expression(text: str) -> None:
    ours, depth = parse_expression(text), max_depth(text)
    has_leading_zero = re.search(r"(?<![0-9])0[0-9]", text) is not None
    if depth <= MAX_DEPTH and not has_leading_zero:
        theirs = value_of(text)
        assert (ours is None) == (theirs == "no"), (ours, theirs)
        assert ours is None or ours.value == theirs
    assert isinstance(judge_expression(text, [3, 5, 7], 22), Verdict)


def max_depth(text: str) -> int:
    depth = most = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        most = max(most, depth)
    return most


REFERENCES = [
    Reference("42"),
    Reference(r"\frac{1}{2}", tolerance=0.1, unit="km"),
    Reference("1,2", Kind.VALUES),
    Reference("C", Kind.CHOICE),
    Reference("yes, no", Kind.TEXT),
    Reference("", Kind.COUNTDOWN, numbers=(6, 7), target=42),
]


def check_sight(text: str) -> None:
    for reference in REFERENCES:
        assert isinstance(look(reference, text), Verdict | Question)
        assert look(reference, text) == look(reference, text)


@cache
def verifier() -> Verifier:
    return Verifier(num_workers=1, time_limit=2.0)


def check_verifier(case: tuple[int, str]) -> None:
    """Its time is the worker's, which is killed at its limit; afterwards it still knows right from wrong."""
    number, text = case
    verdict, right, wrong = verifier().verify([(REFERENCES[number], text), ("1/2", r"\frac{2}{4}"), ("1/2", "x^2+1")])
    assert isinstance(verdict, Verdict) and (right, wrong) == (Verdict.CORRECT, Verdict.WRONG)


# ---------------------------------------------------------------- rows, spools, replies

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([*map(str, Tag), "", "x" * 300]),
)
KEYS = st.sampled_from(
    ["id", "problem", "answer", "source", "facts", "threads", "text", "tag", "forced", "strategy", "x"]
)
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(KEYS, v, max_size=6)), max_leaves=12
)
WORDS = st.text(max_size=20)
GOOD_THREADS = st.fixed_dictionaries(
    {"text": WORDS, "answer": WORDS, "tag": st.sampled_from([*map(str, Tag)])},
    optional={
        "strategy": WORDS,
        "origin": WORDS,
        "forced": st.lists(st.lists(st.integers(-2, 25), max_size=3), max_size=3),
    },
)
GOOD_ROWS = st.fixed_dictionaries(
    {"id": WORDS, "problem": WORDS, "answer": WORDS, "threads": st.lists(GOOD_THREADS, max_size=4)},
    optional={"facts": VALUES, "source": WORDS, "more": VALUES},
)
ROWS = st.one_of(GOOD_ROWS, VALUES, st.builds(lambda row, key, value: {**row, key: value}, GOOD_ROWS, KEYS, VALUES))


def check_row(row: object) -> None:
    try:
        trace = parse_trace(row)
    except ValueError:
        try:
            parse_problem(row)
        except ValueError:
            pass
        return
    again = parse_trace(json.loads(json.dumps(_row(trace))))
    assert repr(again) == repr(trace)  # NaN among the facts is not equal to itself


JSON_PIECES = [
    '{"id": "a", "problem": "b", "answer": "c", "threads": [',
    '{"text": "t", "answer": "a", "tag": "[[best]]"}',
]
JSON_PIECES += [
    "]}",
    "\n",
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "null",
    "NaN",
    "1e999",
    "\\ud800",
    "\ufeff",
    "9" * 5000,
    "[" * 900,
]
BYTES = st.one_of(texts(JSON_PIECES).map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=200))


@contextmanager
def file_of(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield path


def check_file(case: tuple[bytes, str]) -> None:
    with file_of(*case) as path:
        try:
            assert all(trace.threads for trace in read_traces(path))
        except BadDataError as error:
            assert str(path) in str(error)


SPOOL_PIECES = [
    '{"kind": "metrics", "time": 1, "step": 0, "values": {}}',
    '{"kind": "tag"}',
    "5",
    "null",
    "[]",
    '"kind"',
    "\n",
    "\n",
]


def check_spool(case: tuple[bytes, int]) -> None:
    """Whatever a disk made of it, every whole line is one record, of a kind, and none is lost."""
    content, offset = case
    with file_of(content, "records.jsonl") as path:
        (path.parent / "run.json").write_text('{"run_id": "x", "tracking_uri": "sqlite:///x"}')
        (path.parent / "offset").write_text(str(offset))
        reader = SpoolReader(path.parent)
        num_lines, num_records = content[offset:].count(b"\n"), 0
        assert reader.pending() == num_lines
        while reader.pending():
            records, end = reader.read()
            assert records and all(isinstance(record["kind"], str) for record in records) and end <= len(content)
            reader.acknowledge(records, end)
            num_records += len(records)
        assert num_records == num_lines and reader.read()[0] == []


REPLY_PIECES = [
    '{"choices": [{"message": {"content": ',
    '"text"',
    '}, "finish_reason": "stop"',
    "}]",
    "}",
    "null",
    "[",
    '"\\ud800"',
]
TEACHER_PIECES = [
    "Method: ",
    "**Method:**",
    "Ranking: ",
    "1, 2, 3",
    "3 > 1",
    "<think>",
    "</think>",
    "\n",
    "\\boxed{",
    "5}",
    "}",
]


def check_completion(text: str) -> None:
    try:
        assert isinstance(read_completion(text), ChatReply)
    except BadAnswer:
        pass


def check_teacher(text: str) -> None:
    reply = ChatReply(text, "stop")
    solution = _solution(reply)
    assert not solution.error and solution.answer == (parse_answer(solution.answer or "x") and solution.answer)
    ranking = _ranking(reply, 3)
    assert sorted(ranking.order) == ([] if ranking.error else [0, 1, 2])


# ---------------------------------------------------------------- what is shown

SHOWN_PIECES = [
    "<script>",
    "</script>",
    "<!--",
    "-->",
    "<img src=x onerror=alert(1)>",
    "&lt;",
    '"',
    "'",
    "\\",
    "\\u003c",
    "{{data}}",
]
SHOWN_PIECES += [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\u202e",
    "\x9b",
    "\u2028",
    "\ud800",
    "\r\n",
    "]]>",
    "javascript:",
    "[bold]",
    "{{",
    "}}",
]


class Page(HTMLParser):
    """The elements of a page, as a browser would see them, and the data in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.data: dict[str, Any] = {}
        self._is_data = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self._is_data = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data = json.loads(data)
            self._is_data = False


def _page(text: str) -> Page:
    passage = JudgedPassage(Passage(thread(answer=text, thought=text), "path"), Verdict.WRONG)
    outcome = JudgedOutcome(text, text, 0, Problem(text, text, text), (passage,), 0, Cost())
    return Page(viewer_page(text, [outcome]))


@cache
def _plain_page() -> Page:
    return _page("plain")


def check_page(text: str) -> None:
    page = _page(text)
    assert page.tags == _plain_page().tags
    [row] = page.data["rows"]
    assert row["problem"] == clip(text, 8_000) and row["reference"] == page.data["title"] == clip(text, 400)


ACTING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def check_printable(text: str) -> None:
    shown = printable(text)
    assert not ACTING.search(shown) and printable(shown) == shown and len(one_line(text).splitlines()) <= 1
    assert shown == text or ACTING.search(text)


SECRET_PIECES = [
    "password",
    "api_key",
    "--",
    "-",
    "_",
    ".",
    "token",
    "=",
    ":",
    " ",
    "://",
    "me:",
    "@",
    "?",
    "&",
    "sig=",
    "hf_",
    "eyJ",
    "a",
]
SECRET_PIECES += ["-----BEGIN PRIVATE KEY-----", "\n", '"', "'", "host/db", "sk-" + "x" * 20]


def check_redaction(text: str) -> None:
    """Neither a secret of the environment nor a value under a key nor a password in a URI survives."""
    os.environ["LACE_FUZZ_PASSWORD"] = SECRET
    for hidden in (redact_text(f"{text} {SECRET} {text}"), redact_lines(f"{text} {SECRET}")):
        assert SECRET not in hidden
    assert "hush" not in json.dumps(redact({"password": [{text: "hush"}]})).replace(json.dumps(text), "")
    assert "hush" not in redact_text(f"http://me:hush@h/{text}").removesuffix(redact_text(text))


# ---------------------------------------------------------------- prompts, configs

PROMPTS = Prompts()
PROMPT_PIECES = ["$problem", "$", "$$", "${own}", "$answer", "{problem}", "%s", "\\", "\n", "Ranking:", "<think>"]


def check_prompt(case: tuple[str, str]) -> None:
    """Every value stands in the prompt as it is, once for each of its places, and nothing else changes."""
    name, text = case
    values = {key: f"{text}{key}" for key in NAMES[name]}
    source = (TEMPLATES / "v1" / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"\$(\$|\w+|\{\w+\})", source)
    filled = [part if n % 2 == 0 else "$" if part == "$" else values[part.strip("{}")] for n, part in enumerate(parts)]
    assert PROMPTS.fill(name, **values) == "".join(filled) and Template(source).is_valid()


JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1e400,
    "",
    "x",
    [],
    {},
    [[]],
    {"class_path": "os.system"},
    {"class_path": 5},
    "../..",
    "\0",
]
YAML_PIECES = [
    "methods:",
    "\n  ",
    "a:",
    " {",
    "}",
    "[",
    "]",
    "&x",
    "*x",
    "!!python/object/apply:os.system",
    "- ",
    ":",
    "'",
    "\t",
    "? ",
]


def _places(settings: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside nested settings."""
    items = (
        settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    )
    return [place for key, value in items for place in [(*path, key), *_places(value, (*path, key))]]


def _replaced(settings: Any, path: tuple[Any, ...], junk: Any) -> Any:
    if not path:
        return junk
    copy = dict(settings) if isinstance(settings, dict) else list(settings)
    copy[path[0]] = _replaced(settings[path[0]], path[1:], junk)
    return copy


def check_settings(text: str) -> None:
    """YAML of anybody's: settings or a ValueError; nothing that it names is called."""
    with file_of(text.encode("utf-8", "replace"), "settings.yaml") as path:
        try:
            assert isinstance(read_settings([str(path)], []), dict)
        except ValueError:
            pass


SWEEP = yaml.safe_load((SHIPPED / "sweeps/tiny.yaml").read_text()) | {"extends": []}
SWEEP |= {"evaluation": {"configs": ["configs/sweeps/ground/doors_eval.yaml"]}}


def check_sweep(case: tuple[int, Any]) -> None:
    place, junk = case
    places = _places(SWEEP)
    settings = _replaced(SWEEP, places[place % len(places)], junk)
    with file_of(yaml.safe_dump(settings).encode(), "sweep.yaml") as path:
        try:
            read_sweep(str(path))
        except SweepError:
            pass


STAGE = {name: yaml.safe_load((SHIPPED / f"demo/{name}.yaml").read_text()) for name in ("base", "sft")}


def check_stage(case: tuple[int, Any]) -> None:
    """A stage's config with one value replaced is read, or refused in words; what it names is not run."""
    place, junk = case
    places = _places(STAGE["base"])
    settings = _replaced(STAGE["base"], places[place % len(places)], junk)
    with file_of(yaml.safe_dump(settings).encode(), "stage.yaml") as path:
        try:
            resolve([f"--config={path}"])
        except (*MISTAKES, ArgumentError):
            pass


PLACES = st.tuples(st.integers(0, 500), st.one_of(st.sampled_from(JUNK), SCALARS))

TARGETS = [
    of_texts("tags", TAG_PIECES, check_tag, 170_000),
    of_texts("answers", TAG_PIECES, check_answer, 170_000),
    of_texts("expressions of Countdown", [*"0123456789+-*/() "], check_expression, 120_000),
    of_texts("answers at sight", MATH_PIECES, check_sight, 80_000),
    Target("answers in a worker", st.tuples(st.integers(0, 5), texts(MATH_PIECES)), check_verifier, 5_000),
    Target("rows of traces", ROWS, check_row, 60_000),
    Target("files of traces", st.tuples(BYTES, st.sampled_from(["a.jsonl", "a.jsonl.gz"])), check_file, 30_000),
    Target(
        "spools",
        st.tuples(texts(SPOOL_PIECES).map(lambda t: t.encode("utf-8", "replace")), st.integers(0, 60)),
        check_spool,
        20_000,
    ),
    of_texts("replies of endpoints", REPLY_PIECES, check_completion, 80_000),
    of_texts("replies of teachers", TEACHER_PIECES, check_teacher, 60_000),
    of_texts("pages of the viewer", SHOWN_PIECES, check_page, 20_000),
    of_texts("texts for the terminal", SHOWN_PIECES, check_printable, 100_000),
    of_texts("redaction", SECRET_PIECES, check_redaction, 50_000),
    Target("prompt templates", st.tuples(st.sampled_from(sorted(NAMES)), texts(PROMPT_PIECES)), check_prompt, 60_000),
    of_texts("settings in YAML", YAML_PIECES, check_settings, 10_000),
    Target("sweeps", PLACES, check_sweep, 3_000),
    Target("configs of stages", PLACES, check_stage, 1_500),
]

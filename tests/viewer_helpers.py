"""Outcomes to look at, made by hand or by the thousand."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from lace_lightning.decoding.group import Thread
from lace_lightning.evaluation.inspection import Inspection, Read
from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.method import Cost, Passage
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Tag

RIGHT, WRONG = Verdict.CORRECT, Verdict.WRONG

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</script x><img src=x onerror=alert(1)>",
    "<!--<script >",
    "<img src=x onerror=alert(1)>",
    "{{style}}{{data}}",
    "\u2028\u2029\x00\x1b[31m",
    "\u202egnihtyna\u2066",
    "\ud800",
    "&lt;b&gt; \\u003c \\",
]


def passage(
    n: int,
    pieces: Sequence[str],
    segments: str | None = None,
    columns: Sequence[int] | None = None,
    gates: Sequence[float] | None = None,
    reads: Sequence[Sequence[Read]] | None = None,
    answer: str | None = "3",
    tag: Tag | None = Tag.FAIL,
    verdict: Verdict | None = WRONG,
    group: int = 0,
    role: str = "path",
) -> JudgedPassage:
    count = len(pieces)
    segments = segments or "t" * count
    thread = Thread(
        text="".join(pieces), thought="", answer=answer, tag=tag, observations=(), token_ids=tuple(range(count)),
        columns=tuple(range(count) if columns is None else columns), logprobs=(0.0,) * count,
        forced=tuple(kind == "e" for kind in segments), finished="eos",
    )  # fmt: skip
    inspection = Inspection(
        n, tuple(pieces), segments, None if gates is None else tuple(gates),
        None if reads is None else tuple(map(tuple, reads)),
    )  # fmt: skip
    return JudgedPassage(Passage(thread, role, group), verdict, inspection)


def outcome(
    *passages: JudgedPassage,
    chosen: int | None = 0,
    name: str = "p0",
    text: str = "How many?",
    reference: str = "3",
    method: str = "lace",
    benchmark: str = "toy",
    seed: int = 0,
) -> JudgedOutcome:
    problem = Problem(name, text, reference, {}, "made")
    return JudgedOutcome(benchmark, method, seed, problem, passages, chosen, Cost())


def four(
    name: str = "p0", tags: str = "bfsf", rights: str = "1010", chosen: int | None = 0, **options
) -> JudgedOutcome:
    """Four threads of nine tokens; the second waits in columns 3 and 4; every token reads the next thread."""
    names = {"b": Tag.BEST, "s": Tag.SUCCESS, "f": Tag.FAIL, "-": None}
    columns = [tuple(range(9)), (0, 1, 2, 5, 6, 7, 8, 9, 10), tuple(range(9)), tuple(range(9))]
    passages = []
    for n, (tag, right) in enumerate(zip(tags, rights, strict=True)):
        words = [
            "try",
            f" {n}",
            " miss",
            " so",
            " ;",
            " answer",
            " 3" if right == "1" else " 4",
            f" [[{tag}]]",
            "<eos>",
        ]
        reads = [(((n + 1) % 4, time, 0.5), ((n + 2) % 4, max(0, time - 1), 0.25)) for time in columns[n]]
        passages.append(
            passage(
                n,
                words,
                "tteaaaagg",
                columns[n],
                [0.2 + 0.05 * i for i in range(9)],
                reads,
                answer=words[6].strip(),
                tag=names[tag],
                verdict=RIGHT if right == "1" else WRONG,
            )  # fmt: skip
        )
    return outcome(*passages, chosen=chosen, name=name, **options)


def many(groups: int = 500, threads: int = 4, tokens: int = 512, words: int = 20_000) -> list[JudgedOutcome]:
    """Groups of random tokens, gates and reads: as hard to compress as they come."""
    draw = random.Random(0)
    vocabulary = [" " + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 9))) for _ in range(words)]
    outcomes = []
    for index in range(groups):
        passages = []
        for n in range(threads):
            reads = [
                tuple(
                    (draw.choice([m for m in range(threads) if m != n]), draw.randint(0, time), share)
                    for share in sorted((draw.random() * 0.5 for _ in range(3)), reverse=True)
                )
                for time in range(tokens)
            ]
            pieces = [vocabulary[int(words * draw.random() ** 3)] for _ in range(tokens)]
            gates = [draw.random() for _ in range(tokens)]
            verdict = draw.choice([RIGHT, WRONG, WRONG])
            tag = Tag.BEST if n == 0 else Tag.FAIL
            passages.append(passage(n, pieces, None, None, gates, reads, tag=tag, verdict=verdict))
        outcomes.append(outcome(*passages, name=f"p{index}", text=f"Question {index}: " + "how many? " * 20))
    return outcomes


def island(page: str) -> dict:
    """The page's data, as its script gets it."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)

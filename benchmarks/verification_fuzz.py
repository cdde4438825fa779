"""Random answers against the verifier: every one must get a verdict, no code may run, and the workers must survive.

    .venv/bin/python benchmarks/verification_fuzz.py [--cases 100000] [--seed 0] [--time-limit 1]

Answers are strings of LaTeX pieces, damaged real answers, Unicode and code that would leave a file behind. Prints what
became of them, the answers that came out right (to be looked at), and those that cost a worker its life.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from lace_lightning.tasks import Verdict
from lace_lightning.verification import Kind, Reference, Verifier

PIECES = (
    r"\frac \sqrt \sqrt[3] \left( \right) \binom \sum_{k=1}^{9} \int \text{ \mathrm{ \boxed{ \pm \cup \infty \pi \\"
)
PIECES += r" { } ( ) [ ] | $ ^ _ ! / * + - = < > , ; : . % & ~ # @ ' 0 1 2 3 42 999999999 x y i e n \cdot \times \in"
PIECES += r" \begin{pmatrix} \end{pmatrix} \{ \} \log \sin \% ^\circ ** and or ²"
REAL = [
    "42",
    r"\frac{1}{2}",
    "(1,2)",
    "1,3,5",
    r"3\sqrt{2}",
    r"(-\infty,5]",
    "x^2+1",
    r"\pi",
    "yes, no",
    "(C)",
    "6*7",
    "10^{9}",
]
REFERENCES = [
    Reference("42"),
    Reference(r"\frac{1}{2}", tolerance=0.1, unit="km"),
    Reference(r"(-\infty,5]"),
    Reference("x^2+1"),
    Reference("1,3,5", Kind.VALUES),
    Reference("C", Kind.CHOICE),
    Reference("yes, no", Kind.TEXT),
    Reference("", Kind.COUNTDOWN, numbers=(6, 7), target=42),
]
WEIGHTS = [4, 2, 2, 2, 3, 1, 1, 1]
BATCH = 2000


def answer(draw: random.Random, code: str) -> str:
    """One random answer."""
    kind = draw.random()
    if kind < 0.5:
        return draw.choice(["", " "]).join(draw.choices(PIECES.split(), k=draw.randint(1, 9)))
    if kind < 0.85:
        return damaged(draw.choice(REAL), draw)
    if kind < 0.97:
        return "".join(
            chr(draw.choice([draw.randrange(128), draw.randrange(0x110000)])) for _ in range(draw.randint(1, 12))
        )
    return damaged(code, draw) if draw.random() < 0.5 else f"42{draw.choice(';*+, $')}{code}"


def damaged(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice([*PIECES.split(), ""]) + text[place + draw.randint(0, 2) :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=1.0)
    args = parser.parse_args()
    draw, counts, right, lethal = random.Random(args.seed), Counter[str](), Counter[str](), []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Verifier(time_limit=args.time_limit) as verifier:
        planted = Path(folder) / "planted"
        for done in range(0, args.cases, BATCH):
            size = min(BATCH, args.cases - done)
            references = draw.choices(REFERENCES, WEIGHTS, k=size)
            pairs = [(reference, answer(draw, f"open({str(planted)!r},'w')")) for reference in references]
            before = verifier.counts
            verdicts = verifier.verify(pairs)
            assert len(verdicts) == size and all(isinstance(verdict, Verdict) for verdict in verdicts)
            assert not planted.exists(), "an answer was run"
            counts.update(verdicts)
            hits = zip(pairs, verdicts, strict=True)
            right.update(f"{pair[0].answer} <- {pair[1]}" for pair, verdict in hits if verdict == Verdict.CORRECT)
            if verifier.counts != before:
                lethal.append(f"batch {done // BATCH}: {verifier.counts}")
            print(f"\r{done + size} of {args.cases}, {time.monotonic() - began:.0f} s", end="", flush=True)
    print(f"\n{dict(counts)}, {verifier.counts}")
    print("right:", *(f"{times:5} {text}" for text, times in right.most_common()), sep="\n")
    print("lost workers:", *lethal, sep="\n")


if __name__ == "__main__":
    main()

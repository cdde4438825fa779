"""Which comparison a problem gets, and what each counts as right, wrong and unparsable."""

import pytest

from lace_lightning.traces.schema import Problem
from lace_lightning.verification import Kind, MathTask, Reference, Verifier, reference_of
from lace_lightning.verification.spelling import MAX_LENGTH, is_readable
from tests.hand_built import RIGHT, UNPARSABLE, WRONG, thread

ODD = Reference("1,3,5", Kind.VALUES)
PAIRS = Reference("(1,1), (3,2)", Kind.VALUES)
RATE = Reference("4.2", tolerance=0.1, unit="%")
AREA = Reference("166", unit="cm^2")
LETTER = Reference("C", Kind.CHOICE)
LIES = Reference("yes, no, yes", Kind.TEXT)
ZEBRA = Reference("mexican, video-games, 2", Kind.TEXT)
TWENTY_EIGHT = Reference("", Kind.COUNTDOWN, numbers=(52, 17, 97), target=28)

CASES = [
    (
        ODD,
        RIGHT,
        ["5,3,1", "1, 3 and 5", r"\{1,3,5\}", "(1,3,5)", "x=1, x=3, x=5", "1 or 3 or 5", "1;3;5", r"1,\text{ and }3,5"],
    ),
    (ODD, WRONG, ["1,3", "1,3,5,7", "1,3,5,5", "1,3,4", "135"]),
    (ODD, UNPARSABLE, [r"1,3,\frac{5"]),
    (Reference("16,3,1,1", Kind.VALUES), WRONG, ["16,3,1"]),  # a set would swallow the second 1
    (Reference("221,8", Kind.VALUES), RIGHT, ["8,221"]),  # not the number 8221
    (Reference("312,123,231", Kind.VALUES), WRONG, ["312123231"]),
    (Reference("2,-2", Kind.VALUES), RIGHT, [r"\pm 2", r"x=\pm2"]),
    (PAIRS, RIGHT, ["(3,2),(1,1)", r"\{(1,1),(3,2)\}", "(1,1) and (3,2)"]),
    (PAIRS, WRONG, ["(2,3),(1,1)", "1,1,3,2", "(1,1)"]),
    (RATE, RIGHT, ["4.2", "4.2%", r"4.2\%", "4.1", "4.3", "4.25", r"\frac{17}{4}", "r=4.2"]),
    (RATE, WRONG, ["4.31", "4.0999", "x", r"\frac{9}{2}", "0.042"]),
    (AREA, RIGHT, ["166", "166 cm^2", r"166\text{ cm}^2", r"166 \mathrm{~cm}^{2}"]),
    (AREA, WRONG, ["166 cm^3", "165 cm^2"]),
    (Reference(r"\frac{600}{7}", unit="km/h"), RIGHT, [r"\frac{600}{7} \mathrm{km} / \mathrm{h}", "600/7 km/h"]),
    (Reference("45", unit="minute"), RIGHT, ["45 minutes", r"45\text{ minute}", "45 min"]),
    (
        LETTER,
        RIGHT,
        [
            "C",
            "c",
            "(C)",
            r"\text{C}",
            r"\textbf{(C)}",
            "CCCCC",
            "C) 42",
            "C. 42",
            "The answer is C",
            "**C**",
            r"(C) \frac{A}{2}",
        ],
    ),
    (LETTER, WRONG, ["D", "DDDDD", "C or D", "(A) or (C)", "A, C"]),
    (LETTER, UNPARSABLE, ["42", "none", r"\frac{1}{2}", "()"]),
    (
        LIES,
        RIGHT,
        [
            "Yes, No, Yes",
            "yes,no,yes",
            "**yes, no, yes**",
            r"\text{yes, no, yes}",
            r"\text{yes}, \text{no}, \text{yes}",
            "yes, no, and yes",
        ],
    ),
    (LIES, WRONG, ["no, yes, yes", "yes, no", "yes no yes", "yes, no, yes, no"]),
    (LIES, UNPARSABLE, ["$$", "**", ", ,"]),
    (ZEBRA, RIGHT, ["Mexican, video games, 02", r"mexican, video\_games, 2."]),
    (Reference("d&b", Kind.TEXT), RIGHT, [r"d\&b", "***D&B***"]),
    (Reference("tetrahedron", Kind.TEXT), RIGHT, ["a tetrahedron.", "The answer is a tetrahedron"]),
    (
        TWENTY_EIGHT,
        RIGHT,
        ["97-17-52", "(97 - 17) - 52 = 28", "97 − (17 + 52)", r"\left(97-17\right)-52", r"\boxed{97-17-52}."],
    ),
    (TWENTY_EIGHT, WRONG, ["28", "97-17", "97-(17+52)=29", "97-17-52-0", r"97\times17\div52"]),
    (TWENTY_EIGHT, UNPARSABLE, ["97-17-52=28=28", "97**17", "x", "97-17-52=abc"]),
    (Reference("", Kind.COUNTDOWN, numbers=(2, 4, 8), target=4), RIGHT, [r"\frac{8}{4}\times 2", r"8\div4\cdot2"]),
    (Reference("10000"), RIGHT, ["10,000", "10 000", r"10{,}000", r"10\,000", r"\$10,000", "$10,000.00"]),
    (Reference("3/2"), RIGHT, ["1 1/2", r"1\frac12", "1.5", r"$\dfrac{3}{2}$"]),
    (Reference("42"), RIGHT, ["42 eggs", "42 dollars per day", "$42 per hour", r"42\text{ dollars}", "42.0 kg"]),
    (Reference("42"), WRONG, ["42 thousand", "42 dozen", "42 sin x", "421 eggs", "-42 eggs"]),
    (Reference("6"), UNPARSABLE, ["4 2", r"4\ 2"]),  # math-verify reads the sum
    (
        Reference("42"),
        UNPARSABLE,
        ["4\u200f2", "４２", "٤٢", "4\x002", "\ud800", "42 \\frac{"],
    ),
    (Reference("42"), WRONG, [r"10^{\infty}", r"\infty"]),  # found by benchmarks/verification_fuzz.py, as the next
    (Reference("42"), UNPARSABLE, [r"0\}{\sqrt[3]\int=42", r"\sqrt[3](\boxed{\binom\boxed{>=42"]),
    (Reference(r"\infty"), RIGHT, [r"+\infty"]),
    (Reference(r"\infty"), WRONG, [r"-\infty", "42"]),
    (Reference("(-\\infty,-5)"), RIGHT, ["x<-5", r"\left(-\infty,-5\right)"]),
    (Reference(r"m_{\max }=n^{2}-n-1"), RIGHT, ["n^2-n-1"]),
    (Reference("\\$32,\\!348"), RIGHT, ["32348"]),
    (Reference(r"4 x^3 (5 e^{4 x^5-4} x)"), RIGHT, ["20x^4 e^{4x^5-4}"]),
]


def test_each_kind_counts_as_right_wrong_and_unparsable_what_it_should():
    table = [(reference, answer, verdict) for reference, verdict, answers in CASES for answer in answers]
    with Verifier(num_workers=1) as verifier:
        found = verifier.verify([(reference, answer) for reference, answer, _ in table])
    rows = zip(table, found, strict=True)
    assert [(ref.answer, answer, got) for (ref, answer, expected), got in rows if got != expected] == []


@pytest.mark.parametrize(
    ("answer", "source", "facts", "expected"),
    [
        ("58,500", "math500", {}, Reference("58,500")),
        ("221,8", "olympiadbench", {}, Reference("221,8", Kind.VALUES)),
        ("108,135", "olympiadbench", {}, Reference("108,135", Kind.VALUES)),
        ("1,-2", "math500", {}, Reference("1,-2", Kind.VALUES)),
        ("(3,4]", "math500", {}, Reference("(3,4]")),
        ("4.2", "olympiadbench", {"tolerance": "1e-1", "unit": "%"}, Reference("4.2", tolerance=0.1, unit="%")),
        (r"\text{Evelyn}", "math500", {}, Reference("Evelyn", Kind.TEXT)),
        ("x", "", {}, Reference("x")),
        ("3,1,2", "livebench-math", {"subject": "olympiad/imo"}, Reference("3,1,2", Kind.TEXT)),
        (r"\lambda ^2", "livebench-math", {"subject": "AMPS_Hard/x"}, Reference(r"\lambda ^2")),
        ("025", "livebench-math", {"subject": "math_comp/aime_i_2024"}, Reference("025")),
        ("4", "livebench-reasoning", {"subject": "spatial"}, Reference("4", Kind.TEXT)),
        ("yes", "", {"kind": "text"}, Reference("yes", Kind.TEXT)),
        (
            "(1+2)*3",
            "",
            {"numbers": [1, 2, 3], "target": 9},
            Reference("(1+2)*3", Kind.COUNTDOWN, 0.0, "", (1, 2, 3), 9),
        ),
    ],
)
def test_the_kind_of_a_reference_follows_from_its_problem(answer, source, facts, expected):
    assert reference_of(Problem("p", "text", answer, facts, source)) == expected


@pytest.mark.parametrize(
    "text", ["٤", "４", "4\u200f", "\u202e4", "4\x00", "\ud800", "\ue000", "\u0378", "", " \n", None]
)
def test_no_text_is_readable_that_depends_on_who_reads(text):
    assert not is_readable(text)
    assert is_readable("x² ≤ 4\u00a0€ \n") and is_readable("1" * MAX_LENGTH) and not is_readable("1" * (MAX_LENGTH + 1))


def test_a_letter_is_a_choice_only_where_the_problem_offers_options():
    options = r"Which? \textbf{(A)} 1 \textbf{(B)} 2 \textbf{(C)} 3"
    assert [reference_of(Problem("p", options, answer)) for answer in ("C", r"\text{(C)}")] == [LETTER, LETTER]
    assert reference_of(Problem("p", "Which constant?", "C")) == Reference("C")


@pytest.mark.parametrize(
    ("answer", "facts", "message"),
    [
        ("1", {"kind": "guess"}, "kind='guess' is none of expression"),
        ("42", {"kind": "choice"}, "answer='42' is no letter"),
        ("1", {"tolerance": "wide"}, "tolerance='wide'"),
        ("1", {"tolerance": -1}, "tolerance=-1"),
        ("1", {"numbers": "1 2", "target": 3}, "numbers='1 2', target=3"),
        ("1", {"numbers": [], "target": 3}, "list of whole numbers"),
        (" ", {}, "has no answer"),
    ],
)
def test_facts_that_make_no_reference_are_refused_as_the_problem_is_read(answer, facts, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        MathTask().adapt(Problem("p", "text", answer, facts))


def test_math_task_judges_each_problem_by_its_own_kind():
    items = [
        (Problem("a", "text", "(97-17)-52", {"numbers": [52, 17, 97], "target": 28}), "97-(52+17)"),
        (Problem("b", "text", "yes, no", source="livebench-reasoning"), "Yes, No"),
        (Problem("c", "(A) 1 (B) 2", "B"), "A"),
        (Problem("d", "text", "1,3", source="olympiadbench"), "3,1"),
        (Problem("e", "text", "1/3"), "\x00"),
    ]
    task = MathTask(num_workers=1)
    verdicts = task.judge([(problem, thread(answer)) for problem, answer in items])
    assert verdicts == [RIGHT, RIGHT, WRONG, RIGHT, UNPARSABLE]
    task.verifier.close()

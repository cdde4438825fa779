"""What counts as the same problem: near-duplicates and evaluation problems go, innocents stay."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lace_lightning.puzzles import Countdown
from lace_lightning.synthesis.overlap import contaminated, near_duplicates, ngrams_of, words_of
from lace_lightning.synthesis.problems import ProblemOptions, collect, shard_of
from lace_lightning.traces.reading import read_problems
from lace_lightning.traces.sources import BadDataError
from lace_lightning.verification import MathTask

MATH = Path(__file__).parents[2] / "shared/data/math"
needs_data = pytest.mark.skipif(not MATH.exists(), reason=f"{MATH} is not there")

EVALUATION = (
    "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?",
    "Find the number of ordered pairs of positive integers whose sum is 100 and whose product is a perfect square.",
)
INNOCENTS = (
    "A tailor buys 2 bolts of blue cloth and 7 of white. How many bolts does she have in total after giving 3 away?",
    "Find the number of subsets of the first ten positive integers whose sum is divisible by three.",
    "How many bolts?",
)
COPIES = (
    EVALUATION[0].upper().replace("  ", " "),
    "Solve this. " + EVALUATION[0] + " Give your answer as a number.",
    EVALUATION[1].replace("positive integers", "positive whole integers").replace(".", "!"),
)


def write(path: Path, texts) -> str:
    rows = [{"id": n, "problem": text, "answer": n} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_planted_copies_of_evaluation_problems_are_found_and_innocents_are_not(tmp_path):
    source = write(tmp_path / "train.jsonl", INNOCENTS + COPIES)
    evaluation = write(tmp_path / "eval.jsonl", EVALUATION)
    rows = collect(ProblemOptions(source, evaluation=(evaluation,)), MathTask())
    removed = {row["problem"]["text"]: row for row in rows if row.get("removed")}
    assert set(removed) == {copy.strip() for copy in COPIES}
    for copy, reference in zip(COPIES, (0, 0, 1), strict=True):
        row = removed[copy]
        assert row["removed"] == "evaluation problem"
        assert row["match"]["id"] == str(reference) and row["match"]["source"] == evaluation
        assert row["match"]["problem"] == EVALUATION[reference] and 0.5 <= row["match"]["overlap"] <= 1


def test_overlap_with_an_evaluation_problem_is_shared_ngrams_over_those_of_the_shorter():
    # 7 words have two 6-grams; the text below holds the first of them among its four
    assert contaminated(["x a b c d e f y z"], ["a b c d e f g"], 6, 0.5)[0].overlap == 1 / 2
    assert not contaminated(["x a b c d e f y z"], ["a b c d e f g"], 6, 0.51)


def test_of_near_duplicates_the_first_stays_and_the_list_says_which(tmp_path):
    first = "Tom has 3 red balls and 4 blue balls and gives 2 of them to his little sister Ann. How many are left?"
    texts = [first, first.replace("little ", ""), "Another problem altogether, about 7 geese.", first.lower()]
    options = ProblemOptions(write(tmp_path / "p.jsonl", texts), duplicate_threshold=0.6)
    rows = collect(options, MathTask())
    assert [row.get("removed") for row in rows] == [None, "near-duplicate", None, "near-duplicate"]
    assert [row["match"]["id"] for row in rows if row.get("removed")] == ["0", "0"]
    assert rows[3]["match"]["overlap"] == 1


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join), max_size=12), st.data())
def test_prefix_filtering_finds_what_comparing_all_pairs_finds(texts, data):
    size, threshold = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.8, 1.0]))
    staying, going = [], {}
    for index, text in enumerate(texts):
        own = ngrams_of(text, size)
        likeness = {k: len(own & ngrams_of(texts[k], size)) / len(own | ngrams_of(texts[k], size)) for k in staying}
        if likeness and max(likeness.values()) >= threshold:
            going[index] = max(likeness, key=lambda k: (likeness[k], -k))
        else:
            staying.append(index)
    assert {index: match.index for index, match in near_duplicates(texts, size, threshold).items()} == going


def test_words_are_compared_without_case_punctuation_and_spelling_of_digits():
    assert words_of("It’s 5, SO…") == words_of("it's ５ so")
    assert words_of("x+1") != words_of("x-1")
    assert len(words_of("求所有的整数")) == 6  # Chinese has no spaces: every sign is a word


def test_shards_part_the_problems():
    rows = [{"position": position} for position in (0, 1, 3, 4, 7, 8)]
    shards = [shard_of(rows, index, 3) for index in range(3)]
    assert sorted((row for shard in shards for row in shard), key=lambda row: row["position"]) == rows
    assert all(not set(map(id, a)) & set(map(id, b)) for a, b in combinations(shards, 2))


def test_a_puzzle_makes_its_own_problems_and_other_tasks_need_a_source():
    rows = collect(ProblemOptions(limit=5, duplicate_threshold=1.0), Countdown())
    assert [row["problem"]["id"] for row in rows] == [f"countdown-train-{index}" for index in range(5)]
    with pytest.raises(ValueError, match="MathTask makes no problems"):
        collect(ProblemOptions(limit=5), MathTask())


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(), "limit"),
        (dict(limit=0), "limit=0"),
        (dict(limit=1, duplicate_threshold=0.0), "duplicate_threshold=0.0"),
        (dict(limit=1, evaluation_ngram=0), "evaluation_ngram=0"),
    ],
)
def test_options_out_of_range_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        ProblemOptions(**options)


def test_a_missing_evaluation_set_is_named(tmp_path):
    source = write(tmp_path / "p.jsonl", ["one"])
    with pytest.raises(BadDataError, match=r"problems\.evaluation='nowhere\.jsonl'"):
        collect(ProblemOptions(source, evaluation=("nowhere.jsonl",)), MathTask())


@needs_data
def test_real_problems_leave_real_evaluation_sets_alone_and_planted_ones_are_caught(tmp_path):
    """GSM8K's training problems are not its test problems; three of them planted among 300 are found."""
    train = [p.text for p in read_problems(MATH / "gsm8k_train.jsonl.gz")[:300]]
    test = MATH / "gsm8k_test_dev.jsonl"
    planted = Random(0).sample([p.text for p in read_problems(test)], 3)
    source = write(tmp_path / "p.jsonl", train + [text.replace("?", " ?").replace(",", "") for text in planted])
    rows = collect(ProblemOptions(source, evaluation=(str(test),)), MathTask())
    leaked = [row["position"] for row in rows if row.get("removed") == "evaluation problem"]
    assert leaked == [300, 301, 302]

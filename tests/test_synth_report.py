"""`lace synth report` and the data card, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lace_lightning.cli.main import main
from lace_lightning.embedding import Embedder, NgramEmbedder
from lace_lightning.exchange import LatticeAttentionConfig
from lace_lightning.puzzles import Doors
from lace_lightning.synthesis.card import Prices, make_card
from lace_lightning.synthesis.card_page import to_markdown
from lace_lightning.synthesis.compression import TokenCounter
from lace_lightning.synthesis.statistics import cross_ratio, diversity, own_text, trace_statistics
from lace_lightning.synthesis.work_folder import Outcome
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
from lace_lightning.traces.writing import write_traces
from tests.synth_helpers import ScriptedTeacher


class Compass(Embedder):
    """Texts point where they say."""

    directions = {"north": (0.0, 1.0), "east": (1.0, 0.0), "between": (math.sqrt(0.5), math.sqrt(0.5))}

    def embed(self, texts):
        return torch.tensor([self.directions[text] for text in texts])


def trace(*threads: tuple[str, Tag, str]) -> Trace:
    made = (TraceThread(text, "1", tag, strategy) for text, tag, strategy in threads)
    return Trace(Problem("p", "q", "1"), tuple(made))


TRACES = [
    trace(("abcd", Tag.BEST, "s"), ("abcx", Tag.FAIL, "s")),  # edit distance 1/4
    trace(("ab", Tag.BEST, "s"), ("xyz", Tag.SUCCESS, "t"), ("ab", Tag.FAIL, "s")),  # 1, 0, 1 of 3 pairs
]


def test_edit_distance_tags_strategies_and_lengths_are_those_worked_out_by_hand():
    found = trace_statistics(TRACES, NgramEmbedder(), TokenCounter())
    assert found["diversity"]["edit_distance"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert found["tags"] == {"[[best]]": 2 / 5, "[[success]]": 1 / 5, "[[fail]]": 2 / 5}
    assert found["valid_tags"] == 1 and found["num_threads"] == {"2": 1, "3": 1}
    assert found["strategies"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["tokens"] == {"mean": 1, "median": 1, "largest": 1}


def test_embedding_dissimilarity_is_the_mean_over_groups_of_the_mean_over_pairs():
    found = diversity([["north", "east"], ["north", "east", "between"]], Compass())
    diagonal = 1 - math.sqrt(0.5)
    assert found["embedding_dissimilarity"] == pytest.approx((1 + (1 + 2 * diagonal) / 3) / 2)
    assert diversity([["north"] * 4], Compass())["embedding_dissimilarity"] == pytest.approx(0, abs=1e-6)
    assert diversity([], Compass()) == {"edit_distance": None, "embedding_dissimilarity": None}


def test_what_an_environment_wrote_is_no_thread_s_own_text():
    assert own_text(TraceThread("try 3: wrong, 4: right", "4", Tag.BEST, forced=((7, 12), (17, 22)))) == "try 3: , 4: "


def test_two_bests_are_counted_as_invalid_tags():
    found = trace_statistics([trace(("a", Tag.BEST, ""), ("b", Tag.BEST, ""))], NgramEmbedder(), TokenCounter())
    assert found["valid_tags"] == 0


def test_lace_synth_report_prints_the_statistics_of_any_trace_file(tmp_path, capsys):
    path = tmp_path / "traces.parquet"
    write_traces(TRACES, path)
    assert main(["synth", "report", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(trace_statistics(TRACES, NgramEmbedder(), TokenCounter())))
    assert main(["synth", "report", str(path)]) == 0
    assert "edit_distance             0.4583" in capsys.readouterr().out
    assert main(["synth", "report", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_cross_ratio_is_zero_for_threads_that_read_only_themselves_and_one_for_those_that_never_do():
    from transformers import AutoModelForCausalLM, Qwen3Config

    from lace_lightning.threaded_lm import ThreadedLM

    puzzle = Doors()
    tokenizer = puzzle.tokenizer()
    traces = [puzzle.trace(index, 3) for index in range(3)]
    collate = TraceCollator(tokenizer, puzzle.template, num_threads=3, max_length=40)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    ratios = {}
    for own in ("only", "include", "exclude"):
        exchange = LatticeAttentionConfig(scope="causal", width=8, heads=2, own=own)
        model = ThreadedLM(AutoModelForCausalLM.from_config(config), exchange, 3, tokenizer=tokenizer)
        ratios[own] = cross_ratio(model.eval(), collate, traces, batch_size=2)
    assert ratios["only"] == 0 and ratios["exclude"] == pytest.approx(1) and 0.3 < ratios["include"] < 0.7


# ---------------------------------------------------------------- the card


def usage(requests: int, prompt: int, completion: int) -> dict:
    return {"requests": requests, "prompt_tokens": prompt, "completion_tokens": completion}


def attempt(outcome: str, text: str, verdict: str = "correct") -> dict:
    shown = {"text": text, "verdict": verdict, "outcome": outcome, "error": "dead" if outcome == "error" else ""}
    return shown | {"usage": usage(1, 100, 1000)}


def test_costs_histogram_and_reasons_are_those_worked_out_by_hand():
    base = {"S": 0.25, "verdicts": ["correct", "wrong", "wrong", "wrong"], "usage": usage(4, 40, 400)}
    hard = base | {"S": 0.0, "verdicts": ["wrong"] * 4, "removed": "too hard"}
    attempts = [attempt("accepted", "aa"), attempt("edit distance", "ab"), attempt("accepted", "zz", "wrong")]
    sampled = base | {"attempts": [*attempts, attempt("error", "")], "stopped": "enough"}
    compressed = sampled | {
        "compressions": [
            {"before": 9000, "after": 2000, "outcomes": ["too long", "accepted"], "usage": usage(2, 10, 10)}
        ]
    }
    report = {"disagreement": 0.5, "disagree_on_best": True, "errors": [], "usage": usage(2, 20, 20)}
    solutions = [{"verdict": "correct"}, {"verdict": "wrong"}]
    judged = compressed | {"judging": report, "solutions": solutions}
    assembled = judged | {"threads": [1, 0]}
    outcomes = {
        "problems": Outcome([base] * 2, []),
        "difficulty": Outcome([base], [hard]),
        "sampling": Outcome([sampled], []),
        "compression": Outcome([compressed], []),
        "judging": Outcome([judged], []),
        "assembly": Outcome([assembled], []),
    }
    prices = Prices(prompt=1.0, completion=10.0, solver_prompt=0.0, solver_completion=2.0, currency="EUR")
    counter = TokenCounter()
    card = make_card(outcomes, TRACES[:1], ScriptedTeacher(), NgramEmbedder(), counter, prices, {})
    assert card["S"]["histogram"] == {"0.000": 1, "0.250": 1} and card["S"]["mean"] == 0.125
    assert card["S"]["verdicts"] == {"correct": 1, "wrong": 7}
    assert card["stages"]["difficulty"] == {"in": 2, "kept": 1, "removed": {"too hard": 1}}
    assert card["sampling"]["outcomes"] == {"accepted": 2, "edit distance": 1, "error": 1}
    assert card["compression"]["tokens_before"] == 9000 and card["compression"]["outcomes"]["too long"] == 1
    assert card["judging"] == {"ranked_twice": 1, "disagree_on_best": 1, "disagreement": 0.5, "errors": 0}
    assert card["correct_threads"] == {"1": 1}
    assert card["diversity_before"]["edit_distance"] == 1 / 2  # aa and ab, before ab was rejected
    assert card["cost"]["difficulty"] == usage(8, 80, 800) | {"price": 0.0016}
    assert card["cost"]["sampling"] == usage(4, 400, 4000) | {"price": 0.0404}
    assert card["cost"]["price"] == pytest.approx(0.0016 + 0.0404 + 0.00011 + 0.00022)
    page = to_markdown(card, "sums")
    assert "| 0.250 | 1 |" in page and "too hard 1" in page and "EUR" in page and "`scripted`" in page

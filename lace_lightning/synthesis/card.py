"""The data card: what a data set holds, what was left out and why, who wrote it and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean
from typing import Any

from lace_lightning.embedding import Embedder
from lace_lightning.synthesis.compression import TokenCounter
from lace_lightning.synthesis.rows import Row
from lace_lightning.synthesis.statistics import diversity, trace_statistics
from lace_lightning.synthesis.teacher import Teacher, Usage
from lace_lightning.synthesis.work_folder import Outcome
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Trace

Card = dict[str, Any]


@dataclass(frozen=True)
class Prices:
    """What a model's tokens cost.

    Args:
        prompt, completion: per million tokens of the teacher, in ``currency``.
        solver_prompt, solver_completion: the same of the model to be trained.
        currency: for the card.
    """

    prompt: float = 0.0
    completion: float = 0.0
    solver_prompt: float = 0.0
    solver_completion: float = 0.0
    currency: str = "USD"


def make_card(
    outcomes: Mapping[str, Outcome],
    traces: Sequence[Trace],
    teacher: Teacher,
    embedder: Embedder,
    counter: TokenCounter,
    prices: Prices,
    made_with: Mapping[str, Any],
) -> Card:
    """A card as JSON values: a function of the stages' rows alone, so a resumed or merged run gives the same one."""
    return {
        "teacher": {"identity": teacher.identity, "note": teacher.note, "prompts": dict(teacher.prompts)},
        "stages": {name: _stage(outcome) for name, outcome in outcomes.items()},
        "S": _success_rates(_all(outcomes, "difficulty")),
        "sampling": _sampling(_all(outcomes, "sampling")),
        "compression": _compression(_all(outcomes, "compression")),
        "judging": _judging(_all(outcomes, "judging")),
        "traces": trace_statistics(traces, embedder, counter),
        "correct_threads": _correct_threads(outcomes["assembly"].kept),
        "diversity_before": diversity(_first_attempts(outcomes["assembly"].kept), embedder),
        "cost": _cost(outcomes, prices),
        "made_with": dict(made_with),
    }


def _all(outcomes: Mapping[str, Outcome], name: str) -> list[Row]:
    """Every row of a stage, those it removed included; none if it was left out."""
    return [*outcomes[name].kept, *outcomes[name].removed] if name in outcomes else []


def _stage(outcome: Outcome) -> dict[str, Any]:
    reasons = _counts(row["removed"] for row in outcome.removed)
    return {"in": len(outcome.kept) + len(outcome.removed), "kept": len(outcome.kept), "removed": reasons}


def _success_rates(rows: Sequence[Row]) -> dict[str, Any]:
    rates = [row["S"] for row in rows if row["S"] is not None]
    histogram = {f"{rate:.3f}": count for rate, count in sorted(Counter(rates).items())}
    verdicts = _counts(verdict for row in rows for verdict in row["verdicts"])
    return {"histogram": histogram, "mean": fmean(rates) if rates else None, "verdicts": verdicts}


def _sampling(rows: Sequence[Row]) -> dict[str, Any]:
    attempts = [attempt for row in rows for attempt in row["attempts"]]
    accepted = [attempt for attempt in attempts if attempt["outcome"] == "accepted"]
    return {
        "attempts": len(attempts),
        "outcomes": _counts(attempt["outcome"] for attempt in attempts),
        "errors": dict(Counter(a["error"] for a in attempts if a["error"]).most_common(5)),
        "verdicts_of_accepted": _counts(attempt["verdict"] for attempt in accepted),
        "stopped": _counts(row["stopped"] for row in rows),
    }


def _compression(rows: Sequence[Row]) -> dict[str, Any]:
    entries = [entry for row in rows for entry in row["compressions"]]
    done = [entry for entry in entries if entry["after"] is not None]
    return {
        "too_long": len(entries),
        "rewritten": len(done),
        "outcomes": _counts(outcome for entry in entries for outcome in entry["outcomes"]),
        "tokens_before": fmean(entry["before"] for entry in done) if done else None,
        "tokens_after": fmean(entry["after"] for entry in done) if done else None,
    }


def _judging(rows: Sequence[Row]) -> dict[str, Any]:
    twice = [row["judging"] for row in rows if row["judging"]["disagreement"] is not None]
    return {
        "ranked_twice": len(twice),
        "disagree_on_best": fmean(report["disagree_on_best"] for report in twice) if twice else None,
        "disagreement": fmean(report["disagreement"] for report in twice) if twice else None,
        "errors": sum(len(row["judging"]["errors"]) for row in rows),
    }


def _correct_threads(rows: Sequence[Row]) -> dict[str, int]:
    """Number of traces by how many of their threads are correct."""
    right = [[row["solutions"][index]["verdict"] == Verdict.CORRECT for index in row["threads"]] for row in rows]
    return _counts(sum(trace) for trace in right)


def _first_attempts(rows: Sequence[Row]) -> list[list[str]]:
    """As many solutions as a trace has threads, as the teacher first gave them, before anything was rejected."""
    attempts = [[attempt["text"] for attempt in row["attempts"] if not attempt["error"]] for row in rows]
    return [texts[: len(row["threads"])] for texts, row in zip(attempts, rows, strict=True)]


def _cost(outcomes: Mapping[str, Outcome], prices: Prices) -> dict[str, Any]:
    usages = {
        "difficulty": [row["usage"] for row in _all(outcomes, "difficulty")],
        "sampling": [attempt["usage"] for row in _all(outcomes, "sampling") for attempt in row["attempts"]],
        "compression": [entry["usage"] for row in _all(outcomes, "compression") for entry in row["compressions"]],
        "judging": [row["judging"]["usage"] for row in _all(outcomes, "judging")],
    }
    cost: dict[str, Any] = {"currency": prices.currency}
    for name, rows in usages.items():
        total = reduce(Usage.__add__, (Usage(**row) for row in rows), Usage())
        by_solver = name == "difficulty"
        prompt = prices.solver_prompt if by_solver else prices.prompt
        completion = prices.solver_completion if by_solver else prices.completion
        price = (total.prompt_tokens * prompt + total.completion_tokens * completion) / 1e6
        cost[name] = {**vars(total), "price": round(price, 6)}
    cost["price"] = round(sum(cost[name]["price"] for name in usages), 6)
    return cost


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}

"""The data card as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lace_lightning.synthesis.card import Card

PAPER = {"edit_distance": "0.13 → 0.77", "embedding_dissimilarity": "0.00 → 0.12"}
"""The paper's Table 2: Parallel-R1's data → LACE's."""


def to_markdown(card: Card, title: str) -> str:
    """The page of a card."""
    traces, teacher = card["traces"], card["teacher"]
    parts = [
        f"# Data card: {title}",
        f"{traces['num_traces']} traces; threads per trace: {_listed(traces['num_threads'])}.",
        f"**Teacher**: `{teacher['identity']}`. {teacher['note']}".rstrip(),
        *_prompts(teacher["prompts"]),
        "## Stages",
        _table(["stage", "in", "kept", "removed"], [_stage(*item) for item in card["stages"].items()]),
        *_difficulty(card["S"]),
        "## Sampling",
        _sampling(card["sampling"]),
        "## Compression and judging",
        _compression(card["compression"]) + " " + _judging(card["judging"]),
        "## Threads",
        _table(["", "first attempts", "traces", "paper, Parallel-R1 → LACE"], _diversity(card)),
        _threads(card),
        "## Cost",
        _cost(card["cost"]),
    ]
    return "\n\n".join(parts) + "\n"


def _prompts(prompts: Mapping[str, str]) -> list[str]:
    listed = ", ".join(f"`{version}`" for version in prompts.values())
    return [f"**Prompts** (version, digest): {listed}."] if prompts else []


def _stage(name: str, stage: Mapping[str, Any]) -> list[str]:
    return [name, str(stage["in"]), str(stage["kept"]), _listed(stage["removed"]) or "none"]


def _difficulty(rates: Mapping[str, Any]) -> list[str]:
    if not rates["histogram"]:
        return ["## Difficulty", "Not measured: no solver was given, and every problem was kept."]
    largest = max(rates["histogram"].values())
    rows = [[rate, str(count), "#" * round(40 * count / largest)] for rate, count in rates["histogram"].items()]
    said = f"Mean S {rates['mean']:.3f}; verdicts of all attempts: {_listed(rates['verdicts'])}."
    return ["## Difficulty", said, _table(["S", "problems", ""], rows)]


def _sampling(sampling: Mapping[str, Any]) -> str:
    lines = [
        f"{sampling['attempts']} solutions were asked for: {_listed(sampling['outcomes'])}.",
        f"Verdicts of the accepted: {_listed(sampling['verdicts_of_accepted'])}.",
        f"Problems by the rule that ended their sampling: {_listed(sampling['stopped'])}.",
    ]
    return " ".join(lines + ([f"Errors: {_listed(sampling['errors'])}."] if sampling["errors"] else []))


def _compression(compression: Mapping[str, Any]) -> str:
    if not compression["too_long"]:
        return "No solution was too long."
    mean = f" (mean {compression['tokens_before']:.0f} → {compression['tokens_after']:.0f} tokens)"
    return (
        f"{compression['rewritten']} of {compression['too_long']} solutions that were too long were rewritten"
        f"{mean if compression['rewritten'] else ''}; outcomes: {_listed(compression['outcomes'])}."
    )


def _judging(judging: Mapping[str, Any]) -> str:
    if not judging["ranked_twice"]:
        return f"No problem was ranked twice; {judging['errors']} rankings failed."
    return (
        f"{judging['ranked_twice']} problems had several correct solutions and were ranked twice: the two rankings "
        f"name another best in {judging['disagree_on_best']:.3f} of them and order {judging['disagreement']:.3f} of "
        f"the pairs the other way round; {judging['errors']} rankings failed."
    )


def _diversity(card: Card) -> list[list[str]]:
    before, after = card["diversity_before"], card["traces"]["diversity"]
    return [[name.replace("_", " "), _number(before[name]), _number(after[name]), PAPER[name]] for name in after]


def _threads(card: Card) -> str:
    traces, tokens = card["traces"], card["traces"]["tokens"]
    tags = ", ".join(f"`{tag}` {_number(share)}" for tag, share in traces["tags"].items())
    return (
        f"Tags: {tags}; share of traces with exactly one best: {_number(traces['valid_tags'])}. "
        f"Traces by number of correct threads: {_listed(card['correct_threads'])}. "
        f"Tokens per thread: mean {_number(tokens['mean'])}, median {tokens['median']:g}, largest {tokens['largest']}."
    )


def _cost(cost: Mapping[str, Any]) -> str:
    names = [name for name, value in cost.items() if isinstance(value, dict)]
    keys = ("requests", "prompt_tokens", "completion_tokens", "price")
    rows = [[name, *(f"{cost[name][key]:g}" for key in keys)] for name in names]
    table = _table(["stage", "requests", "prompt tokens", "completion tokens", f"price, {cost['currency']}"], rows)
    return (
        f"{table}\n\nTogether {cost['price']:g} {cost['currency']}; a reply from the cache counts as if paid for now."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"

"""Independent threads of which the unsure are stopped, then a vote by confidence (after DeepConf, Fu et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lace_lightning.decoding.group import Thread
from lace_lightning.evaluation.method import Cost, Method, Outcome, Passage, Policy
from lace_lightning.evaluation.methods.choice import own_logprobs, vote
from lace_lightning.evaluation.methods.record import Record, check_at_least, records, solve_alone
from lace_lightning.traces.schema import Problem


class PrunedVote(Method):
    """N single threads; some set a threshold, the rest are stopped where their confidence falls below it.

    Confidence of a group of tokens is their mean log-probability over a sliding window. DeepConf takes the mean over
    the top k tokens of the vocabulary at each place; what decoding records is the chosen token's, so we take that.
    As in DeepConf's online mode the first ``warmup`` threads run to their end, and the threshold is what the lowest
    window of ``keep`` of them reaches. A stopped thread has no answer and no vote; others weigh exp(lowest window).

    Single threads read nobody, so a thread that is stopped is exactly the beginning of the finished one. We decode all
    of them and cut the records: tokens and columns are counted up to the stop, seconds are those of the whole threads,
    an upper bound. Stopping inside the decoder would make them shorter; nothing else would change. A cut record keeps
    its tokens; its text is left empty.

    Notes: ``stopped`` threads, and ``saved``, the share of all their tokens that was not written.

    Args:
        policy: name of the policy that it asks.
        num_threads: N, those of the warm-up included.
        warmup: threads that set the threshold.
        keep: share of the warm-up threads that the threshold would let through.
        window: tokens per window; a thread with fewer is one window.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, policy: str, num_threads: int = 8, warmup: int = 4, keep: float = 0.5, window: int = 8) -> None:
        super().__init__(policy)
        check_at_least(1, num_threads=num_threads, warmup=warmup, window=window)
        if warmup >= num_threads:
            raise ValueError(f"warmup={warmup} leaves nothing of num_threads={num_threads} to prune: make it smaller")
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} is a share: give a number above 0, at most 1")
        self.num_threads = num_threads
        self.warmup = warmup
        self.keep = keep
        self.window = window

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        solve_alone(policy, owners, self.num_threads)
        return [self._prune(record) for record in owners]

    def _prune(self, record: Record) -> Outcome:
        lowest = [min(windows(passage.thread, self.window)) for passage in record.passages]
        ranked = sorted(lowest[: self.warmup], reverse=True)
        threshold = ranked[math.ceil(self.keep * self.warmup) - 1]
        full = [passage.thread.num_tokens for passage in record.passages]
        stopped = [k for k in range(self.warmup, self.num_threads) if lowest[k] < threshold]
        for index in stopped:
            cut = _cut(record.thread(index), self.window, threshold)
            record.passages[index] = Passage(cut, "pruned", record.passages[index].group)
        record.cost = self._cost(record)
        voters = [index for index in range(self.num_threads) if index not in stopped]
        chosen, share = vote(record, voters, {index: math.exp(lowest[index]) for index in voters})
        saved = 1 - record.cost.tokens / sum(full) if sum(full) else 0.0
        return record.outcome(chosen, share, stopped=len(stopped), saved=saved)

    def _cost(self, record: Record) -> Cost:
        """As written online: the warm-up first, then the others side by side."""
        threads = [passage.thread for passage in record.passages]
        columns = [1 + max(thread.columns, default=-1) for thread in threads]
        return replace(
            record.cost,
            tokens=sum(thread.num_tokens for thread in threads),
            columns=max(columns[: self.warmup]) + max(columns[self.warmup :]),
        )


def windows(thread: Thread, size: int) -> list[float]:
    """Mean log-probability of each window of ``size`` tokens that the thread chose; at least one window.

    Entry k ends with token ``size - 1 + k``, or with the last one if there are fewer than ``size``.
    """
    own = own_logprobs(thread) or [0.0]
    size = min(size, len(own))
    return [sum(own[start : start + size]) / size for start in range(len(own) - size + 1)]


def _cut(thread: Thread, size: int, threshold: float) -> Thread:
    """The thread up to the last token of its first window below ``threshold``, without text, answer and tag."""
    low = next(number for number, mean in enumerate(windows(thread, size)) if mean < threshold)
    chosen = [place for place, forced in enumerate(thread.forced) if not forced]
    end = chosen[min(low + size, len(chosen)) - 1] + 1
    return replace(
        thread, text="", thought="", answer=None, tag=None, observations=(), finished="length",
        token_ids=thread.token_ids[:end], columns=thread.columns[:end],
        logprobs=thread.logprobs[:end], forced=thread.forced[:end],
    )  # fmt: skip

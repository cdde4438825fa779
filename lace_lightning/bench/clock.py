"""Time on a device, and samples taken in turn so that drift hits every case alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class CaseFailed(Exception):
    """One case of a cell could not be measured; the message goes into the record and the other cases go on."""


class Clock:
    """Measures what a device takes: between CUDA events, on CPUs by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Time from when the device is done with earlier work until it is done with ``work``; one host sync."""
        if not self._is_cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended)

    def settle(self) -> None:
        """Wait for the device, so that what comes next is not charged for what came before."""
        if self._is_cuda:
            torch.cuda.synchronize()


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """All samples, in the order they were taken, with median and quartiles."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"samples": list(samples), "median": median, "q1": q1, "q3": q3}


def in_turn(
    cases: Mapping[str, Callable[[], T]], warmup: int, repeats: int, progress: Callable[[str], None]
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Run every case once per round, in alternating order.

    Args:
        cases: name -> takes one sample.
        warmup: rounds whose samples are thrown away.
        repeats: rounds that count.
        progress: is told what runs next.

    Returns:
        Samples by case, one per round; and what went wrong, by case. A case that failed once is not run again.
    """
    samples: dict[str, list[T]] = {name: [] for name in cases}
    errors: dict[str, str] = {}
    for index in range(warmup + repeats):
        names = [name for name in cases if name not in errors]
        for name in names if index % 2 == 0 else reversed(names):
            progress(f"{name}, {'warm-up' if index < warmup else f'{index - warmup + 1} of {repeats}'}")
            try:
                sample = cases[name]()
            except torch.OutOfMemoryError:
                errors[name] = "OOM"
            except CaseFailed as error:
                errors[name] = str(error)
            else:
                if index >= warmup:
                    samples[name].append(sample)
            if name in errors:
                free_memory()
    return {name: taken for name, taken in samples.items() if name not in errors}, errors


def free_memory() -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Peak memory of decoding against N, exchange on and off, each with the device to itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lace_lightning.bench import floors
from lace_lightning.bench.bench import OFF, Bench
from lace_lightning.bench.clock import free_memory
from lace_lightning.bench.decoding import Point, make_decoder
from lace_lightning.threaded_lm import ThreadedLM


def memory(bench: Bench, threads: Sequence[int], groups: int, prompt: int, columns: int) -> Iterator[dict[str, Any]]:
    """One cell for each N, once every case has been through all of them."""
    points = [Point(num_threads, groups, prompt, 0, columns) for num_threads in threads]
    yield from memory_cells(bench, points)


def memory_cells(bench: Bench, points: Sequence[Point], width: int | None = None) -> list[dict[str, Any]]:
    """A cell per point. One model stands on the device at a time: what it keeps between points counts as its own."""
    peaks: dict[str, list[dict[str, Any]]] = {}
    for case in bench.settings.cases:
        before = allocated_bytes(bench.device)
        model = bench.model(case, width=width)
        peaks[case] = [_peak(bench, case, model, point, before) for point in points]
        del model
        free_memory()
    return [_cell(point, {case: taken[index] for case, taken in peaks.items()}) for index, point in enumerate(points)]


def _peak(bench: Bench, case: str, model: ThreadedLM, point: Point, before: int | None) -> dict[str, Any]:
    bench.progress(f"{point}: memory, {case}")
    free_memory()
    reset_peak(bench.device)
    try:
        decoding = make_decoder(model, point.max_new_tokens, bench.settings.engine).start(
            bench.prompts(point.groups, point.prompt), point.threads, list(range(point.groups))
        )
        decoding.advance(point.max_new_tokens)
        bench.clock.settle()
    except torch.OutOfMemoryError:
        return {"error": "OOM"}
    peak = peak_bytes(bench.device)
    return {
        "peak_bytes": None if peak is None or before is None else peak - before,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "kv": floors.kv_record(model, point.groups, point.threads, point.prompt, point.max_new_tokens),
    }


def _cell(point: Point, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    off = cases.get(OFF, {}).get("peak_bytes")
    on = {case: record["peak_bytes"] for case, record in cases.items() if case != OFF and record.get("peak_bytes")}
    return asdict(point) | {
        "cases": cases,
        "ratios": {case: {"median": peak / off} for case, peak in on.items()} if off else {},
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes allocated now; None on CPUs, where torch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes allocated at once since the last reset; None on CPUs."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

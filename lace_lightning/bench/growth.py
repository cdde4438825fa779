"""Step time and memory against the number of threads, the prompt, lattice time and lattice width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lace_lightning.bench import floors
from lace_lightning.bench.bench import Bench, joined
from lace_lightning.bench.clock import free_memory, spread
from lace_lightning.bench.decode import measure
from lace_lightning.bench.decoding import Point, make_decoder
from lace_lightning.bench.memory import memory_cells
from lace_lightning.decoding import Decoding
from lace_lightning.threaded_lm import ThreadedLM


@dataclass(frozen=True)
class Sweeps:
    """Values of each sweep; an empty one is left out. What a sweep does not vary stays at ``base``."""

    base: Point
    threads: Sequence[int] = ()
    prompt: Sequence[int] = ()
    lattice_time: Sequence[int] = ()
    width: Sequence[int] = ()


def growth(bench: Bench, sweeps: Sweeps) -> Iterator[dict[str, Any]]:
    """One cell of step times for each value of each sweep, with ``sweep`` and ``at``."""
    check_times(bench, sweeps)
    backbone = bench.backbone()
    models = bench.models(backbone=backbone)
    for name in ("threads", "prompt"):
        for value in getattr(sweeps, name):
            yield {"sweep": name, "at": value} | measure(bench, models, replace(sweeps.base, **{name: value}))
    for value, cell in zip(sweeps.lattice_time, along_time(bench, models, sweeps), strict=True):
        yield {"sweep": "lattice_time", "at": value} | cell
    for value in sweeps.width:
        wide = bench.models(width=value, backbone=backbone)
        yield {"sweep": "width", "at": value} | measure(bench, wide, sweeps.base)
        del wide


def memory_growth(bench: Bench, sweeps: Sweeps) -> Iterator[dict[str, Any]]:
    """Cells of peak memory, with ``sweep`` named ``memory against …``; lattice time has none of its own."""
    free_memory()
    for name in ("threads", "prompt"):
        points = [replace(sweeps.base, **{name: value}) for value in getattr(sweeps, name)]
        for value, cell in zip(getattr(sweeps, name), memory_cells(bench, points) if points else (), strict=True):
            yield {"sweep": f"memory against {name}", "at": value} | cell
    for value in sweeps.width:
        [cell] = memory_cells(bench, [sweeps.base], width=value)
        yield {"sweep": "memory against width", "at": value} | cell


# ---------------------------------------------------------------- lattice time


def check_times(bench: Bench, sweeps: Sweeps) -> None:
    """Raise ValueError if the blocks timed at one lattice time run into the next one."""
    rounds = bench.settings.warmup + bench.settings.repeats
    for time, following in zip(sweeps.lattice_time, sweeps.lattice_time[1:], strict=False):
        end = time + rounds * sweeps.base.columns
        if end > following:
            raise ValueError(
                f"--times {time} {following}: {rounds} blocks of {sweeps.base.columns} columns from {time} on end at "
                f"{end}; put the times in order and further apart, or lower --columns or --repeats"
            )


def along_time(bench: Bench, models: dict[str, ThreadedLM], sweeps: Sweeps) -> Iterator[dict[str, Any]]:
    """One cell per lattice time out of one long decoding per case: at each, blocks are timed in turn.

    So late times cost their columns once, not once per sample; the blocks of one time follow each other from there on.
    """
    if not sweeps.lattice_time:
        return
    drift = (bench.settings.warmup + bench.settings.repeats) * sweeps.base.columns
    last = sweeps.lattice_time[-1] + drift
    running = {case: _Running(bench, model, sweeps.base, last) for case, model in models.items()}
    for time in sweeps.lattice_time:
        point = replace(sweeps.base, lattice_time=time)
        blocks: dict[str, Callable[[], float]] = {
            case: partial(_block, bench, decoding, point) for case, decoding in running.items()
        }
        samples, errors = bench.in_turn(point, blocks)
        cases = {case: _record(bench, models[case], point, time + drift / 2, taken) for case, taken in samples.items()}
        yield asdict(point) | joined(cases, errors)


class _Running:
    """A decoding under way, and the columns it has decoded; started by its first block."""

    def __init__(self, bench: Bench, model: ThreadedLM, point: Point, max_new_tokens: int) -> None:
        self._decoder = make_decoder(model, max_new_tokens, bench.settings.engine)
        self._prompts, self._threads = bench.prompts(point.groups, point.prompt), point.threads
        self._decoding: Decoding | None = None
        self.columns = 0

    def advance(self, columns: int) -> None:
        if self._decoding is None:
            self._decoding = self._decoder.start(self._prompts, self._threads, list(range(len(self._prompts))))
        self._decoding.advance(columns)
        self.columns += columns


def _block(bench: Bench, running: _Running, point: Point) -> float:
    """Milliseconds per column of one block, behind what is missing up to the point's lattice time."""
    running.advance(max(0, point.lattice_time - running.columns))
    bench.clock.settle()
    return bench.clock.milliseconds(lambda: running.advance(point.columns)) / point.columns


def _record(bench: Bench, model: ThreadedLM, point: Point, middle: float, samples: Sequence[float]) -> dict[str, Any]:
    step = spread(samples)
    floor = floors.step_bytes(model, point.groups, point.threads, point.prompt, middle).record(bench.bytes_per_second)
    return {"step_ms": step, "floor": floor, "times_floor": step["median"] / floor["ms"]}

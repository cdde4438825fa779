"""Heat maps as matplotlib figures; drawn without pyplot, so that no figure outlives its use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lace_lightning.metrics.readings import SEGMENTS, ReadingMaps
from lace_lightning.metrics.tags import TAGS, VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MAX_ANNOTATED = 144  # cells beyond which numbers would not be legible


def gate_figure(maps: ReadingMaps, layers: Sequence[int], bin_width: int) -> Figure:
    """Mean gates: layer × segment beside layer × lattice time, on one colour scale from 0 to 1."""
    figure = _figure(11, 2 + 0.35 * len(layers))
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    names = [segment.name.lower() for segment in SEGMENTS]
    _draw(left, maps.gate_by_segment, [str(layer) for layer in layers], names, 1.0)
    times = [str(index * bin_width) for index in range(maps.gate_by_time.shape[1])]
    image = _draw(right, maps.gate_by_time, [str(layer) for layer in layers], times, 1.0, annotate=False)
    left.set(title="gate by segment", ylabel="layer")
    left.tick_params(axis="x", rotation=20)
    right.set(title="gate by lattice time", xlabel="column")
    figure.colorbar(image, ax=right)
    return figure


def thread_figure(thread_share: Tensor) -> Figure:
    """Whom each thread attends to, (N, N): rows read, columns are read; a row sums to 1."""
    return _threads_figure(thread_share, "lattice attention", "thread that is read", "thread that reads")


def similarity_figure(similarity: Tensor) -> Figure:
    """How alike the thoughts of two threads are, (N, N) mean cosine similarities."""
    return _threads_figure(similarity, "similarity of thoughts", "thread", "thread")


def _threads_figure(values: Tensor, title: str, below: str, beside: str) -> Figure:
    size = 2.5 + 0.4 * len(values)
    figure = _figure(size + 0.8, size)
    axes = figure.subplots()
    names = [str(index) for index in range(len(values))]
    figure.colorbar(_draw(axes, values, names, names, 1.0), ax=axes)
    axes.set(title=title, xlabel=below, ylabel=beside)
    return figure


def confusion_figure(confusion: Tensor) -> Figure:
    """Threads by verdict and tag, (3, 4) counts as :class:`~lace_lightning.metrics.tags.TagConfusion` has them."""
    figure = _figure(5.5, 3.5)
    axes = figure.subplots()
    most = float(confusion.max()) or 1.0
    _draw(axes, confusion, [str(verdict) for verdict in VERDICTS], [str(tag or "none") for tag in TAGS], most)
    axes.set(title="threads by verdict and tag", xlabel="tag", ylabel="verdict")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw(
    axes: Axes, values: Tensor, rows: Sequence[str], columns: Sequence[str], most: float, annotate: bool = True
) -> AxesImage:
    """Draw (rows, columns) values on a scale from 0 to ``most``; few enough cells get their numbers."""
    array = values.detach().cpu().numpy()
    image = axes.imshow(array, vmin=0.0, vmax=most, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), rows)
    every = max(1, len(columns) // 12)
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    if annotate and array.size <= _MAX_ANNOTATED:
        for (row, column), value in np.ndenumerate(array):
            text = "" if np.isnan(value) else f"{value:.2f}" if values.is_floating_point() else f"{value:,}"
            axes.text(column, row, text, ha="center", va="center", color="black" if value > 0.6 * most else "white")
    return image

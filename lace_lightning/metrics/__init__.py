"""Metrics of LACE.md §7 as torchmetrics, and the one list of metric names."""

from lace_lightning.metrics.groups import GroupMetrics
from lace_lightning.metrics.names import DESCRIPTIONS
from lace_lightning.metrics.readings import ReadingMaps, ReadingMetrics
from lace_lightning.metrics.summary import EvaluationSummary
from lace_lightning.metrics.tags import TagConfusion

__all__ = ["DESCRIPTIONS", "EvaluationSummary", "GroupMetrics", "ReadingMaps", "ReadingMetrics", "TagConfusion"]

"""DataModules: where a run's traces and problems come from."""

from lace_lightning.datamodules.problems import ProblemData
from lace_lightning.datamodules.traces import TraceData

__all__ = ["ProblemData", "TraceData"]

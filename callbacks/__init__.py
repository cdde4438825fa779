"""Lightning callbacks: they decide when; what is computed are pure functions and metrics of the library."""

from lace_lightning.callbacks.diversity import DiversityMonitor
from lace_lightning.callbacks.game_score_table import GameScoreTable
from lace_lightning.callbacks.gates import GateMonitor
from lace_lightning.callbacks.graceful_stop import GracefulStop
from lace_lightning.callbacks.group_traces import GroupTraces
from lace_lightning.callbacks.group_writer import GroupWriter
from lace_lightning.callbacks.health import HealthMonitor, UnhealthyRun
from lace_lightning.callbacks.lineage import Lineage
from lace_lightning.callbacks.one_run import OneRun
from lace_lightning.callbacks.samples import SampleGroups
from lace_lightning.callbacks.save_config import SaveConfig
from lace_lightning.callbacks.stage_checkpoint import StageCheckpoint
from lace_lightning.callbacks.tags import TagMonitor
from lace_lightning.callbacks.validation_table import ValidationTable

__all__ = [
    "DiversityMonitor",
    "GameScoreTable",
    "GateMonitor",
    "GracefulStop",
    "GroupTraces",
    "GroupWriter",
    "HealthMonitor",
    "Lineage",
    "OneRun",
    "SampleGroups",
    "SaveConfig",
    "StageCheckpoint",
    "TagMonitor",
    "UnhealthyRun",
    "ValidationTable",
]

"""MLflow tracking that survives servers, signals and crashes."""

from lace_lightning.tracking.logger import MLflowLogger
from lace_lightning.tracking.replay import Replayed, find_spools, replay
from lace_lightning.tracking.store import DEFAULT_TRACKING_URI, TrackingError

__all__ = ["DEFAULT_TRACKING_URI", "MLflowLogger", "Replayed", "TrackingError", "find_spools", "replay"]

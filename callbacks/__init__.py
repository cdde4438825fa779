"""Lightning callbacks: they decide when; what is computed are pure functions and metrics of the library."""

from lace_lightning.callbacks.graceful_stop import GracefulStop
from lace_lightning.callbacks.save_config import SaveConfig

__all__ = ["GracefulStop", "SaveConfig"]

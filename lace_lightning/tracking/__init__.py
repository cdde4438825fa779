"""MLflow tracking that survives servers, signals and crashes. Names load on first use: ``lace ui`` needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lace_lightning.tracking.logger import MLflowLogger
    from lace_lightning.tracking.resend import Replayed, find_spools, replay
    from lace_lightning.tracking.store import DEFAULT_TRACKING_URI, TrackingError

__all__ = ["DEFAULT_TRACKING_URI", "MLflowLogger", "Replayed", "TrackingError", "find_spools", "replay"]

_MODULES = {"DEFAULT_TRACKING_URI": "store", "MLflowLogger": "logger", "TrackingError": "store"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'resend')}"), name)

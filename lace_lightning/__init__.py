"""lace-lightning: reasoning threads that read each other while they are decoded (LACE, arXiv 2604.15529).

The names below load on first use, so that ``import lace_lightning`` and ``lace --help`` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lace_lightning.decoding import Environment, Group, Sampling, Thread
    from lace_lightning.exchange import (
        ConfidentAttention,
        ConfidentAttentionConfig,
        Exchange,
        ExchangeConfig,
        Isolated,
        LatticeAttention,
        LatticeAttentionConfig,
        SameStepConfig,
        SameStepExchange,
        SharedVisibility,
        SharedVisibilityConfig,
    )
    from lace_lightning.tasks import Puzzle, Task, Verdict
    from lace_lightning.threaded_lm import ThreadedLM
    from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
    from lace_lightning.traces.template import Template

__version__ = "0.1.0"

__all__ = [
    "ConfidentAttention",
    "ConfidentAttentionConfig",
    "Environment",
    "Exchange",
    "ExchangeConfig",
    "Group",
    "Isolated",
    "LatticeAttention",
    "LatticeAttentionConfig",
    "Problem",
    "Puzzle",
    "SameStepConfig",
    "SameStepExchange",
    "Sampling",
    "SharedVisibility",
    "SharedVisibilityConfig",
    "Tag",
    "Task",
    "Template",
    "Thread",
    "ThreadedLM",
    "Trace",
    "TraceThread",
    "Verdict",
]

_NAMES = {
    "decoding": ("Environment", "Group", "Sampling", "Thread"),
    "exchange": (
        "ConfidentAttention",
        "ConfidentAttentionConfig",
        "Exchange",
        "ExchangeConfig",
        "Isolated",
        "LatticeAttention",
        "LatticeAttentionConfig",
        "SameStepConfig",
        "SameStepExchange",
        "SharedVisibility",
        "SharedVisibilityConfig",
    ),
    "tasks": ("Puzzle", "Task", "Verdict"),
    "threaded_lm": ("ThreadedLM",),
    "traces.schema": ("Problem", "Tag", "Trace", "TraceThread"),
    "traces.template": ("Template",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]

"""Games that threads play, each thread in a copy of its own (``docs/agents.md``)."""

from lace_lightning.agents.cooking import TextWorldCooking

__all__ = ["TextWorldCooking"]

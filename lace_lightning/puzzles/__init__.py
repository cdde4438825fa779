"""Puzzles that make their own problems, oracle traces and verdicts (``docs/puzzles.md``)."""

from lace_lightning.puzzles.countdown import Countdown
from lace_lightning.puzzles.countdown_drills import CountdownDrills
from lace_lightning.puzzles.doors import Doors
from lace_lightning.puzzles.find import Find

__all__ = ["Countdown", "CountdownDrills", "Doors", "Find"]

"""How much device memory a run takes, before it runs: counted from shapes, nothing is allocated (docs/operations)."""

from lace_lightning.memory.estimate import Estimate, Phase, estimate
from lace_lightning.memory.knobs import Knob, knobs
from lace_lightning.memory.run import Decoding, Pass, Precision, Run
from lace_lightning.memory.shape import LatticeShape, Shape

__all__ = [
    "Decoding", "Estimate", "Knob", "LatticeShape", "Pass", "Phase", "Precision", "Run", "Shape", "estimate", "knobs",
]  # fmt: skip

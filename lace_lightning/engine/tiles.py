"""Thin products: few rows, so that a product only reads its weights, cut into tiles for our own kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from lace_lightning.engine.weights import DecoderWeights

THIN = 16
"""Most rows for which our own matrix products are used."""


@dataclass(frozen=True)
class Tile:
    """How a thin product is cut: warps that share out the inputs, and inputs that a warp asks for at once."""

    warps: int
    inputs: int

    def step(self, inputs: int) -> int:
        """Inputs that each warp asks for at once: half as many where the last turn of a warp would be mostly empty.

        A tensor core's operand has at least 32.
        """
        share = inputs // self.warps
        step = min(self.inputs, triton.next_power_of_2(share))
        if step < share and -share % step > share // 10:
            step //= 2
        return max(32, step)


TILES = {
    "qkv": Tile(4, 256),
    "side": Tile(8, 256),
    "out": Tile(4, 512),
    "gated": Tile(4, 128),
    "down": Tile(4, 512),
    "head": Tile(4, 256),
}
"""By the product's role in a step."""


def is_thin(weights: DecoderWeights, rows: int) -> bool:
    """Whether our own products take these weights: 16-bit, few rows, sizes in whole tiles."""
    warps = max(tile.warps for tile in TILES.values())
    layer = weights.layers[0]
    matrices = [layer.q, layer.k, layer.o, layer.gate, layer.down, weights.head]
    matrices += [matrix for side in weights.sides.values() for matrix in (side.w_in, side.w_out)]
    fits = all(matrix.shape[0] % 16 == 0 and matrix.shape[1] % (8 * warps) == 0 for matrix in matrices)
    return rows <= THIN and fits and weights.head.dtype in (torch.bfloat16, torch.float16)

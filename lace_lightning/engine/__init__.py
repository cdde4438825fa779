"""The fast decoding engine: the step of a known family of backbones, written for one new token per thread."""

from lace_lightning.engine.weights import DecoderWeights, obstacle

__all__ = ["DecoderWeights", "obstacle"]

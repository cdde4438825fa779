"""LightningModules, one per stage."""

from lace_lightning.modules.base import DecodingSpec, ThreadedModule
from lace_lightning.modules.fully_sharded import FullySharded
from lace_lightning.modules.fully_sharded_on_disk import FullyShardedOnDisk
from lace_lightning.modules.lattice_grpo import LatticeGRPO
from lace_lightning.modules.optimizer import OptimizerSpec
from lace_lightning.modules.sampled_groups import SampledGroups
from lace_lightning.modules.trace_stages import BackbonePretraining, ContinuedPretraining, SupervisedFinetuning

__all__ = [
    "BackbonePretraining",
    "ContinuedPretraining",
    "DecodingSpec",
    "FullySharded",
    "FullyShardedOnDisk",
    "LatticeGRPO",
    "OptimizerSpec",
    "SampledGroups",
    "SupervisedFinetuning",
    "ThreadedModule",
]

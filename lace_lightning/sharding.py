"""Weights divided among processes by FSDP2, torch's ``fully_shard``; and whole again for whoever reads them directly.

Sharded, a parameter is a DTensor of which each process holds its rows. A decoder layer's weights are gathered for as
long as it runs, those of the rest (embedding, head, exchanges) from a forward pass to the end of its backward pass, so
that ``ThreadedLM`` finds the head whole after its decoder has run. A column of decoding is too short for that: groups
are decoded within :func:`whole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lace_lightning.backbone import decoder_of
from lace_lightning.threaded_lm import ThreadedLM

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: ThreadedLM, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Divide the weights of a model, as rank zero has them, among the processes of a mesh of one dimension.

    Args:
        model: on any device; its shards stand on the mesh's afterwards.
        mesh: the processes.
        compute_dtype: of the gathered weights, and so of all that is computed; shards and gradients keep the dtype
            of the weights. None: theirs too.
    """
    layers = list(decoder_of(model.backbone).layers)
    # Inputs are not cast, which would copy the lattice: the embedding hands the dtype on from layer to layer.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32 if compute_dtype else None, cast_forward_inputs=False)
    for module in (*layers, model):  # a module takes the parameters that those before it have left
        _share_from_rank_zero(module, mesh)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
    # The one way into the decoder; most of our passes never call `forward`.
    register_fsdp_forward_method(model, "run")


@torch.no_grad()
def _share_from_rank_zero(module: nn.Module, mesh: DeviceMesh) -> None:
    """Random weights may differ between processes, as under DDP, which does the same."""
    module.to(mesh.device_type)
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            dist.broadcast(parameter, group=mesh.get_group(), group_src=0)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights of a sharded model stand here as plain tensors, so that passes need no other process.

    Every process must enter and leave. Nothing happens to weights that are not sharded, or whole already.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield
        return
    inner = shards[1:]  # the first is the model, whose own weights stay after a pass anyway
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    for module in shards:
        module.unshard()
    try:
        yield
    except GeneratorExit:  # an interrupted run never leaves: this is its end, and the model may be gone before
        inner = shards = []
        raise
    finally:
        for module in inner:
            module.set_reshard_after_forward(True, recurse=False)
        for module in shards:
            module.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not; every process must call it for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

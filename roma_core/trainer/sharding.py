"""Sharding (FSDP2): the processes share out weights, gradients and the optimiser's state.

Training happens on a sharded twin of the caller's model. The model itself stays whole, in the host's
memory, and is given the twin's weights when somebody looks at it: an evaluation, at the end. So what
evaluates, saves or loads knows tensors by name and nothing of shards, and a checkpoint does not tell
how many processes wrote it.

``(…)`` shapes below are those of whole tensors; a process holds about 1/n of each along its first axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from roma_core.model.encoder import Block
from roma_core.trainer.ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def sharded_twin(model: M, device: torch.device, ranks: Ranks) -> M:
    """A copy of a model with its weights shared out, block by block; every process calls it.

    All start from the weights of rank 0. The model moves to the host's memory.
    """
    model.cpu()
    ranks.take_from_main(model.state_dict().values())
    twin = copy.deepcopy(model)
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in (part for part in twin.modules() if isinstance(part, Block)):
        fully_shard(block, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    return twin


@contextmanager
def gradients_kept_back(twin: nn.Module) -> Iterator[None]:
    """Backward passes inside the ``with`` block add up in each process; nothing is exchanged.

    The weights stay gathered from one micro-batch to the next, so processes may have different
    numbers of them.
    """
    assert isinstance(twin, FSDPModule)
    _exchange(twin, False)
    try:
        yield
    finally:
        _exchange(twin, True)


def _exchange(twin: FSDPModule, happens: bool) -> None:
    twin.set_requires_gradient_sync(happens)
    twin.set_reshard_after_forward(happens)
    twin.set_reshard_after_backward(happens)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, as it holds ``parameter``; of one like no other, all."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        # every process has read the same file: nothing needs to be sent
        return distribute_tensor(
            tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return tensor


def copies(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole copies of tensors on CPU, by name, each with memory of its own.

    Where ``keep`` is False the process only does its part for the others.
    """
    kept = {}
    for name, tensor in named:
        if keep or isinstance(tensor, DTensor):
            complete = whole(tensor.detach())
            if keep:
                kept[name] = complete.cpu().contiguous().clone()
    return kept

"""The processes of a training: Accelerate, host-side collectives and FSDP sharding."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from torch import Tensor, nn

from roma_core.model.attention import has_matrix_units
from roma_core.model.backbone import Backbone
from roma_core.model.encoder import Block
from roma_core.trainer.config import TrainerConfig

if TYPE_CHECKING:  # half a second, which only a sharded training needs
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
log = logging.getLogger(__name__)


def init_accelerator(config: TrainerConfig, model: Backbone | None = None) -> Accelerator:
    """The Accelerator of this process, started by ``python``, ``accelerate`` or ``torchrun``.

    Raises ValueError if the launcher is configured to shard the model.
    """
    on_cpu, precision = not torch.accelerator.is_available(), config.mixed_precision
    if precision == "auto":
        device = PartialState(cpu=on_cpu).device
        precision = "bf16" if all(gather_object([_gains_by_16_bits(device, model)])) else "no"
        log.info(f"mixed_precision auto: {precision}")
    AcceleratorState._reset_state()  # an earlier training of this process may have had another one
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"the launcher selected {accelerator.distributed_type}, whose checkpoints cannot be resumed by "
            f"another number of processes. Launch without it and set ROMA_TRAINER_SHARDING=fsdp; a RoMA "
            f"of 100 M parameters fits any GPU without sharding"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif accelerator.device.type != "cuda" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return accelerator


def _gains_by_16_bits(device: torch.device, model: Backbone | None) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # at width 64 conversions cost more than products save, but for the convolutions of windows
    is_wide = model is None or model.stem is not None or model.config.encoder_config.d_model >= 128
    return device.type == "cpu" and is_wide and has_matrix_units()


class HostGroup:
    """Collectives among the processes of one training, on the host: none waits for a device.

    Every process creates its own, at the same point of the program; see :func:`init_group`.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._group: Any = None
        if size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over the processes, in float64, equal on all."""
        if self.size == 1:
            return [float(n) for n in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks, on every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @torch.no_grad()
    def broadcast_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, which passes the same ones."""
        for tensor in tensors if self.size > 1 else ():
            on_host = tensor.detach().cpu().contiguous()
            dist.broadcast(on_host, src=0, group=self._group)
            tensor.copy_(on_host)

    def call(self, act: Callable[[], T], here: bool) -> list[T | None]:
        """Results of ``act`` in the order of ranks, called where ``here`` is True; an error fails all."""
        result: T | None = None
        error: ValueError | OSError | None = None
        try:
            result = act() if here else None
        except (ValueError, OSError) as raised:
            error = raised
        gathered = self.gather((result, str(error) if error else ""))
        if messages := [message for _, message in gathered if message]:
            raise error or ValueError(messages[0])
        return [result for result, _ in gathered]


@torch.no_grad()
def overwrite_from_main(tensors: list[Tensor]) -> None:
    """Overwrite tensors with those of rank 0, on the device; every process calls it."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(together, src=0)
    parts = together.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


SINGLE_PROCESS = HostGroup()


def init_group() -> HostGroup:
    """The processes launched together; the first call waits for all, or raises RuntimeError."""
    # without cpu=True, several processes on a computer without GPU would each train on its own
    no_accelerator = not torch.accelerator.is_available()
    state = PartialState(cpu=no_accelerator or parse_flag_from_env("ACCELERATE_USE_CPU"))
    n = state.num_processes
    if n != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"the launcher started {launched} processes, but they formed groups of {n}; "
            f"each would train on its own. Check the rendezvous address and the launcher's flags"
        )
    return HostGroup(state.process_index, n)


M = TypeVar("M", bound=nn.Module)


def fsdp_copy(model: M, device: torch.device, group: HostGroup) -> M:
    """A copy of a model with its weights sharded, block by block; every process calls it.

    All start from the weights of rank 0. The model itself moves to host memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.cpu()
    group.broadcast_from_main(model.state_dict().values())
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh(device.type, (group.size,))
    for block in (part for part in sharded.modules() if isinstance(part, Block)):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded


@contextmanager
def no_gradient_sync(sharded: nn.Module) -> Iterator[None]:
    """Backward passes inside the ``with`` block accumulate in each process; nothing is exchanged.

    The weights stay gathered from one micro-batch to the next, so processes may have different
    numbers of them.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(sharded, FSDPModule)

    def set_sync(enabled: bool) -> None:
        sharded.set_requires_gradient_sync(enabled)
        sharded.set_reshard_after_forward(enabled)
        sharded.set_reshard_after_backward(enabled)

    set_sync(False)
    try:
        yield
    finally:
        set_sync(True)


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; then every process must call this."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a full tensor, placed like ``parameter``; whole if shapes differ."""
    tensor = tensor.to(parameter.device)
    if _is_sharded(parameter) and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        # every process has read the same file: no communication is needed
        return distribute_tensor(
            tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return tensor


def cpu_copies(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Full copies of tensors on CPU, by name, each with memory of its own.

    Where ``keep`` is False the process only takes part in the collectives.
    """
    kept = {}
    for name, tensor in named:
        if keep or _is_sharded(tensor):
            complete = full_tensor(tensor.detach())
            if keep:
                kept[name] = complete.cpu().contiguous().clone()
    return kept

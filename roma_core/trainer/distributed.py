"""Stop requests: a signal or a stop file asks the run to save and end with "continue".

What the processes of a training tell each other, host to host: no device ever waits for it.
Sharding (FSDP2): the processes share out weights, gradients and the optimiser's state.
Joins the processes of a training, through Accelerate, and refuses a group that is not one.
"""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from roma_core.model.encoder import Block
from roma_core.trainer.config import TrainerConfig

T = TypeVar("T")


class HostGroup:
    """The processes of one training.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Every process makes its own, at the same place of the program."""
        self.rank, self.size = rank, size
        self._group: Any = None
        if size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over the processes, in float64, the same on all."""
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
    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, which has the same."""
        for tensor in tensors if self.size > 1 else ():
            on_host = tensor.detach().cpu().contiguous()
            dist.broadcast(on_host, src=0, group=self._group)
            tensor.copy_(on_host)

    def wait(self) -> None:
        """Go on when every process has come here."""
        self.gather(None)


ALONE = HostGroup()
"""A single process."""


M = TypeVar("M", bound=nn.Module)


def sharded_twin(model: M, device: torch.device, ranks: HostGroup) -> M:
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


def join(config: TrainerConfig) -> Accelerator:
    """What stands for this process among those that ``python``, ``accelerate`` or ``torchrun`` started.

    Raises:
        RuntimeError: the processes do not form one group.
        ValueError: the launcher was asked to shard the model.
    """
    # without cpu=True, several processes on a computer without GPU would each train alone
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{accelerator.distributed_type} was asked for at launch, which knows nothing of checkpoints "
            f"that any number of processes can resume. Launch without it and set "
            f"ROMA_TRAINER_SHARDING=full; a RoMA of 100 M parameters fits any GPU without"
        )
    n = accelerator.num_processes
    if n != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"the launcher started {launched} processes, but they formed groups of {n}; "
            f"each would train alone. Check the rendezvous address and the launcher's flags"
        )
    if threads := config.threads or (None if accelerator.device.type == "cuda" else 1):
        torch.set_num_threads(threads)
    return accelerator


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_S = 0.5


class Interrupted(Exception):
    """A stop request was seen in the middle of something that can be done again later."""


class StopRequests:
    """Notes requests of this process; ranks agree on them where they reduce the loss count.

    As a context manager it takes over SIGTERM, SIGINT and SIGUSR1, in the main thread only. A
    second SIGINT interrupts at once. One inside another takes over what the outer one noted, so a
    program can begin to listen before it imports what training needs.
    """

    _innermost: StopRequests | None = None

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.reason = ""
        self._previous: dict[int, object] = {}
        self._outer: StopRequests | None = None
        self._last_poll = float("-inf")

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
            self._outer, StopRequests._innermost = StopRequests._innermost, self
            if self._outer is not None:
                self.reason = self._outer.reason
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous:
            StopRequests._innermost = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == name:
            raise KeyboardInterrupt
        self.reason = name

    def requested(self) -> bool:
        """True once somebody asked; looks for the stop file at most twice a second."""
        if not self.reason and self.stop_file is not None:
            now = time.monotonic()
            if now - self._last_poll >= _POLL_S:
                self._last_poll = now
                if self.stop_file.exists():
                    self.reason = "stop file"
        return bool(self.reason)

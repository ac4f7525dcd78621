"""Joins the processes of a training, through Accelerate, and refuses a group that is not one."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from roma_core.trainer.config import TrainerConfig


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

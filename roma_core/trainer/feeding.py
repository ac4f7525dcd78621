"""The batches of a run, step after step; a wait for them ends when somebody asks to stop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from roma_core.model.config import _ModelConfig
from roma_core.model.packing import PackedBatch
from roma_core.trainer.augmenting import augmentations_of
from roma_core.trainer.batches import Collate, MapStyle, load
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.epoch_plan import Indices, Plan
from roma_core.trainer.loader_processes import LoaderProcesses
from roma_core.trainer.ranks import Ranks
from roma_core.trainer.stopping import Interrupted, StopRequests

_LOADER_POLL_S = 1.0  # how often a wait for loader processes looks for stop requests


class Feed:
    """This process's share of every step. Use it as a context manager."""

    def __init__(
        self,
        config: TrainerConfig,
        plan: Plan,
        dataset: MapStyle,
        model: _ModelConfig,
        ranks: Ranks,
        device: torch.device,
        stops: StopRequests,
    ) -> None:
        """``plan`` says which samples a step has, ``model`` how they become a batch."""
        self.config, self.plan, self.dataset = config, plan, dataset
        self.ranks, self.device, self.stops = ranks, device, stops
        augmentations = augmentations_of(config, model.n_channels, dataset)
        self.collate = Collate(model, config.random_seed, augmentations)
        self._processes = LoaderProcesses()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exception: object) -> None:
        self._processes.forget()

    def steps(self, first_step: int) -> Iterator[list[PackedBatch]]:
        """The micro-batches of each step, on the device, from ``first_step`` to the last.

        Raises:
            Interrupted: a stop request came while it waited for data.
        """
        # one loader for all epochs, which may be a batch or more ahead of the steps
        steps, ahead = itertools.tee(self._shares(first_step))
        loaded = load(
            self.dataset,
            ((epoch, indices) for epoch, share in ahead for indices in share),
            self.collate,
            self.config.num_dataset_workers,
            pin=self.device.type == "cuda",
            patience_s=_LOADER_POLL_S,
        )
        for _, share in steps:
            yield [self._awaited(loaded).to(self.device) for _ in share]

    def _shares(self, first_step: int) -> Iterator[tuple[int, list[Indices]]]:
        """Epoch and sample indices of this process's micro-batches, step after step."""
        first_epoch, first = divmod(first_step, self.plan.batches_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            for batch in self.plan.epoch(epoch)[first if epoch == first_epoch else 0 :]:
                yield epoch, self.plan.share(batch, self.ranks.rank, self.ranks.size)

    def _awaited(self, loaded: Iterator[PackedBatch]) -> PackedBatch:
        """The next micro-batch; :class:`Interrupted` if a stop request comes first."""
        while not self.stops.requested():
            try:
                return next(loaded)
            except RuntimeError as error:
                if "timed out" not in str(error):  # the loader's word for "not yet"
                    raise
        if self.config.num_dataset_workers:
            self._processes.kill()
        raise Interrupted

"""Samples of a data set → packed batches, in the training process or in loader processes."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from roma_core.data.ragged import RaggedBatch
from roma_core.model.config import (
    RoMAConfig,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
)
from roma_core.model.masking import draw_mask
from roma_core.model.packing import PackedBatch, Segments, patchify
from roma_core.model.positions import origin, to_float32, to_model_positions
from roma_core.trainer.augmentation import Augmentation, CustomAugmentation, augmentations_of
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import HostGroup, Interrupted, StopRequests
from roma_core.trainer.sampler import BatchSampler, Indices

_WORKER_POLL_S = 1.0  # how often a wait for loader processes checks for stop requests


class MapStyle(Protocol):
    """Any data set with a length whose items are dictionaries.

    An item has ``values`` (time, C, height, width) float, ``positions`` (D, N) of any real type, and
    optionally ``pad_mask`` (N,) bool, ``label``, ``targets`` (N, K) float, which regression takes as
    the label, and ``id`` int, a stable name; without it the index is taken. The model's
    ``position_axes``, if it has any, are applied to positions.
    The set may have ``lengths``, tokens by index; ``gather(indices)``, which returns a
    :class:`~roma_core.data.ragged.RaggedBatch`; and ``augmentations`` for training: functions of one
    series, see :class:`~roma_core.trainer.augmentation.CustomAugmentation`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Collate:
    """Samples of one micro-batch → :class:`PackedBatch`, shortest series first, with its mask.

    Attributes:
        config: of the model the batch is for.
        seed: of masks and drops.
        augmentations: changes to every series, redrawn in every epoch; none in evaluation.
    """

    config: RoMAConfig
    seed: int
    augmentations: tuple[Augmentation, ...] = ()

    def __post_init__(self) -> None:
        is_custom = [isinstance(a, CustomAugmentation) for a in self.augmentations]
        if self._is_per_token and any(is_custom):
            raise ValueError(
                "pooling='token' has a label for every token, which the data set's own augmentations "
                "would not follow; remove them, or use the augment_ settings"
            )

    def batch(self, dataset: MapStyle, indices: Indices, epoch: int = 0) -> PackedBatch:
        """Read the samples at ``(B,)`` indices; all at once if the data set has ``gather``."""
        gather = getattr(dataset, "gather", None)
        if gather is None or not self.can_gather:
            return self([(epoch, i, dataset[i]) for i in indices.tolist()])
        series: RaggedBatch = gather(indices)
        for what, array, width in (
            ("channels", series.values, self.config.n_channels),
            ("position axes", series.positions, self.config.n_pos_dims),
        ):
            if array.shape[1] != width:
                raise ValueError(
                    f"the data set has {array.shape[1]} {what}, but the model was built for {width}"
                )
        if not self._is_per_token:
            series = replace(series, targets=None)
        return self._pack(series, indices, epoch)

    def __call__(self, items: Sequence[tuple[int, int, dict[str, Any]]]) -> PackedBatch:
        """``items`` are (epoch, sample index, item)."""
        series = [self._series(index, item) for _, index, item in items]
        tokens, positions, ids, labels = zip(*series, strict=True)
        ragged = RaggedBatch.of(tokens, positions, ids)
        if labels[0] is not None and self._is_per_token:
            ragged = replace(ragged, targets=np.concatenate(labels))
        elif labels[0] is not None:
            ragged = replace(ragged, labels=_stacked(labels))
        return self._pack(ragged, np.array([index for _, index, _ in items]), items[0][0])

    @property
    def can_gather(self) -> bool:
        """Whether a stored data set's observations are this model's tokens, and its positions final."""
        has_targets = self._is_per_token == self._is_regression
        return self._one_observation and not self.config.position_axes and has_targets

    @property
    def _one_observation(self) -> bool:
        return tuple(self.config.tubelet_size) == (1, 1, 1)

    @property
    def _is_per_token(self) -> bool:
        config = self.config
        return isinstance(config, RoMAForClassificationConfig) and config.pools == "token"

    @property
    def _is_regression(self) -> bool:
        config = self.config
        return (
            isinstance(config, RoMAForClassificationConfig) and config.problem_type == "regression"
        )

    def _pack(self, series: RaggedBatch, indices: Indices, epoch: int) -> PackedBatch:
        """Augment, sort by length, mask."""
        for augmentation in self.augmentations:
            series = augmentation(series, self.seed, epoch)
        if (np.diff(series.lengths) < 0).any():
            order = series.lengths.argsort(kind="stable")
            series, indices = series.reorder(order), indices[order]
        labels = series.targets if self._is_per_token else series.labels
        batch = PackedBatch(
            tokens=torch.from_numpy(series.values),
            positions=torch.from_numpy(series.positions),
            segments=Segments(series.lengths.tolist()),
            sample_ids=torch.from_numpy(series.ids),
            indices=torch.from_numpy(indices),
            labels=None if labels is None else torch.from_numpy(labels),
        )
        if isinstance(self.config, RoMAForPreTrainingConfig):
            batch = draw_mask(batch, self.config, self.seed, epoch)
        return batch

    def _series(
        self, index: int, item: dict[str, Any]
    ) -> tuple[NDArray[np.float32], NDArray[Any], int, Any]:
        """Real tokens (N, P), their positions (N, D), the sample's name, and its label."""
        values = torch.as_tensor(item["values"]).float()
        if self._one_observation and values.shape[1:] == (self.config.n_channels, 1, 1):
            tokens = values[:, :, 0, 0]  # (N, C): patchify would give the same, 40 µs slower
        else:
            tokens = patchify(values[None], self.config.tubelet_size)[0]  # (N, P)
        n_tokens = tokens.shape[0]
        positions = torch.as_tensor(item["positions"])  # (D, N)
        if positions.shape != (self.config.n_pos_dims, n_tokens):
            raise ValueError(
                f"sample {index}: positions must have shape (n_pos_dims, tokens) = "
                f"{(self.config.n_pos_dims, n_tokens)}, got {tuple(positions.shape)}"
            )
        label = item.get("label")
        if self._is_regression:
            label = item.get("targets", label)
        if label is not None and self._is_per_token:
            label = torch.as_tensor(label).numpy()
            if label.shape[:1] != (n_tokens,):
                raise ValueError(
                    f"sample {index}: label must have one entry for each of {n_tokens} tokens, "
                    f"got shape {label.shape}"
                )
        if (pad_mask := item.get("pad_mask")) is not None:
            real = ~torch.as_tensor(pad_mask)
            tokens, positions = tokens[real], positions[:, real]
            if label is not None and self._is_per_token:
                label = label[real.numpy()]
        positions = self._model_positions(positions)
        return tokens.numpy(), positions.numpy(), int(item.get("id", index)), label

    def _model_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """``(D, N)`` of a user's real tokens → ``(N, D)`` float32 of the model's."""
        axes = self.config.position_axes
        if not axes and positions.dtype == torch.float32:
            return positions.T
        one = positions[None]
        real = torch.ones(1, positions.shape[1], dtype=torch.bool)
        return to_float32(to_model_positions(one, origin(one, real, axes), axes)[0].T)


def _stacked(labels: Sequence[Any]) -> NDArray[Any]:
    if all(type(label) is int for label in labels):
        return np.array(labels, dtype=np.int64)
    return torch.stack([torch.as_tensor(label) for label in labels]).numpy()


@dataclass(frozen=True)
class _BatchDataset(Dataset[PackedBatch]):
    """Packed batches by (epoch, sample indices), so that loader processes know the epoch."""

    dataset: MapStyle
    collate: Collate

    def __getitems__(self, key: tuple[int, Indices]) -> PackedBatch:
        epoch, indices = key
        return self.collate.batch(self.dataset, indices, epoch)


class TrainLoader:
    """This process's micro-batches of every step. Use it as a context manager."""

    def __init__(
        self,
        config: TrainerConfig,
        sampler: BatchSampler,
        dataset: MapStyle,
        model: RoMAConfig,
        group: HostGroup,
        device: torch.device,
        stops: StopRequests,
    ) -> None:
        """``sampler`` chooses the samples of a step; ``model`` says how they become a batch."""
        self.config, self.sampler = config, sampler
        self.group, self.device, self.stops = group, device, stops
        augmentations = augmentations_of(config, model.n_channels, dataset)
        self.batches = _BatchDataset(dataset, Collate(model, config.random_seed, augmentations))
        self._child_handler: Any = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._child_handler is not None:
            signal.signal(signal.SIGCHLD, self._child_handler)
            self._child_handler = None

    def steps(self, first_step: int) -> Iterator[list[PackedBatch]]:
        """The micro-batches of each step, on the device, from ``first_step`` to the last.

        Raises:
            Interrupted: a stop request came while waiting for data.
        """
        # one loader for all epochs, which may read a batch or more ahead of the steps
        steps, ahead = itertools.tee(self._micro_batches(first_step))
        loaded = self._load((epoch, indices) for epoch, shard in ahead for indices in shard)
        for _, shard in steps:
            yield [self._next(loaded).to(self.device) for _ in shard]

    def _micro_batches(self, first_step: int) -> Iterator[tuple[int, list[Indices]]]:
        """Epoch and sample indices of this process's micro-batches, step after step."""
        first_epoch, first = divmod(first_step, self.sampler.batches_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            for batch in self.sampler.batches(epoch)[first if epoch == first_epoch else 0 :]:
                yield epoch, self.sampler.shard(batch, self.group.rank, self.group.size)

    def _load(self, keys: Iterator[tuple[int, Indices]]) -> Iterator[PackedBatch]:
        """Packed batches of (epoch, sample indices), in order, the same with any number of workers."""
        workers, pin = self.config.num_dataset_workers, self.device.type == "cuda"
        if not workers and not pin:
            return map(self.batches.__getitems__, keys)  # a DataLoader would only add overhead
        return iter(
            DataLoader(
                self.batches,
                batch_sampler=keys,  # type: ignore[arg-type]
                collate_fn=_identity,
                num_workers=workers,
                worker_init_fn=_ignore_signals if workers else None,
                pin_memory=pin,
                timeout=_WORKER_POLL_S if workers else 0,
            )
        )

    def _next(self, loaded: Iterator[PackedBatch]) -> PackedBatch:
        """The next micro-batch; :class:`Interrupted` if a stop request comes first."""
        while not self.stops.requested():
            try:
                return next(loaded)
            except RuntimeError as error:
                if "timed out" not in str(error):  # raised by the loader; next may be called again
                    raise
        if self.config.num_dataset_workers:
            self._kill_workers()
        raise Interrupted

    def _kill_workers(self) -> None:
        """End the loader processes at once. They ignore SIGTERM, and DataLoader waits 5 s for each."""
        # DataLoader's own handler would raise, in the middle of a save, that a process died
        self._child_handler = signal.signal(signal.SIGCHLD, _ignore_child)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()
                child.join()


def _identity(batch: Any) -> Any:
    return batch


def _ignore_child(number: int, frame: FrameType | None) -> None:
    pass


def _ignore_signals(_: int) -> None:
    """Stop requests are for the training process, which must still read its last batches."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

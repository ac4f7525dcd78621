"""Samples of a data set → augmented, packed batches, in the training process or in loader processes.

Every draw of an augmentation is a hash of (seed, epoch, purpose, sample id), so it depends on no
process, batch or worker. Shapes: B series of a batch, T tokens of all of them, P numbers of a token, the
channel fastest, C channels, D axes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from roma_core.data.store import RaggedBatch
from roma_core.hashing import hash_ints
from roma_core.job import STOP_SIGNALS, Interrupted, StopRequests
from roma_core.model.config import RoMAConfig, RoMAForPreTrainingConfig
from roma_core.model.masking import draw_mask
from roma_core.model.packing import PackedBatch, Segments, patchify
from roma_core.model.positions import origin, to_float32, to_model_positions
from roma_core.schema import DataSchema, Normaliser
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import HostGroup
from roma_core.trainer.sampler import BatchSampler, Indices

# keep the hashes of one purpose apart from those of another; 1 and 3 are those of the sampler
_DROP, _CROP, _CHANNELS, _NOISE, _CUSTOM, _CATEGORIES, _COVARIATES = 2, 4, 5, 6, 7, 8, 9
_WORKER_POLL_S = 1.0  # how often a wait for loader processes checks for stop requests

Augmentation = Callable[[RaggedBatch, int, int], RaggedBatch]
"""``(batch, seed, epoch)`` → a batch of the same series; the arrays of the first stay as they are."""


class MapStyle(Protocol):
    """Any data set with a length whose items are dictionaries.

    An item has ``values`` (time, C, height, width) float, ``positions`` (D, N) of any real type, and
    optionally ``pad_mask`` (N,) bool, ``label``, ``targets`` (N, K) float, or (K,) of the whole
    series, which regression takes as the label, ``covariates`` (K,) float, and ``id`` int, a stable
    name; without it the index is taken. The model's ``position_axes``, if it has any, are applied to
    positions.
    The set may have ``lengths``, tokens by index; ``gather(indices)``, which returns a
    :class:`~roma_core.data.store.RaggedBatch`; a ``schema``; and ``augmentations`` for training: functions of one
    series, see :class:`CustomAugmentation`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Drop:
    """Leaves out up to ``rate`` of each series' tokens, anywhere."""

    rate: float

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        fraction = hash_ints(seed, epoch, _DROP, batch.ids) / 2**32 * self.rate  # (B,)
        n_dropped = np.minimum((fraction * batch.lengths).astype(np.int64), batch.lengths - 1)
        noise = hash_ints(seed, epoch, _DROP, batch.ids[batch.series], batch.index)  # (T,)
        rank = np.empty_like(batch.index)
        rank[np.lexsort((noise, batch.series))] = batch.index
        return batch.select(rank >= n_dropped[batch.series])


@dataclass(frozen=True)
class Crop:
    """Cuts off up to ``rate`` of the tokens at both ends together, and more if there are too many."""

    rate: float
    max_tokens: int | None = None

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        n = batch.lengths
        fraction = hash_ints(seed, epoch, _CROP, batch.ids, 0) / 2**32 * self.rate  # (B,)
        left = np.maximum(1, n - (fraction * n).astype(np.int64))
        left = np.minimum(left, self.max_tokens or left)
        offset = hash_ints(seed, epoch, _CROP, batch.ids, 1) / 2**32
        start = (offset * (n - left + 1)).astype(np.int64)
        index, series = batch.index, batch.series
        return batch.select((index >= start[series]) & (index < (start + left)[series]))


@dataclass(frozen=True)
class ChannelDrop:
    """Leaves each channel of a series out with probability ``rate``; one of them stays.

    Its numbers become 0, the mean of normalised values, or NaN where values may be missing. With
    ``channel_axis``, the position axis of the channel's index, its tokens are left out.
    """

    rate: float
    n_channels: int
    missing_values: bool = False
    channel_axis: int | None = None

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        channels = np.arange(self.n_channels)
        chance = hash_ints(seed, epoch, _CHANNELS, batch.ids[:, None], channels) / 2**32  # (B, C)
        if self.channel_axis is not None:
            channel = batch.positions[:, self.channel_axis].astype(np.int64)  # (T,)
            chance = chance[batch.series, channel]
            best = np.zeros(len(batch.lengths))
            np.maximum.at(best, batch.series, chance)
            return batch.select((chance >= self.rate) | (chance == best[batch.series]))
        kept = chance >= self.rate
        kept[np.arange(len(kept)), chance.argmax(axis=1)] = True
        per_number = np.tile(kept, batch.values.shape[1] // self.n_channels)[batch.series]  # (T, P)
        if not self.missing_values:
            return replace(batch, values=batch.values * per_number)
        values = np.where(per_number, batch.values, np.float32(np.nan))
        empty = np.isnan(values).all(axis=1, keepdims=True)  # a token has an observed number
        return replace(batch, values=np.where(empty, batch.values, values))


@dataclass(frozen=True)
class Jitter:
    """Adds normal noise to values, and to positions on the first axis."""

    value_std: float
    position_std: float

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        width = batch.values.shape[1]
        key = (seed, epoch, _NOISE, batch.ids[batch.series][:, None], batch.index[:, None])
        uniform, turn = (
            (hash_ints(*key, np.arange(width + 1), k).astype(np.float32) + np.float32(0.5))
            / np.float32(2**32)
            for k in (0, 1)
        )
        # Box and Muller, in float32: its cosine takes a twentieth of the time
        noise = np.sqrt(-2 * np.log(uniform)) * np.cos(np.float32(2 * np.pi) * turn)  # (T, P + 1)
        positions = batch.positions.copy()
        positions[:, 0] += self.position_std * noise[:, -1]
        values = batch.values + self.value_std * noise[:, :-1]
        return replace(batch, values=values, positions=positions)


@dataclass(frozen=True)
class UnknownDrop:
    """Takes each category of a series for 'unknown', and each covariate for missing, with probability ``rate``.

    On axes that have an 'unknown', and with all observations of the category, as an unknown one comes
    when the model is applied. Values normalised by category get the normalisation of 'unknown'.
    """

    rate: float
    schema: DataSchema | None = None  # without one, no axis has an 'unknown'

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        values, positions, covariates = batch.values, batch.positions, batch.covariates
        if covariates is not None:
            columns = np.arange(covariates.shape[1])
            chance = hash_ints(seed, epoch, _COVARIATES, batch.ids[:, None], columns) / 2**32
            covariates = np.where(chance < self.rate, np.float32(np.nan), covariates)
        for axis in unknown_axes(self.schema):
            assert self.schema is not None
            unknown = self.schema.axes[axis].n_embedded - 1
            key = batch.ids[batch.series], axis, positions[:, axis].astype(np.int64)
            gone = hash_ints(seed, epoch, _CATEGORIES, *key) / 2**32 < self.rate  # (T,)
            before, positions = positions, positions.copy()
            positions[gone, axis] = unknown
            if axis == self.schema.normalisation_axis and gone.any():
                units, values = Normaliser(self.schema), values.copy()
                delivered = units.denormalise(values[gone], before[gone])
                values[gone] = units.normalise(delivered, positions[gone])
        return replace(batch, values=values, positions=positions, covariates=covariates)


def unknown_axes(schema: DataSchema | None) -> list[int]:
    """Indices of the axes that accept other categories than those they name."""
    return [] if schema is None else [k for k, axis in enumerate(schema.axes) if axis.unknown]


@dataclass(frozen=True)
class CustomAugmentation:
    """``function(tokens, positions, generator)`` of a user, which takes and returns ``(N, P)`` and
    ``(N, D)`` of one series; ``generator`` is a numpy generator of this sample in this epoch."""

    function: Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        changed = []
        for tokens, positions, name in zip(*batch.split(), batch.ids.tolist(), strict=True):
            key = [hash_ints(seed, epoch, _CUSTOM, name), hash_ints(seed, epoch, _CUSTOM, name, 1)]
            result = self.function(
                torch.from_numpy(tokens), torch.from_numpy(positions), np.random.default_rng(key)
            )
            n, m = result[0].shape[0], result[1].shape[0]
            if n == 0 or n != m:
                raise ValueError(
                    f"the augmentation {self.function} left {n} tokens and {m} positions of sample "
                    f"{name}; it must leave at least one, and equally many"
                )
            changed.append([part.numpy() for part in result])
        values, at = zip(*changed, strict=True)
        changed_batch = RaggedBatch.of(values, at, batch.ids)
        return replace(changed_batch, labels=batch.labels, covariates=batch.covariates)


def augmentations_of(
    config: TrainerConfig, model: RoMAConfig, dataset: Any = None
) -> tuple[Augmentation, ...]:
    """The augmentations of the settings, then the data set's own ``augmentations``, if it has any."""
    chosen: list[Augmentation] = []
    if config.augment_crop_rate > 0 or config.augment_crop_tokens is not None:
        chosen.append(Crop(config.augment_crop_rate, config.augment_crop_tokens))
    if config.augment_drop_rate > 0:
        chosen.append(Drop(config.augment_drop_rate))
    if config.augment_channel_drop_rate > 0:
        categories = [axis for axis, size in enumerate(model.axis_categories) if size]
        one_value = model.n_channels == 1 and len(categories) > 0
        chosen.append(
            ChannelDrop(
                config.augment_channel_drop_rate,
                model.axis_categories[categories[-1]] if one_value else model.n_channels,
                model.missing_values,
                categories[-1] if one_value else None,
            )
        )
    if config.augment_jitter_std > 0 or config.augment_jitter_position > 0:
        chosen.append(Jitter(config.augment_jitter_std, config.augment_jitter_position))
    schema = getattr(dataset, "schema", None)
    if config.augment_unknown_rate > 0 and (model.covariates or unknown_axes(schema)):
        chosen.append(UnknownDrop(config.augment_unknown_rate, schema))
    own = getattr(dataset, "augmentations", ())
    return (*chosen, *(CustomAugmentation(function) for function in own))


@dataclass(frozen=True)
class Collate:
    """Samples of one micro-batch → :class:`PackedBatch`, shortest series first, with its mask."""

    config: RoMAConfig  # of the model the batch is for
    seed: int  # of masks and drops
    augmentations: tuple[Augmentation, ...] = ()  # redrawn in every epoch; none in evaluation
    # drawn for a pretraining model; off where all is visible or the caller hides
    masks: bool = True

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
            if self._is_regression and series.series_targets is not None:
                series = replace(series, labels=series.series_targets)
        return self._pack(series, indices, epoch)

    def __call__(self, items: Sequence[tuple[int, int, dict[str, Any]]]) -> PackedBatch:
        """``items`` are (epoch, sample index, item)."""
        series = [self._series(index, item) for _, index, item in items]
        tokens, positions, ids, labels = zip(*series, strict=True)
        ragged = RaggedBatch.of(tokens, positions, ids)
        if self.config.covariates:
            covariates = [np.asarray(item["covariates"], np.float32) for _, _, item in items]
            ragged = replace(ragged, covariates=np.stack(covariates))
        if labels[0] is not None and self._is_per_token:
            ragged = replace(ragged, targets=np.concatenate(labels))
        elif all(type(label) is int for label in labels):
            ragged = replace(ragged, labels=np.array(labels, dtype=np.int64))
        elif labels[0] is not None:
            stacked = torch.stack([torch.as_tensor(label) for label in labels])
            ragged = replace(ragged, labels=stacked.numpy())
        return self._pack(ragged, np.array([index for _, index, _ in items]), items[0][0])

    @property
    def can_gather(self) -> bool:
        """Whether a stored data set's observations are this model's tokens, and its positions final."""
        has_labels = self._is_regression or not self._is_per_token
        return self._one_observation and not self.config.position_axes and has_labels

    @property
    def _one_observation(self) -> bool:
        return tuple(self.config.tubelet_size) == (1, 1, 1)

    @property
    def _is_per_token(self) -> bool:
        return getattr(self.config, "pools", None) == "token"

    @property
    def _is_regression(self) -> bool:
        return getattr(self.config, "problem_type", None) == "regression"

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
            covariates=None if series.covariates is None else torch.from_numpy(series.covariates),
        )
        if self.masks and isinstance(self.config, RoMAForPreTrainingConfig):
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
        axes = self.config.position_axes
        if axes or positions.dtype != torch.float32:
            one, real = positions[None], torch.ones(1, positions.shape[1], dtype=torch.bool)
            positions = to_float32(to_model_positions(one, origin(one, real, axes), axes)[0])
        return tokens.numpy(), positions.T.numpy(), int(item.get("id", index)), label


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
        augmentations = augmentations_of(config, model, dataset)
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

        Raises Interrupted if a stop request comes while waiting for data.
        """
        first_epoch, first = divmod(first_step, self.sampler.batches_per_epoch)
        shards = (
            (epoch, self.sampler.shard(batch, self.group.rank, self.group.size))
            for epoch in range(first_epoch, self.config.epochs)
            for batch in self.sampler.batches(epoch)[first if epoch == first_epoch else 0 :]
        )
        # one loader for all epochs, which may read a batch or more ahead of the steps
        steps, ahead = itertools.tee(shards)
        loaded = self._load((epoch, indices) for epoch, shard in ahead for indices in shard)
        for _, shard in steps:
            yield [self._next(loaded).to(self.device) for _ in shard]

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
            # end the processes at once: they ignore SIGTERM, and DataLoader waits 5 s for each.
            # DataLoader's own handler would raise, in the middle of a save, that a process died
            self._child_handler = signal.signal(signal.SIGCHLD, lambda number, frame: None)
            for child in multiprocessing.active_children():
                if child.daemon:
                    child.kill()
                    child.join()
        raise Interrupted


def _identity(batch: Any) -> Any:
    return batch  # a lambda cannot be sent to loader processes


def _ignore_signals(_: int) -> None:
    """Stop requests are for the training process, which must still read its last batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

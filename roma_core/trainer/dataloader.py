"""The batches of a run, step after step; a wait for them ends when somebody asks to stop.

Ends loader processes that do not answer; a stop request must not wait for a file system.
Samples → packed batches, in this process or in loader processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from roma_core.data.store import Gathered
from roma_core.model.config import (
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    _ModelConfig,
)
from roma_core.model.packing import PackedBatch, patchify
from roma_core.model.positions import in_float32, placed, start_of
from roma_core.model.segments import Segments
from roma_core.trainer.augmentation import Augmentation, Each, Rows, augmentations_of
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import HostGroup, Interrupted, StopRequests
from roma_core.trainer.sampler import Indices, Plan


class LoaderProcesses:
    """The loader processes of a run, seen from the process that may have to end them."""

    def __init__(self) -> None:
        self._handler: Any = None

    def kill(self) -> None:
        """End them at once. They ignore SIGTERM, and the loader itself waits 5 s for each."""
        # the loader's handler would raise, in the middle of a save, that a process died
        self._handler = signal.signal(signal.SIGCHLD, _no_news)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()
                child.join()

    def forget(self) -> None:
        """Give the loader's handler back, when the loader is gone."""
        if self._handler is not None:
            signal.signal(signal.SIGCHLD, self._handler)
            self._handler = None


def _no_news(number: int, frame: FrameType | None) -> None:
    pass


_COLUMNS = {"values": "channels", "positions": "position axes"}


class MapStyle(Protocol):
    """Any data set with a length whose items are dictionaries.

    An item has ``values`` (time, C, height, width) float, ``positions`` (D, N) of any real type, and
    optionally ``pad_mask`` (N,) bool, ``label``, ``targets`` (N, K) float, which regression takes for
    the label, and ``id`` int, a stable name; without it the index is taken. The model's ``position_axes``, if it has any, are applied to positions.
    The set may have ``lengths``, tokens by index, and ``augmentations`` of its own for training:
    functions of one series, see :class:`~roma_core.trainer.augmentation.Each`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Collate:
    """Items of one micro-batch → :class:`PackedBatch`, shortest series first, with its mask.

    Attributes:
        config: of the model the batch is for.
        seed: of masks and drops.
        augmentations: changes to every series, anew in every epoch; none in evaluation.
    """

    config: _ModelConfig
    seed: int
    augmentations: tuple[Augmentation, ...] = ()

    def __post_init__(self) -> None:
        if self._is_per_token and any(isinstance(a, Each) for a in self.augmentations):
            raise ValueError(
                "pooling='token' has a label for every token, which the data set's own augmentations "
                "would leave behind; take them away, or use the augment_ settings"
            )

    def __call__(self, items: Sequence[tuple[int, int, dict[str, Any]]]) -> PackedBatch:
        """``items`` are (epoch, sample index, item)."""
        series = [self._tokens(index, item) for _, index, item in items]
        tokens, positions, ids, labels = zip(*series, strict=True)
        rows = Rows.of(tokens, positions, ids)
        indices = np.array([index for _, index, _ in items])
        if labels[0] is None:
            return self._packed(items[0][0], indices, rows, None)
        if self._is_per_token:
            rows = replace(rows, labels=torch.cat(labels))
            return self._packed(items[0][0], indices, rows, None)
        return self._packed(items[0][0], indices, rows, _stacked(labels))

    def gathered(self, epoch: int, indices: Indices, series: Gathered) -> PackedBatch:
        """The same of series that a stored data set gave all at once."""
        for what, array, width in (
            ("values", series.values, self.config.n_channels),
            ("positions", series.positions, self.config.n_pos_dims),
        ):
            if array.shape[1] != width:
                raise ValueError(
                    f"the data set has {array.shape[1]} {_COLUMNS[what]}, but the model was built "
                    f"for {width}"
                )
        numbers = series.targets if self._is_regression else series.labels
        labels = None if numbers is None else torch.from_numpy(numbers)
        rows = Rows(
            torch.from_numpy(series.values),
            torch.from_numpy(series.positions),
            series.lengths,
            series.ids,
            labels if self._is_per_token else None,
        )
        return self._packed(epoch, indices, rows, None if self._is_per_token else labels)

    @property
    def takes_gathered(self) -> bool:
        """Whether observations are tokens and positions already as the model takes them."""
        return self._one_observation and not self.config.position_axes

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

    def _packed(
        self, epoch: int, indices: Indices, rows: Rows, labels: torch.Tensor | None
    ) -> PackedBatch:
        """Augment, sort, mask. ``labels`` (B,) or (B, K) are those of series."""
        for augmentation in self.augmentations:
            rows = augmentation(rows, self.seed, epoch)
        if (np.diff(rows.lengths) < 0).any():
            order = rows.lengths.argsort(kind="stable")
            rows, indices = rows.in_order(order), indices[order]
            labels = None if labels is None else labels[torch.from_numpy(order)]
        batch = PackedBatch(
            tokens=rows.tokens,
            positions=rows.positions,
            segments=Segments(rows.lengths.tolist()),
            sample_ids=torch.from_numpy(rows.ids),
            indices=torch.from_numpy(indices),
            labels=rows.labels if self._is_per_token else labels,
        )
        if isinstance(self.config, RoMAForPreTrainingConfig):
            batch = batch.with_drawn_mask(self.config, self.seed, epoch)
        return batch

    def _tokens(
        self, index: int, item: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, int, Any]:
        """Real tokens (N, P), their positions (N, D), the sample's name, and its label."""
        values = torch.as_tensor(item["values"]).float()
        if self._one_observation and values.shape[1:] == (self.config.n_channels, 1, 1):
            tokens = values[:, :, 0, 0]  # (N, C): patchify would give the same, for 40 µs
        else:
            tokens = patchify(values[None], self.config.tubelet_size)[0]  # (N, P)
        positions = torch.as_tensor(item["positions"])  # (D, N)
        if positions.shape != (self.config.n_pos_dims, tokens.shape[0]):
            raise ValueError(
                f"sample {index}: positions must have shape (n_pos_dims, tokens) = "
                f"{(self.config.n_pos_dims, tokens.shape[0])}, got {tuple(positions.shape)}"
            )
        label, n_tokens = item.get("label"), tokens.shape[0]
        if self._is_regression:
            label = item.get("targets", label)
        if per_token := label is not None and self._is_per_token:
            label = torch.as_tensor(label)
            if label.shape[:1] != (n_tokens,):
                raise ValueError(
                    f"sample {index}: label must have one entry for each of {n_tokens} tokens, "
                    f"got shape {tuple(label.shape)}"
                )
        if (pad_mask := item.get("pad_mask")) is not None:
            real = ~torch.as_tensor(pad_mask)
            tokens, positions = tokens[real], positions[:, real]
            if per_token:
                label = label[real]  # type: ignore[index]
        return tokens, self._placed(positions), int(item.get("id", index)), label

    def _placed(self, positions: torch.Tensor) -> torch.Tensor:
        """``(D, N)`` of a user's real tokens → ``(N, D)`` float32 of the model's."""
        axes = self.config.position_axes
        if not axes and positions.dtype == torch.float32:
            return positions.T
        one = positions[None]
        real = torch.ones(1, positions.shape[1], dtype=torch.bool)
        return in_float32(placed(one, start_of(one, real, axes), axes)[0].T)


def _stacked(labels: Sequence[Any]) -> torch.Tensor:
    if all(type(label) is int for label in labels):
        return torch.tensor(labels, dtype=torch.int64)
    return torch.stack([torch.as_tensor(label) for label in labels])


@dataclass(frozen=True)
class _Batches(Dataset[PackedBatch]):
    """Packed batches by (epoch, sample indices), so that loader processes know the epoch.

    A data set that can give many series at once (``gathered``, as stored ones can) is asked to.
    """

    dataset: MapStyle
    collate: Collate

    def __getitems__(self, key: tuple[int, Indices]) -> PackedBatch:
        epoch, indices = key
        gathered = getattr(self.dataset, "gathered", None)
        if gathered is not None and self.collate.takes_gathered:
            return self.collate.gathered(epoch, indices, gathered(indices))
        return self.collate([(epoch, i, self.dataset[i]) for i in indices.tolist()])


def _as_it_is(batch: Any) -> Any:
    return batch


def load(
    dataset: MapStyle,
    micro_batches: Iterable[tuple[int, Indices]],
    collate: Collate,
    workers: int,
    pin: bool,
    patience_s: float = 0,
) -> Iterator[PackedBatch]:
    """Packed batches of the given (epoch, sample indices), in their order.

    ``workers`` loader processes read ahead; 0 reads in this process. The batches are the same. With
    ``patience_s``, loader processes that take longer make ``next`` raise a RuntimeError; it may be
    called again.
    """
    batches = _Batches(dataset, collate)
    if not workers and not pin:
        return map(batches.__getitems__, micro_batches)  # a loader would only add to the wait
    return iter(
        DataLoader(
            batches,
            batch_sampler=micro_batches,  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_ignore_signals if workers else None,
            pin_memory=pin,
            timeout=patience_s if workers else 0,
        )
    )


def _ignore_signals(_: int) -> None:
    """Stop requests are for the training process, which must still read its last batches."""
    import signal

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


_LOADER_POLL_S = 1.0  # how often a wait for loader processes looks for stop requests


class TrainLoader:
    """This process's share of every step. Use it as a context manager."""

    def __init__(
        self,
        config: TrainerConfig,
        plan: Plan,
        dataset: MapStyle,
        model: _ModelConfig,
        ranks: HostGroup,
        device: torch.device,
        stops: StopRequests,
    ) -> None:
        """``plan`` says which samples a step has, ``model`` how they become a batch."""
        self.config, self.plan, self.dataset = config, plan, dataset
        self.ranks, self.device, self.stops = ranks, device, stops
        augmentations = augmentations_of(config, model.n_channels, dataset)
        self.collate = Collate(model, config.random_seed, augmentations)
        self._processes = LoaderProcesses()

    def __enter__(self) -> TrainLoader:
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

"""Samples → packed batches, in this process or in loader processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from roma_core.model.axes import in_float32, placed, start_of
from roma_core.model.config import (
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    _ModelConfig,
)
from roma_core.model.packing import PackedBatch
from roma_core.model.segments import Segments
from roma_core.model.tubelets import patchify
from roma_core.trainer.augmenting import Augmentation, Rows
from roma_core.trainer.epoch_plan import Indices


class MapStyle(Protocol):
    """Any data set with a length whose items are dictionaries.

    An item has ``values`` (time, C, height, width) float, ``positions`` (D, N) of any real type, and
    optionally ``pad_mask`` (N,) bool, ``label``, and ``id`` int, a stable name; without it the index
    is taken. The model's ``position_axes``, if it has any, are applied to positions.
    The set may have ``lengths``, tokens by index, and ``augmentations`` of its own for training:
    functions of one series, see :class:`~roma_core.trainer.augmenting.Each`.
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
        if self.augmentations and _is_per_token(self.config):
            raise ValueError(
                "pooling='token' has a label for every token, which augmentations would leave behind; "
                "set the augment_ settings to 0"
            )

    @property
    def _one_observation(self) -> bool:
        return tuple(self.config.tubelet_size) == (1, 1, 1)

    def __call__(self, items: Sequence[tuple[int, int, dict[str, Any]]]) -> PackedBatch:
        """``items`` are (epoch, sample index, item)."""
        epoch = items[0][0]
        series = [(*self._tokens(index, item), index) for _, index, item in items]
        tokens, positions, ids, labels, indices = zip(*series, strict=True)
        if self.augmentations:
            rows = Rows.of(tokens, positions, ids)
            for augmentation in self.augmentations:
                rows = augmentation(rows, self.seed, epoch)
            series = list(zip(*rows.split(), ids, labels, indices, strict=True))
        series.sort(key=lambda s: s[0].shape[0])
        tokens, positions, ids, labels, indices = zip(*series, strict=True)
        batch = PackedBatch(
            tokens=torch.cat(tokens),
            positions=torch.cat(positions),
            segments=Segments([t.shape[0] for t in tokens]),
            sample_ids=torch.tensor(ids, dtype=torch.int64),
            indices=torch.tensor(indices, dtype=torch.int64),
            labels=None if labels[0] is None else self._labels(labels),
        )
        if isinstance(self.config, RoMAForPreTrainingConfig):
            batch = batch.with_drawn_mask(self.config, self.seed, epoch)
        return batch

    def _tokens(
        self, index: int, item: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, int, Any]:
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
        if per_token := label is not None and _is_per_token(self.config):
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

    def _labels(self, labels: Sequence[Any]) -> torch.Tensor:
        return torch.cat(list(labels)) if _is_per_token(self.config) else _stacked(labels)

    def _placed(self, positions: torch.Tensor) -> torch.Tensor:
        """``(D, N)`` of a user's real tokens → ``(N, D)`` float32 of the model's."""
        axes = self.config.position_axes
        if not axes and positions.dtype == torch.float32:
            return positions.T
        one = positions[None]
        real = torch.ones(1, positions.shape[1], dtype=torch.bool)
        return in_float32(placed(one, start_of(one, real, axes), axes)[0].T)


def _is_per_token(config: _ModelConfig) -> bool:
    return isinstance(config, RoMAForClassificationConfig) and config.pools == "token"


def _stacked(labels: Sequence[Any]) -> torch.Tensor:
    if all(type(label) is int for label in labels):
        return torch.tensor(labels, dtype=torch.int64)
    return torch.stack([torch.as_tensor(label) for label in labels])


class _WithEpoch(Dataset[tuple[int, int, dict[str, Any]]]):
    """Items by (epoch, index), so that loader processes know which epoch they draw for."""

    def __init__(self, dataset: MapStyle) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, dict[str, Any]]:
        epoch, index = key
        return epoch, index, self.dataset[index]


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
    keys = ([(epoch, int(i)) for i in indices] for epoch, indices in micro_batches)
    return iter(
        DataLoader(
            _WithEpoch(dataset),
            batch_sampler=keys,
            collate_fn=collate,
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

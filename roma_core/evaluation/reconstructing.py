"""What a masked autoencoder says about hidden observations, beside what was there.

The hidden values are overwritten with NaN before the model is asked, so a model that looked at one
would say NaN, which is an error here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.data.normalisation import Normaliser
from roma_core.data.schema import DataSchema
from roma_core.data.store import Subset
from roma_core.files import write_bytes
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.masking import sample_all_but
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import Collate

Float32 = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HiddenTable:
    """H hidden observations of N series, one series after the other, in the units of the data.

    Attributes:
        n_series: N, series without a hidden observation among them.
        series: ``(H,)`` int64, which series of the split.
        places: ``(H,)`` int64, which observation of it.
        true: ``(H, C)`` as observed, noise and all.
        predicted: ``(H, C)``.
        std: ``(H, C)`` predicted standard deviation; None if the model predicts none.
        clean: ``(H, C)`` what would have been observed without noise; None if nobody knows.
    """

    n_series: int
    series: Ints
    places: Ints
    true: Float32
    predicted: Float32
    std: Float32 | None
    clean: Float32 | None

    def of(self, series: NDArray[np.bool_]) -> HiddenTable:
        """The rows of the series where ``(N,)`` is True; ``n_series`` becomes their number."""
        rows = series[self.series]
        return replace(
            self,
            n_series=int(series.sum()),
            series=self.series[rows],
            places=self.places[rows],
            true=self.true[rows],
            predicted=self.predicted[rows],
            std=None if self.std is None else self.std[rows],
            clean=None if self.clean is None else self.clean[rows],
        )

    def save(self, path: Path, split: Subset) -> None:
        """Write Parquet, a row per hidden observation, in one step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = split.dataset.schema
        ids = pa.array([split.dataset.ids[i] for i in split.indices])
        columns = {"id": ids.take(pa.array(self.series)), "place": self.places}
        for what in ("true", "predicted", "std", "clean"):
            if (numbers := getattr(self, what)) is not None:
                for c, channel in enumerate(schema.channels):
                    columns[f"{what}_{channel.name}"] = numbers[:, c]
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        write_bytes(path, buffer.getvalue())


Hide = Callable[[PackedBatch], PackedBatch]


def all_but(n_seen: int, seed: int) -> Hide:
    """Hides all observations of each series but ``n_seen``, where it has more."""

    def hide(batch: PackedBatch) -> PackedBatch:
        return batch.with_mask(sample_all_but(batch.segments, batch.sample_ids, n_seen, seed))

    return hide


def as_trained(config: RoMAForPreTrainingConfig, seed: int) -> Hide:
    """Hides as much, and in the way, that the model was trained with."""
    return lambda batch: batch.with_drawn_mask(config, seed, epoch=0)


def can_be_judged(config: RoMAForPreTrainingConfig, schema: DataSchema) -> None:
    """Raises ValueError, with the reason, if there are no values in the units of the data."""
    if config.normalize_targets:
        raise ValueError(
            "a model trained with normalize_targets predicts the shape of a token less its own mean, which is "
            "hidden too; only one trained with normalize_targets=False can be judged by values"
        )
    if not Collate(config, seed=0).takes_gathered or config.n_channels != len(schema.channels):
        raise ValueError(
            f"the model has tokens of {config.tubelet_size} steps with {config.n_channels} channels and "
            f"{len(config.position_axes)} position axes of its own; only one with a token for each "
            f"observation of this data set, {len(schema.channels)} channels, can be judged on it"
        )


@torch.no_grad()
def reconstruct(
    model: RoMAForPreTraining, split: Subset, hide: Hide, batch_size: int
) -> HiddenTable:
    """Ask the model about every hidden observation of a split.

    Raises:
        ValueError: nothing is hidden, the model cannot be judged by values, or is of other data.
        RuntimeError: the model read a hidden value, or its weights are not finite.
    """
    _check_units(model, split.dataset.schema)
    model.eval()
    batches = list(_batches(model.config, split, hide, batch_size))
    table, order = _hidden(batches, split)
    outputs = np.concatenate([_said(model, batch) for batch in batches])[order]
    width = table.true.shape[1]
    units = Normaliser(split.dataset.schema)
    mean, log_variance = outputs[:, :width], outputs[:, width:]
    deviation = np.exp(0.5 * log_variance.clip(-14, 14))  # as in the loss
    std = deviation * units.slope(mean) if model.config.predict_variance else None
    return replace(table, predicted=units.denormalise(mean), std=std)


def _check_units(model: RoMAForPreTraining, schema: DataSchema) -> None:
    if model.data_schema is None:
        return
    own = DataSchema.model_validate(model.data_schema)
    for what in ("channels", "axes", "normalisation"):
        if getattr(own, what) != getattr(schema, what):
            raise ValueError(
                f"{what} of this data set and of the data the model was trained on differ, so its numbers would "
                f"mean something else here; judge it on the version of the data it was trained on"
            )


def hidden_of(config: RoMAForPreTrainingConfig, split: Subset, hide: Hide) -> HiddenTable:
    """What such a model would be asked about, predicted by nobody yet: NaN.

    Raises:
        ValueError: nothing is hidden, or such a model cannot be judged by values.
    """
    return _hidden(list(_batches(config, split, hide, 256)), split)[0]


def _batches(
    config: RoMAForPreTrainingConfig, split: Subset, hide: Hide, batch_size: int
) -> Iterator[PackedBatch]:
    can_be_judged(config, split.dataset.schema)
    collate, places = Collate(config, seed=0), np.arange(len(split))
    for start in range(0, len(split), batch_size):
        part = places[start : start + batch_size]
        yield hide(collate.gathered(0, part, split.gathered(part)))


def _hidden(batches: list[PackedBatch], split: Subset) -> tuple[HiddenTable, Ints]:
    """The table without predictions, and the ``(H,)`` row of the batches that became each of its rows."""
    named = [_named(batch) for batch in batches]
    series, places = (np.concatenate(column) for column in zip(*named, strict=True))
    if len(series) == 0:
        raise ValueError(
            f"nothing is hidden in {len(split)} series of {split.lengths.min()} to "
            f"{split.lengths.max()} observations: fewer must be seen "
            f"(--seen), or a larger share hidden (mask_ratio)"
        )
    order = np.lexsort((places, series))
    series, places = series[order], places[order]
    true, clean = _what_was_there(split, series, places)
    nobody = np.full_like(true, np.nan)
    return HiddenTable(len(split), series, places, true, nobody, std=None, clean=clean), order


def _named(batch: PackedBatch) -> tuple[Ints, Ints]:
    """Series in the split, and place in it, of the hidden tokens of a batch."""
    assert batch.masked is not None and batch.indices is not None
    rows, segments = batch.masked.hidden_rows, batch.segments
    return batch.indices[segments.ids[rows]].numpy(), segments.index_in_series[rows].numpy()


def _said(model: RoMAForPreTraining, batch: PackedBatch) -> Float32:
    """The head's numbers for the hidden tokens of a batch."""
    masked = batch.masked
    assert masked is not None
    rows = masked.hidden_rows
    if masked.hidden.total == 0:
        return np.zeros((0, model.head.linear.out_features), np.float32)
    tokens = batch.tokens.clone()
    tokens[rows] = torch.nan
    outputs = model.outputs_of(replace(batch, tokens=tokens), masked).float()
    if not bool(outputs.isfinite().all()):
        raise RuntimeError(
            "the model gives numbers that are not finite: its weights are not, or it reads hidden values"
        )
    return outputs.numpy()


def _what_was_there(split: Subset, series: Ints, places: Ints) -> tuple[Float32, Float32 | None]:
    """``(H, C)`` observed values of hidden observations, and the clean ones if they are known."""
    dataset = split.dataset
    columns = clean_columns(dataset.schema)
    true = np.empty((len(series), len(dataset.schema.channels)), np.float32)
    clean = None if columns is None else np.empty_like(true)
    for k, rows in rows_by_series(series):
        true[rows] = dataset.raw(int(split.indices[k]))[1][places[rows]]
        if clean is not None:
            targets = dataset.targets(int(split.indices[k]))
            assert targets is not None and columns is not None
            clean[rows] = targets[places[rows]][:, columns]
    return true, clean


def rows_by_series(series: Ints) -> Iterator[tuple[int, slice]]:
    """The series that have rows, with their rows; ``series`` ascends."""
    found, starts = np.unique(series, return_index=True)
    for k, a, b in zip(found.tolist(), starts, [*starts[1:], len(series)], strict=True):
        yield k, slice(int(a), int(b))


def clean_columns(schema: DataSchema) -> list[int] | None:
    """The targets that are the channels without noise: ``clean_<channel>``, or ``clean`` of the only one.

    None unless every channel has one.
    """
    names = [target.name for target in schema.targets]
    wanted = [f"clean_{channel.name}" for channel in schema.channels]
    if names == ["clean"] and len(wanted) == 1:
        return [0]
    return [names.index(name) for name in wanted] if set(wanted) <= set(names) else None


def mean_of_train(table: HiddenTable, split: Subset) -> HiddenTable:
    """The same observations, predicted by the mean of the train split."""
    schema = split.dataset.schema
    nothing = np.zeros((1, len(schema.channels)), np.float32)
    mean = Normaliser(schema).denormalise(nothing)
    return replace(table, predicted=np.broadcast_to(mean, table.true.shape), std=None)


def interpolated(table: HiddenTable, split: Subset) -> HiddenTable:
    """The same observations, on straight lines between seen ones; level before the first and after the last.

    For data with a single position axis.
    """
    predicted = np.empty_like(table.true)
    for k, rows in rows_by_series(table.series):
        positions, values = split.dataset.raw(int(split.indices[k]))
        seen = np.ones(len(values), dtype=bool)
        seen[table.places[rows]] = False
        order = np.argsort(positions[seen, 0], kind="stable")
        at, known = positions[seen, 0][order], values[seen][order]
        asked = positions[table.places[rows], 0]
        for c in range(values.shape[1]):
            predicted[rows, c] = np.interp(asked, at, known[:, c])
    return replace(table, predicted=predicted, std=None)

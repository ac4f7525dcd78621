"""Predictions of a pretraining model for hidden observations, and two baselines for them.

Shapes here:  N series   H hidden observations   C channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from roma_core.data.store import Subset
from roma_core.evaluation.metrics import (
    ReconstructionMetrics,
    coverage,
    errors_by_class,
    noise_error,
    reconstruction_errors,
)
from roma_core.evaluation.plots import ReconstructionExample, label_of
from roma_core.evaluation.predictions import Float32, Floats, Ints, ReconstructionTable
from roma_core.model import masking
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import DataSchema, Normaliser
from roma_core.trainer.dataloader import Collate

_N_EXAMPLES, _N_CHANNELS = 4, 4  # drawn; more would be too small to read

Mask = Callable[[PackedBatch], PackedBatch]
"""Hides observations of a batch."""


def mask_all_but(n_observed: int, seed: int) -> Mask:
    """Hides all observations of each series but ``n_observed``, where it has more."""

    def mask(batch: PackedBatch) -> PackedBatch:
        return batch.with_mask(
            masking.mask_all_but(batch.segments, batch.sample_ids, n_observed, seed)
        )

    return mask


def mask_as_trained(config: RoMAForPreTrainingConfig, seed: int) -> Mask:
    """Hides observations with the ratio and the strategy of the pretraining."""
    return lambda batch: masking.draw_mask(batch, config, seed, epoch=0)


@torch.no_grad()
def reconstruct(
    model: RoMAForPreTraining, split: Subset, mask: Mask, batch_size: int
) -> ReconstructionTable:
    """Predict every hidden observation of a split.

    Raises:
        ValueError: nothing is hidden, the model predicts no values in the units of the data, or it
            was trained on other data.
        RuntimeError: the model read a hidden value, or its weights are not finite.
    """
    _check_schema(model, split.dataset.schema)
    model.eval()
    batches = list(_masked_batches(model.config, split, mask, batch_size))
    table, order = _hidden_table(batches, split)
    outputs = np.concatenate([_outputs(model, batch) for batch in batches])[order]
    width = table.true.shape[1]
    units = Normaliser(split.dataset.schema)
    mean, log_variance = outputs[:, :width], outputs[:, width:]
    deviation = np.exp(0.5 * log_variance.clip(-14, 14))  # as in the loss
    std = deviation * units.slope(mean) if model.config.predict_variance else None
    return replace(table, predicted=units.denormalise(mean), std=std)


def hidden_observations(
    config: RoMAForPreTrainingConfig, split: Subset, mask: Mask
) -> ReconstructionTable:
    """What a model of this configuration would have to predict; ``predicted`` is NaN.

    Raises:
        ValueError: nothing is hidden, or such a model predicts no values in the units of the data.
    """
    return _hidden_table(list(_masked_batches(config, split, mask, 256)), split)[0]


def _check_schema(model: RoMAForPreTraining, schema: DataSchema) -> None:
    if model.data_schema is None:
        return
    own = DataSchema.model_validate(model.data_schema)
    for what in ("channels", "axes", "normalisation"):
        if getattr(own, what) != getattr(schema, what):
            raise ValueError(
                f"{what} of this data set and of the data the model was trained on differ, so its "
                f"outputs have another meaning here; evaluate it on the version of the data it was "
                f"trained on"
            )


def _check_config(config: RoMAForPreTrainingConfig, schema: DataSchema) -> None:
    if config.normalize_targets:
        raise ValueError(
            "a model trained with normalize_targets predicts the shape of a token less its own mean, "
            "which is hidden too; only one trained with normalize_targets=False can be evaluated by "
            "values"
        )
    if not Collate(config, seed=0).can_gather or config.n_channels != len(schema.channels):
        raise ValueError(
            f"the model has tokens of {config.tubelet_size} steps with {config.n_channels} channels and "
            f"{len(config.position_axes)} position axes of its own; only one with a token for each "
            f"observation of this data set, {len(schema.channels)} channels, can be evaluated on it"
        )


def _masked_batches(
    config: RoMAForPreTrainingConfig, split: Subset, mask: Mask, batch_size: int
) -> Iterator[PackedBatch]:
    _check_config(config, split.dataset.schema)
    collate, rows = Collate(config, seed=0), np.arange(len(split))
    for start in range(0, len(split), batch_size):
        part = rows[start : start + batch_size]
        yield mask(collate.batch(split, part))


def _hidden_table(batches: list[PackedBatch], split: Subset) -> tuple[ReconstructionTable, Ints]:
    """The table without predictions, and the ``(H,)`` row of the batches for each of its rows."""
    found = []
    for batch in batches:
        assert batch.masked is not None and batch.indices is not None
        rows, segments = batch.masked.hidden_rows, batch.segments
        series = batch.indices[segments.ids[rows]].numpy()
        found.append((series, segments.index_in_series[rows].numpy()))
    series, index = (np.concatenate(column) for column in zip(*found, strict=True))
    if len(series) == 0:
        raise ValueError(
            f"nothing is hidden in {len(split)} series of {split.lengths.min()} to "
            f"{split.lengths.max()} observations: leave fewer visible (--n-observed), or hide a "
            f"larger fraction (mask_ratio)"
        )
    order = np.lexsort((index, series))
    series, index = series[order], index[order]
    true, clean = _true_values(split, series, index)
    unknown = np.full_like(true, np.nan)
    return ReconstructionTable(len(split), series, index, true, unknown, clean=clean), order


def _outputs(model: RoMAForPreTraining, batch: PackedBatch) -> Float32:
    """The head's outputs for the hidden tokens of a batch, which the model sees as NaN."""
    masked = batch.masked
    assert masked is not None
    if masked.hidden.total == 0:
        return np.zeros((0, model.head.linear.out_features), np.float32)
    tokens = batch.tokens.clone()
    tokens[masked.hidden_rows] = torch.nan
    outputs = model.predict_hidden(replace(batch, tokens=tokens), masked).float()
    if not bool(outputs.isfinite().all()):
        raise RuntimeError(
            "outputs of the model are not finite: its weights are not, or it reads hidden values"
        )
    return outputs.numpy()


def _true_values(split: Subset, series: Ints, index: Ints) -> tuple[Float32, Float32 | None]:
    """``(H, C)`` observed values of hidden observations, and the clean ones if they are known."""
    dataset = split.dataset
    columns = clean_columns(dataset.schema)
    true = np.empty((len(series), len(dataset.schema.channels)), np.float32)
    clean = None if columns is None else np.empty_like(true)
    for k, rows in rows_by_series(series):
        true[rows] = dataset.raw(int(split.indices[k]))[1][index[rows]]
        if clean is not None:
            targets = dataset.targets(int(split.indices[k]))
            assert targets is not None and columns is not None
            clean[rows] = targets[index[rows]][:, columns]
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


def train_mean(table: ReconstructionTable, split: Subset) -> ReconstructionTable:
    """The same observations, predicted by the mean of the train split."""
    schema = split.dataset.schema
    mean = Normaliser(schema).denormalise(np.zeros((1, len(schema.channels)), np.float32))
    return replace(table, predicted=np.broadcast_to(mean, table.true.shape), std=None)


def linear_interpolation(table: ReconstructionTable, split: Subset) -> ReconstructionTable:
    """The same observations, on straight lines between visible ones; constant outside of them.

    For data with a single position axis.
    """
    predicted = np.empty_like(table.true)
    for k, rows in rows_by_series(table.series):
        positions, values = split.dataset.raw(int(split.indices[k]))
        hidden = table.index[rows]
        known = np.delete(np.arange(len(values)), hidden)
        known = known[np.argsort(positions[known, 0], kind="stable")]
        for c in range(values.shape[1]):
            predicted[rows, c] = np.interp(
                positions[hidden, 0], positions[known, 0], values[known, c]
            )
    return replace(table, predicted=predicted, std=None)


def channel_ranges(train: Subset) -> Floats | None:
    """``(C,)`` range of every channel over the train split; None if one never changes."""
    if len(train) == 0:
        return None
    ends = [
        (values.min(axis=0), values.max(axis=0))
        for values in (train.dataset.raw(int(i))[1] for i in train.indices)
    ]
    lows, highs = (np.array(column) for column in zip(*ends, strict=True))
    ranges = highs.max(axis=0).astype(np.float64) - lows.min(axis=0)
    return ranges if (ranges > 0).all() else None


def evaluate_reconstruction(table: ReconstructionTable, split: Subset) -> ReconstructionMetrics:
    """Every error of a table, beside those of the baselines on the same observations."""
    dataset = split.dataset
    ranges = channel_ranges(dataset.split("train"))
    found = noise_error(table) | coverage(table)
    found |= reconstruction_errors(table, "true", ranges)
    found |= reconstruction_errors(table, "clean", ranges)
    baselines = {"mean_": train_mean(table, split)}
    if len(dataset.schema.axes) == 1:
        baselines["linear_"] = linear_interpolation(table, split)
    for name, baseline in baselines.items():
        own = reconstruction_errors(baseline) | reconstruction_errors(baseline, "clean")
        found |= {f"{name}{key}": own[key] for key in ("mse", "clean_mse") if key in own}
    labels = dataset.labels
    return ReconstructionMetrics(
        n_series=len(np.unique(table.series)),
        n_hidden=len(table.series),
        mean_hidden_fraction=len(table.series) / int(split.lengths.sum()),
        overall=found,
        groups=()
        if labels is None
        else errors_by_class(table, labels[split.indices], dataset.schema.classes),
    )


@torch.no_grad()
def reconstruct_examples(model: RoMAForPreTraining, split: Subset) -> list[ReconstructionExample]:
    """A few series of a split, masked as in the pretraining; none if nothing of them is hidden.

    With ``normalize_targets`` predictions take the level of the true values.
    """
    by_length = np.argsort(split.lengths, kind="stable")
    few = Subset(split.dataset, split.indices[by_length[len(split) // 2 :][:_N_EXAMPLES]])
    batch = Collate(model.config, seed=0).batch(few, np.arange(len(few)))
    if batch.masked is None or batch.masked.hidden.total == 0:
        return []
    table, order = _hidden_table([batch], few)
    outputs = model.eval().reconstruct_hidden(batch, batch.masked).float().numpy()[order]
    predicted = Normaliser(split.dataset.schema).denormalise(outputs)
    return examples_of(replace(table, predicted=predicted), few)


def examples_of(table: ReconstructionTable, split: Subset) -> list[ReconstructionExample]:
    """A few series, evenly spaced over the split, in the units of the data."""
    schema, dataset = split.dataset.schema, split.dataset
    columns = clean_columns(schema)
    has_hidden = np.unique(table.series)
    chosen = has_hidden[np.linspace(0, len(has_hidden) - 1, _N_EXAMPLES).astype(int)]
    examples = []
    for k in dict.fromkeys(chosen.tolist()):
        row = int(split.indices[k])
        positions, values = dataset.raw(row)
        rows = table.series == k
        hidden = table.index[rows]
        targets = dataset.targets(row)
        clean = None if targets is None or columns is None else targets[:, columns]

        def scatter(numbers: Float32, n: int = len(values), at: Ints = hidden) -> Float32:
            """``(hidden, C)`` to their rows of ``(N, drawn)``, the others NaN."""
            full = np.full((n, numbers.shape[1]), np.nan, np.float32)
            full[at] = numbers
            return full[:, :_N_CHANNELS]

        examples.append(
            ReconstructionExample(
                title=dataset.ids[row],
                channels=[label_of(channel) for channel in schema.channels[:_N_CHANNELS]],
                positions=positions[:, 0],
                values=values[:, :_N_CHANNELS],
                predicted=scatter(table.predicted[rows]),
                visible=~np.isin(np.arange(len(values)), hidden),
                axis=label_of(schema.axes[0]),
                std=None if table.std is None else scatter(table.std[rows]),
                clean=None if clean is None else clean[:, :_N_CHANNELS],
            )
        )
    return examples

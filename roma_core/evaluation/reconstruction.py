"""Predictions of a pretraining model for hidden observations, two baselines for them, and features.

Shapes here:  N series   H hidden observations   C channels
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from roma_core.data.store import StoredDataset, Subset, as_delivered
from roma_core.evaluation.config import Fact, FactSheet
from roma_core.evaluation.metrics import (
    Estimate,
    GroupErrors,
    ReconstructionMetrics,
    error_estimates,
    means_with_resamples,
    r2_samples,
)
from roma_core.evaluation.plots import ReconstructionExample
from roma_core.evaluation.predictions import Float32, Floats, Ints, ReconstructionTable
from roma_core.figures import label_of
from roma_core.model import masking
from roma_core.model.backbone import Backbone
from roma_core.model.config import EncoderConfig, RoMAForPreTrainingConfig
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import DataSchema, Normaliser
from roma_core.trainer.dataloader import Collate

_N_EXAMPLES, _N_CHANNELS = 4, 4  # drawn; more would be too small to read

Mask = Callable[[PackedBatch], PackedBatch]
"""Hides observations of a batch."""


def mask_all_but(n_observed: int, seed: int) -> Mask:
    """Hides all observations of each series but ``n_observed``, where it has more."""
    return lambda batch: batch.with_mask(
        masking.mask_all_but(batch.segments, batch.sample_ids, n_observed, seed)
    )


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
    schema = split.dataset.schema
    _check_model(model, schema)
    model.eval()
    collate, rows = Collate(model.config, seed=0, masks=False), np.arange(len(split))
    parts = [rows[start : start + batch_size] for start in range(0, len(split), batch_size)]
    batches = [mask(collate.batch(split, part)) for part in parts]
    outputs = np.concatenate([_outputs(model, batch) for batch in batches])
    units, width = Normaliser(schema), schema.n_values
    at = _hidden_positions(batches)
    mean, log_variance = outputs[:, :width], outputs[:, width:]
    deviation = np.exp(0.5 * log_variance.clip(-14, 14))  # as in the loss
    std = deviation * units.slope(mean, at) if model.config.predict_variance else None
    return with_squared(_table(split, batches, units.denormalise(mean, at), std), split)


@torch.no_grad()
def embed(encoder: Backbone, series: Subset, batch_size: int) -> Float32:
    """``(len(series), d_model)`` features: the mean of every series' tokens, all of them visible."""
    collate = Collate(encoder.config, seed=0, masks=False)
    device = encoder.projection.weight.device
    features = np.empty((len(series), encoder.config.encoder_config.d_model), np.float32)
    for part in np.array_split(np.arange(len(series)), -(-len(series) // batch_size)):
        batch = collate.batch(series, part)
        assert batch.indices is not None  # set by Collate
        means = encoder.embed(batch.to(device), pooling="mean")
        features[batch.indices.numpy()] = means.float().cpu().numpy()
    return features


def _hidden_positions(batches: list[PackedBatch]) -> Floats:
    """``(H, D)`` positions of the hidden observations as the model sees them; categories as delivered."""
    masked = [(batch, batch.masked.hidden_rows) for batch in batches if batch.masked is not None]
    return torch.cat([batch.positions[rows] for batch, rows in masked]).double().numpy()


def check_schema(model: Backbone, schema: DataSchema, *also: str) -> None:
    """Raise ValueError if the model says that it was trained on data of another schema.

    ``also``: fields to compare besides channels, axes and normalisation.
    """
    if model.data_schema is None:
        return
    own = DataSchema.model_validate(model.data_schema)
    for what in ("layout", "channels", "axes", "covariates", "normalisation", *also):
        if getattr(own, what) != getattr(schema, what):
            raise ValueError(
                f"{what} of this data set and of the data the model was trained on differ, so its "
                f"outputs have another meaning here; evaluate it on the version of the data it was "
                f"trained on, or apply it with `roma predict`"
            )


def facts_of(model: RoMAForPreTraining, dataset: StoredDataset, seed: int) -> FactSheet:
    """The model and its masks, as a table of the report."""

    def size(stack: EncoderConfig) -> str:
        return f"width {stack.d_model}, {stack.depth} layers, {stack.nhead} heads"

    config, manifest = model.config, dataset.manifest
    low, high = config.mask_ratio, config.mask_ratio_max
    facts = {
        "data": f"{manifest.name}, version {manifest.digest[:12]}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "encoder": size(config.encoder_config),
        "decoder": size(config.decoder_config),
        "hidden": f"{low:g} of each series" if high is None else f"{low:g} to {high:g}",
        "masks": f"{', '.join(config.mask_strategies)}, seed {seed}",
        "position scales": ", ".join(f"{a.name} {a.scale:g}" for a in dataset.schema.axes),
    }
    lines = tuple(Fact(label=label, value=value) for label, value in facts.items())
    return FactSheet(title="Model and masks", facts=lines)


def _check_model(model: RoMAForPreTraining, schema: DataSchema) -> None:
    config = model.config
    check_schema(model, schema)
    if config.normalize_targets:
        raise ValueError(
            "a model trained with normalize_targets predicts the shape of a token less its own mean, "
            "which is hidden too; only one trained with normalize_targets=False can be evaluated by "
            "values"
        )
    if not Collate(config, seed=0).can_gather or config.n_channels != schema.n_values:
        raise ValueError(
            f"the model has tokens of {config.tubelet_size} steps with {config.n_channels} channels and "
            f"{len(config.position_axes)} position axes of its own; only one with a token for each "
            f"observation of this data set, {schema.n_values} numbers, can be evaluated on it"
        )


def _outputs(model: RoMAForPreTraining, batch: PackedBatch) -> Float32:
    """The head's outputs for the hidden tokens of a batch, which the model sees as NaN."""
    batch = batch.to(model.projection.weight.device)
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
    return outputs.cpu().numpy()


def _table(
    split: Subset, batches: list[PackedBatch], predicted: Float32, std: Float32 | None
) -> ReconstructionTable:
    """Predictions ``(H, C)`` of the hidden observations, in the order of the batches, as a table.

    The table has a column per channel in either layout.
    """
    found = []
    for batch in batches:
        assert batch.masked is not None and batch.indices is not None
        hidden, segments = batch.masked.hidden_rows, batch.segments
        place = batch.indices[segments.ids[hidden]], batch.index_in_series[hidden]
        found.append((*place, batch.tokens[hidden].isnan()))
    series, index, visible = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    if len(series) == 0:
        raise ValueError(
            f"nothing is hidden in {len(split)} series of {split.lengths.min()} to "
            f"{split.lengths.max()} observations: leave fewer visible (--n-observed), or hide a "
            f"larger fraction (mask_ratio)"
        )
    order = np.lexsort((index, series))
    series, index, visible = series[order], index[order], visible[order]
    dataset = split.dataset
    columns = clean_columns(dataset.schema)
    true = np.empty((len(series), dataset.schema.n_values), np.float32)
    channel = np.zeros(len(series), np.int64)
    clean = None if columns is None else np.empty_like(true)
    for k, rows in rows_by_series(series):
        row = int(split.indices[k])
        positions, values = dataset.raw(row)
        true[rows] = values[index[rows]]
        channel[rows] = positions[index[rows], -1].astype(np.int64)  # in the per_channel layout
        if clean is not None:
            targets = dataset.targets(row)
            assert targets is not None and columns is not None
            clean[rows] = targets[index[rows]][:, columns]
    schema = dataset.schema
    true[visible] = np.nan

    def by_channel(numbers: Float32) -> Float32:
        """``(H, C)`` with NaN for numbers that were not observed, or not hidden."""
        if schema.layout == "joint":
            return np.where(np.isnan(true), np.float32(np.nan), numbers)
        columns = np.full((len(numbers), len(schema.channels)), np.nan, np.float32)
        columns[np.arange(len(numbers)), channel] = numbers[:, 0]
        return columns

    return ReconstructionTable(
        ids=[dataset.ids[i] for i in split.indices],
        series=series,
        channels=schema.channels,
        index=index,
        true=by_channel(true),
        predicted=by_channel(predicted[order]),
        std=None if std is None else by_channel(std[order]),
        clean=None if clean is None else by_channel(clean),
    )


def joint_values(dataset: StoredDataset, row: int) -> Float32:
    """``(N, C)`` values of a series as delivered, a column per channel in either layout."""
    positions, values = dataset.raw(row)
    if dataset.schema.layout == "joint":
        return values
    joint = np.full((len(values), len(dataset.schema.channels)), np.nan, np.float32)
    joint[np.arange(len(values)), positions[:, -1].astype(np.int64)] = values[:, 0]
    return joint


def rows_by_series(series: Ints) -> Iterator[tuple[int, slice]]:
    """The series that have rows, with their rows; ``series`` ascends."""
    found, starts = np.unique(series, return_index=True)
    for k, a, b in zip(found.tolist(), starts, [*starts[1:], len(series)], strict=True):
        yield k, slice(int(a), int(b))


def requests(table: ReconstructionTable, split: Subset) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Rows of every series of a table, and its visible values with queries of the hidden ones.

    The request of a server: fields of :class:`roma_core.serving.client.Series`.
    """
    dataset, schema = split.dataset, split.dataset.schema
    for k, rows in rows_by_series(table.series):
        row, hidden = int(split.indices[k]), table.index[rows]
        positions, values = dataset.raw(row)[0], joint_values(dataset, row).copy()
        values[hidden] = np.where(np.isnan(table.true[rows]), values[hidden], np.nan)
        seen, at = ~np.isnan(values).all(axis=1), positions[:, : len(schema.given_axes)]
        queries = as_delivered(dataset, row, at[hidden], values[hidden])["positions"]
        if schema.layout == "per_channel":
            channels = positions[hidden, -1].astype(int)
            queries["channel"] = [schema.channels[c].name for c in channels]
        yield rows, as_delivered(dataset, row, at[seen], values[seen]) | {"queries": queries}


def clean_columns(schema: DataSchema) -> list[int] | None:
    """The targets that are the channels without noise: ``clean_<channel>``, or ``clean`` of the only one.

    None unless every channel has one, in every observation.
    """
    names = [target.name for target in schema.targets if schema.target_level == "observation"]
    wanted = [f"clean_{channel.name}" for channel in schema.channels]
    if names == ["clean"] and len(wanted) == 1:
        return [0]
    return [names.index(name) for name in wanted] if set(wanted) <= set(names) else None


def train_mean(table: ReconstructionTable, split: Subset) -> ReconstructionTable:
    """The same observations, predicted by the mean of the train split."""
    schema = split.dataset.schema
    zeros = np.zeros((len(table.series), schema.n_values), np.float32)
    mean = Normaliser(schema).denormalise(zeros, _positions(table, split))
    predicted = np.where(np.isnan(table.true), np.float32(np.nan), mean)
    return replace(table, predicted=predicted, std=None)


def _positions(table: ReconstructionTable, split: Subset) -> Floats:
    """``(T, D)`` positions of the observations of a table, as delivered."""
    parts = [
        split.dataset.raw(int(split.indices[k]))[0][table.index[rows]]
        for k, rows in rows_by_series(table.series)
    ]
    return np.concatenate(parts)


def with_squared(table: ReconstructionTable, split: Subset) -> ReconstructionTable:
    """The table with ``squared``."""
    schema, at, z = split.dataset.schema, _positions(table, split), []
    for x in (table.true, table.predicted):
        if schema.layout == "per_channel":  # one column of each row has a number
            x = np.nansum(x, axis=1, keepdims=True)
        z.append(Normaliser(schema).normalise(x, at).astype(np.float64))
    true, predicted = z  # the mean of train is 0
    columns = [np.nansum((predicted - true) ** 2, axis=1), np.nansum(true**2, axis=1)]
    return replace(table, squared=np.stack(columns, axis=1))


def linear_interpolation(table: ReconstructionTable, split: Subset) -> ReconstructionTable:
    """The same observations, on straight lines between visible ones; constant outside of them.

    A channel without a visible value gets the mean of train. For data with a single position axis,
    besides that of channels.
    """
    predicted = train_mean(table, split).predicted.copy()
    for k, rows in rows_by_series(table.series):
        row = int(split.indices[k])
        at, values = split.dataset.raw(row)[0][:, 0], joint_values(split.dataset, row).copy()
        hidden = table.index[rows]
        values[hidden] = np.where(np.isnan(table.true[rows]), values[hidden], np.nan)
        order = np.argsort(at, kind="stable")
        for c in range(values.shape[1]):
            known = order[~np.isnan(values[order, c])]
            if len(known):
                predicted[rows, c] = np.interp(at[hidden], at[known], values[known, c])
    predicted[np.isnan(table.true)] = np.nan
    return with_squared(replace(table, predicted=predicted, std=None), split)


def channel_ranges(train: Subset) -> Floats | None:
    """``(C,)`` range of every channel over the train split; None if one never changes."""
    if len(train) == 0:
        return None
    ends = [
        (np.fmin.reduce(values), np.fmax.reduce(values))
        for values in (joint_values(train.dataset, int(i)) for i in train.indices)
    ]
    lows, highs = (np.array(column) for column in zip(*ends, strict=True))
    ranges = np.fmax.reduce(highs).astype(np.float64) - np.fmin.reduce(lows)
    return ranges if (ranges > 0).all() else None


def reconstruction_errors(
    table: ReconstructionTable,
    against: Literal["true", "clean"] = "true",
    ranges: Floats | None = None,
) -> dict[str, Estimate]:
    """``mse``, ``rmse`` and ``mae`` of a table, with 95 % intervals over series.

    Args:
        against: ``clean`` prefixes the names with ``clean_``; nothing if the table has no such values.
        ranges: ``(C,)`` of the channels, for ``nrmse``.
    """
    truth = table.true if against == "true" else table.clean
    if truth is None:
        return {}
    error = table.predicted.astype(np.float64) - truth  # (H, C)
    scaled = error if ranges is None else error / ranges
    values = np.hstack([error**2, np.abs(error), scaled**2])
    means = means_with_resamples(table.series, values)
    by_channel = means.reshape(len(means), 3, -1)
    mse, mae, relative = np.nanmean(by_channel, axis=2).T  # each (1 + R,)
    found = error_estimates(mse, mae)
    if ranges is not None:
        found["nrmse"] = Estimate.of(np.sqrt(relative))
    prefix = "clean_" if against == "clean" else ""
    return {f"{prefix}{name}": estimate for name, estimate in found.items()}


def noise_error(table: ReconstructionTable) -> dict[str, Estimate]:
    """``noise_mse``: the error of the values without noise; nothing if they are unknown."""
    if table.clean is None:
        return {}
    return {"noise_mse": reconstruction_errors(replace(table, predicted=table.clean))["mse"]}


def coverage(table: ReconstructionTable) -> dict[str, Estimate]:
    """``coverage_50``, ``_80`` and ``_95``: fractions of values in these predicted intervals.

    In percent; nothing without ``std``.
    """
    if table.std is None:
        return {}
    deviations = np.abs(table.predicted.astype(np.float64) - table.true) / table.std
    widths = {50: 0.6745, 80: 1.2816, 95: 1.96}
    hits = [np.where(np.isnan(deviations), np.nan, deviations <= w) for w in widths.values()]
    means = means_with_resamples(table.series, np.hstack(hits))
    levels = np.nanmean(means.reshape(len(means), len(widths), -1), axis=2)
    return {f"coverage_{k}": Estimate.of(x) for k, x in zip(widths, levels.T, strict=True)}


def errors_by_class(
    table: ReconstructionTable, labels: Ints, classes: tuple[str, ...]
) -> tuple[GroupErrors, ...]:
    """Reconstruction errors of every class with a hidden observation.

    Args:
        labels: ``(N,)`` index into ``classes`` of every series.
    """
    slugs = [re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in classes]
    found = []
    for k, (name, slug) in enumerate(zip(classes, slugs, strict=True)):
        part = table.select(labels[table.series] == k)
        if len(part.series) == 0:
            continue
        n_series = len(np.unique(part.series))
        clean = reconstruction_errors(part, "clean").get("clean_mse")
        found.append(
            GroupErrors(
                name=name,
                slug=slug if slug and slugs.count(slug) == 1 else f"{slug}_class{k}",
                n_series=n_series,
                mse=reconstruction_errors(part)["mse"].of_part(n_series),
                clean_mse=None if clean is None else clean.of_part(n_series),
            )
        )
    return tuple(found)


def evaluate_reconstruction(table: ReconstructionTable, split: Subset) -> ReconstructionMetrics:
    """Every error of a table, beside those of the baselines on the same observations."""
    dataset = split.dataset
    ranges = channel_ranges(dataset.split("train"))
    r2 = r2_samples(table)
    if not np.isfinite(r2[0]):
        raise ValueError(
            f"R² is undefined: every hidden value of {len(table.ids)} test series is the mean of train; "
            f"check the channels of {dataset.path}"
        )
    found = {"r2": Estimate.of(r2)} | noise_error(table) | coverage(table)
    found |= reconstruction_errors(table, "true", ranges)
    found |= reconstruction_errors(table, "clean", ranges)
    baselines = {"mean_": train_mean(table, split)}
    if len(dataset.schema.axes) == 1 + (dataset.schema.layout == "per_channel"):
        lines = baselines["linear_"] = linear_interpolation(table, split)
        found["linear_r2"] = Estimate.of(r2_samples(lines))
        found["gain_r2"] = Estimate.of(r2 - r2_samples(lines))  # of the same resamples
    for name, baseline in baselines.items():
        own = reconstruction_errors(baseline) | reconstruction_errors(baseline, "clean")
        found |= {f"{name}{key}": own[key] for key in ("mse", "clean_mse") if key in own}
    labels = dataset.labels
    n_observed = sum(int((~np.isnan(dataset.raw(int(row))[1])).sum()) for row in split.indices)
    return ReconstructionMetrics(
        n_series=len(np.unique(table.series)),
        n_hidden=len(table.series),
        mean_hidden_fraction=int((~np.isnan(table.true)).sum()) / n_observed,
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
    moved = batch.to(model.projection.weight.device)
    assert moved.masked is not None
    outputs = model.eval().reconstruct_hidden(moved, moved.masked).float().cpu().numpy()
    at = _hidden_positions([batch])
    predicted = Normaliser(split.dataset.schema).denormalise(outputs, at)
    return examples_of(_table(few, [batch], predicted, None), few)


def examples_of(table: ReconstructionTable, split: Subset) -> list[ReconstructionExample]:
    """A few series, evenly spaced over the split, in the units of the data."""
    schema, dataset = split.dataset.schema, split.dataset
    columns = clean_columns(schema)
    has_hidden = np.unique(table.series)
    chosen = has_hidden[np.linspace(0, len(has_hidden) - 1, _N_EXAMPLES).astype(int)]
    examples = []
    for k in dict.fromkeys(chosen.tolist()):
        row, rows = int(split.indices[k]), table.series == k
        positions, values = dataset.raw(row)[0], joint_values(dataset, row)
        hidden, targets = table.index[rows], dataset.targets(row)
        predicted, std = np.full_like(values, np.nan), np.full_like(values, np.nan)
        predicted[hidden] = table.predicted[rows]
        if table.std is not None:
            std[hidden] = table.std[rows]
        clean = None if targets is None or columns is None else targets[:, columns]
        drawn = slice(_N_CHANNELS)
        examples.append(
            ReconstructionExample(
                title=dataset.ids[row],
                channels=[label_of(channel) for channel in schema.channels[drawn]],
                positions=positions[:, 0],
                values=values[:, drawn],
                predicted=predicted[:, drawn],
                visible=np.isnan(predicted[:, drawn]),
                axis=label_of(schema.axes[0]),
                std=None if table.std is None else std[:, drawn],
                clean=None if clean is None else clean[:, drawn],
            )
        )
    return examples

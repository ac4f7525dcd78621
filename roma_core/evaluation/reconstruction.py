"""How far reconstructions are off, and how sure we are of that.

Errors are per value, in the units of the data: a mean over all hidden values of all channels. As for
classifiers, every metric is a function of sums over series, and a bootstrap resample changes only how
often each series counts.

Shapes here:  N series   H hidden observations   C channels   R resamples

What a masked autoencoder says about hidden observations, beside what was there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.store import Subset
from roma_core.evaluation.metrics import Estimate, PartEstimate, estimated, resample_sums
from roma_core.files import write_bytes
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.masking import draw_mask, mask_all_but
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import DataSchema, Normaliser
from roma_core.trainer.dataloader import Collate

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
        return batch.with_mask(mask_all_but(batch.segments, batch.sample_ids, n_seen, seed))

    return hide


def as_trained(config: RoMAForPreTrainingConfig, seed: int) -> Hide:
    """Hides as much, and in the way, that the model was trained with."""
    return lambda batch: draw_mask(batch, config, seed, epoch=0)


def can_be_judged(config: RoMAForPreTrainingConfig, schema: DataSchema) -> None:
    """Raises ValueError, with the reason, if there are no values in the units of the data."""
    if config.normalize_targets:
        raise ValueError(
            "a model trained with normalize_targets predicts the shape of a token less its own mean, which is "
            "hidden too; only one trained with normalize_targets=False can be judged by values"
        )
    if not Collate(config, seed=0).can_gather or config.n_channels != len(schema.channels):
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
        yield hide(collate.batch(split, part))


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
    outputs = model.predict_hidden(replace(batch, tokens=tokens), masked).float()
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


Floats = NDArray[np.float64]
N_BOOTSTRAP = 1000


class GroupErrors(BaseModel):
    """Series of one class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    slug: str = Field(description="The name as it is in names of metrics.")
    n_series: int
    mse: PartEstimate = Field(description="Without an interval if there is one series only.")
    clean_mse: PartEstimate | None


class ReconstructionMetrics(BaseModel):
    """What was found, by name.

    ``mse``, ``rmse``, ``mae``       against what was observed, noise and all
    ``clean_…``                      against what would have been observed without noise, where known
    ``noise_mse``                    what the clean values themselves would get
    ``nrmse``, ``clean_nrmse``       root mean square of errors as shares of the channel's range in train
    ``coverage_95``                  share of values within 1.96 predicted deviations
    ``mean_mse``, ``linear_mse``     two baselines: the mean of train, straight lines; ``mean_clean_mse``, …
    ``…_seen_N``                     with only N observations of each series seen
    ``mse_GROUP``, ``clean_mse_GROUP``    of the series of one class
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_series: int = Field(description="With a hidden observation.")
    n_hidden: int = Field(description="Hidden observations.")
    mean_hidden_fraction: float
    n_bootstrap: int = N_BOOTSTRAP
    estimates: dict[str, Estimate]
    groups: tuple[GroupErrors, ...] = ()

    def document(self) -> dict[str, Any]:
        """``metrics.json``: every estimate by name at the top, so that a row of results can ask for it."""
        head = {
            "schema_version": 1,
            **self.model_dump(mode="json", exclude={"estimates", "groups"}),
        }
        return head | {name: e.model_dump(mode="json") for name, e in self.all().items()}

    def all(self) -> dict[str, Estimate | PartEstimate]:
        """Estimates by name, those of groups among them."""
        found: dict[str, Estimate | PartEstimate] = dict(self.estimates)
        for group in self.groups:
            found[f"mse_{group.slug}"] = group.mse
            if group.clean_mse is not None:
                found[f"clean_mse_{group.slug}"] = group.clean_mse
        return found

    def flat(self) -> dict[str, float]:
        """Numbers for a tracker."""
        return {name: estimate.value for name, estimate in self.all().items()}


def errors(
    table: HiddenTable,
    against: Literal["true", "clean"] = "true",
    ranges: Floats | None = None,
    after: str = "",
) -> dict[str, Estimate]:
    """``mse``, ``rmse`` and ``mae`` of a table, with 95 % intervals over series.

    Args:
        against: ``clean`` gives names that begin so; nothing if the clean values are not known.
        ranges: ``(C,)`` of the channels, for ``nrmse``.
        after: put behind the names.
    """
    truth = table.true if against == "true" else table.clean
    if truth is None:
        return {}
    off = table.predicted.astype(np.float64) - truth  # (H, C)
    scaled = off if ranges is None else off / ranges
    mse, mae, relative = _means(table.series, [off**2, np.abs(off), scaled**2])
    found = {"mse": _estimate(mse), "rmse": _estimate(np.sqrt(mse)), "mae": _estimate(mae)}
    if ranges is not None:
        found["nrmse"] = _estimate(np.sqrt(relative))
    clean = "clean_" if against == "clean" else ""
    return {f"{clean}{name}{after}": estimate for name, estimate in found.items()}


def noise(table: HiddenTable) -> dict[str, Estimate]:
    """``noise_mse``: what no model can go below for long, if the clean values are known."""
    if table.clean is None:
        return {}
    knowing = replace(table, predicted=table.clean)
    return {"noise_mse": errors(knowing)["mse"]}


def coverage(table: HiddenTable) -> dict[str, Estimate]:
    """``coverage_95``: how often a value lies where the model says that 95 % of them do."""
    if table.std is None:
        return {}
    inside = np.abs(table.predicted.astype(np.float64) - table.true) <= 1.96 * table.std
    return {"coverage_95": _estimate(_means(table.series, [inside])[0])}


def by_group(
    table: HiddenTable, labels: NDArray[np.int64], names: tuple[str, ...]
) -> tuple[GroupErrors, ...]:
    """The errors by class.

    Args:
        labels: ``(N,)`` index into ``names`` of every series.
    """
    found = []
    slugs = _slugs(names)
    for k, name in enumerate(names):
        part = table.of(labels == k)
        if len(part.series) == 0:
            continue
        clean = errors(part, "clean").get("clean_mse")
        n_series = len(np.unique(part.series))
        found.append(
            GroupErrors(
                name=name,
                slug=slugs[name],
                n_series=n_series,
                mse=PartEstimate.of(errors(part)["mse"], n_series),
                clean_mse=None if clean is None else PartEstimate.of(clean, n_series),
            )
        )
    return tuple(found)


def _slugs(names: tuple[str, ...]) -> Mapping[str, str]:
    """Names as they may stand in names of metrics, all different."""
    slugs = [re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in names]
    twice = {slug for slug in slugs if slugs.count(slug) > 1 or not slug}
    return {
        name: f"{slug}_class{k}" if slug in twice else slug
        for k, (name, slug) in enumerate(zip(names, slugs, strict=True))
    }


def _means(series: NDArray[np.int64], values: list[NDArray[Any]]) -> list[Floats]:
    """For each of ``values (H, C)`` its mean per value, of all series and of R resamples: ``(1 + R,)``."""
    of, index = np.unique(series, return_inverse=True)
    columns = [np.bincount(index, v.sum(axis=1), minlength=len(of)) for v in values]
    counts = np.bincount(index, minlength=len(of)) * values[0].shape[1]
    sums = np.stack([*columns, counts], axis=1).astype(np.float64)  # (N, V + 1)
    drawn = np.concatenate([sums.sum(axis=0)[None], resample_sums(sums, N_BOOTSTRAP, seed=0)])
    return list((drawn[:, :-1] / drawn[:, -1:]).T)


def _estimate(numbers: Floats) -> Estimate:
    """Of the value, followed by its resamples."""
    return estimated(numbers[:1], numbers[1:])

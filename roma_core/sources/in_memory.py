"""Series in memory, as scikit-learn's users have them: arrays, tuples and frames as tables of numbers.

:mod:`roma_core.estimators` says what ``X`` may be.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils import check_array

from roma_core.data.layout import pivot

Floats = NDArray[np.float64]
Table = tuple[Floats, Floats]
"""Times ``(m,)`` and values ``(m, C)`` of one series."""


def is_path(X: Any) -> bool:
    return isinstance(X, str | os.PathLike)


def series_of(X: Any) -> list[Any]:
    """An entry per series; of a 3-D array ``(m, C)``."""
    if hasattr(X, "columns") or is_path(X):
        raise ValueError(
            f"X must be a list of series or an array, got one {type(X).__name__}; pass a frame for each "
            f"series: [frame for _, frame in table.groupby('id')]"
        )
    array = X if issparse(X) or isinstance(X, list | tuple) else np.asarray(X)
    if isinstance(array, list | tuple) or (array.ndim == 1 and array.dtype == object):
        if not len(array):
            raise ValueError("X holds no series, expected one or more")
        return list(array)
    array = check_array(
        array, allow_nd=True, dtype=np.float64, ensure_all_finite="allow-nan", input_name="X"
    )
    if array.ndim > 3:
        raise ValueError(f"X must be of shape (n, channels, times), got {array.shape}")
    return list(array.transpose(0, 2, 1) if array.ndim == 3 else array)


def tables_of(
    X: Any, axis: str = "time", known: Sequence[str] = ()
) -> tuple[list[Table], list[str]]:
    """A copy of every series, with the same channels, and their names.

    ``axis``: column of the times in frames; ``known``: the channels to expect, in their order.

    Raises:
        ValueError: an entry is no series, or has other channels; the text names it.
    """
    read = [_read(one, axis, f"X[{i}]") for i, one in enumerate(series_of(X))]
    channels = list(known) or list(
        dict.fromkeys(name for *_, names in read for name in names or ())
    )
    channels = channels or [f"c{k + 1:02d}" for k in range(read[0][1].shape[1])]
    tables = []
    for i, (times, values, names) in enumerate(read):
        names = channels if names is None else names
        if not set(names) <= set(channels) or values.shape[1] != len(names):
            got = f"{values.shape[1]} channels" if names is channels else f"the channels {names}"
            raise ValueError(
                f"X[{i}] has {got}, expected {channels}; arrays in a list are (times, channels): pass x.T "
                f"of one that is (channels, times)"
            )
        full = np.full((len(times), len(channels)), np.nan)
        full[:, [channels.index(name) for name in names]] = values
        tables.append((times, full))
    return tables, channels


def _read(one: Any, axis: str, where: str) -> tuple[Floats, Floats, list[str] | None]:
    """Times, values and, of a frame, names of channels of an entry of X."""
    times: Any = None
    if hasattr(one, "columns"):
        columns = {str(name): one[name] for name in one.columns}
        if axis not in columns or len(columns) < 2:
            raise ValueError(
                f"{where} has the columns {list(columns)}, expected {axis!r} and one per channel, or "
                f"{axis!r}, 'channel' and 'value'"
            )
        times = _numbers(columns.pop(axis), where)
        if columns.keys() == {"channel", "value"}:
            words = [str(word) for word in np.asarray(columns["channel"]).tolist()]
            if {"None", "nan", "<NA>"} & {*words}:
                raise ValueError(f"{where} has a row without a channel; leave it out")
            names, index = np.unique(words, return_inverse=True)
            single = _numbers(columns["value"], where).astype(np.float32)[:, None]
            positions, joint, _ = pivot(np.column_stack([times, index]), single, len(names))
            return positions[:, 0], joint.astype(np.float64), names.tolist()
        values = np.stack([_numbers(x, f"{where}: {n}") for n, x in columns.items()], axis=1)
        return times, values, list(columns)
    if isinstance(one, tuple) and len(one) == 2:
        times, one = one
    values = _numbers(one, where)
    values = values[:, None] if values.ndim == 1 else values
    times = np.arange(len(values), dtype=np.float64) if times is None else _numbers(times, where)
    if values.ndim != 2 or times.shape != values.shape[:1]:
        raise ValueError(
            f"{where} has times of shape {times.shape} and values of shape {values.shape}, expected (m,) "
            f"and (m, channels)"
        )
    return times, values, None


def _numbers(column: Any, where: str) -> Floats:
    if str(getattr(column, "dtype", "")).startswith("datetime64"):
        column = np.asarray(column, "datetime64[us]")  # in UTC, also of a time zone
    array = np.asarray(column.to_numpy() if hasattr(column, "to_numpy") else column)
    if array.dtype.kind == "M":
        seconds = array.astype("datetime64[us]").astype(np.int64) / 1e6
        return np.where(np.isnat(array), np.nan, seconds)
    try:
        if array.dtype.kind not in "biufO" or not array.ndim:
            raise ValueError(f"{array.dtype} of shape {array.shape}")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} must hold numbers, NaN where one is missing; got {error}"
        ) from None


def with_values(one: Any, table: Table, channels: list[str]) -> Any:
    """An entry of X with the filled values of its table."""
    values = table[1]
    if isinstance(one, tuple):
        return one[0], values
    if not hasattr(one, "columns"):
        return values.reshape(np.shape(one))
    columns = {n: values[:, channels.index(str(n))] for n in one.columns if str(n) in channels}
    if not columns:
        raise ValueError("transform fills frames with a column per channel; pivot those of values")
    if hasattr(one, "assign"):  # pandas
        return one.assign(**columns)
    return one.with_columns(type(one)(columns).get_columns())

"""Series of a stored data set as a consumer of the served model would send them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from roma_core.data.store import Subset


def raw_series(subset: Subset, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Chosen rows of a split as delivered, neither normalised nor anchored.

    Yields:
        ``id``, ``positions`` (axis name → numbers), ``values`` (channel name → numbers) and
        ``units``: the fields of :class:`roma_core.serving.schema.Series`.
    """
    dataset = subset.dataset
    units = dataset.schema.units
    for row in rows:
        i = int(subset.indices[row])
        positions, values = dataset.raw(i)
        yield {
            "id": dataset.ids[i],
            "positions": {
                a.name: positions[:, k].tolist() for k, a in enumerate(dataset.schema.axes)
            },
            "values": {
                c.name: values[:, k].tolist() for k, c in enumerate(dataset.schema.channels)
            },
            "units": units,
        }

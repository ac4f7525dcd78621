"""Leaving whole observations out, so that regular data becomes irregular.

Which ones is a pure function of (seed, object id, number of observations): every model sees the
same holes, whatever the order, the split or the computer.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from roma_core.data.errors import DataError
from roma_core.hashing import hash_ints, hash_text


def n_dropped(n_observations: int, rate: float) -> int:
    """How many of a series' observations go: ⌊rate · n⌋, which always leaves at least one.

    Raises:
        ValueError: ``rate`` is not in ``[0, 1)``.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop rate must be in [0, 1), got {rate}")
    n = math.floor(rate * n_observations + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return min(n, n_observations - 1)


def kept(n_observations: int, rate: float, seed: int, object_id: str) -> NDArray[np.bool_]:
    """Which observations stay: ``(N,)`` bool, False for exactly ``n_dropped(N, rate)`` of them.

    Every choice of that many observations is equally likely. All channels of an observation go or
    stay together.
    """
    n = n_dropped(n_observations, rate)
    noise = hash_ints(seed, hash_text(object_id), np.arange(n_observations))  # (N,)
    stays = np.ones(n_observations, dtype=bool)
    stays[np.argsort(noise, kind="stable")[:n]] = False
    return stays


def assert_dropped(rate: float, lengths_before: NDArray[np.int64], n_after: int) -> int:
    """The number of observations left out of a whole data set, checked.

    Args:
        rate: the drop rate asked for.
        lengths_before: ``(n_series,)`` lengths as delivered.
        n_after: observations that are left.

    Raises:
        DataError: another number is gone than the rate demands, or the rate demands a drop and the
            series are too short for it to take anything.
    """
    gone = int(lengths_before.sum()) - n_after
    demanded = sum(n_dropped(int(n), rate) for n in lengths_before) if rate > 0 else 0
    if gone != demanded:
        raise DataError(f"a drop of {rate:.0%} should take {demanded} observations, it took {gone}")
    if rate > 0 and gone == 0:
        raise DataError(
            f"a drop of {rate:.0%} takes nothing: the longest series has {lengths_before.max()} "
            f"observations; set drop_rate to 0 or use longer series"
        )
    return gone

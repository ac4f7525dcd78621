"""Where series lie among an encoder's features, and how far others are from there; needs no torch.

The profile holds the median and the spread of every feature over training series. The distance of
others is the root mean square, over the features, of the shift of the median in spreads, less what
chance alone gives for so few series: one far series moves no median, and no single feature decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

_QUARTILES_OF_NORMAL = 1.349  # their distance, in standard deviations
_CHANCE = np.pi / 2  # variance of the median of n normal numbers, times n


class EmbeddingProfile(BaseModel):
    """Features of the series that an encoder was trained on, D numbers each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_series: int = Field(gt=0)
    center: tuple[float, ...] = Field(description="Median of every feature.")
    spread: tuple[float, ...] = Field(
        description="Distance of its quartiles in those of a normal distribution of deviation 1."
    )


def embedding_profile(features: NDArray[Any]) -> EmbeddingProfile:
    """The profile of features ``(n, D)``."""
    low, center, high = np.quantile(features.astype(np.float64), (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / _QUARTILES_OF_NORMAL
    return EmbeddingProfile(
        n_series=len(features), center=tuple(center.tolist()), spread=tuple(spread.tolist())
    )


def embedding_distance(profile: EmbeddingProfile, center: Sequence[float], n: int) -> float:
    """How far the medians ``center`` of n other series are from the profile's, in spreads.

    A feature that hardly varies is measured by a thousandth of the largest spread at least.

    Raises:
        ValueError: there are as many medians as another encoder has features.
    """
    if len(center) != len(profile.center):
        raise ValueError(
            f"the profile is of {len(profile.center)} features, these series have {len(center)}: "
            f"they were embedded by another encoder"
        )
    if n < 1 or not np.isfinite(center).all():
        raise ValueError(f"the features of {n} recent series have no finite medians")
    spread = np.array(profile.spread)
    spread = np.maximum(spread, max(spread.max() * 1e-3, np.finfo(np.float32).eps))
    shift = (np.array(center) - np.array(profile.center)) / spread
    chance = _CHANCE * (1 / profile.n_series + 1 / n)
    return float(np.sqrt(max(0.0, float((shift**2).mean()) - chance)))

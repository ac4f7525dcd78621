"""Generated series: a recipe, a number and a seed.

A set of more series begins with the same series, so it grows like delivered data; no two series
share their draws, whichever splits they go to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from roma_core.data.sources.protocol import RawSeries, SourceConfig
from roma_core.data.sources.recipes import RECIPES

_AT_ONCE = 256


class GeneratedConfig(SourceConfig):
    """Series of one recipe of ``recipes.py``."""

    kind: Literal["generated"] = "generated"
    recipe: Literal["pendulum", "positions", "rbf", "sines", "spirals"]
    n_series: int = Field(gt=0)
    seed: int = Field(0, ge=0)
    noise: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Standard deviation of the noise on the values of spirals, rbf and sines; null: 0.1.",
    )
    citation: str = "generated after the recipes of arXiv:2505.20535"
    licence: str = "generated; free of rights"

    @model_validator(mode="after")
    def _noise_can_be_chosen(self) -> Self:
        if self.noise is not None and RECIPES[self.recipe].noise is None:
            choose = ", ".join(name for name, recipe in RECIPES.items() if recipe.noise is not None)
            raise ValueError(
                f"the noise of {self.recipe} cannot be chosen; leave noise out, or take {choose}"
            )
        return self

    def open(self, cache: Path) -> GeneratedSource:
        return GeneratedSource(self)


class GeneratedSource:
    """The series of one recipe."""

    files: Mapping[str, str] = {}

    def __init__(self, config: GeneratedConfig) -> None:
        self.config, self.recipe = config, RECIPES[config.recipe]
        self.axes, self.channels = self.recipe.axes, self.recipe.channels
        self.classes, self.targets = self.recipe.classes, self.recipe.targets
        self.citation, self.licence = config.citation, config.licence

    def __length_hint__(self) -> int:
        return self.config.n_series

    def read(self) -> Iterator[RawSeries]:
        """Every series; series k depends on the recipe, the seed and k alone."""
        n, noise = self.config.n_series, self.config.noise
        for start in range(0, n, _AT_ONCE):
            generator = np.random.default_rng([self.config.seed, start])
            drawn = self.recipe.draw(generator, _AT_ONCE, *(() if noise is None else (noise,)))
            for k in range(min(_AT_ONCE, n - start)):
                yield RawSeries(
                    id=f"{self.config.recipe}-{start + k:07d}",
                    positions=drawn.positions[k],
                    values=drawn.values[k],
                    targets=None if drawn.targets is None else drawn.targets[k],
                    label=None if drawn.labels is None else self.classes[drawn.labels[k]],
                )

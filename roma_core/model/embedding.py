"""A token's numbers, its category and its neighbours → the input of the encoder; CLS and covariates."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.config import NEIGHBOUR_FEATURES, RoMAConfig
from roma_core.model.encoder import initialise

_BIAS_STD = 0.02
_EMBEDDING_STD = 0.5  # beside a projection of unit spread


class Projection(nn.Linear):
    """``(…, P)`` → ``(…, d)``: linear with bias, as published, plus ``n_features`` of SiLU."""

    def __init__(self, n_numbers: int, width: int, n_features: int) -> None:
        super().__init__(n_numbers, width)
        self.features = self.mix = None
        if n_features:
            self.features = nn.Linear(n_numbers, n_features)
            self.mix = nn.Linear(n_features, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        linear = super().forward(x)
        if self.features is None or self.mix is None:
            return linear
        return linear + self.mix(F.silu(self.features(x)))

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the initial weights."""
        initialise(self)
        if self.features is None:
            # without a bias a series of zeros would stay zero, where the slope of a norm is 1/√eps:
            # the product of a few such slopes overflows float32
            nn.init.normal_(self.bias, std=_BIAS_STD)
        else:
            _initialise_features(self.features)


@torch.no_grad()
def _initialise_features(features: nn.Linear) -> None:
    """Inputs have about unit spread, their products with these weights 1.4; biases of unit spread
    put the bends of SiLU all over that range."""
    nn.init.normal_(features.weight, std=math.sqrt(2 / features.in_features))
    nn.init.normal_(features.bias)


def with_observed_flags(tokens: Tensor) -> Tensor:
    """``(…, P)`` with NaN where missing → ``(…, 2 P)``: numbers, 0 where missing, then 1 if observed."""
    missing = tokens.isnan()
    return torch.cat((tokens.masked_fill(missing, 0), (~missing).to(tokens.dtype)), dim=-1)


def in_order(positions: Tensor, series: Tensor) -> Tensor:
    """``(T,)`` rows by series, then by position, the first axis first."""
    order = torch.arange(positions.shape[0], device=positions.device)
    for key in (*reversed(positions.unbind(1)), series):
        order = order[key[order].argsort(stable=True)]
    return order


def interpolated(tokens: Tensor, positions: Tensor, series: Tensor) -> Tensor:
    """``(T, 2 P)`` numbers and flags, ``(T, D)``, ``(T,)`` → the same, with missing numbers filled in.

    A token thereby holds what is known of every channel at its time, and its flags say what was observed.
    """
    order = in_order(positions, series)
    numbers, flags = tokens[order].chunk(2, dim=1)
    numbers = filled(numbers, flags, positions[order, :1], series[order][:, None])
    result = torch.cat((numbers, flags), dim=1)
    return torch.zeros_like(result).index_copy(0, order, result)


def filled(numbers: Tensor, flags: Tensor, time: Tensor, series: Tensor) -> Tensor:
    """``(T, P)`` numbers in order, with those of flag 0 filled in; times and series are ``(T, 1)``.

    On a straight line between the nearest observed numbers of the same channel and series; with the
    nearest one outside of them, and with 0 where a series has none.
    """
    rows = torch.arange(time.shape[0], device=time.device)[:, None]
    last = rows.max()
    before = torch.where(flags > 0, rows, -1).cummax(0).values
    after = torch.where(flags > 0, rows, last + 1).flip(0).cummin(0).values.flip(0)
    at, to = before.clamp(min=0), after.clamp(max=last)
    has_before = (at == before) & (series[at, 0] == series)
    has_after = (to == after) & (series[to, 0] == series)
    past, coming = time - time[at, 0], time[to, 0] - time
    share = past / (past + coming).clamp(min=torch.finfo(past.dtype).tiny)
    share = torch.where(has_before, share, 1.0).where(has_after, torch.zeros_like(share))
    share = share.to(numbers.dtype)
    result = numbers.gather(0, at) * (1 - share) + numbers.gather(0, to) * share
    return result.masked_fill(~(has_before | has_after), 0)


class CategoryEmbedding(nn.Module):
    """A learned vector for every category of every axis that has some, added to a token.

    It says what a token is about: its channel, its band, its sensor.
    """

    def __init__(self, axis_categories: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.axes = [axis for axis, size in enumerate(axis_categories) if size]
        self.tables = nn.ModuleList(nn.Embedding(axis_categories[a], width) for a in self.axes)

    def initialise(self) -> None:
        """Draw the initial weights."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=_EMBEDDING_STD)

    def forward(self, positions: Tensor) -> Tensor:
        """``(…, D)`` positions, on these axes indices of categories → ``(…, d)``."""
        tables = zip(self.axes, self.tables, strict=True)
        return sum(table(positions[..., axis].long()) for axis, table in tables)


class CovariateEmbedding(nn.Module):
    """Covariates of a series → a token each: a vector, for a number plus its multiple of another."""

    offsets: Tensor  # (K,) int64, the row of each covariate's 'missing'
    is_number: Tensor  # (K,) bool

    def __init__(self, sizes: tuple[int, ...], width: int) -> None:
        """``sizes``: categories of each covariate, 0 for a number."""
        super().__init__()
        # 'missing', then the number or the categories
        n_rows = [1 + max(1, size) for size in sizes]
        offsets = torch.tensor([sum(n_rows[:k]) for k in range(len(sizes))])
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("is_number", torch.tensor([size == 0 for size in sizes]), False)
        self.table = nn.Embedding(sum(n_rows), width)
        self.slope = nn.Parameter(torch.empty(len(sizes), width))

    def initialise(self) -> None:
        """Draw the initial weights."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=_EMBEDDING_STD)

    def forward(self, covariates: Tensor) -> Tensor:
        """``(B, K)`` numbers and indices of categories, NaN where missing → ``(B, K, d)``."""
        missing = covariates.isnan()
        known = covariates.masked_fill(missing, 0)
        codes = torch.where(self.is_number, 0, known.long()) + 1
        rows = self.table(self.offsets + codes.masked_fill(missing, 0))
        numbers = torch.where(self.is_number, known, 0).to(rows.dtype)
        return rows + numbers[..., None] * self.slope


def token_vectors(model: Any, tokens: Tensor, positions: Tensor, series: Tensor) -> Tensor:
    """``(…, P)`` with NaN where missing, ``(…, D)``, ``(…,)`` int64, each token's series → ``(…, d)``.

    The series have to be told apart only where the model looks at neighbours. Tokens of another category
    count as of another series there.
    """
    config, dtype = model.config, model.projection.weight.dtype
    if config.missing_values:
        tokens = with_observed_flags(tokens)
    neighbours: Tensor | float = 0.0
    if model.neighbourhood is not None:
        # of positions: sizes of other tensors are other numbers to an exported program
        shape = positions.shape[:-1]
        at = positions
        if any(sizes := config.axis_categories):
            at = torch.stack([positions[..., axis] for axis in config.rotary_axes], dim=-1)
            for axis, size in enumerate(sizes):
                series = series * size + positions[..., axis].long() if size else series
        at, series, flat = at.flatten(0, -2), series.flatten(), tokens.flatten(0, -2)
        if config.missing_values:
            flat = interpolated(flat, at, series)
            tokens = flat.unflatten(0, shape)
        neighbours = model.neighbourhood(flat, at, series).unflatten(0, shape).to(dtype)
    x = model.projection(tokens).to(dtype) + neighbours
    if model.categories is not None:
        x = x + model.categories(positions)
    return x


def prefix_tokens(model: Any, n_series: int, covariates: Tensor | None) -> Tensor | None:
    """``(B, R, d)``: CLS, then the tokens of ``(B, K)`` covariates; None if the model has neither."""
    rows = []
    if model.cls is not None:
        cls = model.cls if model.sinusoidal is None else model.cls + model.sinusoidal.table[0]
        rows.append(cls.expand(n_series, 1, -1))
    if model.covariates is not None:
        rows.append(model.covariates(covariates).to(model.projection.weight.dtype))
    return torch.cat(rows, dim=1) if rows else None


class Neighbourhood(nn.Module):
    """Differences of a token from those around it, as features to be added to its projection.

    From few labelled series attention learns late or never to find a token's neighbours. Here every
    token has from the start its differences in value and position from the tokens 1, 2, 4, 8, … before
    and after it, as in dilated convolutions. Only tokens that the encoder sees take part, ordered by
    position, the first axis first.
    ``python -m tests.benchmarks.results neighbours`` measures the gain.
    """

    offsets: Tensor  # (K,) int64, relative to the token

    def __init__(self, config: RoMAConfig) -> None:
        """For 2^0, …, 2^(neighbours - 1) tokens on either side, K in all."""
        super().__init__()
        ahead = [2**k for k in range(config.neighbours)]
        offsets = torch.tensor([*(-offset for offset in ahead), *ahead])
        self.register_buffer("offsets", offsets, persistent=False)
        n_numbers = config.n_inputs
        n_inputs = n_numbers + 2 * config.neighbours * (n_numbers + len(config.rotary_axes) + 1)
        self.features = nn.Linear(n_inputs, NEIGHBOUR_FEATURES)
        self.mix = nn.Linear(NEIGHBOUR_FEATURES, config.encoder_config.d_model, bias=False)

    def initialise(self) -> None:
        """Draw the initial weights that differ from those of other layers."""
        _initialise_features(self.features)

    def forward(self, tokens: Tensor, positions: Tensor, series: Tensor) -> Tensor:
        """``(T, P)``, ``(T, D)`` and ``(T,)`` int64, the series of each token → ``(T, d)``."""
        order = in_order(positions, series)
        inputs = self._inputs(tokens[order], positions[order], series[order])
        found = self.mix(F.silu(self.features(inputs)))
        return torch.zeros_like(found).index_copy(0, order, found)  # back in the caller's order

    def _inputs(self, tokens: Tensor, positions: Tensor, series: Tensor) -> Tensor:
        """``(T, P + K (P + D + 1))``: the token, and for each offset both differences and a 1.

        All three are 0 where the series ends before that offset.
        """
        n = tokens.shape[0]
        wanted = torch.arange(n, device=tokens.device)[:, None] + self.offsets  # (T, K)
        there = wanted.clamp(0, n - 1)
        exists = (wanted == there) & (series[there] == series[:, None])
        values = tokens[there] - tokens[:, None]
        differences = torch.cat(
            (
                values,
                # asinh resolves gaps of days and of years alike
                torch.asinh(positions[there] - positions[:, None]).to(tokens.dtype),
                tokens.new_ones(n, len(self.offsets), 1),
            ),
            dim=2,
        )
        differences = differences.masked_fill(~exists[..., None], 0)
        return torch.cat((tokens, differences.flatten(1)), dim=1)


EMBEDDINGS = (Projection, CategoryEmbedding, CovariateEmbedding, Neighbourhood)
"""Layers with an initialisation of their own, ``initialise()``."""

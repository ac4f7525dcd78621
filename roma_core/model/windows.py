"""Windows of a regular grid: convolutions over single steps, then one token for every few of them.

A dense series has its information in the shape of many small steps. Attention over single steps is slow
and finds shapes late; a window of p steps, described by convolutions over its own and its neighbours'
steps, is a token that has a shape. Steps that were not observed are interpolated and flagged, so that a
series with gaps stays one. Numbers are given as they are and relative to their series' mean and spread.
Windows follow from positions alone: data sets, masks, queries and requests keep single observations.

Shapes:  T observations   W windows   S = W · p steps   C channels   f features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.config import RoMAConfig
from roma_core.model.embedding import filled

_KERNEL = 7  # steps that a convolution sees
_MOMENTUM = 0.1  # of the running statistics
_FLAT = 1e-7  # smaller deviations within a series are not enlarged
_MAX_GAP = 8  # windows; a longer gap ends a convolution


@dataclass(frozen=True)
class Windows:
    """The windows that hold an observation: series after series, by time in each."""

    of_row: Tensor  # (T,) int64, the window of each observation, in the caller's order
    series: Tensor  # (W,) int64
    positions: Tensor  # (W, 1) float32, of their middle


@dataclass(frozen=True)
class _Steps:
    """All steps of some windows, of those in short gaps between them, and blank ones between series."""

    inputs: Tensor  # (S, 3C): numbers, the same in the scale of their series, and 1 where observed
    inside: Tensor  # (S,), 1 between the first and the last observation of the series, else 0
    observed: Tensor  # (W,) int64, the windows that hold an observation among those of the steps


@dataclass(frozen=True)
class _Rows:
    """Observations, series after series and by time in each."""

    order: Tensor  # (T,) int64, row of the caller
    series: Tensor  # (T,) int64
    time: Tensor  # (T,)
    index: Tensor  # (T,) int64, on the grid
    first: Tensor  # (T,) int64, row where the series begins
    last: Tensor  # (T,) int64, row where it ends
    window: Tensor  # (T,) int64
    head: Tensor  # (W,) int64, row where a window begins


def steps_of(time: Tensor, first: Tensor, step: float) -> Tensor:
    """``(T,)`` int64: the index of each time on the grid, which the ``(T,)`` first of its series lies on."""
    # a quarter: most grids begin at a multiple of the step, or half a step from one
    start = (first / step + 0.25).floor()
    return (((time - first) / step).round() + start).long()


def window_of(positions: Tensor, series: Tensor, n_series: int, config: RoMAConfig) -> Tensor:
    """``(T,)`` int64: the number of the window of each ``(T, 1)`` position on the grid of its series."""
    assert config.grid_step is not None
    time = positions[:, 0]
    least = time.new_full((n_series,), torch.inf).scatter_reduce(0, series, time, "amin")
    index = steps_of(time, least[series], config.grid_step)
    return index.div(config.window, rounding_mode="floor")


def _moments(numbers: Tensor, flags: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """``(T, C)`` float64 twice, in each series' ``first`` row: mean and deviation of its observed numbers."""
    exact, seen = numbers.double(), flags.double()
    zeros = torch.zeros_like(exact)
    count = zeros.index_add(0, first, seen).clamp(min=1)
    mean = zeros.index_add(0, first, exact) / count
    squares = ((exact - mean[first]) * seen).square()
    return mean, (zeros.index_add(0, first, squares) / count).sqrt().clamp(min=_FLAT)


def _runs(inside: Tensor) -> list[int]:
    """Lengths of the runs of zeros and ones in turn, of which the first is of zeros and may be empty."""
    kinds, counts = (inside > 0).unique_consecutive(return_counts=True)
    return [0] * int(kinds[0].item()) + counts.tolist()


class BatchNorm(nn.Module):
    """Batch normalisation of ``(f, S)`` steps; sums are in float32 whatever the steps' type."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(f, S)`` → ``(f, S)``; running statistics are those of training batches."""
        learns = self.training and x.shape[1] > 1  # one step has no variance
        running = self.mean, self.variance
        return F.batch_norm(x[None], *running, self.weight, self.bias, learns, _MOMENTUM)[0]


class Stem(nn.Module):
    """Observations on a grid → features of windows of ``config.window`` steps.

    Residual convolutions over single steps with batch normalisation, as the networks of Wang, Yan and
    Oates (2017, arXiv:1611.06455) have them, each reaching twice as far as the one before, then the mean
    over a window. Gaps of up to 8 windows are interpolated; beyond longer ones, and beyond the ends of a
    series, a convolution finds zeros. All steps lie in one row, series after series.
    """

    def __init__(self, config: RoMAConfig) -> None:
        super().__init__()
        assert config.grid_step is not None
        self.window, self.step, width = config.window, config.grid_step, config.stem_width
        dilations = [1, *(2**k for k in range(config.stem_layers))]
        sizes = [3 * config.n_channels] + [width] * config.stem_layers
        self.convolutions = nn.ModuleList(
            nn.Conv1d(size, width, _KERNEL, padding="same", dilation=dilation, bias=False)
            for size, dilation in zip(sizes, dilations, strict=True)
        )
        self.norms = nn.ModuleList(BatchNorm(width) for _ in sizes)
        # windows between two series, so that no convolution reaches from one into the other
        self.n_blank = -(-(_KERNEL // 2 * dilations[-1]) // self.window)

    def forward(self, tokens: Tensor, positions: Tensor, series: Tensor) -> tuple[Tensor, Windows]:
        """``(T, C)`` with NaN where missing, ``(T, 1)`` and ``(T,)`` int64, any order → ``(W, f)``."""
        steps, windows = self._gather(tokens, positions, series)
        x, inside = steps.inputs.T * steps.inside, steps.inside
        runs = _runs(inside) if self.training else None
        for n, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            found = convolution(x[None])[0]
            if runs is None:
                found = F.silu(norm(found)) * inside
            else:  # statistics are those of the steps inside, which are moved together
                found = F.silu(norm(torch.cat(found.split(runs, 1)[1::2], 1)))
                parts = [found.new_zeros(found.shape[0], size) for size in runs]
                parts[1::2] = found.split(runs[1::2], 1)
                found = torch.cat(parts, 1)
            found = found.to(tokens.dtype)  # under autocast the sum over layers stays in 32 bits
            x = x + found if n else found
        features = x.unflatten(1, (-1, self.window)).mean(2).T
        return features[steps.observed], windows

    def _gather(self, tokens: Tensor, positions: Tensor, series: Tensor) -> tuple[_Steps, Windows]:
        """Find the windows of all observations, and put the observations at their steps.

        Sizes that depend on the data are read on the host, which waits for a GPU.
        """
        rows = self._sort(positions[:, 0], series)
        head, window = rows.head, rows.window
        begin = rows.index[head].div(self.window, rounding_mode="floor") * self.window  # (W,)
        count, is_short = self._counts(rows, begin)
        observed = count.cumsum(0) - count
        n_all: Any = count.sum().item()
        torch._check(n_all >= head.shape[0])
        of_all = torch.arange(head.shape[0], device=head.device)
        of_all = of_all.repeat_interleave(count, output_size=n_all)
        nth = torch.arange(n_all, device=head.device) - observed[of_all]
        each = torch.arange(self.window, device=head.device)
        steps = (begin[of_all] + nth * self.window)[:, None] + each
        row = head[of_all]
        first, last = (rows.index[place[row], None] for place in (rows.first, rows.last))
        is_real = (nth == 0) | is_short[of_all]
        inside = (steps >= first) & (steps <= last) & is_real[:, None]

        values = tokens[rows.order]
        seen = (~values.isnan()).to(values.dtype)
        values = values.masked_fill(values.isnan(), 0)
        at = observed[window] * self.window + rows.index - begin[window]
        blank = values.new_zeros(n_all * self.window, values.shape[1])
        counts = blank.index_add(0, at, seen)
        numbers, flags = blank.index_add(0, at, values), (counts > 0).to(values.dtype)
        row = row.repeat_interleave(self.window)
        time = steps.flatten()[:, None].to(positions.dtype)
        numbers = filled(numbers / counts.clamp(min=1), flags, time, rows.series[row][:, None])
        mean, spread = (moment[rows.first[row]] for moment in _moments(values, seen, rows.first))
        own = ((numbers.double() - mean) / spread).to(values.dtype)
        middle = begin - rows.index[rows.first[head]] + (self.window - 1) / 2
        return _Steps(
            inputs=torch.cat((numbers, own, flags), dim=1),
            inside=inside.flatten().to(values.dtype),
            observed=observed,
        ), Windows(
            of_row=torch.zeros_like(window).index_copy(0, rows.order, window),
            series=rows.series[head],
            positions=(rows.time[rows.first[head]] + middle * self.step)[:, None],
        )

    def _sort(self, time: Tensor, series: Tensor) -> _Rows:
        """Sort observations and number their windows."""
        order = time.argsort(stable=True)
        order = order[series[order].argsort(stable=True)]
        series, time = series[order], time[order]
        n_rows = order.shape[0]
        rows = torch.arange(n_rows, device=order.device)
        is_new = F.pad(series[1:] != series[:-1], (1, 0), value=True)
        first = torch.where(is_new, rows, 0).cummax(0).values
        ends = torch.where(is_new.roll(-1), rows, n_rows)
        last = ends.flip(0).cummin(0).values.flip(0)
        index = steps_of(time, time[first], self.step)
        number = index.div(self.window, rounding_mode="floor")
        opens = is_new | F.pad(number[1:] != number[:-1], (1, 0), value=True)
        window = opens.cumsum(0) - 1
        n_windows: Any = window[-1].item() + 1  # a symbol while a program is exported
        torch._check(n_windows >= 1)
        torch._check(n_windows <= n_rows)
        head = rows.new_full((n_windows,), n_rows).scatter_reduce(0, window, rows, "amin")
        return _Rows(order, series, time, index, first, last, window, head)

    def _counts(self, rows: _Rows, begin: Tensor) -> tuple[Tensor, Tensor]:
        """``(W,)``: windows until the next observed one, and whether a short gap is between the two.

        Convolutions go on across short gaps, and find blanks after a long one or the end of a series.
        """
        series = rows.series[rows.head]
        same = F.pad(series[1:] == series[:-1], (0, 1), value=False)
        gap = F.pad(begin[1:] - begin[:-1], (0, 1), value=self.window)
        gap = gap.div(self.window, rounding_mode="floor")
        is_short = same & (gap <= _MAX_GAP)
        return torch.where(is_short, gap, 1 + self.n_blank), is_short

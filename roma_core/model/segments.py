"""Where the series of a packed row begin and end. Shapes: ``roma_core.model.packing``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class Segments:
    """Where each series lies in a packed row: series b owns rows ``offsets[b]:offsets[b + 1]``.

    Sizes are known on the host, so that no step waits for the device.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        self.device = torch.device(device)

    @property
    def count(self) -> int:
        """Series, B."""
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """Rows, T."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def sizes(self) -> Tensor:
        """``(B,)`` int64 lengths on the device."""
        return torch.tensor(self.lengths, dtype=torch.int64).to(self.device, non_blocking=True)

    @cached_property
    def offsets(self) -> Tensor:
        """``(B + 1,)`` int32 on the device."""
        starts = torch.tensor((0, *self.lengths), dtype=torch.int64).cumsum(0)
        return starts.to(torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def ids(self) -> Tensor:
        """``(T,)`` int64: the series each row belongs to."""
        series = torch.arange(self.count, device=self.device)
        return series.repeat_interleave(self.sizes, output_size=self.total)

    @cached_property
    def index_in_series(self) -> Tensor:
        """``(T,)`` int64: 0 for the first row of each series."""
        return torch.arange(self.total, device=self.device) - self.offsets[:-1].long()[self.ids]

    @cached_property
    def with_cls(self) -> ClsRows:
        """The same series with one row for CLS at the start of each."""
        segments = Segments([n + 1 for n in self.lengths], self.device)
        series = torch.arange(self.count, device=self.device)
        return ClsRows(
            segments=segments,
            cls_rows=self.offsets[:-1].long() + series,
            token_rows=torch.arange(self.total, device=self.device) + self.ids + 1,
        )

    def to(self, device: torch.device | str) -> Segments:
        return self if torch.device(device) == self.device else Segments(self.lengths, device)


@dataclass(frozen=True)
class ClsRows:
    """A packed row with room for CLS, and where the rows went."""

    segments: Segments
    cls_rows: Tensor  # (B,) int64
    token_rows: Tensor  # (T,) int64

"""The absolute variant: a sine table indexed by token order is added at the inputs.

Kept to reproduce published checkpoints, off-by-one included: with CLS the encoder's token n takes
row n + 1, the decoder's takes row n, and visible tokens are unmarked in the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roma_core.model.rotary import BASE


class SineTable(nn.Module):
    """``(max_len, width)`` table: even columns ``sin(n / 10000^(2i/w))``, odd ones the cosine."""

    def __init__(self, max_len: int, width: int) -> None:
        super().__init__()
        rates = BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(max_len, dtype=torch.float64)[:, None] * rates
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table for ``(T,)`` int64 token indices."""
        return self.table[index]

    def check_length(self, n_rows: int) -> None:
        """Raises ValueError if a series needs more rows than the table has."""
        if n_rows > self.table.shape[0]:
            raise ValueError(
                f"a series needs {n_rows} rows of the absolute table, which has max_len={self.table.shape[0]}; "
                f"raise max_len or use pos_encoding='ropend'"
            )

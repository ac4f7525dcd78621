"""What the pretraining model says about positions of anybody's choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roma_core.data.normalisation import Normaliser
from roma_core.data.schema import DataSchema


@dataclass(frozen=True)
class Reconstruction:
    """Predicted tubelets.

    Attributes:
        mean: ``(B, Q, P)`` float; the numbers of a tubelet run time, height, width, channel, the last
            one fastest: for tubelets of one step, ``(B, Q, C)``.
        std: likewise, the predicted standard deviation; None if the model predicts no variance.
    """

    mean: Tensor
    std: Tensor | None

    def denormalised(self, schema: DataSchema) -> Reconstruction:
        """The same in the units of the data; deviations to first order where a transform bends."""
        width, n_channels = self.mean.shape[-1], len(schema.channels)
        if width % n_channels:
            raise ValueError(
                f"tubelets of {width} numbers do not hold whole observations of {n_channels} channels"
            )
        normaliser = Normaliser(schema)

        def by_channel(x: Tensor) -> Tensor:
            return x.detach().float().cpu().unflatten(-1, (-1, n_channels))

        mean = torch.from_numpy(normaliser.denormalise(by_channel(self.mean).numpy()))
        std = None
        if self.std is not None:
            slope = torch.from_numpy(normaliser.slope(by_channel(self.mean).numpy()))
            std = (by_channel(self.std) * slope).flatten(-2)
        return Reconstruction(mean.flatten(-2), std)

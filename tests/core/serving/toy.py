"""A small network with the signature of a served classifier, and what belongs to it."""

import numpy as np
import torch
from safetensors.torch import save_file

from roma_core.schema import Channel, ChannelNormalisation, DataSchema, PositionAxis
from roma_core.serving.client import Series
from roma_core.serving.package import build_package

CLASSES = ("one", "two", "three")
SCHEMA = DataSchema(
    channels=(Channel(name="flux", unit="mJy"), Channel(name="ratio", unit="1")),
    axes=(
        PositionAxis(name="time", unit="d", anchor="first", scale=2.0),
        PositionAxis(name="band", unit="1", offset=1.0),
    ),
    classes=CLASSES,
    normalisation=(
        ChannelNormalisation(transform="arcsinh", transform_scale=3.0, mean=0.5, std=2.0),
        ChannelNormalisation(mean=-1.0, std=4.0),
    ),
)


class Toy(torch.nn.Module):
    """Mean over real tokens of a layer over values and positions, then a linear head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.token = torch.nn.Linear(4, 8)
        self.head = torch.nn.Linear(8, len(CLASSES))

    def forward(self, values, positions, valid):
        tokens = torch.tanh(self.token(torch.cat([values, positions], dim=-1)))
        weight = valid.unsqueeze(-1).to(tokens.dtype)
        return 5 * self.head((tokens * weight).sum(dim=1) / weight.sum(dim=1))


def exported(module):
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    dims = {0: batch, 1: length}
    example = (torch.randn(2, 5, 2), torch.randn(2, 5, 2), torch.ones(2, 5, dtype=torch.bool))
    return torch.export.export(module.eval(), example, dynamic_shapes=(dims, dims, dims))


def series(n, seed=0, **changes):
    rng = np.random.default_rng(seed)
    content = {
        "id": f"s{seed}",
        "positions": {"time": (60000 + rng.random(n)).tolist(), "band": rng.random(n).tolist()},
        "values": {"flux": rng.normal(size=n).tolist(), "ratio": rng.normal(size=n).tolist()},
        "units": {"time": "d", "flux": "mJy"},
    }
    return Series(**{**content, **changes})


class ToyOfTargets(Toy):
    """Two targets and their deviations in units: of the series, or of every observation."""

    def __init__(self, per_observation):
        super().__init__()
        self.per_observation = per_observation
        self.head = torch.nn.Linear(8, 4)

    def forward(self, values, positions, valid):
        if not self.per_observation:
            return super().forward(values, positions, valid)
        tokens = torch.nan_to_num(torch.cat([values, positions], dim=-1))
        return self.head(torch.tanh(self.token(tokens)))


def build_toy(folder, module=None, schema=SCHEMA, **options):
    """Write a package of the toy; returns the sha256 of its manifest."""
    module = module or Toy()
    weights = folder.parent / f"{folder.name}.safetensors"
    save_file(module.state_dict(), weights)
    golden = [series(n, seed=n) for n in range(1, 11)]
    facts = {"dataset_digest": "d1"}
    card = "# toy\n\nA *small* model."
    arguments = {"name": "toy", "card": card, "max_length": 50, "max_batch_tokens": 40, **options}
    return build_package(
        folder, exported(module), weights, {"d_model": 8}, schema, golden, facts, **arguments
    )

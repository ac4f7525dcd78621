"""Features of a data set's series, by the encoder as it was trained."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.data.store import StoredDataset, Subset
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import Collate, load

_MOST_SERIES = 2000  # of the splits that were trained on; more move no median


@torch.no_grad()
def features_of(
    encoder: RoMAForPreTraining, series: Subset, batch_size: int
) -> NDArray[np.float32]:
    """The mean of every series' tokens, all of them visible: ``(len(series), d)``."""
    parts = np.array_split(np.arange(len(series)), -(-len(series) // batch_size))
    collate = Collate(encoder.config, seed=0)
    found = np.empty((len(series), encoder.config.encoder_config.d_model), np.float32)
    for batch in load(series, [(0, part) for part in parts], collate, workers=0, pin=False):
        assert batch.indices is not None  # collate gave them
        found[batch.indices.numpy()] = encoder.embed(batch, pooling="mean").float().numpy()
    return found


def trained_on_features(
    encoder: RoMAForPreTraining, dataset: StoredDataset, batch_size: int
) -> NDArray[np.float32]:
    """Those of training and validation series, evenly spaced ones of many."""
    rows = np.concatenate([dataset.split(name).indices for name in ("train", "validation")])
    rows = rows[:: -(-len(rows) // _MOST_SERIES)]
    return features_of(encoder, Subset(dataset, rows), batch_size)

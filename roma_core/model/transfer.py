"""Which configuration a classifier gets from the folder it starts from. Imports no torch.

The shape comes from the checkpoint, the dropouts and the head from the wishes, else from the
environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from roma_core.model.config import EncoderConfig, RoMAForClassificationConfig
from roma_core.settings import SettingsError

_OWN_KEYS = ("schema_version", "class", "data_schema")
DROPOUTS = (
    "drop_path_rate",
    "hidden_drop_rate",
    "attn_proj_drop_rate",
    "attn_drop_rate",
    "pos_drop_rate",
)
SHAPE = (
    "value_features",
    "neighbours",
    "use_cls",
    "pos_encoding",
    "max_len",
    "tubelet_size",
    "n_channels",
    "n_pos_dims",
    "position_axes",
    "p_rope_val",
)
HEAD = ("head_drop_rate", "dim_output", "problem_type", "pooling")


def settings_of(document: dict[str, Any]) -> dict[str, Any]:
    """The configuration's fields in a ``model_config.json``; published ones know fewer."""
    return {"position_axes": [], "value_features": 0, "neighbours": 0} | {
        k: v for k, v in document.items() if k not in _OWN_KEYS
    }


def is_pretraining(document: dict[str, Any]) -> bool:
    """Whether a ``model_config.json`` is that of a pretraining model."""
    return "decoder_config" in document


def classifier_config(
    document: dict[str, Any], wishes: dict[str, Any], folder: Path
) -> RoMAForClassificationConfig:
    """Configuration of the classifier that starts from ``folder``.

    Args:
        document: the folder's ``model_config.json``, of a pretraining model or of a classifier.
        wishes: fields given by the caller. For a start from pretraining, fields not wished for
            come from the environment.

    Raises:
        SettingsError: a wish contradicts the checkpoint, or ``dim_output`` is missing.
    """
    stored = settings_of(document)
    stack = stored["encoder_config"]
    wished_dropouts = _dropouts_of(wishes.get("encoder_config", {}), stack)
    others = {k: v for k, v in wishes.items() if k != "encoder_config"}
    for name in SHAPE:
        wish = others.pop(name, stored[name])
        if (list(wish) if isinstance(wish, tuple) else wish) != stored[name]:
            raise SettingsError(
                f"{name}={wish} contradicts the checkpoint {folder}, which has {stored[name]}; leave it out"
            )
    if not is_pretraining(document):
        return RoMAForClassificationConfig.from_values(
            stored | {"encoder_config": stack | wished_dropouts} | others
        )
    asked = RoMAForClassificationConfig(**others)
    if asked.dim_output is None:
        raise SettingsError(
            "dim_output (the number of classes) is needed to start a classifier from a pretraining checkpoint: "
            "give it as a keyword or set ROMA_CLASSIFIER_DIM_OUTPUT"
        )
    shape = {k: v for k, v in stack.items() if k not in DROPOUTS}
    dropouts = {k: getattr(asked.encoder_config, k) for k in DROPOUTS} | wished_dropouts
    return RoMAForClassificationConfig.from_values(
        {name: stored[name] for name in SHAPE}
        | {"encoder_config": shape | dropouts}
        | {name: getattr(asked, name) for name in HEAD}
    )


def _dropouts_of(wish: EncoderConfig | dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    values = wish.model_dump(exclude_unset=True) if isinstance(wish, EncoderConfig) else dict(wish)
    for name, value in values.items():
        if name not in DROPOUTS and value != stored.get(name):
            raise SettingsError(
                f"encoder_config.{name}={value} contradicts the checkpoint, which has {stored.get(name)}; leave it out"
            )
    return {name: value for name, value in values.items() if name in DROPOUTS}

"""Configurations of the models, as saved beside the weights; field names are the published ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.files import read_json
from roma_core.schema import PositionAxis
from roma_core.settings import Frozen, RomaSettings, SettingsError

WEIGHTS = "model.safetensors"
CONFIG = "model_config.json"
SCHEMA_VERSION = 1
Rate = Annotated[float, Field(ge=0, lt=1)]
MaskStrategy = Literal["random", "value", "channel", "window", "block", "future"]
NEIGHBOUR_FEATURES = 64
"""Width of the features of a token's neighbours, with ``neighbours``."""

PRESETS: dict[str, dict[str, int]] = {
    "tiny-shallow": {"d_model": 180, "nhead": 3, "depth": 2},
    "tiny": {"d_model": 180, "nhead": 3, "depth": 12},
    "small": {"d_model": 432, "nhead": 6, "depth": 12},
    "base": {"d_model": 720, "nhead": 12, "depth": 12},
    "large": {"d_model": 960, "nhead": 16, "depth": 24},
}
"""Published sizes (RoMAE paper, section 4), by name without the ``RoMA-`` in front."""


def get_encoder_size(name: str) -> dict[str, int]:
    """Keyword arguments of :class:`EncoderConfig` for a published size such as ``RoMA-tiny``."""
    key = name.removeprefix("RoMAE-").removeprefix("RoMA-")
    if key not in PRESETS:
        raise ValueError(f"no encoder size {name!r}; there are {', '.join(PRESETS)}")
    return dict(PRESETS[key])


class EncoderConfig(Frozen):
    """Transformer stack; the encoder and the decoder each have one."""

    d_model: PositiveInt = Field(192, description="Token width.")
    nhead: PositiveInt = Field(3, description="Attention heads; each is d_model // nhead wide.")
    depth: int = Field(6, ge=0, description="Transformer blocks.")
    dim_feedforward: PositiveInt | None = None
    """Width inside the MLP; null takes round(mlp_ratio * d_model)."""
    mlp_ratio: PositiveFloat = Field(4.0, description="MLP width as a multiple of d_model.")
    layer_norm_eps: PositiveFloat = Field(1e-12, description="Added to RMSNorm's mean square.")
    drop_path_rate: Rate = 0.0
    """Probability to skip a branch, per series; grows from 0 to this with depth."""
    hidden_drop_rate: Rate = Field(0.0, description="Dropout after the MLP.")
    attn_proj_drop_rate: Rate = Field(0.0, description="Dropout after attention's output.")
    attn_drop_rate: Rate = Field(0.0, description="Dropout on attention probabilities.")
    pos_drop_rate: Rate = 0.0
    """Dropout on rotated queries and keys; in pretraining on inputs too."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published size, e.g. ``EncoderConfig.preset("tiny", drop_path_rate=0.1)``."""
        return cls(**{**get_encoder_size(name), **changes})

    @property
    def head_width(self) -> int:
        return self.d_model // self.nhead

    @property
    def mlp_width(self) -> int:
        return self.dim_feedforward or round(self.mlp_ratio * self.d_model)

    @model_validator(mode="after")
    def _head_has_a_pair_to_rotate(self) -> Self:
        if self.head_width < 2:
            raise ValueError(
                f"nhead={self.nhead} leaves heads of width {self.head_width}; rotation needs pairs: "
                f"use fewer heads or a larger d_model"
            )
        return self


class RoMAConfig(RomaSettings):
    """Fields that both models share."""

    encoder_config: EncoderConfig = EncoderConfig()
    """The encoder's stack."""
    tubelet_size: tuple[int, int, int] = (1, 1, 16)
    """Steps of time, height and width that one token covers."""
    n_channels: PositiveInt = 1
    """Channels of `values`."""
    n_pos_dims: PositiveInt = 3
    """Position axes: rows of `positions`."""
    position_axes: tuple[PositionAxis, ...] = ()
    """Name, unit, anchor, offset and scale of every axis, applied to positions in float64;
    empty takes them as they are. Stored data sets describe and apply their own."""
    axis_categories: tuple[NonNegativeInt, ...] = ()
    """For every position axis the number of its categories, of which each has a learned vector, or 0
    for a rotary axis; empty: all axes are rotary, as published."""
    missing_values: bool = False
    """Numbers of a token may be missing (NaN): each has a flag that says whether it was observed, and
    pretraining counts observed numbers only."""
    covariates: tuple[NonNegativeInt, ...] = ()
    """For every covariate of a series the number of its categories, or 0 for a number. Each is a token
    without position; it may be missing."""
    value_features: NonNegativeInt = 0
    """Nonlinear features of a token's numbers, added to their linear projection; 0: the
    projection alone, as published. 64 helps where a token holds few numbers."""
    neighbours: int = Field(0, ge=0, le=12)
    """Add to every token its differences from the tokens 1, 2, 4, … before and after it: 5
    reaches 16 tokens away. 0: none, as published. Meant for tokens of few numbers."""
    window: NonNegativeInt = 0
    """Steps of a regular grid that one token covers: convolutions describe the steps, and their mean is
    the token. 0: a token is one observation, as published. For long series whose observations lie on a
    grid of one axis; steps may be missing. It takes the place of neighbours and value_features."""
    grid_step: PositiveFloat | None = None
    """With window, the distance of two steps in the model's positions; data sets have their own."""
    stem_width: PositiveInt = 64
    """With window, features of a step."""
    stem_layers: NonNegativeInt = 5
    """With window, residual convolutions after the first; they reach 3, 6, 12, … steps to either side."""
    use_cls: bool = True
    """Prepend a learned token at position 0."""
    pos_encoding: Literal["ropend", "absolute"] = "ropend"
    """'ropend': continuous axial rotary; 'absolute': sine table by token order."""
    p_rope_val: float = Field(0.75, ge=0, le=1)
    """Fraction of channel pairs that rotate, the fastest ones."""
    max_len: PositiveInt = 1500
    """Rows of the absolute table; rotary ignores it."""
    head_drop_rate: Rate = 0.0
    """Dropout before the head."""

    @property
    def tubelet_width(self) -> int:
        """Numbers in one token, P."""
        time, height, width = self.tubelet_size
        return time * height * width * self.n_channels

    @property
    def n_inputs(self) -> int:
        """Numbers of a token as the projection takes them: with ``missing_values`` a flag each."""
        return self.tubelet_width * (2 if self.missing_values else 1)

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """Indices of the axes that rotate: all but those with categories."""
        sizes = self.axis_categories or (0,) * self.n_pos_dims
        return tuple(axis for axis, size in enumerate(sizes) if not size)

    @property
    def n_prefix(self) -> int:
        """Rows in front of each series' tokens: CLS and the covariates."""
        return int(self.use_cls) + len(self.covariates)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (found := next(self._contradictions(), None)) is not None:
            raise ValueError(found)
        return self

    def _contradictions(self) -> Iterator[str]:
        """A sentence for each field that contradicts another one."""
        size, window = self.tubelet_size, self.window
        if min(size) < 1:
            yield f"tubelet_size={size}: every side must be at least 1"
        if len(self.axis_categories) not in (0, self.n_pos_dims):
            axes = f"describes {len(self.axis_categories)} axes, but n_pos_dims={self.n_pos_dims}"
            yield f"axis_categories={self.axis_categories} {axes}"
        if not self.rotary_axes:
            yield "all axes have categories; at least one, such as time, must be rotary"
        if window and (self.n_pos_dims > 1 or self.axis_categories or tuple(size) != (1, 1, 1)):
            yield (
                f"window={window} needs observations on one axis, with tubelet_size=(1, 1, 1); these have "
                f"{self.n_pos_dims} axes and tubelet_size={size}: use window=0"
            )
        if window and self.grid_step is None:
            yield f"window={window} needs grid_step, the distance of two steps in the model's positions"
        is_absolute = self.pos_encoding == "absolute"
        if window and (self.neighbours or self.value_features or is_absolute):
            yield "window has convolutions in place of neighbours and value_features, which must be 0, and needs pos_encoding='ropend'"
        if is_absolute and (any(self.axis_categories) or self.covariates):
            yield "pos_encoding='absolute' reproduces published models, which have no categories or covariates; use 'ropend'"
        if len(self.position_axes) not in (0, self.n_pos_dims):
            names = f"{len(self.position_axes)} axes ({', '.join(axis.name for axis in self.position_axes)})"
            yield f"position_axes describes {names}, but n_pos_dims={self.n_pos_dims}"
        for name in ("encoder_config", "decoder_config"):
            stack: EncoderConfig | None = getattr(self, name, None)
            if stack is None:
                continue
            n_pairs, n_axes = stack.head_width // 2, len(self.rotary_axes)
            if not is_absolute and n_pairs < n_axes:
                heads = f"heads of width {stack.head_width} have {n_pairs} pairs of channels"
                yield f"{name}: {heads}, fewer than the {n_axes} rotary axes; use fewer heads or a larger d_model"
            if is_absolute and stack.d_model % 2:
                yield f"{name}: d_model={stack.d_model} is odd; the absolute table needs an even width"


class RoMAForPreTrainingConfig(RoMAConfig):
    """Everything the pretraining model depends on."""

    model_config = SettingsConfigDict(env_prefix="ROMA_PRETRAIN_")

    decoder_config: EncoderConfig = EncoderConfig(depth=2)
    """The decoder's stack."""
    mask_ratio: Rate = 0.75
    """Fraction of each series' tokens to hide; of its observed numbers, where single ones are hidden."""
    mask_ratio_max: Rate | None = None
    """Hide between mask_ratio and this fraction of each series' tokens, every count equally
    often; null: always mask_ratio."""
    mask_strategy: (
        MaskStrategy | Annotated[dict[MaskStrategy, PositiveFloat], Field(min_length=1)]
    ) = "random"
    """What is hidden together. 'random': single tokens; 'value': single numbers of tokens, with
    missing_values; 'channel': whole channels: with missing_values a channel's numbers in all tokens, else
    tokens of equal channel_axis; 'window': eighths of a series' time, all channels; 'block': one
    contiguous run; 'future': the last tokens. Or a mixture, as JSON with weights, of which each series
    draws one: {"random": 0.5, "channel": 0.25, "window": 0.25}."""
    channel_axis: NonNegativeInt | None = None
    """Position axis that holds the channel's index, for mask_strategy 'channel'; null: the last with
    categories, or none with missing_values."""
    predict_variance: bool = False
    """Predict a Gaussian for every hidden number, mean and variance, and train on its
    likelihood instead of the squared error."""
    normalize_targets: bool = False
    """Standardise every target tubelet by its own mean and deviation."""

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.normalize_targets and self.tubelet_width == 1:
            size = f"tubelet_size={self.tubelet_size} with n_channels={self.n_channels}"
            yield f"normalize_targets needs tubelets of at least 2 numbers; {size} has 1"
        if self.normalize_targets and self.missing_values:
            yield "normalize_targets needs whole tubelets; it excludes missing_values"
        if self.mask_ratio_max is not None and self.mask_ratio_max < self.mask_ratio:
            least = f"mask_ratio={self.mask_ratio}, where its range begins"
            yield f"mask_ratio_max={self.mask_ratio_max} is below {least}"
        axis = self.mask_axis
        is_known = self.missing_values if axis is None else axis < self.n_pos_dims
        if "channel" in self.mask_strategies and not is_known:
            yield (
                f"mask_strategy 'channel' needs channel_axis, the position axis (0…{self.n_pos_dims - 1}) that "
                f"holds the channel's index, got {axis}; or else tokens with missing_values"
            )
        if "value" in self.mask_strategies and not self.missing_values and self.tubelet_width > 1:
            yield (
                f"mask_strategy 'value' hides single numbers, which needs missing_values or tokens of one "
                f"number; these have {self.tubelet_width}, all observed: use 'random'"
            )

    @property
    def mask_axis(self) -> int | None:
        """``channel_axis``; without missing values, by default the last axis with categories."""
        if self.channel_axis is not None or self.missing_values:
            return self.channel_axis
        return max((axis for axis, size in enumerate(self.axis_categories) if size), default=None)

    @property
    def mask_strategies(self) -> dict[MaskStrategy, float]:
        """Weight of each strategy."""
        one = self.mask_strategy
        return one if isinstance(one, dict) else {one: 1.0}

    def hides_numbers(self, strategy: MaskStrategy) -> bool:
        """Whether a strategy hides numbers of a token and leaves others visible."""
        by_number = strategy == "value" or (strategy == "channel" and self.mask_axis is None)
        return self.missing_values and by_number

    @property
    def mask_fractions(self) -> tuple[Fraction, Fraction]:
        """Smallest and largest fraction to hide, as the exact decimals written, e.g. 3/10 for 0.3."""
        most = self.mask_ratio if self.mask_ratio_max is None else self.mask_ratio_max
        return _exact(self.mask_ratio), _exact(most)


@lru_cache
def _exact(ratio: float) -> Fraction:
    return Fraction(repr(ratio)).limit_denominator(1_000_000)


class RoMAForClassificationConfig(RoMAConfig):
    """Everything the classifier (or regressor) depends on."""

    model_config = SettingsConfigDict(env_prefix="ROMA_CLASSIFIER_")

    dim_output: PositiveInt | None = None
    """Classes, or regressed numbers; null lets the trainer count the classes of the training
    labels."""
    problem_type: Literal["classification", "regression"] = "classification"
    """Cross-entropy over classes, or mean squared error."""
    pooling: Literal["auto", "cls", "mean", "token"] = "auto"
    """What the head reads: the CLS token, the mean of the real tokens, or every token for an
    output each; 'auto' takes CLS if use_cls, else the mean, as published."""
    predict_variance: bool = False
    """Of a regression: predict a Gaussian for every number, mean and standard deviation, and train on
    its likelihood instead of the squared error."""
    target_scales: tuple[tuple[float, PositiveFloat], ...] = ()
    """Mean and standard deviation of every regressed number: outputs are in its units, the loss is of
    standardised numbers. A data set has those of its train split; empty: 0 and 1."""

    @property
    def pools(self) -> Literal["cls", "mean", "token"]:
        """``pooling`` with 'auto' resolved."""
        if self.pooling != "auto":
            return self.pooling
        return "cls" if self.use_cls else "mean"

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.pooling == "cls" and not self.use_cls:
            yield "pooling='cls' reads a token that use_cls=False leaves out"
        if self.predict_variance and self.problem_type != "regression":
            yield "predict_variance is for problem_type=regression; leave it out"
        if len(self.target_scales) not in (0, self.dim_output):
            n = f"{len(self.target_scales)} pairs, one for each of dim_output={self.dim_output} numbers"
            yield f"target_scales has {n} is needed"


DROPOUTS = tuple(name for name in EncoderConfig.model_fields if "drop" in name)
"""Fields of a stack that finetuning may change; its other fields are the checkpoint's."""
HEAD = ("head_drop_rate", "dim_output", "problem_type", "pooling", "predict_variance")
"""Fields of a classifier that are not of the checkpoint it starts from."""
SHAPE = tuple(n for n in RoMAConfig.model_fields if n not in (*HEAD, "encoder_config"))
"""Fields that a classifier takes over from the checkpoint."""
OF_PRETRAINING = tuple(RoMAForPreTrainingConfig.__annotations__.keys() - {"model_config"})
"""Fields that a classifier has not."""


def merged(
    before: Any, changes: Any, sections: Collection[str] = ("encoder_config", "decoder_config")
) -> Any:
    """``changes`` over ``before``, of sections field by field."""
    if not isinstance(before, Mapping) or not isinstance(changes, Mapping):
        return changes
    inner = {name: merged(before.get(name), changes[name]) for name in changes if name in sections}
    return {**before, **changes, **inner}


def check_files(folder: Path, *names: str) -> None:
    """Raise FileNotFoundError unless a folder of weights has these files."""
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; expected a folder with {WEIGHTS} and {CONFIG}: the "
                f"outputs/model of a run, or one of its checkpoints/step-…"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the ``model_config.json`` in a folder of weights.

    Raises:
        FileNotFoundError, ValueError: it is missing, or of another version.
    """
    check_files(folder, CONFIG)
    document = read_json(folder / CONFIG)
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has schema_version {version}, this software reads {SCHEMA_VERSION}"
        )
    return document


def stored_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The configuration's fields in a ``model_config.json``; published ones lack some."""
    own = ("schema_version", "class", "data_schema")
    defaults = {"position_axes": [], "value_features": 0, "neighbours": 0}
    defaults |= {"axis_categories": [], "missing_values": False, "covariates": []}
    defaults |= {"window": 0, "grid_step": None, "stem_width": 64, "stem_layers": 5}
    return defaults | {k: v for k, v in document.items() if k not in own}


def is_pretraining(document: dict[str, Any]) -> bool:
    """Whether a ``model_config.json`` is that of a pretraining model."""
    return "decoder_config" in document


def classifier_config(
    document: dict[str, Any], overrides: dict[str, Any], folder: Path
) -> RoMAForClassificationConfig:
    """Configuration of the classifier that starts from ``folder`` with this ``model_config.json``.

    For a start from pretraining, fields that ``overrides`` lack come from the environment.

    Raises:
        SettingsError: an override contradicts the checkpoint, or ``dim_output`` is missing.
    """
    stored = stored_fields(document)
    stack = stored["encoder_config"]
    given = overrides.get("encoder_config", {})
    if isinstance(given, EncoderConfig):
        given = given.model_dump(exclude_unset=True)
    others = {k: v for k, v in overrides.items() if k != "encoder_config"}
    fixed = [
        (f"encoder_config.{k}", v, stack.get(k)) for k, v in given.items() if k not in DROPOUTS
    ]
    fixed += [(k, others.pop(k), stored[k]) for k in SHAPE if k in others]
    for name, value, kept in fixed:
        if (list(value) if isinstance(value, tuple) else value) != kept:
            raise SettingsError(
                f"{name}={value} contradicts the checkpoint {folder}, which has {kept}; leave it out, or start from other weights"
            )
    dropouts = {k: v for k, v in given.items() if k in DROPOUTS}
    if not is_pretraining(document):
        return RoMAForClassificationConfig.from_values(
            stored | {"encoder_config": stack | dropouts} | others
        )
    # the checkpoint determines the window, too, so that of the environment does not count
    requested = RoMAForClassificationConfig(**others, window=0)
    if requested.dim_output is None:
        raise SettingsError(
            "dim_output (the number of classes) is needed to start a classifier from a pretraining checkpoint: "
            "give it as a keyword or set ROMA_CLASSIFIER_DIM_OUTPUT"
        )
    dropouts = {k: getattr(requested.encoder_config, k) for k in DROPOUTS} | dropouts
    return RoMAForClassificationConfig.from_values(
        {name: stored[name] for name in SHAPE}
        | {"encoder_config": stack | dropouts}
        | {name: getattr(requested, name) for name in (*HEAD, "target_scales")}
    )

"""Configuration of the trainer, with a mark on the settings that may change when a run resumes.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings

T = TypeVar("T")
Resumable = Annotated[T, Field(json_schema_extra={"resumable": True})]
"""Type of a setting that may change when a run resumes."""
MAX_THREADS = 8  # of a process that nobody gave a number: a guess, more than 2 were not measured


class TrainerConfig(RomaSettings):
    """How to train; the same for pretraining and finetuning. One step is one optimiser step.

    A ``Resumable`` field may change when a run resumes: order and masks of the samples and, up to
    rounding, the weights of every step are the same with any value of it.
    """

    model_config = SettingsConfigDict(env_prefix="ROMA_TRAINER_")

    # names of the published package
    base_lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    epochs: int = Field(100, gt=0)
    """Passes over the training set."""
    batch_size: Resumable[int] = Field(32, gt=0)
    """Series per process and micro-batch. Times processes times accumulation it is the global batch,
    frozen at the first start."""
    eval_every: Resumable[int] = Field(500, gt=0)
    """Steps between evaluations."""
    save_every: Resumable[int] = Field(500, gt=0)
    """Steps between checkpoints."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser."""
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the optimiser as JSON: betas, weight_decay, momentum, fused."""
    checkpoint_dir: Resumable[Path] = Path("checkpoints")
    """Folder of the run's checkpoints."""
    max_checkpoints: Resumable[int | None] = Field(4, ge=2)
    """Newest checkpoints to keep, at least 2; null keeps all."""
    num_dataset_workers: Resumable[int] = Field(0, ge=0)
    """Loader processes per training process."""
    run_name: Resumable[str | None] = None
    """Name at the trackers; null takes the folder's."""
    project_name: Resumable[str] = "RoMA"
    """Project at Weights & Biases."""
    entity_name: Resumable[str | None] = None
    """Entity at Weights & Biases."""
    log_wandb: Resumable[bool] = True
    """Log to Weights & Biases if it is configured (ROMA_WANDB_MODE)."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; null takes a tenth of all steps."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up, to the last step."""
    lr_scaling: bool = False
    """Multiply base_lr by the number of processes of the first start."""
    gradient_clip: float | None = Field(1.0, gt=0)
    """Maximum gradient norm; null: no clipping."""
    random_seed: int = 42
    """Seed of order, masks, dropout and initial weights."""

    # settings of this project
    tokens_per_batch: int | None = Field(None, gt=0)
    """Approximate tokens per process and micro-batch, with windows observations, in place of batch_size;
    series of similar length come together unless the model has `window`. null: batches of batch_size."""
    gradient_accumulation_steps: Resumable[int] = Field(1, gt=0)
    """Micro-batches per step."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = None
    """Precision of forward and backward. 'auto' is bf16 on GPUs from compute capability 8.0 and, for models
    with `window` or at least 128 wide, on CPUs with AMX (narrower ones were slower in 16 bits), else no.
    null takes the value of `accelerate launch`, else no."""
    sharding: Resumable[Literal["none", "fsdp"]] = "none"
    """'fsdp' shards weights, gradients and optimiser state over all processes (FSDP2), for a model
    that does not fit into one device; 'none' keeps a full copy in each."""
    compile: Resumable[bool] = False
    """Compile the token-wise parts of the blocks, which takes up to a minute; meant for GPUs. In bf16 on
    a CPU with AMX, a training step took up to 15 % less."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the exponential moving average (EMA) of the weights, for evaluation; null: off."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Fraction of each target spread evenly over all classes; classification only."""
    class_weights: Literal["inverse_frequency"] | list[float] | None = None
    """Weight of each class in the loss: 'inverse_frequency', or a JSON list in the order of the
    classes; scaled to a mean of 1 over the training series. Classification only."""
    freeze_encoder: bool = False
    """Train only the head (a linear probe); classification only."""
    layer_lr_decay: float | None = Field(None, gt=0, le=1)
    """Factor of the learning rate from each encoder block to the one before it; null: one rate."""
    encoder_lr_scale: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate of the encoder's blocks. 0.03 lets the convolutions of windows learn
    shapes before attention fits few series by heart."""
    best_metric: str = "eval/loss"
    """Evaluation metric by which checkpoints are ranked: eval/loss or, of a classifier, eval/accuracy,
    eval/balanced_accuracy, eval/macro_f1, eval/auroc or eval/average_precision, of a regressor eval/r2.
    An experiment sets its primary metric."""
    best_metric_mode: Literal["min", "max"] = "min"
    """Whether a small (min) or a large (max) best_metric is better."""
    keep_best: Resumable[int] = Field(1, ge=0)
    """Best checkpoints to keep in addition to the max_checkpoints newest."""
    final_weights: Resumable[Literal["last", "best"]] = "last"
    """Weights of the trained model: those of the last or of the best step."""
    early_stopping_patience: Resumable[int | None] = Field(None, gt=0)
    """Stop after this many evaluations in a row without a better best_metric; null: never."""
    early_stopping_min_delta: float = Field(0.0, ge=0)
    """Smallest change of best_metric that counts as an improvement."""
    augment_drop_rate: float = Field(0.0, ge=0, lt=1)
    """Drop up to this fraction of each training series' tokens, redrawn every epoch."""
    augment_crop_rate: float = Field(0.0, ge=0, lt=1)
    """Crop up to this fraction of each training series at its ends."""
    augment_crop_tokens: int | None = Field(None, gt=0)
    """Crop longer training series to this many consecutive tokens."""
    augment_channel_drop_rate: float = Field(0.0, ge=0, lt=1)
    """Set each channel of a training series to its mean with this probability; one is kept."""
    augment_unknown_rate: float = Field(0.05, ge=0, lt=1)
    """Take each category of a training series for 'unknown', on axes that have one, and each
    covariate for missing, with this probability, so that the model learns both."""
    augment_jitter_std: float = Field(0.0, ge=0)
    """Normal noise on training values, in standard deviations of the channel."""
    augment_jitter_position: float = Field(0.0, ge=0)
    """Normal noise on training positions of the first axis, in its scale."""
    log_every: Resumable[int] = Field(10, gt=0)
    """Steps between records of the training metrics."""
    threads: Resumable[int | None] = Field(None, gt=0)
    """Threads per process; null takes OMP_NUM_THREADS, which launchers set, else 1 on CPU."""
    heartbeat_interval_s: Resumable[float] = Field(5.0, gt=0)
    """Seconds between heartbeats."""
    background_checkpoints: Resumable[bool] = True
    """Write checkpoints in a background thread; false: training waits for them."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_false_to_yaml(cls, value: Any) -> Any:
        return "no" if value is False else value

    @field_validator("class_weights")
    @classmethod
    def _class_weights_are_finite(cls, value: Any) -> Any:
        if isinstance(value, list) and not all(0 <= weight < float("inf") for weight in value):
            raise ValueError(f"weights must be finite and not negative, got {value}")
        return value

    @model_validator(mode="after")
    def _settings_are_compatible(self) -> Self:
        allowed = {
            "adamw": {"betas", "weight_decay", "eps", "fused", "foreach", "amsgrad"},
            "sgd": {"momentum", "weight_decay", "nesterov", "dampening", "fused", "foreach"},
        }[self.optimizer]
        if unknown := set(self.optimizer_args) - allowed:
            raise ValueError(
                f"optimizer_args {sorted(unknown)} are not arguments of {self.optimizer}; "
                f"it takes {sorted(allowed)}"
            )
        if self.sharding == "fsdp" and self.optimizer == "sgd" and self.optimizer_args.get("fused"):
            raise ValueError(
                "sharding=fsdp needs SGD without its fused kernel, which does not support shards: "
                "leave fused out of optimizer_args, or use adamw"
            )
        if self.final_weights == "best" and self.keep_best == 0:
            raise ValueError("final_weights=best needs a best checkpoint: set keep_best above 0")
        return self

    @classmethod
    def resumable(cls) -> frozenset[str]:
        """Names of the settings that may change when a run resumes."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return frozenset(n for n, e in extras.items() if isinstance(e, dict) and e.get("resumable"))


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """``base_lr 0.001 → 0.5, epochs 4 → 5``: old and new value by name."""
    return ", ".join(f"{name} {then} → {now}" for name, (then, now) in changed.items())


def describe_resumable() -> str:
    return f"A resumed run may change only {', '.join(sorted(TrainerConfig.resumable()))}"

"""Configuration of the trainer. Imports no torch.

Which settings a run may change when it goes on. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings

RESUMABLE = frozenset(
    {
        # how a step is cut; the global batch stays that of the first start
        *("batch_size", "gradient_accumulation_steps", "sharding", "compile"),
        *("num_dataset_workers", "threads"),
        # when something is written or measured
        *(
            "eval_every",
            "save_every",
            "log_every",
            "heartbeat_interval_s",
            "background_checkpoints",
        ),
        *("checkpoint_dir", "max_checkpoints", "keep_best"),
        *("early_stopping_patience", "final_weights"),
        *("run_name", "project_name", "entity_name", "log_wandb"),
    }
)
"""Settings that a run may change when it goes on: order, masks and, up to rounding, the course of the
weights are the same with any value of them."""


def told(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """``base_lr 0.001 → 0.5, epochs 4 → 5``: old and new value by name."""
    return ", ".join(f"{name} {then} → {now}" for name, (then, now) in changed.items())


def what_may_change() -> str:
    return f"A run that goes on may change only {', '.join(sorted(RESUMABLE))}"


class TrainerConfig(RomaSettings):
    """How to train; the same for pretraining and finetuning. One step is one optimiser step."""

    model_config = SettingsConfigDict(env_prefix="ROMA_TRAINER_")

    # the published names
    base_lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    epochs: int = Field(100, gt=0, description="Passes over the training set.")
    batch_size: int = Field(
        32,
        gt=0,
        description="Series per process and micro-batch. Times processes times accumulation it is the "
        "global batch, frozen at the first start.",
    )
    eval_every: int = Field(500, gt=0, description="Steps between evaluations.")
    save_every: int = Field(500, gt=0, description="Steps between checkpoints.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimiser.")
    optimizer_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to the optimiser as JSON: betas, weight_decay, momentum, fused.",
    )
    checkpoint_dir: Path = Field(
        Path("checkpoints"), description="Folder of the run's checkpoints."
    )
    max_checkpoints: int | None = Field(
        4, ge=2, description="Newest checkpoints to keep, at least 2; None keeps all."
    )
    num_dataset_workers: int = Field(0, ge=0, description="Loader processes per training process.")
    run_name: str | None = Field(None, description="Name at the trackers; None takes the folder's.")
    project_name: str = Field("RoMA", description="Project at Weights & Biases.")
    entity_name: str | None = Field(None, description="Entity at Weights & Biases.")
    log_wandb: bool = Field(
        True, description="Log to Weights & Biases if it is configured (ROMA_WANDB_MODE)."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up; None takes a tenth of all steps."
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after the warm-up, to the last step."
    )
    lr_scaling: bool = Field(
        False, description="Multiply base_lr by the number of processes of the first start."
    )
    gradient_clip: float | None = Field(
        1.0, gt=0, description="Largest gradient norm; None: no limit."
    )
    random_seed: int = Field(42, description="Seed of order, masks, dropout and initial weights.")

    # ours
    tokens_per_batch: int | None = Field(
        None,
        gt=0,
        description="Tokens per process and micro-batch, about, instead of batch_size series; series "
        "of similar length go together. None counts series.",
    )
    gradient_accumulation_steps: int = Field(1, gt=0, description="Micro-batches per step.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        None,
        description="Number type of forward and backward; None takes what `accelerate launch` says, "
        "else no.",
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="'full' shares out weights, gradients and the optimiser's state over all processes "
        "(FSDP2), for a model that does not fit into one; 'none' keeps it whole in each. May change "
        "from one start to the next.",
    )
    compile: bool = Field(
        False,
        description="Compile the token-wise parts of every block; costs up to a minute at the start. "
        "Meant for GPUs; on CPU the kernels in use are as fast.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the averaged weights used for evaluation; None: off.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each target spread evenly over all classes; classification only.",
    )
    class_weights: Literal["inverse_frequency"] | list[float] | None = Field(
        None,
        description="Weight of each class in the loss: 'inverse_frequency', or a JSON list in the "
        "order of the classes; scaled to a mean of 1 over the training series. Classification only.",
    )
    freeze_encoder: bool = Field(
        False, description="Train the head alone (a linear probe); classification only."
    )
    layer_lr_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Each encoder block, counted from the head, learns this much slower than the one "
        "after it; None: all at the same rate.",
    )
    best_metric: str = Field(
        "eval/loss", description="Metric of an evaluation that says which checkpoint is the best."
    )
    best_metric_mode: Literal["min", "max"] = Field(
        "min", description="Whether a small (min) or a large (max) best_metric is good."
    )
    keep_best: int = Field(
        1, ge=0, description="Best checkpoints to keep besides the max_checkpoints newest."
    )
    final_weights: Literal["last", "best"] = Field(
        "last",
        description="Weights the trained model has at the end: of the last or the best step.",
    )
    early_stopping_patience: int | None = Field(
        None,
        gt=0,
        description="End after this many evaluations in a row without a better best_metric; None: "
        "never early.",
    )
    early_stopping_min_delta: float = Field(
        0.0, ge=0, description="Smallest change of best_metric that counts as better."
    )
    augment_drop_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Up to this share of each training series' tokens is left out, anew every epoch.",
    )
    augment_crop_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Up to this share of each training series is cut off at its ends.",
    )
    augment_crop_tokens: int | None = Field(
        None, gt=0, description="Longer training series are cut to this many consecutive tokens."
    )
    augment_channel_drop_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Each channel of a training series is set to its mean with this probability; one "
        "stays.",
    )
    augment_jitter_std: float = Field(
        0.0,
        ge=0,
        description="Normal noise on training values, in standard deviations of the channel.",
    )
    augment_jitter_position: float = Field(
        0.0,
        ge=0,
        description="Normal noise on training positions of the first axis, in its scale.",
    )
    log_every: int = Field(10, gt=0, description="Steps between records of the training loss.")
    threads: int | None = Field(
        None, gt=0, description="Threads per process; None takes 1 on CPU, the framework's on GPU."
    )
    heartbeat_interval_s: float = Field(5.0, gt=0, description="Seconds between heartbeats.")
    background_checkpoints: bool = Field(
        True, description="Write checkpoints beside the training; false: training waits for them."
    )

    @field_validator("class_weights")
    @classmethod
    def _weights_weigh(cls, value: Any) -> Any:
        if isinstance(value, list) and not all(0 <= weight < float("inf") for weight in value):
            raise ValueError(f"weights must be finite and not negative, got {value}")
        return value

    @model_validator(mode="after")
    def _optimizer_args_are_known(self) -> Self:
        allowed = {
            "adamw": {"betas", "weight_decay", "eps", "fused", "foreach", "amsgrad"},
            "sgd": {"momentum", "weight_decay", "nesterov", "dampening", "fused", "foreach"},
        }[self.optimizer]
        if unknown := set(self.optimizer_args) - allowed:
            raise ValueError(
                f"optimizer_args {sorted(unknown)} are not arguments of {self.optimizer}; "
                f"it takes {sorted(allowed)}"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_can_shard(self) -> Self:
        if self.sharding == "full" and self.optimizer == "sgd" and self.optimizer_args.get("fused"):
            raise ValueError(
                "sharding=full needs SGD without its fused kernel, which knows no shards: "
                "leave fused out of optimizer_args, or take adamw"
            )
        return self

    @model_validator(mode="after")
    def _best_weights_are_kept(self) -> Self:
        if self.final_weights == "best" and self.keep_best == 0:
            raise ValueError(
                "final_weights=best needs a best checkpoint: set keep_best to 1 or more"
            )
        return self

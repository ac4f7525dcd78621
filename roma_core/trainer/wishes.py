"""What is refused before the first step: wishes that model or data cannot fulfil, and other runs."""

from __future__ import annotations

from roma_core.model.classification import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import MapStyle
from roma_core.trainer.checkpoint import TrainState
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.evaluator import no_such_metric
from roma_core.trainer.may_change import MAY_CHANGE, told, what_may_change


def check_wishes(
    config: TrainerConfig,
    model: RoMAForPreTraining | RoMAForClassification,
    test_dataset: MapStyle | None,
    has_callback: bool,
) -> None:
    """Refuse what this model or these data cannot give.

    Raises:
        ValueError: naming the setting.
    """
    if config.freeze_encoder and isinstance(model, RoMAForPreTraining):
        raise ValueError(
            "freeze_encoder trains a classifier's head alone; pretraining would learn nothing: "
            "unset ROMA_TRAINER_FREEZE_ENCODER"
        )
    needs_evaluation = {
        "early_stopping_patience": config.early_stopping_patience is not None,
        "final_weights=best": config.final_weights == "best",
    }
    if test_dataset is None or len(test_dataset) == 0:
        for name in (n for n, wished in needs_evaluation.items() if wished):
            raise ValueError(f"{name} needs a test_dataset with series to evaluate on")
    elif not has_callback:
        known = ["eval/loss"]
        if isinstance(model, RoMAForClassification):
            judged = model.config.problem_type == "classification"
            known += ["eval/accuracy"] if judged else []
        if config.best_metric not in known:
            raise ValueError(no_such_metric(config.best_metric, known))


def check_same_run(
    state: TrainState, config: TrainerConfig, n_samples: int, total_steps: int
) -> None:
    """Refuse to continue from a checkpoint of another run.

    Raises:
        ValueError: naming what differs, and what may.
    """
    now = config.model_dump(mode="json")
    changed = {
        name: (state.settings[name], value)
        for name, value in now.items()
        if name not in MAY_CHANGE and name in state.settings and state.settings[name] != value
    }
    facts = {
        "random_seed": (state.seed, config.random_seed),
        "size of the training set": (state.n_samples, n_samples),
        "total steps (epochs)": (state.total_steps, total_steps),
    }
    changed |= {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    if changed:
        raise ValueError(
            f"{config.checkpoint_dir} belongs to another run: {told(changed)}; set it back, or give "
            f"another checkpoint_dir. {what_may_change()}"
        )

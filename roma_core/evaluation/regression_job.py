"""Evaluation of a regression of every observation, as a job.

outputs/predictions.parquet     test observations: what was true, what the model said
outputs/metrics.json
outputs/plots/*.png
outputs/report.html

There is no package: what is served tells the class of a whole series.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation.held_out import seen_in_training, tell, unseen
from roma_core.evaluation.job_config import EvaluationJobConfig
from roma_core.evaluation.page import Plot
from roma_core.evaluation.pictures import of_training
from roma_core.evaluation.regression_metrics import RegressionMetrics, evaluate_regression
from roma_core.evaluation.regression_plots import against_true, along_series, error_by_position
from roma_core.evaluation.regression_report import RegressionReport, render_regression_report
from roma_core.evaluation.regression_table import RegressionTable
from roma_core.files import write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.job_runner import Work
from roma_core.model.classification import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import Collate
from roma_core.trainer.evaluating import classify
from roma_core.trainer.progress import Progress

NOT_SERVED = (
    "No package was written: a served model tells the class of a whole series, and this one tells "
    "numbers of every observation."
)
_PLACES = (0.1, 0.5, 1.0)  # of the series that are drawn, among all from the best to the worst


def run_regression(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    model: RoMAForClassification,
    folder: JobFolder,
    attempt: Attempt,
) -> Work:
    """Evaluate a regressor on the test split.

    Raises:
        ValueError: it tells one output a series, or the data have no such targets, or no test series.
    """
    test = dataset.split("test")
    _refuse_others(config, dataset, model)
    out = folder.outputs
    (out / "plots").mkdir(parents=True, exist_ok=True)
    with Progress("evaluate", total_steps=3, first_step=0) as progress:
        attempt.beat(0)
        table = predict_targets(model, test, config.batch_size)
        table.save(out / "predictions.parquet")
        metrics = evaluate_regression(table)
        write_json(out / "metrics.json", metrics.model_dump(mode="json"))
        progress.update(1, {"mse": metrics.mse.value}, force=True)

        pictures = _pictures(config, dataset, table, metrics)
        for name, plot in pictures.items():
            write_bytes(out / "plots" / f"{name}.png", plot.png)
        progress.update(2, {}, force=True)

        leaks = seen_in_training(dataset, [Path(path) for path in config.trained_on])
        tell(leaks)
        page = _report(config, metrics, leaks, tuple(pictures.values()))
        write_bytes(out / "report.html", page.encode())
        progress.update(3, {}, force=True)
    print(NOT_SERVED, flush=True)
    places = {
        "predictions": "predictions.parquet",
        "metrics": "metrics.json",
        "plots": "plots",
        "report": "report.html",
    }
    return Work(
        "completed",
        metrics=metrics.flat(),
        outputs={name: f"outputs/{place}" for name, place in places.items()},
        facts={"n_series": len(test)},
    )


def _refuse_others(
    config: EvaluationJobConfig, dataset: StoredDataset, model: RoMAForClassification
) -> None:
    if model.config.pools != "token":
        raise ValueError(
            f"{config.classifier} tells one output a series (pooling={model.config.pools}), but the "
            f"targets of a data set belong to its observations; train with pooling=token"
        )
    if model.config.dim_output != len(dataset.schema.targets):
        raise ValueError(
            f"{config.classifier} tells {model.config.dim_output} numbers of every observation, and "
            f"{config.dataset} has {len(dataset.schema.targets)} targets; evaluate it on data like "
            f"those it was trained on"
        )
    if len(dataset.split("test")) == 0:
        raise ValueError(f"{config.dataset} has no test series to evaluate on")


def predict_targets(model: RoMAForClassification, test: Subset, batch_size: int) -> RegressionTable:
    """What a per-token regressor says of every observation of a split, beside what is true."""
    outputs = classify(model, test, Collate(model.config, seed=0), batch_size)
    assert outputs.labels is not None
    dataset = test.dataset
    return RegressionTable(
        ids=[dataset.ids[i] for i in test.indices],
        lengths=test.lengths,
        axes=dataset.schema.axes,
        positions=np.concatenate([dataset.raw(int(i))[0] for i in test.indices]),
        targets=dataset.schema.targets,
        true=outputs.labels.astype(np.float64),
        predicted=outputs.logits.astype(np.float64),
        lineage={"dataset_digest": dataset.manifest.digest},
    )


def _pictures(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    table: RegressionTable,
    metrics: RegressionMetrics,
) -> dict[str, Plot]:
    scaled = (table.errors**2 / table.true.var(axis=0).clip(1e-300)).mean(axis=1)  # (T,)
    order = (np.add.reduceat(scaled, table.starts) / table.lengths).argsort()  # the best first
    chosen = [int(order[round(place * (len(order) - 1))]) for place in _PLACES]
    encoder = None
    if config.autoencoder is not None:
        encoder = RoMAForPreTraining.from_pretrained(config.autoencoder).eval()
    return {
        "series": Plot(
            title="Along three series",
            caption="A test series that is predicted well (one in ten is better), one in the middle, "
            "and the worst of all.",
            alt="True and predicted targets over position, of three test series.",
            png=along_series(table, chosen),
            wide=True,
        ),
        "against_true": Plot(
            title="Predicted against true",
            caption="Observations of the test split; on the line a prediction is right.",
            alt="Predicted against true targets.",
            png=against_true(table),
        ),
        "by_position": Plot(
            title="Error against position",
            caption="Over observations at neighbouring positions, about equally many each.",
            alt="Root mean squared error against position.",
            png=error_by_position(metrics, table.axes[0]),
        ),
        **of_training(config, dataset, encoder),
    }


def _report(
    config: EvaluationJobConfig,
    metrics: RegressionMetrics,
    leaks: tuple[str, ...],
    pictures: tuple[Plot, ...],
) -> str:
    names = ", ".join(target.name for target in metrics.per_target)
    return render_regression_report(
        RegressionReport(
            title=f"Evaluation of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, as a regressor of {names} at every "
            f"observation, judged on {metrics.n_series} test series{unseen(leaks)}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            leaks=leaks,
            not_served=NOT_SERVED,
            plots=pictures,
            facts=config.facts,
            limits=(
                "Weights and settings were selected on the validation split.",
                "Intervals are percentile bootstraps over test series; they do not cover another "
                "training seed or another choice of test series.",
            ),
        )
    )

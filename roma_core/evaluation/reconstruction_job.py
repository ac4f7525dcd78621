"""Judging a pretraining model's reconstructions as a job, on test series it never saw.

outputs/reconstructions.parquet   every hidden observation, beside what the model said
outputs/metrics.json
outputs/plots/*.png
outputs/report.html
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation.config import Fact, FactSheet, ReconstructionJobConfig
from roma_core.evaluation.figures import draw_reconstructions
from roma_core.evaluation.leakage import seen_in_training, tell, unseen
from roma_core.evaluation.reconstruction import (
    HiddenTable,
    ReconstructionMetrics,
    all_but,
    as_trained,
    by_group,
    coverage,
    errors,
    interpolated,
    mean_of_train,
    noise,
    reconstruct,
)
from roma_core.evaluation.report import Plot, ReconstructionReport, render_reconstruction_report
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.run_job import Work
from roma_core.trainer.job import open_dataset
from roma_core.trainer.run_logger import Progress


def run_reconstruction(folder: JobFolder, attempt: Attempt) -> Work:
    """Judge as ``config.json`` says."""
    config = ReconstructionJobConfig.model_validate(read_json(folder.config, schema_version=1))
    torch.set_num_threads(1)
    dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
    test = dataset.split("test")
    if len(test) == 0:
        raise ValueError(f"{config.dataset} has no test series to judge reconstructions on")
    out = folder.outputs
    (out / "plots").mkdir(parents=True, exist_ok=True)
    with Progress("evaluate", total_steps=3, first_step=0) as progress:
        attempt.beat(0)
        model = RoMAForPreTraining.from_pretrained(config.autoencoder)
        table = reconstruct(model, test, as_trained(model.config, config.seed), config.batch_size)
        table.save(out / "reconstructions.parquet", test)
        attempt.beat(1)
        progress.update(1, {}, force=True)

        metrics = judged(table, dataset, test)
        for n in config.seen:
            fewer = reconstruct(model, test, all_but(n, config.seed), config.batch_size)
            metrics = beside(metrics, fewer, f"_seen_{n}")
        write_json(out / "metrics.json", metrics.document())
        attempt.beat(2)
        progress.update(2, {"mse": metrics.estimates["mse"].value}, force=True)

        floor = metrics.estimates.get("noise_mse")
        pictures = draw_reconstructions(table, test, metrics.groups, floor, config.curves)
        for name, plot in pictures.items():
            write_bytes(out / "plots" / f"{name}.png", plot.png)
        leaks = seen_in_training(dataset, [Path(path) for path in config.trained_on])
        tell(leaks)
        page = report(config, model, dataset, metrics, leaks, tuple(pictures.values()))
        write_bytes(out / "report.html", page.encode())
        progress.update(3, {}, force=True)
    return Work(
        "completed",
        metrics=metrics.flat(),
        outputs={
            "reconstructions": "outputs/reconstructions.parquet",
            "metrics": "outputs/metrics.json",
            "plots": "outputs/plots",
            "report": "outputs/report.html",
        },
        facts={"n_series": metrics.n_series},
    )


def judged(table: HiddenTable, dataset: StoredDataset, split: Subset) -> ReconstructionMetrics:
    """Every error of a table, beside those of the baselines on the same observations."""
    ranges = ranges_of(dataset.split("train"))
    found = noise(table) | coverage(table)
    found |= errors(table, "true", ranges) | errors(table, "clean", ranges)
    baselines = {"mean_": mean_of_train(table, split)}
    if len(dataset.schema.axes) == 1:
        baselines["linear_"] = interpolated(table, split)
    for name, baseline in baselines.items():
        own = errors(baseline) | errors(baseline, "clean")
        found |= {f"{name}{key}": own[key] for key in ("mse", "clean_mse") if key in own}
    labels, classes = dataset.labels, dataset.schema.classes
    return ReconstructionMetrics(
        n_series=len(np.unique(table.series)),
        n_hidden=len(table.series),
        mean_hidden_fraction=len(table.series) / int(split.lengths.sum()),
        estimates=found,
        groups=() if labels is None else by_group(table, labels[split.indices], classes),
    )


def beside(metrics: ReconstructionMetrics, table: HiddenTable, after: str) -> ReconstructionMetrics:
    """The metrics and, with ``after`` behind their names, the errors of another table."""
    more = errors(table, after=after) | errors(table, "clean", after=after)
    return metrics.model_copy(update={"estimates": metrics.estimates | more})


def ranges_of(train: Subset) -> NDArray[np.float64] | None:
    """``(C,)`` range of every channel over the train split; None if one never changes."""
    if len(train) == 0:
        return None
    ends = [
        (values.min(axis=0), values.max(axis=0))
        for values in (train.dataset.raw(int(i))[1] for i in train.indices)
    ]
    lows, highs = (np.array(column) for column in zip(*ends, strict=True))
    ranges = highs.max(axis=0).astype(np.float64) - lows.min(axis=0)
    return ranges if (ranges > 0).all() else None


def report(
    config: ReconstructionJobConfig,
    model: RoMAForPreTraining,
    dataset: StoredDataset,
    metrics: ReconstructionMetrics,
    leaks: tuple[str, ...],
    pictures: tuple[Plot, ...],
) -> str:
    """The HTML page."""
    stacks = {"encoder": model.config.encoder_config, "decoder": model.config.decoder_config}
    most, least = model.config.mask_ratio_max, model.config.mask_ratio
    facts = {
        "data": f"{dataset.manifest.name}, version {dataset.manifest.digest[:12]}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **{k: f"width {s.d_model}, {s.depth} layers, {s.nhead} heads" for k, s in stacks.items()},
        "hidden": f"{least:g} of each series" if most is None else f"{least:g} to {most:g}",
        "masks": f"{model.config.mask_strategy}, seed {config.seed}",
        "position scales": ", ".join(f"{a.name} {a.scale:g}" for a in dataset.schema.axes),
    }
    return render_reconstruction_report(
        ReconstructionReport(
            title=f"Reconstructions of {config.name}",
            summary="RoMA, the Rotary Masked Autoencoder, judged on hidden observations of "
            f"{metrics.n_series} test series{unseen(leaks)}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            seen=config.seen,
            leaks=leaks,
            plots=pictures,
            facts=(
                FactSheet(
                    title="Model and masks",
                    facts=tuple(Fact(label=k, value=v) for k, v in facts.items()),
                ),
            ),
            limits=(
                "Hidden values were overwritten before the model was asked.",
                "Intervals are percentile bootstraps over test series; they do not cover another "
                "training seed, other masks or another choice of test series.",
            ),
        )
    )

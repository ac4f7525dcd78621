"""Asset: predictions of the champion for a file of series, with drift against its training data."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.files import digest_of, fingerprint_of, read_json
from roma_pipelines.experiment import Experiment
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import picture, registry


def batch_predictions_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``batch_predictions``; a retry resumes, and nothing is made without a champion."""
    section = experiment.predictions
    assert section is not None

    @dg.asset(
        **experiment.asset_arguments("batch_predictions"),
        kinds={"parquet"},
        output_required=False,
        pool=f"predictions_{experiment.name}",  # concurrent runs would delete each other's parts
        description=f"Predictions of the champion for {section.input}. {experiment.description}",
    )
    def batch_predictions(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        import pyarrow.parquet as pq

        from roma_core.serving.batch import score_file
        from roma_core.serving.registry_client import fetch, load, package_of, resolve

        storage = Storage.open()
        source = Path(section.input).absolute()
        if not source.exists():
            raise dg.Failure(f"predictions.input: {source} does not exist")
        with registry(context) as client:
            champion = version_at(client, experiment.name, CHAMPION)
            if champion is None:
                context.log.warning(
                    f"{experiment.name} has no champion; promote a version, then materialise this "
                    f"asset again"
                )
                return
            version = resolve(client, f"models:/{experiment.name}/{champion}")
            folder = fetch(client, version, storage.cache / "models")
        digest = version.manifest_sha256 or ""
        model = {"model_version": version.version, "model_sha256": digest}
        run_id = context.run.root_run_id or context.run_id
        lineage = {"model": version.name, **model, "dagster_run_id": run_id}
        output = storage.root / "predictions" / experiment.name / f"{source.stem}.parquet"
        output.parent.mkdir(parents=True, exist_ok=True)
        package = load(folder)
        # before reading, so that a later change is detected
        delivered = fingerprint_of([source]).digest
        n = score_file(package, lineage, source, section.split, output)
        context.log.info(f"{version.uri} predicted {n} series")
        labels = pq.read_table(output, columns=["label"])["label"].value_counts()
        counts = {str(one["values"]): one["counts"].as_py() for one in labels}
        profile = read_json(package_of(folder) / "profile.json")
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(digest_of([digest, delivered, section.split])),
            metadata={
                "path": dg.MetadataValue.path(str(output)),
                "series": n,
                **model,
                "classes": dg.MetadataValue.json(dict(sorted(counts.items()))),
                **_drift(profile, source, section.split, package),
            },
        )

    return batch_predictions


def _drift(profile: Any, source: Path, split: str, package: Any) -> dict[str, Any]:
    """How far the first 2,000 series are from the training data, by every measure."""
    from roma_core.evaluation.drift import (
        LARGE_PSI,
        ReferenceProfile,
        drift_effects,
        sample_from_rows,
    )
    from roma_core.evaluation.plots import drift_figure
    from roma_core.serving.batch import read_series

    if not profile:
        return {"drift": "the model carries no profile of its training data"}
    reference = ReferenceProfile.model_validate(profile)
    rows = islice(read_series(source, split, package), 2000)
    covariates = getattr(package, "covariates", [])  # the code of the model may be older
    series = sample_from_rows(rows, package.axes, package.channels, covariates)
    found = drift_effects(reference, series)
    most = max((e for e in found if e.measure == "psi"), key=lambda e: e.size, default=None)
    if most is None:
        return {"drift": "nothing to compare"}
    sizes = {f"{e.quantity}, {e.measure}": round(e.size, 4) for e in found}
    return {
        "drift": picture(drift_figure(reference, series), "drift against the training data"),
        "drift_sizes": dg.MetadataValue.json(sizes),
        "largest_drift": f"{most.quantity}: {most.size:.3f} (above {LARGE_PSI} is large)",
    }

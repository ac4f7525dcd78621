"""Asset: the data set, versioned by its content."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.data.build import build_dataset
from roma_core.data.config import source_fingerprint
from roma_core.data.job import DatasetJobConfig, InspectedDataset, inspect_dataset
from roma_core.data.manifest import read_manifest
from roma_core.data.quality import findings_table
from roma_core.files import read_json
from roma_pipelines.automation.state import FINGERPRINT
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import job_folder
from roma_pipelines.launching.targets import roma_command
from roma_pipelines.pictures import picture
from roma_pipelines.resources import JobClient
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import of_this_run


def dataset_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``dataset`` with its profile and two checks."""
    key = experiment.key("dataset")

    @dg.asset(
        **experiment.asset_arguments("dataset"),
        kinds={"numpy"},
        description=f"Data set on disk, with splits and a profile. {experiment.description}",
        check_specs=[
            dg.AssetCheckSpec(
                "sound",
                asset=key,
                blocking=True,
                description="Files match their sha256, numbers are finite, no object, group or equal "
                "content is in two splits, and no object changed its split since the previous version.",
            ),
            dg.AssetCheckSpec(
                "unsuspicious",
                asset=key,
                description="No warnings: order, duplicates, lengths, outliers, sentinels, rare classes, "
                "empty splits, near duplicates across splits, drift against the previous version.",
            ),
        ],
    )
    def dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        resources = of_this_run(context, experiment).resources  # before anything is built
        storage, folder = Storage.open(), job_folder(context)
        if folder.config.exists():  # a retry adopts the job
            config = DatasetJobConfig.model_validate(read_json(folder.config))
            begun, now = (
                d.model_dump(mode="json") for d in (config.definition, experiment.dataset)
            )
            if begun != now:
                raise dg.Failure(
                    f"dataset of {experiment.name} changed since this run began to build it; start a new run",
                    allow_retries=False,
                )
        else:
            config = DatasetJobConfig(
                definition=experiment.dataset,
                # before the build, so that a change during it is detected later
                fingerprint=source_fingerprint(experiment.dataset).digest,
                root=str(storage.datasets.absolute()),
                cache=str(storage.cache.absolute()),
                working_folder=str(Path.cwd()),
            )
        of_job: dict[str, Any] = {}
        if resources.dataset is None:
            made = inspect_dataset(
                build_dataset(experiment.dataset, storage.datasets, storage.cache, progress=False)
            )
        else:
            resources = resources.of("dataset")
            client: JobClient = getattr(context.resources, resources.target)
            job = client.complete(
                context,
                folder,
                roma_command("data build", folder.path),
                config.model_dump(mode="json"),
                resources,
                profile=resources.profile,
                max_attempts=resources.max_attempts,
            )
            made = InspectedDataset.model_validate(read_json(job.output("dataset")))
            of_job = job.metadata()
        manifest = read_manifest(made.path)
        counts = {f"{split}_series": count.n_series for split, count in manifest.counts.items()}
        repairs = manifest.repairs.model_dump() if manifest.repairs else {}
        context.log.info(
            f"dataset: {sum(counts.values())} series, version {manifest.digest[:12]}, "
            f"{made.fraction_dropped:.0%} of observations dropped"
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.digest),
            metadata={
                "plot": picture(made.plot, "profile of the data set"),
                "profile": dg.MetadataValue.md(made.profile),
                "path": dg.MetadataValue.path(str(made.path)),
                "digest": manifest.digest,
                **counts,
                **{f"repaired_{name}": count for name, count in repairs.items() if count},
                "fraction_dropped": made.fraction_dropped,
                FINGERPRINT: config.fingerprint,
                "classes": len(manifest.data_schema.classes),
                "source": dg.MetadataValue.json(json.loads(manifest.provenance.source)),
                "citation": manifest.provenance.citation,
                "licence": manifest.provenance.licence,
                **of_job,
            },
            check_results=[
                _check("sound", dg.AssetCheckSeverity.ERROR, made),
                _check("unsuspicious", dg.AssetCheckSeverity.WARN, made),
            ],
        )

    return dataset


def _check(
    name: str, severity: dg.AssetCheckSeverity, made: InspectedDataset
) -> dg.AssetCheckResult:
    kind = "error" if severity is dg.AssetCheckSeverity.ERROR else "warning"
    these = [finding for finding in made.findings if finding.severity == kind]
    lines = [line for finding in these for line in finding.lines()]
    return dg.AssetCheckResult(
        passed=not these,
        check_name=name,
        severity=severity,
        metadata={
            "problems": sum(finding.count for finding in these),
            "first": "\n".join(lines[:20]) or "none",
            "findings": dg.MetadataValue.md(findings_table(these)),
            "compared_with": made.compared_with,
        },
    )

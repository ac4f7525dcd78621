"""Asset: the data set, versioned by its content."""

import json
from pathlib import Path

import dagster as dg

from roma_core.data.build import build_dataset
from roma_core.data.config import source_fingerprint
from roma_core.data.profile import plot_profile, profile_dataset
from roma_core.data.quality import (
    Finding,
    check_dataset,
    compare_versions,
    findings_table,
    previous_version,
)
from roma_core.data.store import StoredDataset
from roma_pipelines.automation.state import FINGERPRINT
from roma_pipelines.experiment import Experiment
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import of_this_run, picture


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
        of_this_run(context, experiment)  # a wrong run config fails before anything is built
        storage = Storage.open()
        # before the build, so that a change during it is detected later
        fingerprint = source_fingerprint(experiment.dataset).digest
        path = build_dataset(experiment.dataset, storage.datasets, storage.cache, progress=False)
        found = check_dataset(path)
        stored = StoredDataset(path, verify=False)
        before = previous_version(path)
        if before is not None and not any(f.severity == "error" for f in found):
            found += compare_versions(stored, StoredDataset(before))
        profile = profile_dataset(stored)
        manifest = stored.manifest
        counts = {f"{split}_series": count.n_series for split, count in manifest.counts.items()}
        repairs = manifest.repairs.model_dump() if manifest.repairs else {}
        context.log.info(
            f"dataset: {len(stored)} series, version {manifest.digest[:12]}, "
            f"{profile.fraction_dropped:.0%} of observations dropped"
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.digest),
            metadata={
                "plot": picture(plot_profile(profile, stored), "profile of the data set"),
                "profile": dg.MetadataValue.md(profile.to_markdown()),
                "path": dg.MetadataValue.path(str(path)),
                "digest": manifest.digest,
                **counts,
                **{f"repaired_{name}": count for name, count in repairs.items() if count},
                "fraction_dropped": profile.fraction_dropped,
                FINGERPRINT: fingerprint,
                "classes": len(stored.schema.classes),
                "source": dg.MetadataValue.json(json.loads(manifest.provenance.source)),
                "citation": manifest.provenance.citation,
                "licence": manifest.provenance.licence,
            },
            check_results=[
                _check("sound", dg.AssetCheckSeverity.ERROR, found, before),
                _check("unsuspicious", dg.AssetCheckSeverity.WARN, found, before),
            ],
        )

    return dataset


def _check(
    name: str, severity: dg.AssetCheckSeverity, found: list[Finding], before: Path | None
) -> dg.AssetCheckResult:
    kind = "error" if severity is dg.AssetCheckSeverity.ERROR else "warning"
    these = [finding for finding in found if finding.severity == kind]
    lines = [line for finding in these for line in finding.lines()]
    return dg.AssetCheckResult(
        passed=not these,
        check_name=name,
        severity=severity,
        metadata={
            "problems": sum(finding.count for finding in these),
            "first": "\n".join(lines[:20]) or "none",
            "findings": dg.MetadataValue.md(findings_table(these)),
            "compared_with": before.name if before else "no previous version",
        },
    )

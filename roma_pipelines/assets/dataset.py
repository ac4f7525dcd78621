"""Asset: the data set, versioned by its content."""

import json

import dagster as dg

from roma_core.data.building import build_dataset
from roma_core.data.checks import problems
from roma_core.data.profile import as_markdown, plot_profile, profile_of
from roma_core.data.store import StoredDataset
from roma_pipelines.experiment import Experiment
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import picture


def dataset_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The data set of an experiment, with its profile and a blocking check of its content."""
    key = experiment.key("dataset")

    @dg.asset(
        **experiment.asset_arguments("dataset", settings={"dataset"}),
        kinds={"numpy"},
        description=f"Irregular series on disk, split and profiled. {experiment.description}",
        check_specs=[
            dg.AssetCheckSpec(
                "sound",
                asset=key,
                blocking=True,
                description="Files match their sha256, numbers are finite, no object or equal "
                "content is in two splits.",
            )
        ],
    )
    def dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        storage = Storage.open()
        path = build_dataset(experiment.dataset, storage.datasets, storage.cache, progress=False)
        found = problems(path)
        stored = StoredDataset(path, verify=False)
        profile = profile_of(stored)
        manifest = stored.manifest
        counts = {f"{split}_series": count.n_series for split, count in manifest.counts.items()}
        context.log.info(
            f"dataset: {len(stored)} series, version {manifest.digest[:12]}, "
            f"{profile.share_dropped:.0%} of observations dropped"
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.digest),
            metadata={
                "plot": picture(plot_profile(profile, stored), "profile of the data set"),
                "profile": dg.MetadataValue.md(as_markdown(profile)),
                "path": dg.MetadataValue.path(str(path)),
                "digest": manifest.digest,
                **counts,
                "share_dropped": profile.share_dropped,
                "classes": len(stored.schema.classes),
                "source": dg.MetadataValue.json(json.loads(manifest.provenance.source)),
                "citation": manifest.provenance.citation,
                "licence": manifest.provenance.licence,
            },
            check_results=[
                dg.AssetCheckResult(
                    passed=not found,
                    check_name="sound",
                    metadata={"problems": len(found), "first": "\n".join(found[:20]) or "none"},
                )
            ],
        )

    return dataset

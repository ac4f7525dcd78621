"""A data set with what its checks and its profile say, made as a job or in the caller's process."""

from __future__ import annotations

from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from roma_core.data.build import build_dataset
from roma_core.data.config import DatasetConfig
from roma_core.data.profile import plot_profile, profile_dataset
from roma_core.data.quality import Finding, check_dataset
from roma_core.data.store import StoredDataset
from roma_core.data.versions import compare_versions, previous_version
from roma_core.files import read_json, write_json
from roma_core.job import Attempt, Interrupted, JobFolder, StopRequests
from roma_core.progress import Progress
from roma_core.run_job import Work
from roma_core.settings import Frozen


class InspectedDataset(Frozen):
    """A built data set, and what its checks and its profile say."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    path: Path
    compared_with: str  # name of the previous version
    findings: tuple[Finding, ...]
    fraction_dropped: float  # of the delivered observations
    profile: str  # Markdown
    plot: bytes  # PNG


def inspect_dataset(path: Path) -> InspectedDataset:
    """Check a built data set, compare it with the previous version, profile and plot it."""
    found = check_dataset(path)
    stored = StoredDataset(path, verify=False)
    before = previous_version(path)
    if before is not None and not any(f.severity == "error" for f in found):
        found += compare_versions(stored, StoredDataset(before))
    profile = profile_dataset(stored)
    return InspectedDataset(
        path=path,
        compared_with=before.name if before else "no previous version",
        findings=tuple(found),
        fraction_dropped=profile.fraction_dropped,
        profile=profile.to_markdown(),
        plot=plot_profile(profile, stored),
    )


class DatasetJobConfig(Frozen):
    """The frozen configuration of a job that builds a data set."""

    schema_version: Literal[1] = 1
    definition: DatasetConfig
    fingerprint: str  # of the source before the build, so that a change during it is detected later
    root: str  # folder of data sets
    cache: str
    working_folder: str  # where relative paths of the data set begin


def run_dataset_job(folder: JobFolder, attempt: Attempt) -> Work:
    """Build, check and profile a data set; a further attempt resumes the build, or does what follows it."""
    config = DatasetJobConfig.model_validate(read_json(folder.config, schema_version=1))
    folder.outputs.mkdir(parents=True, exist_ok=True)
    record = folder.outputs / "built.json"
    shown = Progress(f"building {config.definition.name}", unit="series")
    with StopRequests(attempt.stop) as requests, attempt.beating() as advanced, shown:

        def stop() -> bool:
            advanced.set()  # it reads, or waits for another build
            return requests.requested()

        if not record.exists():
            where = Path(config.root), Path(config.cache)
            try:
                # in a pod it may be missing, and paths are absolute
                here = Path(config.working_folder)
                with chdir(here) if here.is_dir() else nullcontext():
                    path = build_dataset(
                        config.definition, *where, shown, stop, folder.mark_checkpoint
                    )
            except Interrupted:
                return Work("continue", reason=requests.reason)
            write_json(record, {"schema_version": 1, "path": str(path)})
        shown.say("the data set is built; checking it")
        made = inspect_dataset(Path(read_json(record)["path"]))
    write_json(folder.outputs / "dataset.json", made.model_dump(mode="json"))
    return Work("completed", outputs={"dataset": "outputs/dataset.json"})

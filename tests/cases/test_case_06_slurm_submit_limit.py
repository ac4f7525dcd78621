"""A submit limit and a controller that restarts pass: the attempt waits, and is submitted later."""

import os

import pytest

from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Rejected, Unreachable
from roma_pipelines.launching.slurm.launcher import SlurmLauncher
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import JobSpec

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = FAILED + (
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
SPEC = JobSpec(key="0123456789abcdef0124", command=("-m", "x"), config_digest="0")


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Submits an attempt to an sbatch that refuses it with these words."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def submit(words, attempt):
        (tmp_path / "words").write_text(words)
        sbatch = tmp_path / "bin" / "sbatch"
        sbatch.write_text(f"#!/bin/bash\ncat '{tmp_path}/words' >&2\nexit 1\n")
        sbatch.chmod(0o755)
        launcher = SlurmLauncher(SlurmProfile(name="s"), tmp_path / "clusters")
        folder = JobFolder(tmp_path / "jobs" / SPEC.key)
        launcher.submit(launcher.plan(SPEC, folder, attempt), {})

    return submit


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\n" + POLICY,
        "sbatch: error: AssocMaxSubmitJobLimit\n" + POLICY,
        "sbatch: error: AssocGrpSubmitJobsLimit\n" + POLICY,
        FAILED + "Unexpected message received",
        FAILED + "Slurm backup controller in standby mode",
        FAILED + "Job cannot be submitted without the DB",
        FAILED + "Unable to connect to database",
        FAILED + "Socket timed out on send/recv operation",
        FAILED + "Unable to contact slurm controller (connect failure)",
        FAILED + "Zero Bytes were transmitted or received",
        FAILED + "Protocol authentication error",
        FAILED + "Invalid authentication credential",
        FAILED + "Resource temporarily unavailable",
        FAILED + "I/O error writing script/environment to file",
        FAILED + "Required partition not available (inactive or drain)",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n"
        + FAILED + "Slurm controller is shutting down",
    ],
)  # fmt: skip
def test_a_passing_state_is_asked_again(submit, words, attempt):
    with pytest.raises(Unreachable, match="sbatch"):
        submit(words, attempt)


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize(
    "words",
    [
        FAILED + "Invalid account or account/partition combination specified",
        FAILED + "Requested node configuration is not available",
        FAILED + "Invalid generic resource (gres) specification",
        FAILED + "Requested time limit is invalid (missing or exceeds some limit)",
        "sbatch: error: invalid partition: x\n" + FAILED + "Invalid partition name specified",
        "NOTICE: scratch communication maintenance\n" + FAILED + "Invalid partition name specified",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n"
        + FAILED + "Invalid qos specification\nretry later, or ask about your authentication",
        "sbatch: error: Unable to open file /database/retry/job.sh",
    ],
)  # fmt: skip
def test_what_would_be_refused_again_ends_the_job(submit, words, attempt):
    with pytest.raises(Rejected, match="sbatch"):
        submit(words, attempt)


def test_a_policy_without_its_name_passes_if_it_took_the_job_before(submit):
    with pytest.raises(Rejected, match="QOS policy"):
        submit(POLICY, 1)
    with pytest.raises(Unreachable, match="QOS policy"):
        submit(POLICY, 2)

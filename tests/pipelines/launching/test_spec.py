import pytest
from pydantic import ValidationError

from roma_core.files import digest_of
from roma_pipelines.launching.spec import JobSpec, job_key, root_of

SPEC = {"key": "0" * 20, "command": ("job.py",), "config_digest": digest_of({})}


def test_a_key_names_asset_and_root_and_nothing_else():
    assert job_key("demo/encoder", "run-a") == job_key("demo/encoder", "run-a")
    assert len({job_key(a, r) for a in ("x", "y") for r in ("run-a", "run-b")}) == 4
    assert job_key("x\ny", "z") != job_key("x", "y")
    JobSpec(**{**SPEC, "key": job_key("demo/encoder", "run-a")})


def test_a_spec_survives_json_and_refuses_unknown_fields():
    spec = JobSpec(**SPEC, nodes=2, processes_per_node=4, env_names=("WANDB_API_KEY",))

    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.world_size == 8
    assert spec.attempt_name(3) == "roma-000000000000-3"
    with pytest.raises(ValidationError, match="node"):
        JobSpec(**SPEC, node=2)


FAILURE = {"dagster/is_resume_retry": "true"}
FAMILY = {  # run id -> tags; each names its parent
    "first": {},
    "auto": {"dagster/retry_number": "1", **FAILURE, "dagster/parent_run_id": "first"},
    "auto all steps": {"dagster/retry_number": "1", "dagster/parent_run_id": "first"},
    "auto twice": {"dagster/retry_number": "2", **FAILURE, "dagster/parent_run_id": "auto"},
    "from asset failure": {
        "dagster/is_asset_resume_retry": "true",
        "dagster/parent_run_id": "first",
    },
    "all again": {"dagster/parent_run_id": "auto"},
    "its failure": {**FAILURE, "dagster/parent_run_id": "all again"},
    "orphan": {**FAILURE, "dagster/parent_run_id": "deleted"},
}
for run_id in FAMILY.keys() - {"first"}:
    FAMILY[run_id]["dagster/root_run_id"] = "first"


@pytest.mark.parametrize(
    ("run_id", "root"),
    [
        ("first", "first"),
        ("auto", "first"),
        ("auto all steps", "first"),
        ("auto twice", "first"),
        ("from asset failure", "first"),
        ("all again", "all again"),
        ("its failure", "all again"),
        ("orphan", "first"),
    ],
)
def test_a_retry_finds_the_job_of_the_run_it_retries(run_id, root):
    assert root_of(run_id, FAMILY[run_id], FAMILY.get) == root

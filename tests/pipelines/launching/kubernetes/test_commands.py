"""The commands, with Kubernetes as the target."""

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from roma_pipelines.cli import main
from tests.time_limits import within


@pytest.fixture
def run(profile, tmp_path, monkeypatch):
    """``roma-pipeline`` with the fake cluster as the profile ``fake``."""
    profile = profile.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump(profile))
    monkeypatch.setenv("ROMA_KUBERNETES_PROFILES", str(tmp_path))
    monkeypatch.setenv("ROMA_KUBERNETES_PROFILE", "fake")
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "roma"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(main, arguments)

    return run


def test_plan_prints_the_manifests_and_asks_the_server(run, cluster):
    result = run("plan", "japanese_vowels", "--target", "kubernetes", "--check")

    assert result.exit_code == 0, result.output
    text = "\n".join(line for line in result.stdout.splitlines() if not line.startswith("#"))
    (job,) = yaml.safe_load_all(text)
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    assert "accepts its jobs in a dry run, which makes no pods" in result.output
    assert "would run" not in result.output


def test_plan_gives_every_reason_for_which_it_would_not_run(run, cluster, monkeypatch):
    monkeypatch.setenv("ROMA_KUBERNETES_NAMESPACE", "elsewhere")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

    result = run("plan", "japanese_vowels", "--target", "kubernetes", "--check")

    assert result.exit_code == 1
    assert "there is no namespace elsewhere" in result.output
    assert "WANDB_API_KEY is set here" in result.output


def test_an_unknown_profile_is_one_sentence(run):
    result = run("plan", "japanese_vowels", "--target", "kubernetes", "--profile", "nowhere")

    assert result.exit_code == 1
    assert "there is no Kubernetes profile 'nowhere'" in result.output
    assert "Traceback" not in result.output


MODULE = """
import json, os, sys
from pathlib import Path
from roma_core.job import Attempt, Exit, JobFolder, Result
folder = JobFolder(os.environ["ROMA_JOB_FOLDER"])
print(json.dumps(sys.argv[1:]), flush=True)
attempt = folder.attempt(int(os.environ["ROMA_JOB_ATTEMPT"]))
folder.write_result(Result(job_key=folder.path.name, attempt=attempt.n, world_size=1, wall_s=1.0))
attempt.write_exit(Exit(status="completed"))
"""


def test_launch_runs_a_module_in_a_pod_with_its_arguments_intact(run, cluster, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    words = ["--name", "two words", "it's", "$(HOME)", "$", "a;b", ""]  # torchrun makes $$ one $

    result = run("launch", "--target", "kubernetes", "-m", "mine", *words)

    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("["))
    assert json.loads(line) == words


def test_jobs_shows_and_cancels_what_runs_in_a_cluster(run, cluster, api, tmp_path, eventually):
    (tmp_path / "long.py").write_text("import time; print('here', flush=True); time.sleep(100)")
    argv = [sys.executable, "-m", "roma_pipelines.cli", "launch", "--target", "kubernetes"]
    waiting = subprocess.Popen(
        [*argv, "-m", "long"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    jobs = tmp_path / "roma" / "jobs"
    eventually(lambda: [p for p in jobs.glob("*/attempts/1/log") if "here" in p.read_text()], 30)
    key = next(jobs.iterdir()).name

    listed, shown = run("jobs", "list"), run("jobs", "show", key)
    logs, cancelled = run("jobs", "logs", key), run("jobs", "cancel", key)
    output = waiting.communicate(timeout=within(10))[0].decode()

    assert f"{key}  running  kubernetes" in listed.output
    assert f"name roma-{key[:12]}-1" in shown.output
    assert "here" in logs.output
    assert f"job {key}: cancelled" in cancelled.output
    assert "cancelled by roma-pipeline jobs cancel" in output
    assert api.store.all("jobs") == []

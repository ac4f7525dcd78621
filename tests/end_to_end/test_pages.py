"""``roma-pipeline up`` in a real browser: the graph, a plot, the Launchpad, a run that is terminated.

Before the pages start, the history gets what a gate refused: a tiny experiment, under the name of one
that ships. ``ROMA_TEST_SCREENSHOTS`` names a folder that keeps a picture of every test's last page.
"""

import json
import os
import re
import signal
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner

from roma_pipelines.cli import main
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.runs import find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import EVIDENCE_TAGS, register
from roma_pipelines.storage import Storage, prepare_instance
from tests.core.serving import toy
from tests.end_to_end.served import (
    CHROMIUM,
    NO_CHROMIUM,
    Pages,
    chromium,
    eventually,
    processes_with,
)
from tests.pipelines import tiny
from tests.time_limits import within

pytestmark = [pytest.mark.browser, pytest.mark.slow]

GROUP = "japanese_vowels"
ASSET_NAMES = (
    "dataset",
    "pretrained_encoder",
    "finetuned_classifier",
    "evaluation_report",
    "registered_classifier",
)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Where the state lies: a registered toy model, and a run that the gate refused; its id."""
    folder = tmp_path_factory.mktemp("pages")
    register_toy(folder / "roma" / "mlflow", folder / "package")
    return folder, refused_run(folder)


@pytest.fixture(scope="module")
def pages(house):
    pages = Pages(house[0])
    yield pages
    pages.stop()


def refused_run(folder: Path) -> str:
    """A run of all five assets with a gate that asks for more than an untrained model has."""
    short = {"trainer": {"epochs": 1, "batch_size": 16}}
    sections = tiny.attributes(folder, pretraining=short, finetuning=short)
    sections |= {"name": GROUP, "gate": {"min_primary": 1.0}}
    job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROMA_STORAGE_ROOT", str(folder / "roma"))
        patch.setenv("ROMA_ENV_FILE", os.devnull)
        patch.delenv("DAGSTER_HOME", raising=False)
        prepare_instance(Storage.open())
        with dg.DagsterInstance.get() as instance:
            done = job.execute_in_process(instance=instance, raise_on_error=False)
        os.environ.pop("DAGSTER_HOME", None)
    assert not done.success
    return done.run_id


def register_toy(root: Path, package: Path) -> None:
    """A registered model, as a finished experiment leaves one."""
    toy.build_toy(package)
    client = connect(MlflowSettings.from_values({}), root)
    run_id = find_or_create_run(client, "roma/toy", "0" * 20, "finetuned_classifier", {}, {})
    client.set_terminated(run_id, "FINISHED")
    tags = dict.fromkeys(EVIDENCE_TAGS, "0")
    version = register(client, package, "toy", "0" * 20, run_id, tags, {"test/accuracy": 0.9})
    promote(
        client, "toy", version, reason="it is the first", actor="a test", evidence={}, force=True
    )


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("ROMA_TEST_REQUIRE_ALL") == "1":
            pytest.fail(NO_CHROMIUM)
        pytest.skip(NO_CHROMIUM)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    named = os.environ.get("ROMA_TEST_SCREENSHOTS")
    return Path(named) if named else tmp_path_factory.mktemp("screenshots")


@pytest.fixture
def page(browser, screenshots, request):
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(within(30) * 1000)
    yield page
    page.screenshot(path=screenshots / f"{request.node.name}.png")
    page.close()


def test_the_graph_shows_the_five_assets(pages, page):
    page.goto(f"{pages.dagster}/locations/roma_pipelines/asset-groups/{GROUP}")

    for noun in ASSET_NAMES:
        page.get_by_text(noun, exact=True).first.wait_for()


def test_a_failed_check_is_seen_to_block_the_promotion(house, pages, page):
    run_id = house[1]
    page.goto(
        f"{pages.dagster}/assets/{GROUP}/evaluation_report?view=checks&checkDetail=primary_metric"
    )
    page.get_by_text("Failed", exact=True).first.wait_for()

    page.goto(f"{pages.dagster}/runs/{run_id}")
    page.get_by_text("Failure", exact=True).first.wait_for()

    page.goto(f"{pages.dagster}/assets/{GROUP}/registered_classifier")
    page.get_by_text(re.compile(rf"Failed in\s*{run_id[:8]}")).first.wait_for()
    query = """query ($key: AssetKeyInput!) {
      assetOrError(assetKey: $key) { ... on Asset { assetMaterializations { runId } } } }"""
    asset = pages.ask(query, key={"path": [GROUP, "registered_classifier"]})["assetOrError"]
    assert asset["assetMaterializations"] == []


LAUNCH = """
mutation ($selector: JobOrPipelineSelector!, $config: RunConfigData) {
  launchRun(executionParams: {selector: $selector, runConfigData: $config, mode: "default"}) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}"""


def launch(pages, *nouns, **config):
    """Start a run of these assets as the page does, with a configuration of the last one; its id."""
    selector = {
        "repositoryLocationName": "roma_pipelines",
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": [GROUP, noun]} for noun in nouns],
    }
    changed = {"ops": {f"{GROUP}__{nouns[-1]}": {"config": config}}} if config else {}
    launched = pages.ask(LAUNCH, selector=selector, config=json.dumps(changed))["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    return launched["run"]["runId"]


def mlflow_run(pages, dagster_run, asset):
    client = connect(MlflowSettings.from_values({}), pages.storage / "mlflow")
    experiment = client.get_experiment_by_name(f"roma/{GROUP}")
    wanted = (
        f"tags.`roma.dagster_run_id` = '{dagster_run}' AND tags.`roma.asset` = '{GROUP}/{asset}'"
    )
    (run,) = client.search_runs([experiment.experiment_id], wanted)
    return run


def test_two_fields_changed_on_the_launchpad_are_in_mlflow_and_in_lineage(pages, page):
    """On the tiny encoder of the refused run, with the settings of the shipped experiment."""
    changed = {"trainer": {"epochs": 40, "base_lr": 0.01}}
    before = len(pages.runs())
    page.goto(f"{pages.dagster}/assets/{GROUP}/finetuned_classifier")
    curve = page.get_by_alt_text("learning curve")  # shown without a click
    assert curve.evaluate("image => image.decode().then(() => image.naturalWidth)") > 200
    page.get_by_text("Materialize", exact=True).click(modifiers=["Shift"])
    page.locator(".CodeMirror").click()
    page.keyboard.press("Control+A")  # it shows the fields with a value by default
    page.keyboard.insert_text(f"ops: {{{GROUP}__finetuned_classifier: {{config: ")
    page.get_by_text("Minutes of one attempt; the job resumes in a new one.").wait_for()
    page.keyboard.insert_text(json.dumps(changed) + "}}")
    page.get_by_role("dialog").get_by_role("button", name="Materialize").click()

    eventually(lambda: len(pages.runs()) > before, 30, "a run")
    run_id = pages.runs()[0]["runId"]
    eventually(lambda: pages.status(run_id) in ("SUCCESS", "FAILURE"), 120, "its end")
    assert pages.status(run_id) == "SUCCESS", pages.story(run_id)
    run = mlflow_run(pages, run_id, "finetuned_classifier")
    assert json.loads(run.data.tags["roma.run_config"]) == changed
    assert (run.data.params["trainer.epochs"], run.data.params["trainer.base_lr"]) == ("40", "0.01")

    run_id = launch(pages, "evaluation_report", "registered_classifier")
    eventually(lambda: pages.status(run_id) in ("SUCCESS", "FAILURE"), 120, "its end")
    assert pages.status(run_id) == "SUCCESS", pages.story(run_id)
    env = {"ROMA_STORAGE_ROOT": str(pages.storage), "ROMA_ENV_FILE": os.devnull}
    said = CliRunner().invoke(main, ["lineage", f"{GROUP}@champion"], env=env).output
    assert json.dumps({"finetuned_classifier": changed}, sort_keys=True) in said


def test_materialize_makes_the_data_set_and_shows_its_plot(pages, page):
    before = len(pages.runs())
    page.goto(f"{pages.dagster}/assets/{GROUP}/dataset")
    page.get_by_text("Materialize", exact=True).click()

    eventually(lambda: len(pages.runs()) > before, 30, "a run")
    eventually(lambda: pages.runs()[0]["status"] == "SUCCESS", 120, "its success")
    page.reload()
    row = page.locator("tr", has=page.get_by_text("plot", exact=True))
    row.get_by_text("Show Markdown").click()
    picture = page.get_by_alt_text("profile of the data set")
    picture.wait_for()
    width = picture.evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert width > 400


OBSERVED = """
query ($key: AssetKeyInput!) {
  assetOrError(assetKey: $key) { ... on Asset { assetObservations(limit: 5) {
    runId metadataEntries { label ... on FloatMetadataEntry { floatValue } }
  } } }
}"""


def test_a_training_is_watched_live_and_terminated(pages, page):
    path = [GROUP, "pretrained_encoder"]
    long = {"epochs": 10_000}  # it must not end by itself while the browser loads a page
    run_id = launch(pages, "pretrained_encoder", trainer=long)

    def live_loss():
        assert pages.status(run_id) in ("QUEUED", "STARTING", "STARTED"), pages.story(run_id)
        asset = pages.ask(OBSERVED, key={"path": path})["assetOrError"]
        observations = [o for o in asset["assetObservations"] if o["runId"] == run_id]
        facts = {
            e["label"]: e.get("floatValue") for o in observations for e in o["metadataEntries"]
        }
        return facts.get("train/loss")

    assert eventually(live_loss, 120, "a live observation of the loss") > 0
    assert pages.status(run_id) == "STARTED"
    jobs = str(pages.storage / "jobs")
    assert processes_with("ROMA_JOB_FOLDER", jobs)
    page.goto(f"{pages.dagster}/assets/{'/'.join(path)}?view=events")
    page.get_by_text("train/loss").first.wait_for()

    page.goto(f"{pages.dagster}/runs/{run_id}")
    page.get_by_role("button", name="Terminate").click()
    page.get_by_role("dialog").get_by_role("button", name="Terminate").click()

    eventually(lambda: not processes_with("ROMA_JOB_FOLDER", jobs), 60, "the end of the job")
    ended = ("CANCELED", "FAILURE", "SUCCESS")
    eventually(lambda: pages.status(run_id) in ended, 30, "the end of the run")
    assert pages.status(run_id) == "CANCELED", pages.story(run_id)
    assert mlflow_run(pages, run_id, "pretrained_encoder").info.status == "KILLED"


SCHEDULES = """
{ schedulesOrError(repositorySelector: {
    repositoryLocationName: "roma_pipelines", repositoryName: "__repository__"}) {
  ... on Schedules { results { name scheduleState { status } } }
} }"""


def test_the_schedule_is_switched_on_where_people_switch_it_on(pages, page):
    name = f"{GROUP}_retraining"

    def status():
        found = pages.ask(SCHEDULES)["schedulesOrError"]["results"]
        return {schedule["name"]: schedule["scheduleState"]["status"] for schedule in found}[name]

    assert status() == "STOPPED"
    page.goto(f"{pages.dagster}/locations/roma_pipelines/schedules/{name}")
    # the box itself is drawn outside of the window; people see its label
    switch = page.locator("label", has=page.locator("input[type=checkbox]")).first
    switch.click()
    eventually(lambda: status() == "RUNNING", 20, "the schedule")
    switch.click()
    eventually(lambda: status() == "STOPPED", 20, "its end")


def test_the_overview_shows_experiments_and_leads_to_their_pages(pages, page):
    page.goto(pages.overview)
    experiment = page.locator(f"#{GROUP}")
    experiment.get_by_text("Last runs").wait_for()

    experiment.get_by_role("link", name="dataset").click()

    page.get_by_text("Materialize", exact=True).first.wait_for()
    assert page.url.startswith(f"{pages.dagster}/assets/{GROUP}/dataset")


def test_mlflow_shows_the_registered_model(pages, page):
    page.goto(f"{pages.mlflow}/#/models/toy")

    page.get_by_text("Version 1").first.wait_for()
    page.get_by_text("champion").first.wait_for()


def test_sigterm_stops_all_servers(pages):
    pages.child.send_signal(signal.SIGTERM)

    out, _ = pages.child.communicate(timeout=within(20))

    assert pages.child.returncode == 0
    assert out.splitlines()[-1] == "stopped"
    assert processes_with("ROMA_STORAGE_ROOT", str(pages.storage)) == []

"""``roma-pipeline up`` in a real browser: the graph, a plot, a run that is watched and terminated."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.runs import end_run, find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import EVIDENCE_TAGS, register
from tests.core.serving import toy

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
GROUP = "japanese_vowels"
NOUNS = (
    "dataset",
    "pretrained_encoder",
    "finetuned_classifier",
    "evaluation_report",
    "registered_classifier",
)
CHROMIUM = shutil.which("chromium")
# fmt: off
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]
# fmt: on


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.2)
    return answer


def processes_with(variable: str, start: str) -> list[psutil.Process]:
    """Living processes whose environment has such a value."""
    return [
        process
        for process in psutil.process_iter(["environ", "status"])
        if (process.info["environ"] or {}).get(variable, "").startswith(start)
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


class Pages:
    """The three servers and what a page asks of Dagster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = folder / "roma"
        with (
            socket.create_server(("127.0.0.1", 0)) as a,
            socket.create_server(("127.0.0.1", 0)) as b,
            socket.create_server(("127.0.0.1", 0)) as c,
        ):
            ports = a.getsockname()[1], b.getsockname()[1], c.getsockname()[1]
        self.dagster, self.mlflow, self.overview = (f"http://127.0.0.1:{port}" for port in ports)
        (folder / "empty.env").touch()
        self.child = subprocess.Popen(
            [
                *(sys.executable, "-m", "roma_pipelines.cli", "up"),
                *("--dagster-port", str(ports[0]), "--mlflow-port", str(ports[1])),
                *("--page-port", str(ports[2])),
            ],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
            | {
                "HOME": str(folder),
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "ROMA_ENV_FILE": str(folder / "empty.env"),
                "ROMA_STORAGE_ROOT": str(self.storage),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.said += line
            if "Ctrl-C stops them" in line:
                return
        pytest.fail(f"the pages did not start:\n{self.said}")

    def ask(self, query: str, **variables: Any) -> Any:
        """The data of a GraphQL answer."""
        request = urllib.request.Request(
            f"{self.dagster}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            document = json.load(answer)
        assert "errors" not in document, document
        return document["data"]

    def runs(self) -> list[dict[str, Any]]:
        """All Dagster runs, the newest first."""
        query = "{ runsOrError { ... on Runs { results { runId status } } } }"
        return self.ask(query)["runsOrError"]["results"]

    def story(self, run_id: str) -> str:
        """What the run's last events say, for a test that wonders."""
        query = """query ($id: ID!) { runOrError(runId: $id) { ... on Run { eventConnection { events {
            ... on MessageEvent { message }
            ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } } }"""
        events = self.ask(query, id=run_id)["runOrError"]["eventConnection"]["events"]
        return "\n".join(str(event) for event in events[-12:])

    def status(self, run_id: str) -> str:
        return next(run["status"] for run in self.runs() if run["runId"] == run_id)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    register_toy(folder / "roma" / "mlflow", folder / "package")
    pages = Pages(folder)
    yield pages
    if pages.child.poll() is None:
        pages.child.send_signal(signal.SIGTERM)
        pages.child.wait(60)
    left = processes_with("ROMA_STORAGE_ROOT", str(pages.storage))
    for process in left:
        process.kill()
    assert left == []


def register_toy(root: Path, package: Path) -> None:
    """A registered model, as a finished experiment leaves one."""
    toy.build_toy(package)
    client = connect(MlflowSettings.from_values({}), root)
    run_id = find_or_create_run(client, "roma/toy", "0" * 20, "finetuned_classifier", {}, {})
    end_run(client, run_id, "FINISHED")
    tags = dict.fromkeys(EVIDENCE_TAGS, "0")
    version = register(client, package, "toy", "0" * 20, run_id, tags, {"test/accuracy": 0.9})
    promote(
        client, "toy", version, why="it is the first", who="a test", evidence={}, despite_gate=True
    )


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        reason = "no chromium on this computer (Debian: apt install chromium)"
        if os.environ.get("ROMA_TEST_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(30_000)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


def test_the_graph_shows_the_five_assets(pages, page):
    page.goto(f"{pages.dagster}/locations/roma_pipelines/asset-groups/{GROUP}")

    for noun in NOUNS:
        page.get_by_text(noun, exact=True).first.wait_for()


def test_materialize_makes_the_data_set_and_shows_its_plot(pages, page):
    page.goto(f"{pages.dagster}/assets/{GROUP}/dataset")
    page.get_by_text("Materialize", exact=True).click()

    eventually(pages.runs, 30, "a run")
    eventually(lambda: pages.runs()[0]["status"] == "SUCCESS", 60, "its success")
    page.reload()
    row = page.locator("tr", has=page.get_by_text("plot", exact=True))
    row.get_by_text("Show Markdown").click()
    picture = page.get_by_alt_text("profile of the data set")
    picture.wait_for()
    width = picture.evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert width > 400


LAUNCH = """
mutation ($selector: JobOrPipelineSelector!) {
  launchRun(executionParams: {selector: $selector, runConfigData: "{}", mode: "default"}) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}"""
OBSERVED = """
query ($key: AssetKeyInput!) {
  assetOrError(assetKey: $key) { ... on Asset { assetObservations(limit: 5) {
    runId metadataEntries { label ... on FloatMetadataEntry { floatValue } }
  } } }
}"""
TERMINATE = """
mutation ($runId: String!) {
  terminateRun(runId: $runId) { __typename ... on TerminateRunFailure { message } }
}"""


def test_a_training_is_watched_live_and_terminated(pages, page):
    path = [GROUP, "pretrained_encoder"]
    selector = {
        "repositoryLocationName": "roma_pipelines",
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": path}],
        "assetCheckSelection": [],
    }
    launched = pages.ask(LAUNCH, selector=selector)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]

    def live_loss():
        assert pages.status(run_id) in ("QUEUED", "STARTING", "STARTED"), pages.story(run_id)
        asset = pages.ask(OBSERVED, key={"path": path})["assetOrError"]
        observations = asset.get("assetObservations", [])
        facts = {
            e["label"]: e.get("floatValue") for o in observations for e in o["metadataEntries"]
        }
        return facts.get("train/loss")

    assert eventually(live_loss, 60, "a live observation of the loss") > 0
    assert pages.status(run_id) == "STARTED"
    jobs = str(pages.storage / "jobs")
    assert processes_with("ROMA_JOB_FOLDER", jobs)
    page.goto(f"{pages.dagster}/assets/{'/'.join(path)}?view=events")
    page.get_by_text("train/loss").first.wait_for()

    answer = pages.ask(TERMINATE, runId=run_id)["terminateRun"]

    assert answer["__typename"] == "TerminateRunSuccess", answer
    eventually(lambda: not processes_with("ROMA_JOB_FOLDER", jobs), 60, "the end of the job")
    eventually(lambda: pages.status(run_id) == "CANCELED", 30, "the end of the run")
    client = connect(MlflowSettings.from_values({}), pages.storage / "mlflow")
    experiment = client.get_experiment_by_name(f"roma/{GROUP}")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["roma.dagster_run_id"] == run_id
    assert run.info.status == "KILLED"


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

    out, _ = pages.child.communicate(timeout=60)

    assert pages.child.returncode == 0
    assert out.splitlines()[-1] == "stopped"
    assert processes_with("ROMA_STORAGE_ROOT", str(pages.storage)) == []

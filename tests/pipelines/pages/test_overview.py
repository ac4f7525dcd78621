"""The overview: what it says of experiments, and what its server gives away."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection

import dagster as dg
import pytest

from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_pipelines.experiment_files import load_experiment
from roma_pipelines.pages.links import announce, job_links, mlflow_link
from roma_pipelines.pages.overview import Evaluation, Pages, overview, serve, trend
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage

NAME = "japanese_vowels"
KEY = dg.AssetKey([NAME, "evaluation_report"])
ACCURACIES = (0.91, 0.95, 0.93)


def evaluated(storage, k, accuracy):
    """The folder of an evaluation job, and the materialisation that names it."""
    folder = JobFolder(storage.jobs / f"{k:020x}")
    folder.outputs.mkdir(parents=True)
    estimate = {"value": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
    write_json(folder.outputs / "metrics.json", {"accuracy": estimate})
    check = {"passed": accuracy > 0.92, "explanation": "worse <than> the champion"}
    write_json(folder.outputs / "gate.json", {"checks": [check]})
    (folder.outputs / "report.html").write_text(f"<h1>report {k}</h1>")
    return dg.AssetMaterialization(
        KEY, metadata={"job_folder": dg.MetadataValue.path(str(folder.path))}
    )


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A storage root and a Dagster instance with three evaluations."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "dagster").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROMA_STORAGE_ROOT", str(folder / "roma"))
        patch.setenv("DAGSTER_HOME", str(folder / "dagster"))
        storage = Storage.open()
        with dg.DagsterInstance.get() as instance:
            for k, accuracy in enumerate(ACCURACIES):
                instance.report_runless_asset_event(evaluated(storage, k, accuracy))
            yield storage, instance


@pytest.fixture(scope="module")
def address(house):
    storage, _ = house
    server = serve(Pages(storage, "http://127.0.0.1:3000", "http://127.0.0.1:5000"), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return answer.read().decode()


def test_a_view_has_the_past_and_the_gates_word(house):
    storage, instance = house
    client = connect(MlflowSettings(), storage.mlflow)
    experiments = {"broken": "broken: no such source", NAME: load_experiment(NAME)}

    first, broken = overview(experiments, storage, instance, client)

    assert (first.name, broken.problem) == (NAME, "broken: no such source")
    assert [e.accuracy for e in first.evaluations] == list(ACCURACIES)
    assert [e.passed for e in first.evaluations] == [False, True, True]
    assert not first.has_champion
    assert [a.noun for a in first.assets if a.made_at] == ["evaluation_report"]


def test_the_page_leads_to_the_report_and_escapes_what_it_shows(house, address):
    storage, instance = house
    instance.report_runless_asset_event(evaluated(storage, 9, 0.5))

    page = get(address, "/")

    assert "0.500" in page
    assert "refused by the gate: worse &lt;than&gt; the champion" in page
    assert f'href="/jobs/{9:020x}/report"' in page
    assert get(address, f"/jobs/{9:020x}/report") == "<h1>report 9</h1>"


def test_head_answers_as_get_does_without_the_content(address):
    connection = HTTPConnection(address)
    connection.request("HEAD", "/")
    answer = connection.getresponse()

    assert answer.status == 200
    assert int(answer.headers["Content-Length"]) > 1000
    assert answer.read() == b""
    connection.close()


@pytest.mark.parametrize(
    "path",
    ["/jobs/..%2f..%2fetc/report", "/jobs/../../layout.json", f"/jobs/{5:020x}/report", "/x"],
)
def test_nothing_else_is_given_away(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(address, path)

    assert refused.value.code == 404


def test_a_name_of_the_internet_bound_to_this_computer_is_refused(address):
    connection = HTTPConnection(address)
    connection.request("GET", "/", headers={"Host": "evil.example"})

    assert connection.getresponse().status == 403
    connection.close()


@pytest.mark.chaos
def test_the_page_is_quick_with_thousands_of_materialisations(house, address):
    storage, instance = house
    for k in range(2000):
        metadata = {"job_folder": dg.MetadataValue.path(str(storage.jobs / f"{k % 3:020x}"))}
        instance.report_runless_asset_event(dg.AssetMaterialization(KEY, metadata=metadata))
    get(address, "/")
    start = time.monotonic()

    page = get(address, "/")

    seconds = time.monotonic() - start
    print(json.dumps({"page_s": round(seconds, 2), "materialisations": 2003}))
    assert seconds < 3
    assert "<svg" in page


def test_the_drawing_marks_what_was_refused():
    drawn = trend(
        [Evaluation(0, a, a - 0.1, a + 0.1, "k", a > 0.6, ()) for a in (0.5, 0.7)]
        + [Evaluation(0, 0.7, 0.7, 0.7, "k", None, ())]
    )

    assert drawn.count("<circle") == 3
    assert drawn.count('class="refused"') == 1


def test_an_asset_leads_to_the_pages_that_are_there(monkeypatch):
    assert job_links("k", has_report=True) == {}
    assert mlflow_link("1", "r", "sqlite:////x/mlflow.db") == {}
    server = mlflow_link("1", "r", "http://me:secret@mlflow.example:5000/")["open_mlflow_run"].value
    assert server == "http://mlflow.example:5000/#/experiments/1/runs/r"

    monkeypatch.setattr(os, "environ", dict(os.environ))
    announce("http://127.0.0.1:8000", "http://127.0.0.1:5000")

    assert (
        job_links("k", has_report=True)["open_report"].value
        == "http://127.0.0.1:8000/jobs/k/report"
    )
    assert set(job_links("k", has_report=False)) == {"open_log"}
    assert "127.0.0.1:5000/#/experiments/1/runs/r" in str(
        mlflow_link("1", "r", "sqlite:////x/mlflow.db")["open_mlflow_run"].value
    )

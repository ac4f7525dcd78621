"""The overview: what it shows of experiments, and what its server does not serve."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection

import dagster as dg
import pytest
import uvicorn

from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_pipelines.experiment import load_experiment
from roma_pipelines.pages.overview import Evaluation, create_app, overview, trend
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage
from tests.time_limits import wait_until, within

NAME = "japanese_vowels"
KEY = dg.AssetKey([NAME, "evaluation_report"])
ACCURACIES = (0.91, 0.95, 0.93)


def evaluated(storage, k, accuracy, **primary):
    """The folder of an evaluation job, and the materialisation that names it."""
    folder = JobFolder(storage.jobs / f"{k:020x}")
    folder.outputs.mkdir(parents=True)
    estimate = {"value": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
    write_json(folder.outputs / "metrics.json", {"accuracy": estimate} | primary)
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
    app = create_app(storage, "http://127.0.0.1:3000", "http://127.0.0.1:5000")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started, 10)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=within(10)) as answer:
        return answer.read().decode()


def test_a_view_has_the_past_and_the_gates_word(house):
    storage, instance = house
    client = connect(MlflowSettings(), storage.mlflow)
    experiments = {"broken": "broken: no such source", NAME: load_experiment(NAME)}

    first, broken = overview(experiments, storage, instance, client)

    assert (first.name, broken.problem) == (NAME, "broken: no such source")
    assert [e.value for e in first.evaluations] == list(ACCURACIES)
    assert [e.passed for e in first.evaluations] == [False, True, True]
    assert first.versions == {}
    assert [key.path[-1] for key, at in first.assets.items() if at] == ["evaluation_report"]


def test_the_page_leads_to_the_report_and_escapes_what_it_shows(house, address):
    storage, instance = house
    instance.report_runless_asset_event(evaluated(storage, 9, 0.5))

    page = get(address, "/")

    assert "0.500" in page
    assert "rejected by the gate: worse &lt;than&gt; the champion" in page
    assert f'href="/jobs/{9:020x}/report"' in page
    assert "Test accuracy" in page
    assert get(address, f"/jobs/{9:020x}/report") == "<h1>report 9</h1>"


def test_the_page_shows_the_primary_metric_of_the_last_evaluation(house, address):
    storage, instance = house
    auroc = {"value": 0.744, "low": 0.7, "high": 0.79}
    primary = {"primary_metric": "auroc", "auroc": auroc}
    instance.report_runless_asset_event(evaluated(storage, 10, 0.73, **primary))

    page = get(address, "/")

    assert "Test AUROC" in page and "0.744" in page
    assert "evaluations, the last" not in page  # those before have another metric


def test_the_page_is_there_while_mlflow_is_away(house, address, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")

    page = get(address, "/")

    assert "MLflow does not answer; registered versions are not shown" in page
    assert "nothing registered yet" not in page


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
    [
        "/jobs/..%2f..%2fetc/report",
        "/jobs/../../layout.json",
        "/jobs/../report",
        f"/jobs/{5:020x}/report",
        f"/jobs/{5:020x}/log",
        f"/jobs/{1:020x}/spec.json",
        "/x",
    ],
)
def test_nothing_else_is_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(address, path)

    assert refused.value.code == 404


def test_a_name_of_the_internet_bound_to_this_computer_is_refused(address):
    connection = HTTPConnection(address)
    connection.request("GET", "/", headers={"Host": "evil.example"})

    answer = connection.getresponse()
    assert answer.status == 400
    assert answer.read() == b"Invalid host header"
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
    assert seconds < within(3)
    assert "<svg" in page


def test_the_trend_marks_what_was_rejected():
    drawn = trend(
        [Evaluation("accuracy", a, a - 0.1, a + 0.1, "k", a > 0.6, ()) for a in (0.5, 0.7)]
        + [Evaluation("accuracy", 0.7, 0.7, 0.7, "k", None, ())]
    )

    assert drawn.count("<circle") == 3
    assert drawn.count('class="rejected"') == 1

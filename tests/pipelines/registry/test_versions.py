"""A registered version, from the package folder to a consumer that has none of this code."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from roma_core.files import sha256_of
from roma_core.serving.package import MODEL_CODE, lock_hash, locked, requirements
from roma_core.serving.pyfunc_model import Series, open_package
from roma_pipelines.registry import versions
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.runs import find_or_create_run
from roma_pipelines.registry.versions import EVIDENCE_TAGS, register, version_at
from tests.core.serving import toy
from tests.time_limits import within

NAME = "vowels"
EVIDENCE = {tag: f"value of {tag}" for tag in EVIDENCE_TAGS} | {GATE_TAG: "passed"}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages") / "toy"
    return folder, toy.build_toy(folder)


def registered(client, package, job_key="k1"):
    run_id = find_or_create_run(client, "roma/vowels", job_key, "register", {}, {})
    tags, metrics = EVIDENCE | {"roma.note": "it's"}, {"accuracy": 0.9}
    return register(client, package[0], NAME, job_key, run_id, tags, metrics), run_id


def test_a_job_has_one_version_and_the_newest_is_the_candidate(client, package, monkeypatch):
    with monkeypatch.context() as patch:  # a crash after the upload, before the version
        patch.setattr(versions, "create_version", lambda *_: pytest.fail("crash"))
        with pytest.raises(pytest.fail.Exception):
            registered(client, package)
    monkeypatch.setattr(versions, "_log_model", lambda *_: pytest.fail("logged twice"))
    first, run_id = registered(client, package)
    assert registered(client, package) == (first, run_id) == ("1", run_id)
    monkeypatch.undo()
    assert registered(client, package, "k2")[0] == "2"
    assert registered(client, package, "k1")[0] == "1"
    assert version_at(client, NAME, "candidate") == "2"

    version = client.get_model_version(NAME, "1")
    tags = version.tags
    assert tags == EVIDENCE | {
        "roma.note": "it's",
        "roma.job_key": "k1",
        "roma.run_id": run_id,
        "roma.manifest_sha256": package[1],
        "roma.code_sha256": sha256_of(MODEL_CODE),
    }
    assert version.description == "# toy\n\nA *small* model."
    assert version.run_id == run_id
    run = client.get_run(run_id)
    assert run.data.metrics == {"accuracy": 0.9}
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert logged.status == "READY"
    assert {m.key: m.value for m in logged.metrics} == {"accuracy": 0.9}


def test_missing_evidence_is_named(client, package):
    with pytest.raises(ValueError, match=r"lack \['roma.config_digest'"):
        register(client, package[0], NAME, "k1", "run", {"roma.dataset_digest": "x"}, {})


def test_requirements_are_pinned_without_build_suffix():
    assert f"numpy=={importlib.metadata.version('numpy')}" in requirements()
    assert not any("+" in line for line in requirements())
    assert set(requirements()) <= set(locked()) and len(locked()) > 40
    assert lock_hash() == lock_hash()


CONSUMER = """
    import importlib.util, json, sys
    assert importlib.util.find_spec("roma_core") is None, "the project must not be importable here"
    import mlflow, mlflow.pyfunc
    uri, request = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/vowels@champion")
    given = json.loads(request)
    answer = {"predictions": [p.model_dump() for p in model.predict(given["good"])], "errors": []}
    for bad in given["bad"]:
        try:
            model.predict(bad)
        except mlflow.exceptions.MlflowException as error:
            answer["errors"].append([error.error_code, error.message])
    folder = model._model_impl.context.artifacts["package"]
    weights = folder + "/model.pt2"
    content = bytearray(open(weights, "rb").read())
    content[len(content) // 2] ^= 1
    open(weights, "wb").write(content)
    import torch
    def deserialise(*_): raise SystemExit("deserialised a file that was tampered with")
    torch.export.load = deserialise
    try:
        mlflow.pyfunc.load_model("models:/vowels@champion")
    except Exception as error:
        answer["tampered"] = str(error)
    assert "roma_core" not in sys.modules
    print(json.dumps(answer))
"""


def installed_packages_alone(folder):
    """A folder with a link to every installed package but the project's editable install."""
    folder.mkdir()
    for path in {Path(p) for p in sys.path if p.endswith("site-packages")}:
        for one in path.iterdir():
            if "roma" not in one.name.lower() and not (folder / one.name).exists():
                (folder / one.name).symlink_to(one)
    return folder


def test_a_consumer_without_this_project_loads_predicts_and_is_protected(
    client, package, store_root, tmp_path
):
    version, _ = registered(client, package)
    promote(client, NAME, version, reason="first", actor="tester", evidence={})
    rows = [toy.series(n, seed=n).model_dump() for n in (3, 50, 1, 7)]
    nan = {**rows[0], "values": {**rows[0]["values"], "flux": [1.0, 2.0, float("nan")]}}
    colour = {**rows[0], "values": {**rows[0]["values"], "colour": [1.0, 2.0, 3.0]}}
    extra = {**rows[0], "color": "red"}
    request = json.dumps({"good": rows, "bad": [[nan], [colour], [extra]]})
    outside = tmp_path / "outside"
    outside.mkdir()
    installed = installed_packages_alone(tmp_path / "installed")
    program = f"import sys; sys.path.append({str(installed)!r})\n" + textwrap.dedent(CONSUMER)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, f"sqlite:///{store_root}/mlflow.db", request],
        cwd=outside,
        env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(outside)},
        capture_output=True,
        text=True,
        timeout=within(60),
    )

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    expected = open_package(package[0]).predict([Series(**row) for row in rows])
    for found, here in zip(answer["predictions"], expected, strict=True):
        assert (found["id"], found["label"]) == (here.id, here.label)
        np.testing.assert_allclose(
            list(found["probabilities"].values()), list(here.probabilities.values()), atol=1e-6
        )
    codes, messages = zip(*answer["errors"], strict=True)
    assert codes == ("INVALID_PARAMETER_VALUE",) * 3
    assert "series 0 (id 's3'): values: 'flux' has no number at index" in messages[0]
    assert "unknown 'colour'" in messages[1]
    assert "color" in messages[2]
    assert "model.pt2 was changed" in answer["tampered"]

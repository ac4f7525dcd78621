"""Consumers of a registry: a verified download, and a service that watches the champion alias."""

from pathlib import Path

import pytest

from roma_core.serving.registry_client import (
    CODE_TAG,
    MANIFEST_TAG,
    AliasWatcher,
    FetchError,
    connect,
    fetch,
    load,
    resolve,
    verify,
)
from roma_pipelines.registry.promotion import promote, rollback
from tests.core.serving import toy
from tests.pipelines.registry.conftest import registered_as
from tests.time_limits import wait_until

CHAMPION = "models:/stars@champion"


@pytest.fixture
def registry(client, toy_package, other_package):
    """Two versions with different weights; the first is champion."""
    registered_as(client, toy_package, "stars", "k1")
    registered_as(client, other_package, "stars", "k2", **{"roma.compared_with": "1"})
    promote(client, "stars", "1", reason="first", actor="tester", evidence={})
    return client


def test_unknown_names_are_refused(registry):
    assert resolve(registry, CHAMPION).version == resolve(registry, "models:/stars/1").version
    with pytest.raises(FetchError, match="expected models:/NAME@ALIAS"):
        resolve(registry, "stars")
    for wrong in ("models:/stars@canary", "models:/stars/9", "models:/suns@champion"):
        with pytest.raises(FetchError, match=f"{wrong} is not in sqlite"):
            resolve(registry, wrong)


@pytest.mark.parametrize(
    "name", ["pyfunc_model.py", "artifacts/package/MANIFEST.json", "artifacts/package/model.pt2"]
)
def test_a_file_changed_in_the_store_or_in_the_cache_never_runs(registry, tmp_path, name):
    version = resolve(registry, CHAMPION)
    folder = fetch(registry, version, tmp_path)
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    assert fetch(registry, version, tmp_path) == folder, "a damaged cache is fetched anew"

    stored = registry.get_model_version_download_uri("stars", "1").removeprefix("file://")
    with (Path(stored) / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(FetchError, match=f"{Path(name).name} was changed: .* the (tag|manifest)"):
        fetch(registry, version, tmp_path / "elsewhere")
    assert not any((tmp_path / "elsewhere" / "stars").iterdir())


def test_a_server_that_does_not_answer_is_named_without_the_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = connect("http://me:geheim@127.0.0.1:1")
    with pytest.raises(FetchError, match=r"is not in http://127\.0\.0\.1:1: ") as caught:
        resolve(client, "models:/waves@champion")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("tag", [MANIFEST_TAG, CODE_TAG])
def test_a_version_without_checksums_cannot_be_verified(registry, tmp_path, tag):
    registry.delete_model_version_tag("stars", "1", tag)
    with pytest.raises(FetchError, match=f"no tag {tag}"):
        fetch(registry, resolve(registry, CHAMPION), tmp_path)


def test_a_watcher_changes_with_its_alias_and_rolls_back(registry, tmp_path):
    rows = [toy.series(n, seed=n).model_dump() for n in (3, 9)]
    watcher = AliasWatcher(registry, CHAMPION, tmp_path)
    first = watcher.predict(rows)
    assert first.version == "1" and not watcher.poll()

    promote(registry, "stars", "2", reason="better", actor="tester", evidence={})
    assert watcher.poll()
    second = watcher.predict(rows)

    assert second.version == "2"
    assert second.predictions[0].probabilities != first.predictions[0].probabilities
    assert watcher.rollback() == "1"
    assert watcher.predict(rows).predictions == first.predictions
    assert not watcher.poll(), "the version that was left does not come back by itself"
    with pytest.raises(ValueError, match="no earlier version"):
        watcher.rollback()


def test_a_watcher_stays_where_it_is_if_the_new_version_is_damaged(registry, tmp_path):
    watcher = AliasWatcher(registry, CHAMPION, tmp_path)
    stored = registry.get_model_version_download_uri("stars", "2").removeprefix("file://")
    golden = Path(stored) / "artifacts" / "package" / "golden.jsonl"
    sound = golden.read_bytes()
    golden.write_bytes(sound.replace(b"0.", b"1.", 1))
    promote(registry, "stars", "2", reason="better", actor="tester", evidence={})
    assert not watcher.poll()
    assert watcher.version == "1" and "golden.jsonl was changed" in watcher.problem
    golden.write_bytes(sound)
    assert watcher.poll() and watcher.version == "2" and watcher.problem is None


def test_a_running_watcher_notices_by_itself(registry, tmp_path):
    with AliasWatcher(registry, CHAMPION, tmp_path, poll_interval_s=0.05) as watcher:
        promote(registry, "stars", "2", reason="better", actor="tester", evidence={})
        wait_until(lambda: watcher.version == "2", 60, "the promotion")
        rollback(registry, "stars", actor="tester", reason="drifts")
        wait_until(lambda: watcher.version == "1", 60, "the rollback")


def test_the_last_three_champions_still_load(registry, toy_package, tmp_path):
    registered_as(registry, toy_package, "stars", "k3", **{"roma.compared_with": "2"})
    for version in ("2", "3"):
        promote(registry, "stars", version, reason="better", actor="tester", evidence={})
    rows = [toy.series(5, seed=5).model_dump()]
    answers = []
    for number in ("1", "2", "3"):
        version = resolve(registry, f"models:/stars/{number}")
        package = load(fetch(registry, version, tmp_path))
        answers.append(package.predict([package.module.Series(**row) for row in rows])[0])
    assert answers[0] == answers[2] != answers[1]


def test_the_code_of_a_model_may_have_any_name_but_there_is_one(registry, tmp_path):
    version = resolve(registry, CHAMPION)
    folder = fetch(registry, version, tmp_path)
    (folder / "pyfunc_model.py").rename(folder / "logged_model.py")  # as older versions called it
    verify(folder, version)
    assert load(folder).classes == list(toy.CLASSES)
    (folder / "second.py").write_text("")
    with pytest.raises(FetchError, match=r"one Python file, found logged_model\.py, second\.py"):
        verify(folder, version)

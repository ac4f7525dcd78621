"""Consumers of a registry: a verified fetch, and a service that follows the champion."""

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
)
from roma_pipelines.registry.promotion import promote, rollback
from tests.core.serving import toy
from tests.pipelines.registry.conftest import registered_as

CHAMPION = "models:/stars@champion"


@pytest.fixture
def registry(client, toy_package, other_package):
    """Two versions with different weights; the first is champion."""
    registered_as(client, toy_package, "stars", "k1")
    registered_as(client, other_package, "stars", "k2", **{"roma.compared_with": "1"})
    promote(client, "stars", "1", why="first", who="tester", evidence={})
    return client


def test_names_that_mean_nothing_are_refused(registry):
    assert resolve(registry, CHAMPION).version == resolve(registry, "models:/stars/1").version
    with pytest.raises(FetchError, match="expected models:/NAME@ALIAS"):
        resolve(registry, "stars")
    for wrong in ("models:/stars@canary", "models:/stars/9", "models:/suns@champion"):
        with pytest.raises(FetchError, match=f"{wrong} is not in sqlite"):
            resolve(registry, wrong)


@pytest.mark.parametrize(
    "name", ["logged_model.py", "artifacts/package/MANIFEST.json", "artifacts/package/model.pt2"]
)
def test_what_was_changed_in_the_store_or_in_the_cache_never_runs(registry, tmp_path, name):
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


def test_a_follower_changes_with_its_alias_and_can_go_back(registry, tmp_path):
    rows = [toy.series(n, seed=n).model_dump() for n in (3, 9)]
    follower = AliasWatcher(registry, CHAMPION, tmp_path)
    first = follower.predict(rows)
    assert first.version == "1" and not follower.poll()

    promote(registry, "stars", "2", why="better", who="tester", evidence={})
    assert follower.poll()
    second = follower.predict(rows)

    assert second.version == "2"
    assert second.predictions[0].probabilities != first.predictions[0].probabilities
    assert follower.go_back() == "1"
    assert follower.predict(rows).predictions == first.predictions
    assert not follower.poll(), "the version that was left does not come back by itself"
    with pytest.raises(ValueError, match="no earlier version"):
        follower.go_back()


def test_a_follower_stays_where_it_is_if_the_new_version_is_damaged(registry, tmp_path):
    follower = AliasWatcher(registry, CHAMPION, tmp_path)
    stored = registry.get_model_version_download_uri("stars", "2").removeprefix("file://")
    golden = Path(stored) / "artifacts" / "package" / "golden.jsonl"
    sound = golden.read_bytes()
    golden.write_bytes(sound.replace(b"0.", b"1.", 1))
    promote(registry, "stars", "2", why="better", who="tester", evidence={})
    assert not follower.poll()
    assert follower.version == "1" and "golden.jsonl was changed" in follower.problem
    golden.write_bytes(sound)
    assert follower.poll() and follower.version == "2" and follower.problem is None


def test_a_running_follower_notices_by_itself(registry, tmp_path):
    import time

    with AliasWatcher(registry, CHAMPION, tmp_path, poll_every_s=0.05) as follower:
        promote(registry, "stars", "2", why="better", who="tester", evidence={})
        deadline = time.monotonic() + 60
        while follower.version != "2" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert follower.version == "2"
        rollback(registry, "stars", who="tester", why="drifts")
        while follower.version != "1" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert follower.version == "1"


def test_the_last_three_champions_still_load(registry, toy_package, tmp_path):
    registered_as(registry, toy_package, "stars", "k3", **{"roma.compared_with": "2"})
    for version in ("2", "3"):
        promote(registry, "stars", version, why="better", who="tester", evidence={})
    rows = [toy.series(5, seed=5).model_dump()]
    answers = []
    for number in ("1", "2", "3"):
        version = resolve(registry, f"models:/stars/{number}")
        package = load(fetch(registry, version, tmp_path))
        answers.append(package.predict([package.module.Series(**row) for row in rows])[0])
    assert answers[0] == answers[2] != answers[1]

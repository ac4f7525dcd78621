import threading

import pytest

from roma_pipelines.registry.promotion import CHAMPION, PREVIOUS, audit, promote, rollback
from roma_pipelines.registry.versions import version_at

NAME = "vowels"


@pytest.fixture
def versions(client, tmp_path):
    """Four versions without content: aliases do not look inside."""
    client.create_registered_model(NAME)
    for _ in range(4):
        client.create_model_version(NAME, (tmp_path / "model").as_uri(), None)
    return client


def aliases(client):
    return {
        alias: version
        for alias in (CHAMPION, PREVIOUS)
        if (version := version_at(client, NAME, alias))
    }


def move(client, version):
    promote(client, NAME, version, why="better", who="tester", evidence={"passed": True})


def test_promotions_and_rollbacks_move_the_aliases_and_are_recorded(versions):
    move(versions, "1")
    assert aliases(versions) == {CHAMPION: "1"}
    move(versions, "2")
    move(versions, "2")  # nothing to do
    move(versions, "4")
    assert aliases(versions) == {CHAMPION: "4", PREVIOUS: "2"}
    assert rollback(versions, NAME, who="tester", why="drifts") == "2"
    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}
    assert rollback(versions, NAME, who="tester", why="still") == "1"
    assert aliases(versions) == {CHAMPION: "1"}
    with pytest.raises(ValueError, match="no previous champion"):
        rollback(versions, NAME, who="tester", why="more")
    move(versions, "3")
    assert aliases(versions) == {CHAMPION: "3", PREVIOUS: "1"}

    events = audit(versions, NAME)

    assert [(e.action, e.replaced, e.version) for e in events] == [
        ("promote", None, "1"),
        ("promote", "1", "2"),
        ("promote", "2", "4"),
        ("rollback", "4", "2"),
        ("rollback", "2", "1"),
        ("promote", "1", "3"),
    ]
    assert (events[1].who, events[1].why, events[1].evidence) == (
        "tester",
        "better",
        {"passed": True},
    )


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_promotion_that_dies_is_finished_by_the_next_one(versions, monkeypatch, dies_at):
    move(versions, "1")
    calls = 0

    def dying(original):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == dies_at:
                raise KeyboardInterrupt
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("set_registered_model_tag", "set_registered_model_alias"):
            patch.setattr(versions, name, dying(getattr(versions, name)))
        with pytest.raises(KeyboardInterrupt):
            move(versions, "2")
        assert version_at(versions, NAME, CHAMPION) == "1"

    move(versions, "2")

    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}
    assert audit(versions, NAME)[-1].version == "2"


def test_a_rollback_that_dies_is_finished_by_the_next_one(versions, monkeypatch):
    for version in ("1", "2", "3"):
        move(versions, version)
    with monkeypatch.context() as patch:
        original = versions.set_registered_model_alias

        def dying(name, alias, version):
            if alias == PREVIOUS:
                raise KeyboardInterrupt
            original(name, alias, version)

        patch.setattr(versions, "set_registered_model_alias", dying)
        with pytest.raises(KeyboardInterrupt):
            rollback(versions, NAME, who="tester", why="drifts")
    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "2"}

    assert rollback(versions, NAME, who="tester", why="drifts") == "2"

    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}


def test_two_promotions_at_once_leave_a_consistent_state(versions):
    move(versions, "1")
    threads = [threading.Thread(target=move, args=(versions, v)) for v in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    events = audit(versions, NAME)

    assert len(events) == 3
    assert events[2].replaced == events[1].version
    assert aliases(versions) == {CHAMPION: events[2].version, PREVIOUS: events[1].version}


def test_bad_input_moves_nothing(versions):
    with pytest.raises(ValueError, match="no version '9'"):
        move(versions, "9")
    with pytest.raises(ValueError, match="why is empty"):
        promote(versions, NAME, "1", why=" ", who="tester", evidence={})
    with pytest.raises(ValueError, match="expected letters"):
        promote(versions, "it's", "1", why="x", who="tester", evidence={})
    with pytest.raises(ValueError, match="not JSON compliant"):
        promote(versions, NAME, "1", why="x", who="y", evidence={"accuracy": float("nan")})
    assert aliases(versions) == {}
    assert audit(versions, NAME) == []

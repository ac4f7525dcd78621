import threading

import pytest

from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.promotion import (
    CHAMPION,
    PREVIOUS,
    PromotionRefused,
    VersionInUse,
    audit,
    delete_version,
    promote,
    reject,
    rollback,
)
from roma_pipelines.registry.versions import COMPARED_TAG, ENCODER_TAG, encoder_name, version_at

NAME = "vowels"


@pytest.fixture
def versions(client, tmp_path):
    """Four versions without content: aliases do not look inside."""
    client.create_registered_model(NAME)
    for _ in range(4):
        tags = {GATE_TAG: "passed", COMPARED_TAG: "none"}
        client.create_model_version(NAME, (tmp_path / "model").as_uri(), None, tags)
    return client


def aliases(client):
    return {
        alias: version
        for alias in (CHAMPION, PREVIOUS)
        if (version := version_at(client, NAME, alias))
    }


def compared(client, version, champion):
    client.set_model_version_tag(NAME, version, COMPARED_TAG, champion)


def move(client, version):
    """Promote a version that was compared with the present champion."""
    compared(client, version, version_at(client, NAME, CHAMPION) or "none")
    promote(client, NAME, version, reason="better", actor="tester", evidence={"passed": True})


def test_an_unknown_model_is_an_error_that_lists_the_known_ones(versions):
    for name in (encoder_name(NAME), f"{NAME}.lock", f"{NAME}.lock.of.host-1-ab"):
        versions.create_registered_model(name)
    for act in (
        lambda: rollback(versions, "vowel", actor="tester", reason="x"),
        lambda: promote(versions, "vowel", "1", reason="x", actor="tester", evidence={}),
    ):
        with pytest.raises(ValueError, match=r"^there is no model 'vowel'; there are vowels$"):
            act()


def test_promotions_and_rollbacks_move_the_aliases_and_are_recorded(versions):
    move(versions, "1")
    assert aliases(versions) == {CHAMPION: "1"}
    move(versions, "2")
    move(versions, "2")  # nothing to do
    move(versions, "4")
    assert aliases(versions) == {CHAMPION: "4", PREVIOUS: "2"}
    assert rollback(versions, NAME, actor="tester", reason="drifts") == "2"
    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}
    assert rollback(versions, NAME, actor="tester", reason="still") == "1"
    assert aliases(versions) == {CHAMPION: "1"}
    with pytest.raises(ValueError, match="no previous champion"):
        rollback(versions, NAME, actor="tester", reason="more")
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
    assert (events[1].actor, events[1].reason, events[1].evidence) == (
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
            rollback(versions, NAME, actor="tester", reason="drifts")
    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "2"}

    assert rollback(versions, NAME, actor="tester", reason="drifts") == "2"

    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}


def test_of_two_promotions_at_once_one_is_refused(versions):
    """Both were compared with version 1; the second was not compared with the first."""
    move(versions, "1")
    refused = []

    def promoted(version):
        try:
            promote(versions, NAME, version, reason="better", actor="tester", evidence={})
        except PromotionRefused as error:
            refused.append(str(error))

    for version in ("2", "3"):
        compared(versions, version, "1")
    threads = [threading.Thread(target=promoted, args=(v,)) for v in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    events = audit(versions, NAME)
    assert len(events) == 2 and events[1].replaced == "1"
    assert aliases(versions) == {CHAMPION: events[1].version, PREVIOUS: "1"}
    assert len(refused) == 1
    assert "was compared with champion 1, but the champion is now" in refused[0]


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({GATE_TAG: "failed"}, "has passed no gate"),
        ({COMPARED_TAG: "4"}, "was compared with champion 4, but the champion is now 1"),
    ],
)
def test_without_a_passed_gate_only_force_promotes(versions, tags, why):
    move(versions, "1")
    for key, value in ({COMPARED_TAG: "1"} | tags).items():
        versions.set_model_version_tag(NAME, "2", key, value)
    asked = {"reason": "I know", "actor": "tester", "evidence": {}}

    with pytest.raises(PromotionRefused, match=why):
        promote(versions, NAME, "2", **asked)
    assert aliases(versions) == {CHAMPION: "1"}
    promote(versions, NAME, "2", **asked, force=True)

    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}
    assert why in audit(versions, NAME)[-1].evidence["forced_despite"]


def test_what_was_rejected_or_rolled_back_does_not_come_back_by_itself(versions):
    move(versions, "1")
    reject(versions, NAME, "2", reason="labels of june are wrong", actor="tester")
    with pytest.raises(PromotionRefused, match=r"rejected: .* tester: labels of june are wrong"):
        move(versions, "2")
    with pytest.raises(PromotionRefused, match="is the champion"):
        reject(versions, NAME, "1", reason="no", actor="tester")
    move(versions, "3")
    rollback(versions, NAME, actor="tester", reason="drifts")
    with pytest.raises(PromotionRefused, match=r"was rolled back at .*: drifts"):
        move(versions, "3")
    assert aliases(versions) == {CHAMPION: "1"}
    assert [e.action for e in audit(versions, NAME)] == ["promote", "reject", "promote", "rollback"]


def test_a_version_in_use_is_not_deleted(versions):
    for version in ("1", "2"):
        move(versions, version)
    rollback(versions, NAME, actor="tester", reason="drifts")
    versions.set_registered_model_alias(NAME, "canary", "3")
    with pytest.raises(VersionInUse, match="version 1 of 'vowels' is champion"):
        delete_version(versions, NAME, "1")
    with pytest.raises(VersionInUse, match="was champion before"):
        delete_version(versions, NAME, "2")
    with pytest.raises(VersionInUse, match="is canary"):
        delete_version(versions, NAME, "3")
    delete_version(versions, NAME, "4")
    with pytest.raises(ValueError, match="no version '4'"):
        delete_version(versions, NAME, "4")


def test_a_rollback_passes_over_a_champion_that_is_gone(versions):
    for version in ("1", "2", "3", "4"):
        move(versions, version)
    versions.delete_model_version(NAME, "2")  # past this project, which would refuse
    assert rollback(versions, NAME, actor="tester", reason="drifts") == "3"
    assert aliases(versions) == {CHAMPION: "3", PREVIOUS: "1"}


@pytest.fixture
def encoders(versions, tmp_path):
    """Name of the encoders of versions 1 and 2."""
    encoder = encoder_name(NAME)
    versions.create_registered_model(encoder)
    for version in ("1", "2"):
        versions.create_model_version(encoder, (tmp_path / "encoder").as_uri(), None)
        versions.set_model_version_tag(NAME, version, ENCODER_TAG, version)
    return encoder


def test_the_encoder_follows_its_classifier_there_and_back(versions, encoders):
    for version in ("1", "2"):
        move(versions, version)
        assert version_at(versions, encoders, CHAMPION) == version
    rollback(versions, NAME, actor="tester", reason="drifts")
    assert version_at(versions, encoders, CHAMPION) == "1"


def test_a_champion_without_encoder_leaves_that_of_another_one_no_champion(versions, encoders):
    move(versions, "1")
    versions.delete_model_version_tag(NAME, "2", ENCODER_TAG)
    move(versions, "2")
    assert version_at(versions, encoders, CHAMPION) is None
    rollback(versions, NAME, actor="tester", reason="drifts")
    assert version_at(versions, encoders, CHAMPION) == "1"


def test_a_promotion_that_dies_before_the_encoder_is_finished_by_the_next_one(
    versions, encoders, monkeypatch
):
    move(versions, "1")
    original = versions.set_registered_model_alias

    def dying(name, alias, version):
        if name == encoders:
            raise KeyboardInterrupt
        original(name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(versions, "set_registered_model_alias", dying)
        with pytest.raises(KeyboardInterrupt):
            move(versions, "2")
    assert (version_at(versions, NAME, CHAMPION), version_at(versions, encoders, CHAMPION)) == (
        "2",
        "1",
    )

    move(versions, "2")

    assert version_at(versions, encoders, CHAMPION) == "2"
    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}


def test_an_encoder_stays_as_long_as_its_classifier_and_no_rollback_needs_it(
    versions, encoders, caplog
):
    for version in ("1", "2"):
        move(versions, version)
    with pytest.raises(VersionInUse, match="is the encoder of version 1 of 'vowels'"):
        delete_version(versions, encoders, "1")
    versions.delete_model_version(encoders, "1")  # past this project
    assert rollback(versions, NAME, actor="tester", reason="drifts") == "1"
    assert aliases(versions) == {CHAMPION: "1"}
    assert version_at(versions, encoders, CHAMPION) == "2"
    assert "the encoder of version 1 of vowels, was deleted" in caplog.text


def test_no_rollback_brings_back_what_was_rejected(versions):
    for version in ("1", "2", "3", "4"):
        move(versions, version)
    reject(versions, NAME, "2", reason="leaks", actor="tester")
    reject(versions, NAME, "3", reason="leaks, too", actor="tester")
    assert aliases(versions) == {CHAMPION: "4", PREVIOUS: "1"}
    versions.set_registered_model_alias(NAME, PREVIOUS, "3")
    with pytest.raises(
        PromotionRefused, match=r"was rejected: .*leaks, too; .* reject vowels 3` again"
    ):
        rollback(versions, NAME, actor="tester", reason="drifts")
    reject(versions, NAME, "3", reason="leaks, too", actor="tester")
    assert rollback(versions, NAME, actor="tester", reason="drifts") == "1"
    assert aliases(versions) == {CHAMPION: "1"}


def test_a_forced_promotion_revokes_a_rejection(versions):
    move(versions, "1")
    reject(versions, NAME, "2", reason="odd", actor="tester")
    promote(versions, NAME, "2", "not odd", "tester", {}, force=True)
    move(versions, "3")
    assert rollback(versions, NAME, actor="tester", reason="drifts") == "2"
    assert aliases(versions) == {CHAMPION: "2", PREVIOUS: "1"}


def test_bad_input_moves_nothing(versions):
    with pytest.raises(ValueError, match="no version '9'"):
        promote(versions, NAME, "9", reason="better", actor="tester", evidence={})
    with pytest.raises(ValueError, match="reason is empty"):
        promote(versions, NAME, "1", reason=" ", actor="tester", evidence={})
    with pytest.raises(ValueError, match="expected letters"):
        promote(versions, "it's", "1", reason="x", actor="tester", evidence={})
    with pytest.raises(ValueError, match="not JSON compliant"):
        promote(versions, NAME, "1", reason="x", actor="y", evidence={"accuracy": float("nan")})
    assert aliases(versions) == {}
    assert audit(versions, NAME) == []


def test_an_event_of_an_older_registry_is_read(versions):
    stored = (
        '{"schema_version": 1, "at": "2026-11-01T00:00:00.000+00:00", "action": "promote", '
        '"version": "1", "replaced": null, "who": "ada", "why": "first", "evidence": {}}'
    )
    versions.set_registered_model_tag(NAME, "roma.audit.000001", stored)
    (event,) = audit(versions, NAME)
    assert (event.actor, event.reason) == ("ada", "first")
    move(versions, "2")
    assert [e.version for e in audit(versions, NAME)] == ["1", "2"]

"""Files other processes read: whole or not there, and made by one of many."""

import errno
import json
import multiprocessing
import os
import stat
import threading

import pytest

from roma_core import files
from roma_core.files import (
    create_json,
    digest_of,
    fingerprint_of,
    read_json,
    sha256_of,
    write_bytes,
    write_json,
)
from roma_core.hashing import hash_ints, hash_text, mix, unit_interval
from tests.time_limits import within


def test_a_reader_sees_the_old_content_or_the_new_never_a_part(tmp_path):
    path = tmp_path / "numbers.json"
    documents = [{"schema_version": 1, "numbers": [n] * 20_000} for n in range(2)]
    write_json(path, documents[0])
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            seen.append(read_json(path, schema_version=1)["numbers"])

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        write_json(path, documents[i % 2])
    done.set()
    reader.join()
    assert seen and all(numbers in ([0] * 20_000, [1] * 20_000) for numbers in seen)


@pytest.mark.parametrize("write", [write_json, create_json])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, write):
    path = tmp_path / "a.json"
    if write is write_json:
        write_json(path, {"a": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        write(path, {"a": 2})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_in_the_way_is_an_error_that_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_bytes(tmp_path / "a", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_others_may_read_what_is_written(tmp_path):
    write_bytes(tmp_path / "a", b"content")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def _claim(path, barrier, results, name):
    barrier.wait()
    results.put((name, create_json(path, {"owner": name})))


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_processes_creates_a_file(tmp_path, monkeypatch, links):
    if not links:  # as on exFAT, SMB and some FUSE file systems
        monkeypatch.setattr(files.os, "link", _no_links)
    context = multiprocessing.get_context("fork")
    path, n = tmp_path / "owner.json", 8
    barrier, results = context.Barrier(n), context.Queue()
    processes = [
        context.Process(target=_claim, args=(path, barrier, results, i), daemon=True)
        for i in range(n)
    ]
    for process in processes:
        process.start()
    claims = dict(results.get(timeout=within(4)) for _ in processes)
    for process in processes:
        process.join()
    winners = [name for name, won in claims.items() if won]
    assert len(winners) == 1 and read_json(path) == {"owner": winners[0]}
    assert [p.name for p in tmp_path.iterdir()] == ["owner.json"]


def _no_links(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_another_error_of_a_link_is_not_taken_for_that(tmp_path, monkeypatch):
    def broken(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "link", broken)
    with pytest.raises(OSError, match="Input/output"):
        create_json(tmp_path / "a.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_reader_waits_for_the_content_of_a_name_that_was_just_taken(tmp_path):
    path = tmp_path / "a.json"
    path.touch()
    writer = threading.Timer(0.2, write_json, (path, {"a": 1}))
    writer.start()
    assert read_json(path) == {"a": 1}
    writer.join()


def test_a_repeated_request_over_nfs_does_not_make_the_winner_lose(tmp_path, monkeypatch):
    link = os.link

    def link_twice(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(files.os, "link", link_twice)
    assert create_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.undo()
    assert not create_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_another_schema_version_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"schema_version": 2})
    with pytest.raises(ValueError, match=r"has schema_version 2, this version .* reads 1; use the"):
        read_json(path, schema_version=1)
    for document in ({"a": 1}, [1]):
        write_json(path, document)
        with pytest.raises(ValueError, match="has schema_version None"):
            read_json(path, schema_version=1)
        assert read_json(path) == document


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe\x00"])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a\.json is not valid JSON .*cut short or changed by hand"
    ):
        read_json(tmp_path / "a.json")


def test_text_stays_readable(tmp_path):
    write_json(tmp_path / "a.json", {"axis": "λ / µm"})
    assert "λ / µm" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"axis": "λ / µm"}


def test_digests_are_those_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    )
    assert digest_of({"a": 1, "b": [2.5, None]}) == digest_of({"b": [2.5, None], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})


def test_hashes_are_what_they_were():
    """Splits, masks and orders of every earlier run hang on these numbers."""
    assert unit_interval("object-1") == 0.6766550528298705
    assert hash_text("object-1") == 12482082585735037550
    assert (mix(1), hash_ints(1, 2, 3)) == (1753845952, 384277788)


def test_the_unit_interval_is_filled_evenly():
    numbers = [unit_interval(f"object-{i}") for i in range(10_000)]
    assert min(numbers) >= 0 and max(numbers) < 1
    tenths = [sum(n < k / 10 for n in numbers) / len(numbers) for k in range(1, 10)]
    assert tenths == pytest.approx([k / 10 for k in range(1, 10)], abs=0.02)


def test_a_fingerprint_ignores_dangling_links(tmp_path):
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "inner" / "a.ts").write_text("a")
    patterns = [tmp_path / "data", tmp_path / "*.ts"]
    before = fingerprint_of(patterns)
    assert before.n_files == 1
    (tmp_path / "data" / "gone.ts").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.ts").symlink_to(tmp_path / "nowhere")
    assert fingerprint_of(patterns) == before
    (tmp_path / "b.ts").write_text("b")
    assert fingerprint_of(patterns).n_files == 2

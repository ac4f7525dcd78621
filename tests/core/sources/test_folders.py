"""Images and sounds in folders."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from roma_core.data import DataError
from roma_core.sources.base import source_config
from roma_core.sources.folders import log_mel


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

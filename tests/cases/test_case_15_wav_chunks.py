"""WAV files as recorders and editors write them: other chunks, depths, hidden files, splits."""

import struct

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.io import wavfile

from roma_core.cli import main
from roma_core.data import DataError, StoredDataset
from roma_core.sources.base import source_config

NOISE = np.random.default_rng(0).normal(0, 3000, 16000).astype("<i2")


def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def wav(path, before=b"", after=b"", size=None):
    """One second of noise at 16 kHz, 16 bit, between other chunks."""
    layout = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
    body = b"WAVE" + before + chunk(b"fmt ", layout) + chunk(b"data", NOISE.tobytes()) + after
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"RIFF" + struct.pack("<I", size or len(body)) + body)


def read(folder):
    return list(source_config({"kind": "wav_folder", "folder": folder}).open(folder).read())


@pytest.mark.parametrize(
    "chunks",
    [
        {"after": chunk(b"id3 ", b"ID3\x03" + b"\0" * 16)},
        {"after": chunk(b"id3 ", b"ID3\x03" + b"\0" * 15)},  # of an odd length, padded
        {"before": chunk(b"bext", b"\0" * 602)},
        {
            "before": chunk(b"JUNK", b"\0" * 28),
            "after": chunk(b"LIST", b"INFOISFT\x04\0\0\0me\0\0"),
        },
        {"before": chunk(b"iXML", b"<a/>"), "after": chunk(b"cue ", b"\0" * 4)},
        {"after": b"\0\0"},  # less than the name of a chunk
    ],
)
def test_other_chunks_change_nothing(tmp_path, chunks):
    wav(tmp_path / "in/bird/plain.wav")
    wav(tmp_path / "in/rain/chunks.WAV", **chunks)
    config = tmp_path / "config.yaml"
    config.write_text(f"name: x\nsource: {{ kind: wav_folder, folder: {tmp_path / 'in'} }}\n")

    result = CliRunner().invoke(main, ["data", "build", str(config), "--out", str(tmp_path)])

    assert result.exit_code == 0, result.output
    dataset = StoredDataset(result.output.splitlines()[-1])
    assert dataset.schema.classes == ("bird", "rain")
    assert np.array_equal(dataset.raw(0)[1], dataset.raw(1)[1])


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    wav(tmp_path / "in/bird/1.wav")
    path = tmp_path / "in/bird/1.wav"
    path.write_bytes(path.read_bytes()[:-8000])

    with pytest.raises(DataError, match=r"1\.wav cannot be read as a WAV file: Reached EOF"):
        read(tmp_path / "in")


@pytest.mark.parametrize("n_bytes", [0, 3, 12, 20, 36])
def test_a_file_without_samples_is_refused(tmp_path, n_bytes):
    wav(tmp_path / "in/bird/1.wav")
    path = tmp_path / "in/bird/1.wav"
    content = path.read_bytes()[:n_bytes]
    path.write_bytes(content[:4] + struct.pack("<I", max(0, n_bytes - 8)) + content[8:])

    with pytest.raises(DataError, match=r"1\.wav cannot be read as a WAV file: "):
        read(tmp_path / "in")


def test_the_depth_of_the_samples_does_not_change_the_loudness(tmp_path):
    sound = np.clip(NOISE.astype(float) / 32768, -1, 1)
    depths = {
        "16": NOISE,
        "32": (sound * (2**31 - 1)).astype(np.int32),
        "8": np.round(sound * 127 + 128).astype(np.uint8),
        "float": sound.astype(np.float32),
    }
    (tmp_path / "in/a").mkdir(parents=True)
    for name, samples in depths.items():
        wavfile.write(tmp_path / "in/a" / f"{name}.wav", 16000, samples)

    found = {series.id: series.values for series in read(tmp_path / "in")}

    for name in depths:
        difference = found[f"a/{name}.wav"] - found["a/16.wav"]
        assert abs(np.median(difference)) < 0.02, name


def test_hidden_files_are_left_out_and_folders_of_splits_are_no_classes(tmp_path):
    for split in ("train", "test"):
        for label in ("bird", "rain"):
            wav(tmp_path / "in" / split / label / "1.wav")
            (tmp_path / "in" / split / label / "._1.wav").write_bytes(b"\0\5\x16\7")

    found = [(s.id, s.label, s.recorded_split) for s in read(tmp_path / "in")]

    assert found == [
        ("test/bird/1.wav", "bird", "test"),
        ("test/rain/1.wav", "rain", "test"),
        ("train/bird/1.wav", "bird", "train"),
        ("train/rain/1.wav", "rain", "train"),
    ]

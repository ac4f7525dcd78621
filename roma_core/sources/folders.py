"""Sounds in a folder of WAV files, a sub-folder per class: patches of the log-mel spectrogram.

Every patch is one observation at (time, band). Reading and the Fourier transform are SciPy's.

Pictures as series: one square patch is one observation, its place is its position.
Pictures in a folder, a sub-folder per class: every patch is one observation at (row, column).
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.files import sha256_of
from roma_core.schema import Channel, DataError, PositionAxis
from roma_core.sources.base import RawSeries, SourceConfig


def patches(
    picture: NDArray[np.float32], height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Cut a picture ``(H, W, C)`` into patches of ``height`` × ``width``.

    Returns:
        positions ``(N, 2)``, row and column of the patch, and values ``(N, height * width * C)``, row
        by row with the colour fastest; N is rows times columns. What is left over at the lower and
        right edge is cut off.
    """
    n_rows, n_columns, depth = (
        picture.shape[0] // height,
        picture.shape[1] // width,
        picture.shape[2],
    )
    whole = picture[: n_rows * height, : n_columns * width]
    cut = whole.reshape(n_rows, height, n_columns, width, depth).transpose(0, 2, 1, 3, 4)
    places = np.stack(np.divmod(np.arange(n_rows * n_columns), n_columns), axis=1)
    return places.astype(np.float64), cut.reshape(n_rows * n_columns, height * width * depth)


def labelled_files(folder: Path, endings: tuple[str, ...]) -> list[tuple[Path, str | None]]:
    """Files below a folder, in order, with the name of the sub-folder they lie in as their class.

    Files directly in the folder have no class; then all must.

    Raises:
        DataError: there is no such folder or file, or some files have a class and some have none.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} (from {Path.cwd()})")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    found = [
        (path, path.relative_to(folder).parts[0] if path.parent != folder else None)
        for path in paths
    ]
    if not found:
        raise DataError(f"{folder} holds no file that ends in {', '.join(endings)}")
    if len({label is None for _, label in found}) > 1:
        stray = next(path for path, label in found if label is None)
        raise DataError(f"{stray} lies in no sub-folder, so it has no class, but others have one")
    return found


def hashes(folder: Path, found: list[tuple[Path, str | None]]) -> dict[str, str]:
    """sha256 of every file, by its name below the folder."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path, _ in found}


def classes(found: list[tuple[Path, str | None]]) -> tuple[str, ...]:
    return tuple(sorted({label for _, label in found if label is not None}))


IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class ImageFolderConfig(SourceConfig):
    """Pictures on this computer."""

    kind: Literal["image_folder"] = "image_folder"
    folder: Path
    patch: int = Field(16, gt=0, description="Pixels along a side of a patch.")
    colours: Literal["rgb", "grey"] = "rgb"
    resize: tuple[int, int] | None = Field(
        None,
        description="Height and width to scale every picture to; None leaves them as they are.",
    )

    def open(self, cache: Path) -> ImageFolderSource:
        return ImageFolderSource(self)


class ImageFolderSource:
    """The pictures of a folder, in the order of their names."""

    def __init__(self, config: ImageFolderConfig) -> None:
        self.config = config
        self.citation, self.licence = config.citation, config.licence
        self._found = labelled_files(config.folder, IMAGE_ENDINGS)
        self.files = hashes(config.folder, self._found)
        self.classes = classes(self._found)
        self.axes = (
            PositionAxis(name="row", unit="patch"),
            PositionAxis(name="column", unit="patch"),
        )
        names = ("red", "green", "blue") if config.colours == "rgb" else ("grey",)
        side = range(config.patch)
        self.channels = tuple(
            Channel(name=f"{name}_{y}_{x}", unit="1") for y in side for x in side for name in names
        )

    def __length_hint__(self) -> int:
        return len(self._found)

    def read(self) -> Iterator[RawSeries]:
        """Every picture; its values are in 0 … 255.

        Raises:
            DataError: a file is no picture, or smaller than one patch.
        """
        from PIL import Image

        config = self.config
        for path, label in self._found:
            try:
                with Image.open(path) as image:
                    picture = image.convert("RGB" if config.colours == "rgb" else "L")
            except OSError as error:
                raise DataError(f"{path} cannot be read as a picture: {error}") from error
            if config.resize is not None:
                height, width = config.resize
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            pixels = np.atleast_3d(np.asarray(picture, dtype=np.float32))  # (H, W, colours)
            positions, values = patches(pixels, config.patch, config.patch)
            if len(values) == 0:
                raise DataError(
                    f"{path} has {pixels.shape[1]} × {pixels.shape[0]} pixels, less than one patch "
                    f"of {config.patch}; use a smaller patch, or resize"
                )
            name = path.relative_to(config.folder).as_posix()
            yield RawSeries(id=name, positions=positions, values=values, label=label)


class WavFolderConfig(SourceConfig):
    """WAV files on this computer."""

    kind: Literal["wav_folder"] = "wav_folder"
    folder: Path
    window_ms: float = Field(25.0, gt=0, description="Length of the window of one spectrum.")
    hop_ms: float = Field(10.0, gt=0, description="Time between spectra.")
    n_bands: int = Field(128, gt=0, description="Bands of the mel scale, from 20 Hz to the top.")
    patch_hops: int = Field(16, gt=0, description="Spectra in one patch.")
    patch_bands: int = Field(16, gt=0, description="Bands in one patch; must divide n_bands.")

    def open(self, cache: Path) -> WavFolderSource:
        if self.n_bands % self.patch_bands:
            raise DataError(
                f"patch_bands={self.patch_bands} does not divide n_bands={self.n_bands}"
            )
        return WavFolderSource(self)


class WavFolderSource:
    """The sounds of a folder, in the order of their names."""

    def __init__(self, config: WavFolderConfig) -> None:
        self.config = config
        self.citation, self.licence = config.citation, config.licence
        self._found = labelled_files(config.folder, (".wav",))
        self.files = hashes(config.folder, self._found)
        self.classes = classes(self._found)
        self.axes = (
            PositionAxis(name="time", unit=f"patch of {config.patch_hops * config.hop_ms:g} ms"),
            PositionAxis(name="band", unit=f"patch of {config.patch_bands} mel bands"),
        )
        self.channels = tuple(
            Channel(name=f"t{t}_f{f}", unit="ln power")
            for t in range(config.patch_hops)
            for f in range(config.patch_bands)
        )

    def __length_hint__(self) -> int:
        return len(self._found)

    def read(self) -> Iterator[RawSeries]:
        """Every sound, its channels mixed to one and its mean taken off.

        Raises:
            DataError: a file is no WAV file, is too short, or has another rate than the first.
        """
        config = self.config
        first: int | None = None
        for path, label in self._found:
            rate, sound = _read(path)
            first = first or rate
            if rate != first:
                raise DataError(
                    f"{path} has {rate} samples a second, others have {first}; resample it first"
                )
            spectrogram = log_mel(sound, rate, config.window_ms, config.hop_ms, config.n_bands)
            positions, values = patches(
                spectrogram[:, :, None], config.patch_hops, config.patch_bands
            )
            if len(values) == 0:
                raise DataError(
                    f"{path} lasts {len(sound) / rate:.3f} s, less than one patch of "
                    f"{config.patch_hops} spectra; use fewer patch_hops, or leave it out"
                )
            name = path.relative_to(config.folder).as_posix()
            yield RawSeries(id=name, positions=positions, values=values, label=label)


def _read(path: Path) -> tuple[int, NDArray[np.float64]]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)  # a file that ends too early
            rate, samples = wavfile.read(path)
    except (ValueError, OSError, EOFError, struct.error, wavfile.WavFileWarning) as error:
        raise DataError(f"{path} cannot be read as a WAV file: {error}") from error
    largest = np.iinfo(samples.dtype).max if samples.dtype.kind in "iu" else 1.0
    sound = samples.astype(np.float64) / largest
    return rate, sound.mean(axis=1) if sound.ndim == 2 else sound


def log_mel(
    sound: NDArray[np.float64], rate: int, window_ms: float, hop_ms: float, n_bands: int
) -> NDArray[np.float32]:
    """Logarithm of the power in mel bands: ``(n,)`` samples to ``(spectra, n_bands)`` float32.

    Only windows that lie wholly inside the sound count; a shorter sound gives no spectrum.
    """
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    window, hop = round(rate * window_ms / 1000), max(1, round(rate * hop_ms / 1000))
    if len(sound) < window:
        return np.empty((0, n_bands), dtype=np.float32)
    n_fft = 1 << (window - 1).bit_length()
    transform = ShortTimeFFT(hann(window, sym=False), hop, rate, mfft=n_fft)
    start, stop = transform.lower_border_end[1], transform.upper_border_begin(len(sound))[1]
    power = np.abs(transform.stft(sound - sound.mean(), p0=start, p1=stop)) ** 2  # (F, spectra)
    bands = _mel_bands(transform.f, n_bands) @ power
    return np.log(np.maximum(bands, 1e-10)).T.astype(np.float32)


def _mel_bands(frequencies: NDArray[Any], n_bands: int) -> NDArray[np.float64]:
    """Triangular weights ``(n_bands, F)``, evenly spaced on the mel scale 2595·log10(1 + f/700)."""

    def mel(f: Any) -> Any:
        return 2595 * np.log10(1 + f / 700)

    edges = np.linspace(mel(20.0), mel(frequencies[-1]), n_bands + 2)
    x = mel(frequencies)
    rising = (x - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - x) / (edges[2:] - edges[1:-1])[:, None]
    return np.clip(np.minimum(rising, falling), 0, None)

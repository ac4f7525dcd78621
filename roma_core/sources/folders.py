"""Images or sounds in a folder, a sub-folder per class, perhaps below a folder per split.

One observation is a square patch of an image at (row, column), or a patch of a sound's log-mel
spectrogram at (time, band). Reading WAV files and the Fourier transform are SciPy's.
"""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.files import sha256_of
from roma_core.schema import Channel, DataError, PositionAxis
from roma_core.sources.base import SPLIT_WORDS, RawSeries, RecordedSplit, Source, SourceConfig

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class ImageFolderConfig(SourceConfig):
    """Images on this computer."""

    kind: Literal["image_folder"] = "image_folder"
    folder: Path
    patch: int = Field(16, gt=0, description="Pixels along a side of a patch.")
    colours: Literal["rgb", "grey"] = "rgb"
    resize: tuple[int, int] | None = None
    """Height and width to scale every image to; None leaves them as they are."""

    def open(self, cache: Path) -> ImageFolderSource:
        return ImageFolderSource(self)


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


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders in order, without those that systems hide in them."""
    hidden = (".", "__MACOSX")
    paths = (p for p in folder.rglob("*") if p.is_file())
    return sorted(
        p for p in paths if not any(q.startswith(hidden) for q in p.relative_to(folder).parts)
    )


class _FolderSource(Source):
    """The files of a folder in the order of their names; their sub-folders, if any, are the classes.

    Folders above those of the classes may be splits: train, test, validation and the like.
    """

    _patch: tuple[int, int]  # height and width

    def __init__(self, config: ImageFolderConfig | WavFolderConfig, *endings: str) -> None:
        super().__init__(config)
        folder = config.folder
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder} (from {Path.cwd()})")
        paths = [path for path in files_below(folder) if path.suffix.lower() in endings]
        if not paths:
            raise DataError(f"{folder} holds no file that ends in {', '.join(endings)}")
        self._paths = {path.relative_to(folder).as_posix(): path for path in paths}
        folders = {name: name.split("/")[:-1] for name in self._paths}
        self._splits: dict[str, RecordedSplit] = {}
        if all(parts and parts[0].lower() in SPLIT_WORDS for parts in folders.values()):
            splits = {name: SPLIT_WORDS[parts.pop(0).lower()] for name, parts in folders.items()}
            if "test" not in splits.values():  # evaluation is on what the publisher held out
                splits = {n: "train" if split == "train" else "test" for n, split in splits.items()}
            self._splits = splits
        self._labels = {name: parts[0] if parts else None for name, parts in folders.items()}
        self.classes = tuple(sorted({label for label in self._labels.values() if label}))
        stray = next((name for name, label in self._labels.items() if label is None), None)
        if stray is not None and self.classes:
            raise DataError(
                f"{folder / stray} lies in no sub-folder, so it has no class, but others have one"
            )
        self.files = {name: sha256_of(path) for name, path in self._paths.items()}

    def __length_hint__(self) -> int:
        return len(self._paths)

    def _image(self, path: Path) -> tuple[NDArray[np.float32], str]:
        """An image ``(H, W, C)``, and the error message if it is less than one patch."""
        raise NotImplementedError

    def read(self) -> Iterator[RawSeries]:
        for name, path in self._paths.items():
            image, too_small = self._image(path)
            positions, values = patches(image, *self._patch)
            if len(values) == 0:
                raise DataError(f"{path} {too_small}")
            yield RawSeries(
                name, positions, values, self._labels[name], recorded_split=self._splits.get(name)
            )


def is_deep(mode: str) -> bool:
    """Whether images of a mode of Pillow have grey levels of more than 8 bits."""
    return mode[0] in "IF"


class ImageFolderSource(_FolderSource):
    """Images; their values are in 0 … 255, or as they stand where all have more bits.

    They are turned as their EXIF data say; transparent pixels are drawn over white, with a warning.
    """

    _is_deep: bool | None = None

    def __init__(self, config: ImageFolderConfig) -> None:
        super().__init__(config, *IMAGE_ENDINGS)
        self.config, self._patch = config, (config.patch, config.patch)
        self.axes = tuple(PositionAxis(name=name, unit="patch") for name in ("row", "column"))
        names = ("red", "green", "blue") if config.colours == "rgb" else ("grey",)
        side = range(config.patch)
        self.channels = tuple(
            Channel(name=f"{name}_{y}_{x}", unit="1") for y in side for x in side for name in names
        )

    def read(self) -> Iterator[RawSeries]:
        self._notes: Counter[str] = Counter()
        yield from super().read()
        for note, n in self._notes.items():
            warnings.warn(f"{n:,} images of {self.config.folder} {note}", stacklevel=2)

    def _image(self, path: Path) -> tuple[NDArray[np.float32], str]:
        from PIL import Image, ImageOps

        config = self.config
        try:
            with Image.open(path) as file:
                if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                    self._notes["have several frames, of which the first is read"] += 1
                image = ImageOps.exif_transpose(file)
            deep = is_deep(image.mode)
            if deep and config.colours == "rgb":
                raise DataError(
                    f"{path} has grey levels of more than 8 bits; set colours to 'grey'"
                )
            if self._is_deep not in (None, deep):
                depth = f"{'more than ' * deep}8 bits"
                raise DataError(f"{path} has grey levels of {depth}, others have not: convert them")
            self._is_deep = deep
            if not deep and image.has_transparency_data:
                image = image.convert("RGBA")
                if np.asarray(image)[:, :, 3].min() < 255:
                    self._notes["have transparent pixels, which are drawn over white"] += 1
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I"):  # Pillow converts I;16 to F by way of I alone
                image = image.convert("I")
            image = image.convert("F" if deep else "RGB" if config.colours == "rgb" else "L")
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        if config.resize is not None:
            height, width = config.resize
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return (
            np.atleast_3d(np.asarray(image, dtype=np.float32)),
            f"has {image.width} × {image.height} pixels, less than one patch: use a smaller patch",
        )


class WavFolderSource(_FolderSource):
    """Sounds, which have the rate of the first; channels are averaged and the mean is subtracted."""

    _rate: int | None = None

    def __init__(self, config: WavFolderConfig) -> None:
        super().__init__(config, ".wav")
        self.config, self._patch = config, (config.patch_hops, config.patch_bands)
        self.axes = (
            PositionAxis(name="time", unit=f"patch of {config.patch_hops * config.hop_ms:g} ms"),
            PositionAxis(name="band", unit=f"patch of {config.patch_bands} mel bands"),
        )
        self.channels = tuple(
            Channel(name=f"t{t}_f{f}", unit="ln power")
            for t in range(config.patch_hops)
            for f in range(config.patch_bands)
        )

    def _image(self, path: Path) -> tuple[NDArray[np.float32], str]:
        config = self.config
        rate, sound = _read_wav(path)
        self._rate = self._rate or rate
        if rate != self._rate:
            raise DataError(
                f"{path} has {rate} samples a second, others have {self._rate}; resample it first"
            )
        spectrogram = log_mel(sound, rate, config.window_ms, config.hop_ms, config.n_bands)
        return (
            spectrogram[:, :, None],
            f"lasts {len(sound) / rate:.3f} s, less than one patch: use fewer patch_hops",
        )


def patches(
    image: NDArray[np.float32], height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Cut an image ``(H, W, C)`` into patches; what is left over at the lower and right edge goes.

    Returns:
        positions ``(N, 2)``, row and column of the patch, and values ``(N, height * width * C)``, row
        by row with the colour fastest.
    """
    n_rows, n_columns, depth = image.shape[0] // height, image.shape[1] // width, image.shape[2]
    whole = image[: n_rows * height, : n_columns * width]
    cut = whole.reshape(n_rows, height, n_columns, width, depth).transpose(0, 2, 1, 3, 4)
    positions = np.stack(np.divmod(np.arange(n_rows * n_columns), n_columns), axis=1)
    return positions.astype(np.float64), cut.reshape(n_rows * n_columns, height * width * depth)


def _read_wav(path: Path) -> tuple[int, NDArray[np.float64]]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)  # a file that ends too early
            # id3, bext and the like, and what is left of one behind the samples
            warnings.filterwarnings("ignore", r"Chunk \(non-data\) not under|Incomplete chunk ID")
            rate, samples = wavfile.read(path)
    except UnboundLocalError as error:  # in SciPy
        raise DataError(f"{path} cannot be read as a WAV file: it has no samples") from error
    except (ValueError, OSError, EOFError, struct.error, wavfile.WavFileWarning) as error:
        raise DataError(f"{path} cannot be read as a WAV file: {error}") from error
    sound = samples.astype(np.float64)
    if samples.dtype.kind == "u":  # 8 bits, about 128
        sound = (sound - 128) / 127
    elif samples.dtype.kind == "i":
        sound /= np.iinfo(samples.dtype).max
    return rate, sound.mean(axis=1) if sound.ndim == 2 else sound


def log_mel(
    sound: NDArray[np.float64], rate: int, window_ms: float, hop_ms: float, n_bands: int
) -> NDArray[np.float32]:
    """Logarithm of the power in mel bands: ``(n,)`` samples to ``(spectra, n_bands)`` float32.

    Only windows that lie wholly inside the sound; a shorter sound gives no spectrum.
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
    # triangular weights (n_bands, F), evenly spaced on the mel scale
    x = 2595 * np.log10(1 + transform.f / 700)
    edges = np.linspace(2595 * np.log10(1 + 20 / 700), x[-1], n_bands + 2)
    rising = (x - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - x) / (edges[2:] - edges[1:-1])[:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None) @ power
    return np.log(np.maximum(bands, 1e-10)).T.astype(np.float32)

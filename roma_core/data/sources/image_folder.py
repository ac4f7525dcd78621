"""Pictures in a folder, a sub-folder per class: every patch is one observation at (row, column)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from roma_core.data.errors import DataError
from roma_core.data.schema import Channel, PositionAxis
from roma_core.data.sources.patches import classes, hashes, labelled_files, patches
from roma_core.data.sources.protocol import RawSeries, SourceConfig

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


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
        self._found = labelled_files(config.folder, _ENDINGS)
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

"""Pictures as series: one square patch is one observation, its place is its position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.data.errors import DataError
from roma_core.files import sha256_of


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

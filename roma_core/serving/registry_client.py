"""A model that follows its alias: services keep running while champions change.

``poll`` looks where the alias points. If it moved, the new version is fetched, verified and loaded
beside the old one, its golden rows are computed, and only then does it take over; the old one is
kept for ``go_back``. Whatever goes wrong on the way leaves the old one in its place.

    with Follower(connect(uri), "models:/NAME@champion", cache) as model:
        answer = model.predict([{"positions": …, "values": …}])     # says which version answered

From a model's name to a verified folder: alias → version → tags → manifest → files.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from roma_core.files import sha256_of
from roma_core.settings import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

MANIFEST_TAG = "roma.manifest_sha256"
CODE_TAG = "roma.code_sha256"
_URI = re.compile(r"models:/(?P<name>.+?)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
_CODE = "logged_model.py"
_PACKAGE = Path("artifacts") / "package"


class FetchError(RuntimeError):
    """The model is not there, cannot be downloaded, or is not what was registered."""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def manifest_sha256(self) -> str | None:
        """Stands for the whole package; None if nobody wrote it down."""
        return self.tags.get(MANIFEST_TAG)


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a server, or of a store of this computer, for tracking and registry."""
    import os

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri, tracking_uri)


def resolve(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` means now.

    Raises:
        FetchError: the text is none of these, or there is no such model, alias or version.
    """
    from mlflow.exceptions import MlflowException

    match = _URI.fullmatch(uri)
    if match is None:
        raise FetchError(f"{uri!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name = match["name"]
    try:
        found = (
            client.get_model_version_by_alias(name, match["alias"])
            if match["alias"]
            else client.get_model_version(name, match["version"])
        )
    except MlflowException as error:
        why = without_credentials(f"{client.tracking_uri}: {error.message}")
        raise FetchError(f"{uri} is not in {why}") from error
    return ModelVersion(name, str(found.version), dict(found.tags))


def fetch(client: MlflowClient, version: ModelVersion, cache: Path) -> Path:
    """The verified folder of a version; downloaded once and verified every time.

    Raises:
        FetchError: it cannot be downloaded, or differs from what its tags say.
    """
    folder = cache / version.name.replace("/", "__") / version.version
    if folder.exists():
        try:
            verify(folder, version)
            return folder
        except FetchError:  # of another registry, or damaged: what counts is what the store has
            shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{version.version}.") as aside:
        downloaded = _download(client, version, Path(aside))
        verify(downloaded, version)
        try:
            downloaded.rename(folder)
        except OSError:  # another process was quicker
            verify(folder, version)
    return folder


def _download(client: MlflowClient, version: ModelVersion, aside: Path) -> Path:
    """Through the client's own server: MLflow's download by name asks the process's default one."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    target = aside / "model"
    target.mkdir()
    try:
        place = client.get_model_version_download_uri(version.name, version.version)
        repository = get_artifact_repository(place, tracking_uri=client.tracking_uri)
        repository.download_artifacts("", dst_path=str(target))
    except Exception as error:  # whatever the store's client raises
        why = without_credentials(str(error))
        raise FetchError(f"{version.uri} cannot be downloaded: {why}") from error
    return target


def package_of(folder: Path) -> Path:
    """The package inside a model's folder."""
    return folder / _PACKAGE


def verify(folder: Path, version: ModelVersion) -> None:
    """Compare a model's folder with the tags of its version. Deserialises nothing but the manifest.

    Raises:
        FetchError: a file is missing, changed, or not listed; or the version lacks a checksum.
    """
    expected = version.manifest_sha256
    if expected is None:
        raise FetchError(f"{version.uri} has no tag {MANIFEST_TAG}; it cannot be verified")
    manifest = folder / _PACKAGE / "MANIFEST.json"
    _same(manifest, expected, f"the tag {MANIFEST_TAG} of {version.uri}")
    if CODE_TAG not in version.tags:
        raise FetchError(
            f"{version.uri} has no tag {CODE_TAG}, so its {_CODE} cannot be verified before it runs; "
            f"evaluate and register it anew, or, if you trust the store, set the tag to the sha256 "
            f"of that file"
        )
    _same(folder / _CODE, version.tags[CODE_TAG], f"the tag {CODE_TAG} of {version.uri}")
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    there = {path.name for path in manifest.parent.iterdir()} - {manifest.name}
    if there != set(listed):
        raise FetchError(
            f"{manifest.parent} should hold {sorted(listed)}; there are {sorted(there)}"
        )
    for name, sha256 in listed.items():
        _same(manifest.parent / name, sha256, "the manifest")


def _same(path: Path, expected: str, whose: str) -> None:
    if not path.is_file():
        raise FetchError(f"{path} is missing; download the model again")
    found = sha256_of(path)
    if found != expected:
        raise FetchError(
            f"{path} was changed: its sha256 is {found}, {whose} says {expected}; do not use it"
        )


def load(folder: Path) -> Any:
    """A model's package, opened by the model's own file of code; golden rows are checked.

    Models of different versions live side by side: each brings its own classes, among them
    ``Series``, as attribute ``module``. Needs torch. The folder must have been verified.
    """
    import importlib.util
    import sys

    name = f"roma_logged_model_{sha256_of(folder / _CODE)[:16]}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, folder / _CODE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pydantic looks types up there
        spec.loader.exec_module(module)
    package = module.open_package(folder / _PACKAGE)
    package.module = module
    return package


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A version in memory."""

    version: ModelVersion
    package: Any

    def predict(self, series: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Answers of this version; series as JSON has them."""
        return self.package.predict([self.package.module.Series(**one) for one in series])


@dataclass(frozen=True)
class Answer:
    """Predictions and the version that made them."""

    version: str
    predictions: list[Any]


class AliasWatcher:
    """The model behind an alias, now.

    Attributes:
        problem: why the newest version did not take over; None if it did.
    """

    def __init__(
        self, client: MlflowClient, uri: str, cache: Path, *, poll_every_s: float = 30.0
    ) -> None:
        """Load the version that the alias points to.

        Raises:
            FetchError: there is none, or it is not what was registered.
        """
        self.client, self.uri, self.cache, self.poll_every_s = client, uri, cache, poll_every_s
        self.problem: str | None = None
        self._refused: set[str] = set()
        self._old: Loaded | None = None
        self._now = self._loaded(resolve(client, uri))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def version(self) -> str:
        return self._now.version.version

    def predict(self, series: Sequence[Mapping[str, Any]]) -> Answer:
        """Predictions of one version, even if another takes over meanwhile."""
        now = self._now
        return Answer(now.version.version, now.predict(series))

    def poll(self) -> bool:
        """Follow the alias; True if another version took over."""
        try:
            version = resolve(self.client, self.uri)
            if version.version == self.version or version.version in self._refused:
                return False
            fresh = self._loaded(version)
        except Exception as error:  # a service goes on with what it has
            self.problem = str(error)
            log.warning("staying with version %s of %s: %s", self.version, self.uri, error)
            return False
        self._old, self._now, self.problem = self._now, fresh, None
        log.info("%s is version %s now", self.uri, version.version)
        return True

    def go_back(self) -> str:
        """Serve the version before this one again, whatever the alias says; returns its version.

        Raises:
            ValueError: none is kept.
        """
        if self._old is None:
            raise ValueError(f"no earlier version of {self.uri} is kept")
        self._refused.add(self.version)
        self._now, self._old = self._old, None
        return self.version

    def _loaded(self, version: ModelVersion) -> Loaded:
        return Loaded(version, load(fetch(self.client, version, self.cache)))

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self.poll_every_s):
            self.poll()

"""Models from an MLflow registry: resolve a name, download, verify, load, follow an alias.

A version's tags hold the sha256 of the package's manifest and of its code; the manifest holds those
of all other files. ``AliasWatcher`` keeps a service on an alias while champions change:

    with AliasWatcher(connect(uri), "models:/NAME@champion", cache) as model:
        result = model.predict([{"positions": …, "values": …}])    # result.version made it

Importing this module imports neither MLflow nor torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from roma_core.files import sha256_of
from roma_core.serving.pyfunc_model import parse_series
from roma_core.settings import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

MANIFEST_TAG = "roma.manifest_sha256"
CODE_TAG = "roma.code_sha256"
_URI = re.compile(r"models:/(?P<name>.+?)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
_log = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """The model is missing, cannot be downloaded, or differs from its recorded checksums."""


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
        """Identifies the whole package; None if it was not recorded."""
        return self.tags.get(MANIFEST_TAG)


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a server or a local store, for tracking and registry; FetchError if it has no file."""
    file = Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0])
    if tracking_uri.startswith("sqlite:///") and not file.exists():  # MLflow would make it
        raise FetchError(f"there is no MLflow store {file}; correct --tracking-uri")
    set_mlflow_defaults()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri, tracking_uri)


def set_mlflow_defaults() -> None:
    """Turn off telemetry, which MLflow reads at its import, and progress bars."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def resolve(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` refers to now.

    Raises FetchError for another form, and if there is no such model, alias or version.
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
        reason = without_credentials(f"{client.tracking_uri}: {error.message}")
        raise FetchError(f"{uri} is not in {reason}; check its name and --tracking-uri") from error
    return ModelVersion(name, str(found.version), dict(found.tags))


def fetch(client: MlflowClient, version: ModelVersion, cache: Path) -> Path:
    """The verified model folder of a version; downloaded once, verified on every call.

    Raises FetchError if it cannot be downloaded, or differs from the checksums of its tags.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    folder = cache / version.name.replace("/", "__") / version.version
    if folder.exists():
        try:
            verify(folder, version)
            return folder
        except FetchError:  # damaged, or of another registry: download again
            shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{version.version}.") as aside:
        downloaded = Path(aside) / "model"
        downloaded.mkdir()
        try:  # mlflow.artifacts would use the process's default server, not the client's
            source = client.get_model_version_download_uri(version.name, version.version)
            repository = get_artifact_repository(source, tracking_uri=client.tracking_uri)
            repository.download_artifacts("", dst_path=str(downloaded))
        except Exception as error:  # each artifact store has its own errors
            reason = without_credentials(str(error))
            raise FetchError(f"{version.uri} cannot be downloaded, try again: {reason}") from error
        verify(downloaded, version)
        try:
            downloaded.rename(folder)
        except OSError:  # another process was first
            verify(folder, version)
    return folder


def package_of(folder: Path) -> Path:
    """The package folder inside a model folder."""
    return folder / "artifacts" / "package"


def code_of(folder: Path) -> Path:
    """The one file of code in a model folder, which loads the package; FetchError if not one."""
    found = sorted(folder.glob("*.py"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FetchError(f"{folder}: expected one Python file, found {names}; download it again")
    return found[0]


def verify(folder: Path, version: ModelVersion) -> None:
    """Compare a model folder with its version's tags. Parses nothing but the manifest.

    Raises FetchError: a file is missing, changed or not listed, or there is no checksum.
    """
    if version.manifest_sha256 is None:
        raise FetchError(f"{version.uri} has no tag {MANIFEST_TAG}; register it again to verify it")
    package = package_of(folder)
    manifest = package / "MANIFEST.json"
    _check_sha256(manifest, version.manifest_sha256, f"the tag {MANIFEST_TAG} of {version.uri}")
    if CODE_TAG not in version.tags:
        raise FetchError(
            f"{version.uri} has no tag {CODE_TAG}, so its code cannot be verified before it runs; "
            f"evaluate and register the model again, or, if you trust the store, set the tag to the "
            f"sha256 of {code_of(folder).name}"
        )
    _check_sha256(code_of(folder), version.tags[CODE_TAG], f"the tag {CODE_TAG} of {version.uri}")
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    found = {path.name for path in package.iterdir()} - {manifest.name}
    if found != set(listed):
        raise FetchError(f"{package}: expected {sorted(listed)}, found {sorted(found)}; remove it")
    for name, sha256 in listed.items():
        _check_sha256(package / name, sha256, "the manifest")


def _check_sha256(path: Path, expected: str, source: str) -> None:
    if not path.is_file():
        raise FetchError(f"{path} is missing; download the model again")
    found = sha256_of(path)
    if found != expected:
        raise FetchError(
            f"{path} was changed: its sha256 is {found}, {source} says {expected}; do not "
            f"use it, download it again"
        )


def load(folder: Path, device: str = "cpu") -> Any:
    """A model's package, opened by the model's own code, with its golden rows checked.

    Code of an earlier version loads it on CPU, whatever ``device`` is.

    Packages of different versions can be loaded side by side: each has the classes of its own code,
    such as ``Series``, in its attribute ``module``. Needs torch. Verify the folder first.
    """
    import importlib.util
    import inspect
    import sys

    code = code_of(folder)
    name = f"roma_model_{sha256_of(code)[:16]}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, code)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pydantic resolves annotations there
        spec.loader.exec_module(module)
    takes = inspect.signature(module.open_package).parameters
    options = {"device": device} if "device" in takes else {}
    package = module.open_package(package_of(folder), **options)
    package.module = module
    return package


def series_of(package: Any, rows: Iterable[Any]) -> list[Any]:
    """Rows as ``parse_series`` takes them, as series of the model's own code, which may be older."""
    fields = (one.model_dump(exclude_unset=True, exclude_none=True) for one in parse_series(rows))
    return [package.module.Series(**given) for given in fields]


class PredictionResult(NamedTuple):
    version: str
    predictions: list[Any]


class AliasWatcher:
    """The model behind an alias, reloaded when the alias moves.

    A new version is downloaded, verified and loaded beside the present one before it replaces it;
    on any error the present one stays, and ``problem`` says why. The replaced one is kept for
    ``rollback``.
    """

    def __init__(
        self, client: MlflowClient, uri: str, cache: Path, *, poll_interval_s: float = 30.0
    ) -> None:
        """Load the version that the alias points to; FetchError if it is missing or changed."""
        self.client, self.uri, self.cache = client, uri, cache
        self.poll_interval_s = poll_interval_s
        self.problem: str | None = None
        self._rolled_back: set[str] = set()
        self._previous: tuple[str, Any] | None = None
        self._current = self._load(resolve(client, uri))  # version and package, replaced together
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alias-watcher", daemon=True)

    @property
    def version(self) -> str:
        return self._current[0]

    def predict(self, series: Iterable[Any]) -> PredictionResult:
        """Predict rows as ``parse_series`` takes them; one version predicts all, even during a change."""
        version, package = self._current
        return PredictionResult(version, package.predict(series_of(package, series)))

    def poll(self) -> bool:
        """Load the version that the alias points to now; True if it is another one."""
        try:
            version = resolve(self.client, self.uri)
            if version.version == self.version or version.version in self._rolled_back:
                return False
            loaded = self._load(version)
        except Exception as error:  # the service continues with the present version
            self.problem = str(error)
            _log.warning("%s stays at version %s: %s", self.uri, self.version, error)
            return False
        self._previous, self._current, self.problem = self._current, loaded, None
        _log.info("%s is now version %s", self.uri, version.version)
        return True

    def rollback(self) -> str:
        """Serve the previous version again, wherever the alias points; return its version.

        Raises ValueError without one.
        """
        if self._previous is None:
            raise ValueError(f"no earlier version of {self.uri} is loaded")
        self._rolled_back.add(self.version)
        self._current, self._previous = self._previous, None
        return self.version

    def _load(self, version: ModelVersion) -> tuple[str, Any]:
        return version.version, load(fetch(self.client, version, self.cache))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.poll_interval_s):
            self.poll()

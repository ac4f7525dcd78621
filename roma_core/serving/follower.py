"""A model that follows its alias: services keep running while champions change.

``poll`` looks where the alias points. If it moved, the new version is fetched, verified and loaded
beside the old one, its golden rows are computed, and only then does it take over; the old one is
kept for ``go_back``. Whatever goes wrong on the way leaves the old one in its place.

    with Follower(connect(uri), "models:/NAME@champion", cache) as model:
        answer = model.predict([{"positions": …, "values": …}])     # says which version answered
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from roma_core.serving.fetching import ModelVersion, fetch, load, resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient

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


class Follower:
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

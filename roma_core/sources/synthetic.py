"""Synthetic series of the published experiments (arXiv:2505.20535), and damped waves, whose targets
are of whole series; drawn by process, number and seed.

A set of more series begins with the same series, so it grows like delivered data; no two series
share their draws, whichever splits they go to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, model_validator

from roma_core.schema import Channel, PositionAxis, TargetLevel
from roma_core.sources.base import RawSeries, Source, SourceConfig

_SIDE, _CANVAS = 24, 128  # pixels along a side of a picture, and of what it is scaled down from
_TONES = 24  # Hz, the highest
_AT_ONCE = 256  # series, or pictures, drawn at a time


class Draw(NamedTuple):
    """Series of one process."""

    positions: NDArray[np.float64]  # (n, N, D)
    values: NDArray[np.float32]  # (n, N, C)
    targets: NDArray[np.float32]  # (n, N, K), or (n, K) of whole series
    labels: NDArray[np.int64] | None = None  # (n,) indices into the classes of the process


def _at(
    times: NDArray[Any], values: NDArray[Any], targets: NDArray[Any], labels: Any = None
) -> Draw:
    """Series observed at the same ``(N,)`` times."""
    positions = np.broadcast_to(times[:, None], (len(values), len(times), 1))
    return Draw(positions, values.astype(np.float32), targets.astype(np.float32), labels)


def spirals(g: Generator, n: int, noise: float = 0.1) -> Draw:
    """Half of a spiral of 150 points over [0, 6π]: 75 noisy points in the plane, either way round.

    Anticlockwise from the inside, r = a + b·t about (5, 0); or clockwise, r = a + 50·b/z about
    (−5, 0) with z = 6π + 1 − t, in the order of rising z. The targets are the points without noise.
    """
    t = np.linspace(0, 6 * np.pi, 150)
    a, b = g.normal(0, 0.02, (n, 1)), g.normal(0.3, 0.02, (n, 1))
    z = (6 * np.pi + 1 - t)[::-1]
    inwards = g.integers(0, 2, n)  # (n,) 1 for clockwise
    out, back = a + b * t, a + 50 * b / z  # (n, 150) radii
    x = np.where(inwards[:, None], back * np.cos(z) - 5, out * np.cos(t) + 5)
    y = np.where(inwards[:, None], -back * np.sin(z), out * np.sin(t))
    clean = np.stack([x, y], axis=2)[:, :75]
    return _at(t[:75], clean + g.normal(0, noise, (n, 75, 2)), clean, inwards)


def rbf(g: Generator, n: int, noise: float = 0.1) -> Draw:
    """A smooth curve through ten normal numbers at 0.1 … 1, observed with noise at 50 times.

    Every point is a mean of the ten, weighted by exp(−120·distance²). The target is the curve itself.
    """
    t = 0.02 * np.arange(1, 51)
    curves = (g.normal(size=(n, 10)) @ rbf_weights(t).T)[:, :, None]
    return _at(t, curves + g.normal(0, noise, (n, 50, 1)), curves)


def rbf_weights(t: NDArray[Any]) -> NDArray[np.float64]:
    """``(N, 10)`` weights of the ten numbers in the curve at each of ``(N,)`` times."""
    weights: NDArray[np.float64] = np.exp(-120 * (t[:, None] - 0.1 * np.arange(1, 11)) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


def sines(g: Generator, n: int, noise: float = 0.1) -> Draw:
    """One or two tones of different whole frequencies, 1 to 24 Hz, at 100 times in a second.

    The target is the wave without noise; the label is the frequency, or that there are two.
    """
    t = np.linspace(0, 1, 100)
    tones = 1 + np.argsort(g.random((n, _TONES)), axis=1)[:, :2]  # (n, 2) Hz, without repetition
    loudness = g.uniform(0.5, 1, (n, 2))
    has_two = g.integers(0, 2, n)  # half of the series have one tone
    loudness[:, 1] *= has_two
    phases = g.uniform(0, 2 * np.pi, (n, 2))
    angles = 2 * np.pi * tones[:, :, None] * t + phases[:, :, None]  # (n, 2, 100)
    wave = (loudness[:, :, None] * np.sin(angles)).sum(axis=1)[:, :, None]
    labels = np.where(has_two == 1, _TONES, tones[:, 0] - 1)
    return _at(t, wave + g.normal(0, noise, (n, 100, 1)), wave, labels)


def positions(g: Generator, n: int) -> Draw:
    """Ten ones at random positions in (1, 50); the target is the position."""
    places = np.sort(g.uniform(1, 50, (n, 10)), axis=1)[:, :, None]
    return Draw(places, np.ones((n, 10, 1), dtype=np.float32), places.astype(np.float32))


def damped(g: Generator, n: int, noise: float = 0.1) -> Draw:
    """A damped wave, observed with noise at 60 random times in 10 s: exp(−t/d)·sin(2π·f·t + φ).

    The targets are of the whole series: the frequency f, 0.2 to 1 Hz, and the decay d, 2 to 10 s.
    """
    t = np.sort(g.uniform(0, 10, (n, 60)), axis=1)
    frequency, decay = g.uniform(0.2, 1, (n, 1)), g.uniform(2, 10, (n, 1))
    wave = np.exp(-t / decay) * np.sin(2 * np.pi * (frequency * t + g.random((n, 1))))
    values, targets = wave + g.normal(0, noise, wave.shape), np.hstack([frequency, decay])
    return Draw(t[:, :, None], values[:, :, None].astype("f4"), targets.astype("f4"))


def pendulum(g: Generator, n: int) -> Draw:
    """A damped pendulum with random kicks: 100 pictures of 24 × 24 pixels, with correlated noise.

    Angles follow ω' = 29.43·sin θ − 0.1·ω in steps of 1e-4, with a kick of N(0, 0.1²) every 0.01. The
    targets are sine and cosine of the angle.
    """
    theta, omega = g.uniform(0, 2 * np.pi, n), np.zeros(n)
    angles = np.empty((n, 100))
    for frame in range(100):
        for _ in range(100):
            omega += 1e-4 * (29.43 * np.sin(theta) - 0.1 * omega)
            theta += 1e-4 * omega
        omega += g.normal(0, 0.1, n)
        theta %= 2 * np.pi
        angles[:, frame] = theta - np.pi
    drawn = angles + g.normal(0, 1e-5, angles.shape)
    pictures = _rods(drawn).astype(np.float32)  # (n, 100, 576) whole numbers in 0 … 255
    clear = _signal_fraction(g, n)[:, :, None]
    seen = clear * pictures + (1 - clear) * g.uniform(0, 255, pictures.shape)
    targets = np.stack([np.sin(angles), np.cos(angles)], axis=2)
    return _at(np.arange(100.0), np.floor(seen), targets)


def _rods(angles: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Pictures ``(…, 576)`` of a rod from the middle to (sin, cos) of its angle.

    The rod is drawn hard-edged on a canvas of 128 × 128, 8 wide and 55 long from (64, 64), which is
    scaled down with the Lanczos filter.
    """
    scale = _CANVAS / _SIDE
    centres = (np.arange(_SIDE) + 0.5) * scale
    away = (np.arange(_CANVAS) + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0.0)
    smaller = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)  # (24, 128)
    side = np.arange(_CANVAS) - _CANVAS // 2
    x, y = np.meshgrid(side, side)  # (128, 128) each, from the middle
    flat = angles.reshape(-1)
    pictures = np.empty((len(flat), _SIDE, _SIDE), dtype=np.uint8)
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE, None, None]
        dx, dy = np.sin(part), np.cos(part)
        along, across = x * dx + y * dy, x * dy - y * dx
        canvas = (along >= 0) & (along <= 55) & (np.abs(across) <= 4)
        small = smaller @ canvas.astype(np.float32) @ smaller.T
        pictures[start : start + _AT_ONCE] = 255 * np.clip(small, 0, 1)
    return pictures.reshape(*angles.shape, _SIDE**2)


def _signal_fraction(g: Generator, n: int) -> NDArray[np.float64]:
    """``(n, 100)`` fraction of the image in the sum with noise; 1 for the first five frames."""
    walk = np.empty((n, 100))
    walk[:, 0] = g.random(n)
    steps = g.uniform(-0.2, 0.2, (n, 100))
    for k in range(1, 100):
        walk[:, k] = np.clip(walk[:, k - 1] + steps[:, k], 0, 1)
    low, high = g.uniform(0, 0.25, (n, 1)), g.uniform(0.75, 1, (n, 1))
    walk = np.clip((walk - low) / (high - low), 0, 1)
    walk[:, :5] = 1
    return walk


@dataclass(frozen=True)
class Process:
    """A random process: ``draw(generator, n_series)``, and the schema of its series."""

    draw: Callable[..., Draw]
    axes: tuple[PositionAxis, ...]
    channels: tuple[Channel, ...]
    targets: tuple[Channel, ...]
    classes: tuple[str, ...] = ()
    target_level: TargetLevel = "observation"


def _columns(*names: str) -> tuple[Channel, ...]:
    return tuple(Channel(name=name, unit="1") for name in names)


def _axis(name: str, unit: str) -> tuple[PositionAxis, ...]:
    return (PositionAxis(name=name, unit=unit),)


_PIXELS = _columns(*(f"y{k // _SIDE:02d}x{k % _SIDE:02d}" for k in range(_SIDE**2)))
_TONE_CLASSES = (*(f"{hz} Hz" for hz in range(1, _TONES + 1)), "two tones")
_ONE, _XY, _CLEAN_XY = _columns("value"), _columns("x", "y"), _columns("clean_x", "clean_y")
_TURNS = ("anticlockwise", "clockwise")
_WAVE = (Channel(name="frequency", unit="Hz"), Channel(name="decay", unit="s"))
PROCESSES = {
    "damped": Process(damped, _axis("time", "s"), _ONE, _WAVE, target_level="series"),
    "pendulum": Process(pendulum, _axis("time", "frame"), _PIXELS, _columns("sin", "cos")),
    "positions": Process(positions, _axis("place", "1"), _columns("one"), _columns("true_place")),
    "rbf": Process(rbf, _axis("time", "s"), _ONE, _columns("clean")),
    "sines": Process(sines, _axis("time", "s"), _ONE, _columns("clean"), _TONE_CLASSES),
    "spirals": Process(spirals, _axis("time", "1"), _XY, _CLEAN_XY, _TURNS),
}
_NOISY = ("damped", "rbf", "sines", "spirals")
"""Processes with a standard deviation of noise, 0.1 by default."""


class SyntheticConfig(SourceConfig):
    """Series of one process."""

    kind: Literal["synthetic"] = "synthetic"
    process: Literal["damped", "pendulum", "positions", "rbf", "sines", "spirals"]
    n_series: int = Field(gt=0)
    seed: int = Field(0, ge=0)
    noise: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Standard deviation of the noise; null: 0.1."""
    citation: str = "generated as in arXiv:2505.20535"
    licence: str = "generated; free of rights"

    @model_validator(mode="after")
    def _noise_can_be_chosen(self) -> Self:
        if self.noise is not None and self.process not in _NOISY:
            raise ValueError(
                f"the noise of {self.process} cannot be chosen; leave noise out, or take {_NOISY}"
            )
        return self

    def open(self, cache: Path) -> SyntheticSource:
        return SyntheticSource(self)


class SyntheticSource(Source):
    """The series of one process."""

    files: Mapping[str, str] = {}

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        if config.process == "damped":
            self.citation = ""
        self.config, process = config, PROCESSES[config.process]
        self.axes, self.channels = process.axes, process.channels
        self.classes, self.targets = process.classes, process.targets
        self.target_level = process.target_level

    def __length_hint__(self) -> int:
        return self.config.n_series

    def read(self) -> Iterator[RawSeries]:
        """Every series; series k depends on the process, the seed and k alone."""
        config = self.config
        noise = () if config.noise is None else (config.noise,)
        for start in range(0, config.n_series, _AT_ONCE):
            generator = np.random.default_rng([config.seed, start])
            drawn = PROCESSES[config.process].draw(generator, _AT_ONCE, *noise)
            for k in range(min(_AT_ONCE, config.n_series - start)):
                yield RawSeries(
                    id=f"{config.process}-{start + k:07d}",
                    positions=drawn.positions[k],
                    values=drawn.values[k],
                    targets=drawn.targets[k],
                    label=None if drawn.labels is None else self.classes[drawn.labels[k]],
                )

"""Synthetic series of the published experiments, re-derived: many at once, from one generator.

Every function draws ``n`` series and gives ``positions`` (n, N, D) float64, ``values`` (n, N, C)
float32 and, where there are classes, ``labels`` (n,) indices into them. All series of a recipe
have one length and regular positions; leave observations out with the data set's ``drop_rate``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from roma_core.data.schema import Channel, PositionAxis

Draw = tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.int64] | None]


@dataclass(frozen=True)
class Recipe:
    """How one kind of series is drawn, and what it consists of."""

    draw: Callable[[Generator, int], Draw]
    axes: tuple[PositionAxis, ...]
    channels: tuple[Channel, ...]
    classes: tuple[str, ...] = ()


def spirals(g: Generator, n: int) -> Draw:
    """Half of a spiral of 150 points over [0, 6π]: 75 noisy points in the plane, either way round.

    Anticlockwise from the inside, r = a + b·t about (5, 0); or clockwise, r = a + 50·b/z about
    (−5, 0) with z = 6π + 1 − t, in the order of rising z.
    """
    t = np.linspace(0, 6 * np.pi, 150)
    a, b = g.normal(0, 0.02, (n, 1)), g.normal(0.3, 0.02, (n, 1))
    z = (6 * np.pi + 1 - t)[::-1]
    inwards = g.integers(0, 2, n)  # (n,) 1 for clockwise
    out, back = a + b * t, a + 50 * b / z  # (n, 150) radii
    x = np.where(inwards[:, None], back * np.cos(z) - 5, out * np.cos(t) + 5)
    y = np.where(inwards[:, None], -back * np.sin(z), out * np.sin(t))
    points = np.stack([x, y], axis=2)[:, :75] + g.normal(0, 0.1, (n, 75, 2))
    times = np.broadcast_to(t[:75, None], (n, 75, 1))
    return times, points.astype(np.float32), inwards.astype(np.int64)


def rbf(g: Generator, n: int) -> Draw:
    """A smooth curve through ten normal numbers at 0.1 … 1, seen with noise at 50 times.

    Every point is a mean of the ten, weighted by exp(−120·distance²).
    """
    t = 0.02 * np.arange(1, 51)
    weights = np.exp(-120 * (t[:, None] - 0.1 * np.arange(1, 11)) ** 2)  # (50, 10)
    weights /= weights.sum(axis=1, keepdims=True)
    curves = g.normal(size=(n, 10)) @ weights.T + g.normal(0, 0.1, (n, 50))
    times = np.broadcast_to(t[:, None], (n, 50, 1))
    return times, curves[:, :, None].astype(np.float32), None


def sines(g: Generator, n: int) -> Draw:
    """One or two tones of different whole frequencies, 1 to 24 Hz, at 100 times in a second."""
    t = np.linspace(0, 1, 100)
    tones = 1 + np.argsort(g.random((n, 24)), axis=1)[:, :2]  # (n, 2) Hz, without repetition
    loudness = g.uniform(0.5, 1, (n, 2))
    loudness[:, 1] *= g.integers(0, 2, n)  # half of the series have one tone
    phases = g.uniform(0, 2 * np.pi, (n, 2))
    angles = 2 * np.pi * tones[:, :, None] * t + phases[:, :, None]  # (n, 2, 100)
    wave = (loudness[:, :, None] * np.sin(angles)).sum(axis=1) + g.normal(0, 0.1, (n, 100))
    times = np.broadcast_to(t[:, None], (n, 100, 1))
    return times, wave[:, :, None].astype(np.float32), None


def positions(g: Generator, n: int) -> Draw:
    """Ten ones at random places in (1, 50): whoever finds the places must read positions."""
    places = np.sort(g.uniform(1, 50, (n, 10)), axis=1)[:, :, None]
    return places, np.ones((n, 10, 1), dtype=np.float32), None


def pendulum(g: Generator, n: int) -> Draw:
    """A damped pendulum with random kicks: 100 pictures of 24 × 24 pixels, with correlated noise.

    Angles follow ω' = 29.43·sin θ − 0.1·ω in steps of 1e-4, with a kick of N(0, 0.1²) every 0.01.
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
    pictures = _rods(angles)  # (n, 100, 576) in 0 … 255
    clear = _clearness(g, n)[:, :, None]
    seen = clear * pictures + (1 - clear) * g.uniform(0, 255, pictures.shape)
    frames = np.broadcast_to(np.arange(100.0)[:, None], (n, 100, 1))
    return frames, seen.astype(np.float32), None


def _rods(angles: NDArray[np.float64]) -> NDArray[np.float32]:
    """Anti-aliased pictures ``(…, 576)`` of a rod from the middle: brightness falls off at its edge."""
    centres = (np.arange(24) + 0.5 - 12) / 12  # of the pixels; the picture spans [-1, 1]
    grid = np.meshgrid(centres, centres)  # (24, 24) each
    x, y = grid[0].reshape(-1), grid[1].reshape(-1)
    dx, dy = np.sin(angles)[..., None], np.cos(angles)[..., None]
    along = np.clip(x * dx + y * dy, 0, 55 / 64)
    distance = np.hypot(x - along * dx, y - along * dy)  # from the rod, whose half width is 4 / 64
    return (255 * np.clip(0.5 + (4 / 64 - distance) * 12, 0, 1)).astype(np.float32)


def _clearness(g: Generator, n: int) -> NDArray[np.float64]:
    """``(n, 100)`` share of the picture that shows through the noise; the first five are clear."""
    walk = np.empty((n, 100))
    walk[:, 0] = g.random(n)
    steps = g.uniform(-0.2, 0.2, (n, 100))
    for k in range(1, 100):
        walk[:, k] = np.clip(walk[:, k - 1] + steps[:, k], 0, 1)
    low, high = g.uniform(0, 0.25, (n, 1)), g.uniform(0.75, 1, (n, 1))
    walk = np.clip((walk - low) / (high - low), 0, 1)
    walk[:, :5] = 1
    return walk


def _time(unit: str = "s") -> tuple[PositionAxis, ...]:
    return (PositionAxis(name="time", unit=unit),)


def _value(*names: str, **unit: Any) -> tuple[Channel, ...]:
    return tuple(Channel(name=name, unit=unit.get("unit", "1")) for name in names)


RECIPES = {
    "pendulum": Recipe(
        pendulum, _time("frame"), _value(*(f"y{k // 24:02d}x{k % 24:02d}" for k in range(576)))
    ),
    "positions": Recipe(positions, (PositionAxis(name="place", unit="1"),), _value("one")),
    "rbf": Recipe(rbf, _time(), _value("value")),
    "sines": Recipe(sines, _time(), _value("value")),
    "spirals": Recipe(spirals, _time("1"), _value("x", "y"), ("anticlockwise", "clockwise")),
}

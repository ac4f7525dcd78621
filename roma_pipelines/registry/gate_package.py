"""The part of the gate that reads what was measured of the package and of the data."""

from __future__ import annotations

from roma_core.evaluation.measured import Measured
from roma_pipelines.registry.gate import (
    MAX_SERVING_DIFFERENCE,
    GateCheck,
    GateThresholds,
    unset,
)


def package_checks(measured: Measured, thresholds: GateThresholds) -> list[GateCheck]:
    """The checks ``golden_rows`` to ``no_leak``."""
    return [
        _golden_rows(measured),
        _serving_parity(measured),
        _latency(measured, thresholds),
        _size(measured, thresholds),
        _no_leak(measured),
    ]


def _golden_rows(measured: Measured) -> GateCheck:
    trial = measured.trial
    if trial is None:
        text = f"the package failed in a fresh process: {measured.trial_problem}"
        return GateCheck(name="golden_rows", passed=False, explanation=text)
    return GateCheck(
        name="golden_rows",
        passed=True,
        value=trial.golden_difference,
        explanation=f"golden rows differ by at most {trial.golden_difference:.1e} in a fresh process",
    )


def _serving_parity(measured: Measured) -> GateCheck:
    value = measured.serving_difference
    return GateCheck(
        name="serving_parity",
        passed=value <= MAX_SERVING_DIFFERENCE,
        value=value,
        threshold=MAX_SERVING_DIFFERENCE,
        explanation=f"trained model and package differ by at most {value:.1e}; at most "
        f"{MAX_SERVING_DIFFERENCE} is allowed",
    )


def _latency(measured: Measured, thresholds: GateThresholds) -> GateCheck:
    if measured.trial is None:
        return GateCheck(name="latency", passed=False, explanation="not measured: it does not run")
    value, most = measured.trial.latency_ms, thresholds.max_latency_ms
    passed, said = True, f"{value:.2f} ms a series"
    if most is not None:
        passed = value <= most
        said += f"; at most {most:g}"
    champion, ratio = measured.champion_trial, thresholds.max_latency_ratio
    if champion is not None and ratio is not None:
        times = value / champion.latency_ms
        passed = passed and times <= ratio
        said += (
            f"; {times:.2f} times the champion's {champion.latency_ms:.2f} ms, at most {ratio:g}"
        )
    elif most is None:
        return unset("latency", said)
    return GateCheck(name="latency", passed=passed, value=value, threshold=most, explanation=said)


def _size(measured: Measured, thresholds: GateThresholds) -> GateCheck:
    value, most = measured.size_mb, thresholds.max_size_mb
    said = f"the package has {value:.2f} MB"
    if most is None:
        return unset("size", said)
    return GateCheck(
        name="size",
        passed=value <= most,
        value=value,
        threshold=most,
        explanation=f"{said}; at most {most:g}",
    )


def _no_leak(measured: Measured) -> GateCheck:
    n = len(measured.leaks)
    return GateCheck(
        name="no_leak",
        passed=n == 0,
        value=float(n),
        threshold=0.0,
        explanation="; ".join(measured.leaks[:3]) + (f"; and {n - 3} more" if n > 3 else "")
        if n
        else "no group, object or equal content is in test and in what was trained on",
    )

"""A clinical set of known ceiling: ten quantities of different scales and rates, 40 % missing.

    python -m tests.benchmarks.clinical FOLDER [--objects 4000] [--seed 0]

Writes ``visits.parquet`` (a row per visit: patient, hours, a column per quantity, gaps empty) and
``patients.parquet`` (patient, outcome, age, sex), and prints the AUROC of the exact likelihood ratio,
which no model can exceed on average, beside that of summary features with gradient boosting.

Quantity q of a patient of class y at hour t is Gaussian:

    scale_q (base_q + u_q + (v_q + y trend_q) t / 48 + noise),   u, v, noise independent N(0, ·)

Age is Gaussian and sex Bernoulli, each shifted by y, and each is missing for some patients.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = (
    "hr",
    "sbp",
    "temp",
    "spo2",
    "lactate",
    "creatinine",
    "wbc",
    "platelets",
    "bilirubin",
    "ph",
)
SCALES = np.array([12, 18, 0.6, 2.5, 1.3, 0.5, 4.0, 80, 0.8, 0.06])  # in the quantity's unit
BASES = np.array([6.5, 6.6, 61.6, 38.4, 1.2, 2.0, 2.2, 2.9, 1.0, 123.0])  # in scales
# fraction of the visits at which a quantity is measured: vital signs often, laboratory values rarely
RATES = np.array([0.95, 0.95, 0.85, 0.9, 0.45, 0.4, 0.4, 0.4, 0.35, 0.35])
TRENDS = np.array([0.5, -0.5, 0.0, -0.3, 0.7, 0.6, 0.3, -0.5, 0.0, -0.4])  # of class 1, in scales
LEVEL_STD, TREND_STD, NOISE_STD = 0.8, 0.7, 0.6  # of u, v and the noise
PREVALENCE = 0.3
AGE = (62.0, 12.0, 4.0)  # mean, standard deviation, shift of class 1
SEX = (0.5, 0.58)  # chance of "m" in class 0 and 1
COVARIATE_MISSING = 0.15


@dataclass(frozen=True)
class Patients:
    """Objects of the set: B patients of up to N visits."""

    outcome: NDArray[np.int64]  # (B,)
    age: NDArray[np.float64]  # (B,), NaN where missing
    is_male: NDArray[np.float64]  # (B,) 0, 1, or NaN where missing
    hours: list[NDArray[np.float64]]  # (N,) of each
    values: list[NDArray[np.float64]]  # (N, 10) of each, in scales, NaN where missing


def draw(n: int, seed: int) -> Patients:
    g = np.random.default_rng([seed, n])
    outcome = (g.random(n) < PREVALENCE).astype(np.int64)
    age = AGE[0] + AGE[2] * outcome + AGE[1] * g.standard_normal(n)
    is_male = (g.random(n) < np.array(SEX)[outcome]).astype(np.float64)
    for covariate in (age, is_male):
        covariate[g.random(n) < COVARIATE_MISSING] = np.nan
    hours, values = [], []
    for y in outcome.tolist():
        n_visits = int(g.integers(6, 25))
        t = np.sort(g.uniform(0, 48, n_visits))
        level = LEVEL_STD * g.standard_normal(10)
        trend = TREND_STD * g.standard_normal(10) + y * TRENDS
        x = BASES + level + trend * t[:, None] / 48
        x += NOISE_STD * g.standard_normal(x.shape)
        x[g.random(x.shape) >= RATES] = np.nan
        kept = ~np.isnan(x).all(1)
        hours.append(np.round(t[kept], 3))
        values.append(x[kept])
    return Patients(outcome, np.round(age, 1), is_male, hours, values)


def log_likelihood_ratio(patients: Patients) -> NDArray[np.float64]:
    """``(B,)`` exact log p(data | class 1) - log p(data | class 0), what is missing left out."""
    mean, std, shift = AGE
    ratio = np.nan_to_num(shift * (patients.age - mean - shift / 2) / std**2)
    male = np.where(
        patients.is_male == 1, np.log(SEX[1] / SEX[0]), np.log((1 - SEX[1]) / (1 - SEX[0]))
    )
    ratio += np.where(np.isnan(patients.is_male), 0.0, male)
    for b, (hours, values) in enumerate(zip(patients.hours, patients.values, strict=True)):
        for q in range(10):
            seen = ~np.isnan(values[:, q])
            t, x = hours[seen] / 48, values[seen, q] - BASES[q]
            covariance = (
                LEVEL_STD**2 + TREND_STD**2 * np.outer(t, t) + NOISE_STD**2 * np.eye(len(t))
            )
            difference = TRENDS[q] * t  # of the means of the two classes
            weights = np.linalg.solve(covariance, difference)
            ratio[b] += weights @ (x - difference / 2)
    return ratio


def summary_features(patients: Patients) -> NDArray[np.float64]:
    """``(B, F)`` per quantity: count, mean, spread, extremes, first, last and slope; covariates."""
    rows = []
    for hours, values in zip(patients.hours, patients.values, strict=True):
        row = []
        for q in range(10):
            seen = ~np.isnan(values[:, q])
            t, x = hours[seen], values[seen, q]
            if not len(x):
                row += [0.0] + [np.nan] * 7
                continue
            slope = np.polyfit(t, x, 1)[0] if len(x) > 1 else np.nan
            row += [len(x), x.mean(), x.std(), x.min(), x.max(), x[0], x[-1], slope]
        rows.append(row)
    return np.column_stack([np.array(rows), patients.age, patients.is_male])


def write(patients: Patients, folder: Path) -> None:
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(hours) for hours in patients.hours]
    names = np.array([f"p{b:05d}" for b in range(len(lengths))])
    visits = pd.DataFrame(np.concatenate(patients.values) * SCALES, columns=list(NAMES))
    visits.insert(0, "hours", np.concatenate(patients.hours))
    visits.insert(0, "patient", np.repeat(names, lengths))
    visits.to_parquet(folder / "visits.parquet", index=False)
    sex = np.where(patients.is_male == 1, "m", "f").astype(object)
    sex[np.isnan(patients.is_male)] = None
    columns = {"patient": names, "outcome": patients.outcome, "age": patients.age, "sex": sex}
    pd.DataFrame(columns).to_parquet(folder / "patients.parquet", index=False)


def main() -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objects", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    patients = draw(arguments.objects, arguments.seed)
    write(patients, arguments.folder)
    values = np.concatenate(patients.values)
    print(f"{len(values):,} visits, {np.isnan(values).mean():.0%} of the values missing")
    ceiling = roc_auc_score(patients.outcome, log_likelihood_ratio(patients))
    print(f"exact likelihood ratio, all patients: AUROC {ceiling:.4f}")
    features, n_train = summary_features(patients), int(0.8 * arguments.objects)
    model = HistGradientBoostingClassifier(random_state=0)
    model.fit(features[:n_train], patients.outcome[:n_train])
    scores = model.predict_proba(features[n_train:])[:, 1]
    print(
        f"summary features, last 20 %: AUROC {roc_auc_score(patients.outcome[n_train:], scores):.4f}"
    )


if __name__ == "__main__":
    main()

"""Few irregular series, made up: the estimators' defaults beside simple models of summary features.

    python -m tests.benchmarks.few_series [--seeds 0 1 2] [--sets clinical periods] [--trainer JSON]

``clinical``: four channels measured at times of their own for two days; the class depends on two slopes and
a level, by chance. 200 training series, 1,000 test series. ``periods``: three shapes of one channel with
a period of 4 to 12 in 50; 300 and 900. A seed is that of the model; the series are always the same.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from roma_core.estimators import RoMAClassifier


def clinical(n):
    g, series, labels = np.random.default_rng(1), [], []
    for _ in range(n):
        levels, slopes, rows = g.normal(size=4), g.normal(size=4), []
        for channel, rate in enumerate((12, 5, 3, 8)):
            at = np.sort(g.uniform(0, 48, g.poisson(rate)))
            noise = 0.5 * g.normal(size=len(at))
            values = np.full((len(at), 4), np.nan)
            values[:, channel] = levels[channel] + slopes[channel] * (at - 24) / 24 + noise
            rows.append(np.column_stack([at, values]))
        table = np.concatenate(rows)
        table = table[np.argsort(table[:, 0], kind="stable")]
        odds = 2 * (2 * slopes[0] - 1.5 * slopes[3] + levels[1] - 0.5)
        series.append((table[:, 0], table[:, 1:]))
        labels.append(int(g.uniform() < 1 / (1 + np.exp(-odds))))
    return series, np.array(labels)


def periods(n):
    g, series = np.random.default_rng(2), []
    for k in range(n):
        at = np.sort(g.uniform(0, 50, g.integers(30, 60)))
        phase = (at / np.exp(g.uniform(np.log(4), np.log(12))) + g.uniform()) % 1
        shapes = np.sin(2 * np.pi * phase), 2 * phase - 1, np.where(phase < 0.12, -1.0, 0.3)
        values = g.normal() + np.exp(0.3 * g.normal()) * shapes[k % 3]
        series.append((at, (values + 0.15 * g.normal(size=len(at)))[:, None]))
    return series, np.arange(n) % 3


SETS = {"clinical": (clinical, 200, 1200), "periods": (periods, 300, 1200)}


def summary(series):
    """Of every channel: count, mean, deviation, least, largest, first, last, slope."""
    rows = []
    for at, values in series:
        row = [len(at), np.ptp(at)]
        for column in values.T:
            seen = ~np.isnan(column)
            x, t = column[seen], at[seen]
            slope = np.polyfit(t - t.mean(), x, 1)[0] if len(x) > 1 else np.nan
            known = [x.mean(), x.std(), x.min(), x.max(), x[0], x[-1], slope] if len(x) else []
            row += [len(x), *known, *[np.nan] * (7 - len(known))]
        rows.append(row)
    return np.array(rows)


def scores(probabilities, labels):
    """Accuracy, AUROC (the mean over classes) and log loss, as text."""
    of_second = probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities
    area = roc_auc_score(labels, of_second, multi_class="ovr")
    accuracy = accuracy_score(labels, probabilities.argmax(axis=1))
    return f"{accuracy:.3f}  {area:.3f}  {log_loss(labels, probabilities):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--trainer", type=json.loads, default={}, help="fields of TrainerConfig")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = {"l1_ratios": (0,), "scoring": "neg_log_loss", "use_legacy_attributes": False}
    linear = LogisticRegressionCV(max_iter=2000, **plain)
    linear = make_pipeline(SimpleImputer(), StandardScaler(), linear)
    beside = {"logistic regression": linear}
    beside["gradient boosting"] = HistGradientBoostingClassifier(random_state=0)
    print("accuracy, AUROC, log loss")
    for name in options.sets:
        make, n_train, n = SETS[name]
        series, labels = make(n)
        known, asked = summary(series[:n_train]), summary(series[n_train:])
        for method, model in beside.items():
            found = model.fit(known, labels[:n_train]).predict_proba(asked)
            print(f"{name}  {scores(found, labels[n_train:])}  {method}", flush=True)
        for seed in options.seeds:
            start = time.perf_counter()
            model = RoMAClassifier(random_state=seed, trainer=options.trainer, verbose=False)
            model.fit(series[:n_train], labels[:n_train])
            found = model.predict_proba(series[n_train:])
            took = f"seed {seed}, {time.perf_counter() - start:.0f} s"
            print(f"{name}  {scores(found, labels[n_train:])}  {took}", flush=True)


if __name__ == "__main__":
    main()

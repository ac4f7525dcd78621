"""Estimators of scikit-learn: what X may be, the package, folders, and scikit-learn's own checks."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import polars
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from roma_core import RoMAClassifier, RoMAImputer, RoMARegressor
from roma_core.data import StoredDataset
from roma_core.serving.pyfunc_model import open_package
from roma_core.trainer.job import train
from tests.core.hand_made import built, series

STACK = {"d_model": 16, "nhead": 2, "depth": 1}
TINY = {
    "model": {
        "encoder_config": STACK,
        "decoder_config": STACK,
        "value_features": 0,
        "neighbours": 0,
    },
    "trainer": {"epochs": 1},
    "random_state": 0,
    "verbose": False,
}
N, C = 24, 2


def irregular():
    """Series of 3 to 8 times, some without the value of a channel; classes 3 and 7."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 2 * 4 + 3
    X = [rng.normal(k, size=(int(m), C)) for k, m in zip(y, rng.integers(3, 9, N), strict=True)]
    for one in X[::3]:
        one[1, 0] = np.nan
    return X, y


def padded(X):
    """As aeon has them, (n, C, times), with NaN after the end."""
    array = np.full((len(X), C, max(map(len, X))), np.nan)
    for row, one in zip(array, X, strict=True):
        row[:, : len(one)] = one.T
    return array


def wide(frame, one):
    return frame({"time": np.arange(len(one)), "c02": one[:, 1], "c01": one[:, 0]})


def long(frame, one):
    time, channel = np.divmod(np.arange(one.size), C)
    return frame({"value": one.ravel(), "channel": [f"c0{k + 1}" for k in channel], "time": time})


@pytest.fixture(scope="module")
def classifier():
    return RoMAClassifier(pretrain=False, **TINY).fit(*irregular())


@pytest.fixture(scope="module")
def imputer():
    return RoMAImputer(**TINY).fit(irregular()[0])


@pytest.mark.parametrize("fields", [{"neighbours": 2}, {"window": 0}])
def test_dense_series_have_windows_unless_the_model_is_asked_for_what_excludes_them(
    fields, monkeypatch
):
    found = []

    def stop(_task, _dataset, model, trainer, **_):
        found.append((model.get("window", 0), trainer.encoder_lr_scale))
        raise KeyboardInterrupt

    monkeypatch.setattr("roma_core.estimators.TrainingJobConfig.resolve", stop)
    dense = np.random.default_rng(0).normal(size=(N, C, 70))
    for model in ({}, fields):
        with pytest.raises(KeyboardInterrupt):
            RoMAClassifier(pretrain=False, verbose=False, model=model).fit(dense, np.arange(N) % 2)
    assert found == [(8, 0.03), (0, 1.0)]


@pytest.mark.parametrize("here, used", [(1, 1), (3, 3), (64, 8)])
def test_a_fit_uses_the_threads_of_torch(here, used, monkeypatch):
    found = []

    def stop(_task, _dataset, _model, trainer, **_):
        found.append(trainer.threads)
        raise KeyboardInterrupt

    monkeypatch.setattr("roma_core.estimators.TrainingJobConfig.resolve", stop)
    monkeypatch.setattr("torch.get_num_threads", lambda: here)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    with pytest.raises(KeyboardInterrupt):
        RoMAClassifier(pretrain=False, verbose=False).fit(*irregular())
    assert found == [used]


FORMS = {
    "times and values": lambda X: [(np.arange(len(one)), one) for one in X],
    "array": padded,
    "wide frames": lambda X: [wide(pd.DataFrame, one) for one in X],
    "long frames": lambda X: [long(pd.DataFrame, one) for one in X],
    "polars": lambda X: [wide(polars.DataFrame, one) for one in X],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_series_gives_the_same_probabilities(classifier, form):
    X, _ = irregular()
    expected = classifier.predict_proba(X)
    assert np.ptp(expected, axis=0).min() > 0.01  # they do differ
    np.testing.assert_allclose(classifier.predict_proba(FORMS[form](X)), expected, atol=1e-6)


def test_it_predicts_what_its_package_serves_wherever_it_is_loaded(classifier, tmp_path):
    X, y = irregular()
    expected = classifier.predict_proba(X)
    classifier.save(tmp_path / "package")
    columns = [dict(zip(["c01", "c02"], one.T.tolist(), strict=True)) for one in X]
    rows = [
        {"positions": {"time": range(len(one))}, "values": by_name}
        for one, by_name in zip(X, columns, strict=True)
    ]
    served = open_package(tmp_path / "package").predict(rows)
    np.testing.assert_array_equal([[*one.probabilities.values()] for one in served], expected)
    for other in (
        RoMAClassifier.load(tmp_path / "package"),
        pickle.loads(pickle.dumps(classifier)),
    ):
        np.testing.assert_array_equal(other.predict_proba(X), expected)
        np.testing.assert_array_equal(other.transform(X), classifier.transform(X))
        assert other.classes_.tolist() == [3, 7]
        assert other.score(X, y) == np.mean(classifier.predict(X) == y)
    assert classifier.transform(X).shape == (N, 16)
    with pytest.raises(ValueError, match="of kind classifier, expected a regressor"):
        RoMARegressor.load(tmp_path / "package")
    with pytest.raises(FileExistsError):
        classifier.save(tmp_path / "package")


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (pd.DataFrame({"time": [0.0]}), "pass a frame for each"),
        ([np.zeros((4, 2)), np.zeros((2, 4))], r"X\[1\] has 4 channels, expected .* pass x.T"),
        ([pd.DataFrame({"t": [0.0], "c01": [1.0]})], "expected 'time' and one per channel"),
        (
            [pd.DataFrame({"time": [0.0], "hr": [1.0]})],
            r"channels \['hr'\], expected \['c01', 'c02'\]",
        ),
        ([(np.arange(3), np.zeros((4, 2)))], r"times of shape \(3,\) and values of shape \(4, 2\)"),
        ([np.full((4, 2), "a")], r"X\[0\] must hold numbers"),
        ([np.full((4, 2), np.inf)], "finite numbers, got inf"),
        ([np.full((4, 2), np.nan)], "expected 1 to 4096 observations, got 0"),
        (np.zeros((2, 3, 4)), "has 3 channels"),
        ([], "X holds no series"),
    ],
)
def test_series_that_cannot_be_predicted_are_named(classifier, X, message):
    with pytest.raises(ValueError, match=message):
        classifier.predict(X)


@pytest.mark.parametrize(
    ("changes", "y", "message"),
    [
        ({}, None, "requires y"),
        ({}, np.full(N, 1), "two or more classes"),
        ({}, np.arange(N) / 7, "continuous"),
        ({}, np.arange(5), "inconsistent numbers of samples"),
        ({"model": {"d_model": 16}}, None, "d_model"),
        ({"trainer": {"epoch": 1}}, None, "epoch"),
        ({"validation_fraction": 1.5}, None, "validation_fraction"),
        ({"pretrain": "nowhere"}, None, "nowhere has no model"),
    ],
)
def test_a_wrong_setting_is_an_error_before_anything_is_trained(changes, y, message):
    X, labels = irregular()
    model = RoMAClassifier(**{"pretrain": False, **TINY, **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.fit(X, labels if changes else y)


def test_no_series_need_be_kept_for_validation():
    X, labels = irregular()
    model = RoMAClassifier(**TINY, pretrain=False, validation_fraction=0).fit(X, labels)
    assert model.predict_proba(X).shape == (N, len(model.classes_))


def test_a_channel_that_never_changed_is_not_far_from_training():
    X, labels = irregular()
    X = [np.column_stack([one, np.full(len(one), 0.1)]) for one in X]
    model = RoMAClassifier(**TINY, pretrain=False).fit(X, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.predict(X)


def test_a_metric_of_labels_is_not_one_of_pretraining_and_has_its_mode(monkeypatch):
    X, labels = irregular()
    chosen, begun = {"best_metric": "eval/macro_f1", "final_weights": "best"}, []

    def recorded(job, *more):
        begun.append(json.loads(job.config.read_text())["trainer"])
        return train(job, *more)

    monkeypatch.setattr("roma_core.estimators.train", recorded)
    model = RoMAClassifier(**TINY | {"trainer": TINY["trainer"] | chosen}, pretrain=True)
    assert model.fit(X, labels).score(X, labels) > 0
    modes = [(one["best_metric"], one["best_metric_mode"]) for one in begun]
    assert modes == [("eval/loss", "min"), ("eval/macro_f1", "max")]


def test_fields_of_pretraining_ask_for_one_and_few_dense_series_alone_for_none(monkeypatch):
    begun = []

    def trained(self, root, task, *_):
        begun.append(task)
        raise KeyboardInterrupt

    monkeypatch.setattr(RoMAClassifier, "_trained", trained)
    X = np.random.default_rng(0).normal(size=(12, 1, 80)).astype(np.float32)
    y = ["a", "b"] * 6
    for given in (
        {},
        {"pretrain": False, "model": {"mask_ratio": 0.5}},
        {"model": {"mask_ratio": 0.5}},
        {"model": {"window": 0}},
        {"pretrain": True},
    ):
        with pytest.raises(KeyboardInterrupt):
            RoMAClassifier(**given, verbose=False).fit(X, y)
    assert begun == ["finetune"] * 2 + ["pretrain"] * 3


def test_searches_and_cross_validation_take_it():
    X, y = irregular()
    model = RoMAClassifier(pretrain=False, **TINY)
    search = GridSearchCV(model, {"trainer": [{"epochs": 1}]}, cv=2, n_jobs=2, refit=False)
    assert np.isfinite(search.fit(X, y).cv_results_["mean_test_score"]).all()
    # what aeon's loops do with its arrays and labels of text
    labels = np.array([f"class {k}" for k in y])
    scores = cross_val_score(clone(model), padded(X), labels, cv=2, n_jobs=2)
    assert np.isfinite(scores).all() and scores.shape == (2,)


def test_a_folder_is_trained_on_and_scored_by_its_own_splits(tmp_path):
    some = [series(f"{k}", 6 + k % 3, "xy"[k % 2], ("train", "test")[k > 9], k) for k in range(14)]
    folder = built(tmp_path, *some)
    model = RoMAClassifier(pretrain=False, **TINY).fit(folder)
    found, test = model.predict(folder), StoredDataset(folder).split("test")
    assert [one.label for one in some[10:]] == ["x", "y", "x", "y"] and len(test) == 4
    assert model.score(folder) == np.mean(found == np.array(["x", "y", "x", "y"]))
    assert model.channels_ == ["a", "b"]


def test_a_regressor_predicts_in_the_units_of_y_from_pretrained_weights():
    X, y = irregular()
    targets = np.stack([1e4 + y, -1e-3 * y], axis=1)
    model = RoMARegressor(**TINY).fit(padded(X), targets)
    found = model.predict(X)
    assert found.shape == (N, 2)
    deviations = (found - targets.mean(axis=0)) / targets.std(axis=0)
    assert 0 < np.abs(deviations).max() < 5  # of a model that was hardly trained
    assert model.transform(X).shape == (N, 16)


def test_an_imputer_fills_what_is_missing_and_only_that(imputer):
    X, _ = irregular()
    frames = [wide(pd.DataFrame, one) for one in X]
    array = padded(X)
    filled = imputer.transform(array)
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[~np.isnan(array)], array[~np.isnan(array)])
    lists, of_frames = imputer.transform(X), imputer.transform(frames)
    for one, given, frame in zip(lists, X, of_frames, strict=True):
        assert one.shape == given.shape and np.isfinite(one).all()
        assert list(frame) == ["time", "c02", "c01"]
        np.testing.assert_array_equal(frame[["c01", "c02"]], one)
    assert np.isnan(X[0][1, 0]) and imputer.score(X) <= 1
    assert imputer.transform([np.ones((3, 2))])[0].tolist() == np.ones((3, 2)).tolist()


def test_a_classifier_starts_from_the_weights_of_an_imputer(imputer, tmp_path):
    X, y = irregular()
    imputer.save(tmp_path / "encoder")
    still = {**TINY, "trainer": {"epochs": 1, "base_lr": 1e-12}}
    models = [RoMAClassifier(pretrain=p, **still) for p in (tmp_path / "encoder", False)]
    a, b = (model.fit(X, y).transform(X) for model in models)
    assert np.abs(a - b).max() > 0.01
    other = {**TINY, "model": {"encoder_config": {"d_model": 32}}}
    with pytest.raises(ValueError, match="d_model=32 contradicts"):
        RoMAClassifier(pretrain=tmp_path / "encoder", **other).fit(X, y)


A_ROW_IS_A_SERIES = "a row of a 2-D array is a series of any length; n_features_in_ counts channels"
EXCLUDED = {
    "check_n_features_in": A_ROW_IS_A_SERIES,
    "check_n_features_in_after_fitting": A_ROW_IS_A_SERIES,
    "check_transformer_general": A_ROW_IS_A_SERIES,
    "check_classifiers_train": A_ROW_IS_A_SERIES,
    "check_classifier_data_not_an_array": "one DataFrame may be one series or many, and is refused",
    "check_array_api_input": "needs SCIPY_ARRAY_API",
    "check_methods_subset_invariance": "rounding of float32 depends on the batch, by 1.5e-7",
}
PASSED_BY_HAND = (  # each trains a model or several, which takes seconds
    "check_estimators_overwrite_params", "check_dont_overwrite_parameters", "check_dtype_object",
    "check_estimators_fit_returns_self", "check_readonly_memmap_input", "check_fit_score_takes_y",
    "check_positive_only_tag_during_fit", "check_estimators_dtypes", "check_pipeline_consistency",
    "check_f_contiguous_array_estimator", "check_estimators_pickle", "check_classifiers_classes",
    "check_transformer_preserve_dtypes", "check_methods_sample_order_invariance",
    "check_fit_check_is_fitted", "check_fit2d_1feature",
    "check_supervised_y_2d", "check_fit2d_predict1d",
    "check_transformer_data_not_an_array",
)  # fmt: skip


def checks():
    for estimator, check in estimator_checks_generator(RoMAClassifier(pretrain=False, **TINY)):
        if (name := check.func.__name__) not in (*EXCLUDED, *PASSED_BY_HAND):
            yield pytest.param(estimator, check, id=name)


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learn_finds_an_estimator(estimator, check):
    check(estimator)


def test_the_notebook_runs_and_its_models_work(tmp_path, monkeypatch, capsys):
    """Its cells in order, as committed: without outputs."""
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    file = Path(__file__).parents[2] / "docs/notebooks/irregular_series.ipynb"
    cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)

    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)

    r2, accuracy = (float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines())
    assert r2 > 0.6 and accuracy > 0.9
    assert len(names["plt"].get_fignums()) == 3
    names["plt"].close("all")

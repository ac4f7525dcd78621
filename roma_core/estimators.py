"""scikit-learn estimators: from irregular series to a score in three lines.

    model = RoMAClassifier().fit(X, y)
    model.score(X_test, y_test)

``X`` holds n series of C channels:

* a list with an entry per series: an array of ``(m, C)`` numbers, or ``(m,)`` of one channel, at the
  times 0, 1, 2, …; a tuple ``(times, values)``; or a frame of pandas or polars with the columns ``time``
  and one per channel, or ``time``, ``channel`` and ``value``;
* an array ``(n, C, m)``, as aeon and sktime have it, or ``(n, m)`` of one channel;
* the path of a data set that this project built: ``fit`` takes its splits train and validation with their
  labels or targets, ``predict``, ``transform`` and ``score`` its split test.

NaN, or null, is a missing value. Series may differ in length and times; a time without any value, such as
padding, is left out. Dates count in seconds since 1970. Settings are chosen by the amount of data, as for
a new experiment of the pipeline; predictions are those of the package that a registry serves. ``fit``
raises ValueError if data or settings cannot be used. Importing this module imports no torch.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from roma_core.data.build import build_dataset
from roma_core.data.config import DatasetConfig
from roma_core.data.infer_schema import source_statistics, suggest_options
from roma_core.data.store import StoredDataset, raw_series
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.evaluation.drift import reference_profile
from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_core.model.config import (
    OF_PRETRAINING,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    merged,
    read_config,
    stored_fields,
)
from roma_core.progress import Progress
from roma_core.schema import Channel, PositionAxis
from roma_core.serving.pyfunc_model import Package, Series, open_package
from roma_core.sources.in_memory import Floats, Table, is_path, series_of, tables_of, with_values
from roma_core.sources.npz import NpzConfig
from roma_core.trainer.config import MAX_THREADS, TrainerConfig
from roma_core.trainer.defaults import DatasetSize, DefaultSettings, default_settings
from roma_core.trainer.job import (
    MODEL_OUTPUT,
    TrainingJobConfig,
    grid_of_split,
    observed_of_split,
    train,
    validation_metric,
)

Task = Literal["pretrain", "finetune"]
_CONFIGS = RoMAForPreTrainingConfig, RoMAForClassificationConfig
_OF_VALIDATION = ("final_weights", "early_stopping_patience")
_FEW = 5  # series of a class that a stratified split needs
_N_GOLDEN = 10
_HIDDEN = 0.2  # fraction of the observations that the score of an imputer is of


class _Estimator(BaseEstimator):
    """Training, package and saving of the three estimators."""

    _kind: Literal["classifier", "regressor", "autoencoder"]

    def __init__(
        self,
        *,
        pretrain: bool | str | os.PathLike[str] | None = None,
        model: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.1,
        random_state: Any = None,
        verbose: bool = True,
    ) -> None:
        self.pretrain, self.model, self.trainer = pretrain, model, trainer
        self.validation_fraction = validation_fraction
        self.random_state, self.verbose = random_state, verbose

    def save(self, folder: Path | str) -> None:
        """Write the package of the model into a new folder; FileExistsError if there is one.

        ``roma predict --model FOLDER`` takes it. ``mlflow.pyfunc.log_model`` registers it with
        ``artifacts={"package": FOLDER}`` and ``python_model=roma_core.serving.package.MODEL_CODE``.
        """
        check_is_fitted(self)
        self.package_.write(Path(folder))

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """A fitted estimator, with default parameters, from a package of ``save`` or of the pipeline.

        Raises:
            PackageError: a file was changed, or a stored prediction is not reproduced.
            ValueError: it is a model of another kind.
        """
        if (kind := open_package(Path(folder)).kind) != cls._kind:
            raise ValueError(f"{folder} holds a model of kind {kind}, expected a {cls._kind}")
        return cls()._use(Path(folder))

    def _use(self, folder: Path) -> Self:
        self.package_ = _Served({path.name: path.read_bytes() for path in folder.iterdir()})
        self.channels_ = [channel["name"] for channel in self.package_.package.channels]
        self.n_features_in_ = len(self.channels_)
        return self

    def _fit(self, X: Any, facts: dict[str, str], **arrays: NDArray[Any]) -> Self:
        """``arrays``: ``labels`` or ``targets`` of the series, as a source of kind npz has them."""
        import torch

        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        n_threads = torch.get_num_threads()
        try:
            with TemporaryDirectory(prefix="roma-") as name, torch.random.fork_rng():
                root, weights = Path(name), None
                folder = Path(X) if is_path(X) else self._built(root, seed, X, arrays)
                dataset = StoredDataset(folder, verify=is_path(X))
                if not isinstance(self.pretrain, bool | None):
                    weights = _weights(Path(self.pretrain), root / "encoder")
                defaults = self._defaults(dataset, weights)
                is_new = weights is None and "pretraining" in defaults.trainings
                if is_new or self._kind == "autoencoder":
                    weights = self._trained(root, "pretrain", dataset, seed, weights, defaults)
                if self._kind != "autoencoder":
                    weights = self._trained(root, "finetune", dataset, seed, weights, defaults)
                assert weights is not None
                return self._use(self._packed(root / "package", weights, dataset, facts))
        finally:
            torch.set_num_threads(n_threads)  # the trainer sets it

    def _built(self, root: Path, seed: int, X: Any, arrays: Mapping[str, Any]) -> Path:
        """The folder of a data set of these series, in train and validation."""
        tables, channels = tables_of(X)
        lengths = [len(times) for times, _ in tables]
        times, values = (np.concatenate(parts) for parts in zip(*tables, strict=True))
        with np.errstate(over="ignore"):  # infinite then, which is refused
            arrays = {"values": values.astype(np.float32), "positions": times, **arrays}
        file = root / "series.npz"
        np.savez(file, offsets=np.cumsum([0, *lengths]), **arrays)
        n_targets = arrays["targets"].shape[1] if "targets" in arrays else 0
        source = NpzConfig(
            file=file,
            axes=(PositionAxis(name="time", unit="1"),),
            channels=tuple(Channel(name=name, unit="1") for name in channels),
            targets=tuple(Channel(name=f"target{k + 1}", unit="1") for k in range(n_targets)),
            target_level="series" if n_targets else "observation",
        )
        statistics = source_statistics(source.open(root))
        options, _ = suggest_options(statistics)
        options["repair"] = {"duplicates": "mean"}
        if (found := statistics.repairs) is not None and found.duplicate_observations:
            warnings.warn("values at equal times of one series: their mean is taken", stacklevel=4)
        if min(statistics.classes.values(), default=0) >= _FEW:
            options["split"] = {"stratified": True}
        options |= {"validation_fraction": self.validation_fraction, "test_fraction": 0}
        config = DatasetConfig(name=f"seed-{seed}", source=source, **options)
        return build_dataset(config, root, root, progress=False)

    def _defaults(self, dataset: StoredDataset, weights: Path | None) -> DefaultSettings:
        """For this data set, and finetuning without the fields that weights or pretraining determine."""
        schema, split = dataset.schema, dataset.split("train")
        n_axes = sum(not axis.n_embedded for axis in schema.axes)
        asked = self.model or {}
        excludes = asked.get("neighbours") or asked.get("value_features")
        excludes = excludes or asked.get("pos_encoding") == "absolute" or len(schema.axes) > 1
        has_windows = asked.get("window", 1) and not excludes
        if weights is not None:
            has_windows = stored_fields(read_config(weights))["window"]
        grid = grid_of_split(split) if has_windows else None
        on_grid = (0.0, 1.0) if grid is None else (grid.fill, observed_of_split(split))
        amount = len(split), int(split.lengths.sum()), schema.n_values, max(1, n_axes)
        size = DatasetSize(*amount, *on_grid)
        asks = weights is not None or self._kind == "autoencoder" or self.pretrain is True
        asks |= self.pretrain is None and not asked.keys().isdisjoint(OF_PRETRAINING)
        pretrains = asks or (None if self.pretrain is None else False)
        return default_settings(size, "series" if self._kind == "regressor" else None, pretrains)

    def _trained(
        self,
        root: Path,
        task: Task,
        dataset: StoredDataset,
        seed: int,
        weights: Path | None,
        defaults: DefaultSettings,
    ) -> Path:
        """The folder of the weights of a training that starts from these, or from new ones."""
        import torch

        fields = [set(config.model_fields) for config in _CONFIGS]
        own, other = fields if task == "pretrain" else fields[::-1]
        # the run is not resumed: no checkpoint is needed but that of the best weights
        fixed = {"random_seed": seed, "save_every": 10**9, "log_wandb": False}
        fixed["threads"] = min(MAX_THREADS, torch.get_num_threads())
        stage = defaults.trainings["pretraining" if task == "pretrain" else "finetuning"]
        model, trainer = stage["model"], stage["trainer"] | fixed
        if self._kind == "autoencoder":
            model = {"predict_variance": True} | model
        if task == "finetune":
            problem = "regression" if self._kind == "regressor" else "classification"
            model = model | {"problem_type": problem}
            metric, _, is_defined = validation_metric(dataset.path, problem)
            if is_defined and "best_metric" not in trainer:
                trainer["best_metric"] = f"eval/{metric}"
        if not len(dataset.split("validation")):
            trainer = {n: x for n, x in trainer.items() if n not in _OF_VALIDATION}
        before_finetuning = task == "pretrain" and self._kind != "autoencoder"
        skipped = ("best_metric", "best_metric_mode") * before_finetuning  # it logs the loss alone
        trainer |= {n: x for n, x in (self.trainer or {}).items() if n not in skipped}
        is_loss = trainer.get("best_metric", "eval/loss") == "eval/loss"
        trainer.setdefault("best_metric_mode", "min" if is_loss else "max")
        trainer.setdefault("keep_best", int(trainer.get("final_weights") == "best"))
        # an unknown field goes to both configurations, which refuse it
        given = {n: x for n, x in (self.model or {}).items() if n in own or n not in other}
        config = TrainingJobConfig.resolve(
            task, dataset.path, merged(model, given), TrainerConfig(**trainer), weights=weights
        )
        job = JobFolder(root / task)
        attempt = job.attempt(1)
        attempt.path.mkdir(parents=True)
        write_json(job.config, config.model_dump(mode="json"))
        work = train(job, attempt, partial(Progress, shown=bool(self.verbose)))
        if work.status != "completed":
            raise KeyboardInterrupt(work.reason)
        return job.path / MODEL_OUTPUT

    def _packed(
        self, folder: Path, weights: Path, dataset: StoredDataset, facts: dict[str, str]
    ) -> Path:
        """The folder of the package that serves these weights, as an evaluation writes it."""
        from roma_core.evaluation.packaging import write_package
        from roma_core.model.prediction import RoMAForClassification
        from roma_core.model.pretraining import RoMAForPreTraining

        split, golden, role = dataset.split("train"), list[Series](), "classifier"
        model_class: type[RoMAForClassification | RoMAForPreTraining] = RoMAForClassification
        if self._kind == "autoencoder":
            few = raw_series(split, range(min(_N_GOLDEN, len(split))))
            golden = [Series(**one, queries=one["positions"]) for one in few]
            model_class, role = RoMAForPreTraining, "autoencoder"
        config = EvaluationJobConfig(
            name=type(self).__name__,
            dataset=str(dataset.path),
            dataset_digest=dataset.manifest.digest,
            lineage=facts,
            **{role: str(weights)},
        )
        model = model_class.from_pretrained(weights)
        write_package(config, model, split, reference_profile(dataset), folder, golden)
        return folder

    def _outputs(self, X: Any, features: bool = False) -> Floats:
        """``(n, K)`` outputs of the package, or features of its encoder."""
        check_is_fitted(self)
        package = self.package_.encoder if features else self.package_.package
        if is_path(X):
            test = StoredDataset(X).split("test")
            return package.outputs(raw_series(test, range(len(test))))
        return package.outputs(_row(package, *one) for one in _tables(X, package)[0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.three_d_array = True
        tags.target_tags.multi_output = self._kind == "regressor"
        return tags


class _Scored(TransformerMixin):
    """Features and score of a classifier or a regressor."""

    def transform(self: Any, X: Any) -> Floats:
        """Features ``(n, d_model)`` of the finetuned encoder: the mean over the tokens of a series."""
        return self._outputs(X, features=True)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy, or R², the mean over targets; without y on the test split of a folder."""
        if is_path(X):
            dataset: Any = StoredDataset(X)
            rows, classes = dataset.split("test").indices, np.array(dataset.schema.classes)
            is_classifier = isinstance(self, ClassifierMixin)
            y = classes[dataset.labels[rows]] if is_classifier else dataset.series_targets[rows]
        return super().score(X, y, sample_weight)


class RoMAClassifier(_Scored, ClassifierMixin, _Estimator):
    """Classes of irregular series; :mod:`roma_core.estimators` says what ``X`` may be.

        model = RoMAClassifier(random_state=0).fit(X, y)
        model.predict_proba(X_test)

    Args:
        pretrain: pretrain an autoencoder on the same series first (True), start from new weights
            (False), or from those in a folder: ``outputs/model`` of a pretraining, or what
            :meth:`RoMAImputer.save` wrote, for the same channels. None pretrains, unless they are fewer
            than 1000 series of windows (``model.window``), which are learnt better from new weights, and
            ``model`` has no field of pretraining alone.
        model: fields of ``RoMAForPreTrainingConfig`` and ``RoMAForClassificationConfig`` in place of
            those chosen, such as ``{"encoder_config": {"depth": 6}, "mask_ratio": 0.5}``.
        trainer: fields of ``TrainerConfig``, such as ``{"epochs": 20}``; pretraining has no ``best_metric``.
        validation_fraction: of the series, in [0, 1); the weights that were best on them are taken,
            but of fewer than 1000 series of windows.
        random_state: int, ``RandomState`` or None; one int gives one model on one computer.
        verbose: show progress bars on stderr.

    Attributes:
        classes_: ``(K,)``, sorted.
        channels_, n_features_in_: names of the channels, and their number.
    """

    _kind = "classifier"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on n series and ``(n,)`` classes of any type; without y on a data set's folder."""
        if is_path(X):
            return self._fit(X, {})
        labels = column_or_1d(_required(y), warn=True)
        check_classification_targets(labels)
        check_consistent_length(series_of(X), labels)
        classes, index = np.unique(labels, return_inverse=True)
        names = [str(one).strip() for one in classes.tolist()]
        if len(names) < 2 or len({*names, ""}) <= len(names):
            got = f"{len(names)} class{'es' * (len(names) > 1)}: {names[:8]}"
            raise ValueError(f"y must hold two or more classes of different names, got {got}")
        facts = {"classes": json.dumps(classes.tolist())}
        return self._fit(X, facts, labels=np.array(names)[index])

    def _use(self, folder: Path) -> Self:
        names = super()._use(folder).package_.package.classes
        facts = json.loads(self.package_.files["package.json"])["facts"]
        self.classes_ = np.array(json.loads(facts.get("classes", json.dumps(names))))
        self._order = [names.index(str(one).strip()) for one in self.classes_.tolist()]
        return self

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities ``(n, K)`` in the order of ``classes_``."""
        return self._outputs(X)[:, self._order]

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of every series, ``(n,)``."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]


class RoMARegressor(_Scored, RegressorMixin, _Estimator):
    """Numbers of whole series; parameters and ``X`` are those of :class:`RoMAClassifier`.

    model = RoMARegressor(random_state=0).fit(X, y)
    model.predict(X_test)
    """

    _kind = "regressor"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on n series and ``(n,)`` or ``(n, K)`` numbers; without y on a data set's folder."""
        if is_path(X):
            return self._fit(X, {})
        y = check_array(_required(y), ensure_2d=False, dtype=np.float64, input_name="y")
        check_consistent_length(series_of(X), y)
        return self._fit(X, {}, targets=y.reshape(len(y), -1))

    def predict(self, X: Any) -> Floats:
        """``(n,)`` in the unit of y, or ``(n, K)`` of several targets."""
        outputs = self._outputs(X)
        outputs = outputs[:, : len(self.package_.package.targets)]
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs


class RoMAImputer(TransformerMixin, _Estimator):
    """Missing values of irregular series, predicted by a masked autoencoder.

        complete = RoMAImputer(random_state=0).fit(X).transform(X)

    Parameters and ``X`` are those of :class:`RoMAClassifier`; with a folder in ``pretrain`` training
    continues from its weights. Methods but ``fit`` take no data-set folder.
    """

    _kind = "autoencoder"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on n series; y is ignored."""
        return self._fit(X, {})

    def transform(self, X: Any) -> Any:
        """A copy of X, in the form it came, with a prediction in place of every missing value."""
        check_is_fitted(self)
        tables, channels = _tables(X, self.package_.package)
        rows = [np.isnan(values).any(axis=1) for _, values in tables]
        for table, lacking, predicted in zip(
            tables, rows, self._predicted(tables, rows), strict=True
        ):
            part = table[1][lacking]
            table[1][lacking] = np.where(np.isnan(part), predicted, part)
        filled = [with_values(*one, channels) for one in zip(series_of(X), tables, strict=True)]
        is_list = not isinstance(X, np.ndarray) or X.dtype == object
        return filled if is_list else np.stack([one.T for one in filled])

    def score(self, X: Any, y: Any = None) -> float:
        """R², the mean over channels, of a fifth of the observations, predicted from the others."""
        check_is_fitted(self)
        tables, _ = _tables(X, self.package_.package)
        generator, rows = np.random.default_rng(0), []
        for _, values in tables:
            seen = generator.permutation(np.flatnonzero(~np.isnan(values).all(axis=1)))
            rows.append(np.isin(np.arange(len(values)), seen[: int(_HIDDEN * len(seen))]))
        parts = zip(tables, rows, strict=True)
        true = np.concatenate([values[hidden] for (_, values), hidden in parts])
        for (_, values), hidden in zip(tables, rows, strict=True):
            values[hidden] = np.nan
        found, known = np.concatenate(self._predicted(tables, rows)), ~np.isnan(true)
        return float(np.mean([r2_score(true[k, c], found[k, c]) for c, k in enumerate(known.T)]))

    def _predicted(self, tables: list[Table], rows: list[Any]) -> list[Floats]:
        """Predictions ``(Q, C)`` at Q rows, by ``(m,)`` bool, of every series."""
        package, requests = self.package_.package, []
        for table, asked in zip(tables, rows, strict=True):
            queries = {package.axes[0]["name"]: table[0][asked]}
            requests += [_row(package, *table) | {"queries": queries}] if asked.any() else []
        answers = iter(package.predict(requests) if requests else ())
        found = [[*next(answers).mean.values()] if asked.any() else [] for asked in rows]
        return [np.array(one, np.float64).reshape(len(package.channels), -1).T for one in found]


class _Served:
    """Name → content of a package's files, and what was loaded from them; pickles the files alone."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __reduce__(self) -> Any:
        return _Served, (self.files,)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    @cached_property
    def package(self) -> Package:
        with TemporaryDirectory(prefix="roma-") as name:
            return Package(self.write(Path(name, "package")))

    @cached_property
    def encoder(self) -> Package:
        """The same with the features of the encoder as outputs."""
        from roma_core.model.backbone import PaddedModel
        from roma_core.model.prediction import RoMAForClassification

        with TemporaryDirectory(prefix="roma-") as name:
            folder = _weights(self.write(Path(name, "package")), Path(name, "weights"))
            model = RoMAForClassification.from_pretrained(folder).eval()
        package = copy.copy(self.package)
        package.kind, package.is_classifier, package.targets = "encoder", False, {}
        package.n_outputs = model.config.encoder_config.d_model
        package._program = PaddedModel(model)
        return package


def _required(y: Any) -> Any:
    if y is None:
        raise ValueError("fit requires y to be passed, but the target y is None")
    return y


def _weights(folder: Path, aside: Path) -> Path:
    """A folder of weights, or ``aside`` with a copy of those in the folder of a package."""
    if not (folder / "weights.safetensors").exists():
        return folder
    shutil.copytree(folder, aside)
    (aside / "weights.safetensors").rename(aside / "model.safetensors")
    return aside


def _tables(X: Any, package: Package) -> tuple[list[Table], list[str]]:
    """Every series with the channels of the package, and their names."""
    if len(package.axes) > 1 or package.covariates:
        raise ValueError("a model with several axes or covariates takes data-set folders only")
    return tables_of(X, package.axes[0]["name"], [one["name"] for one in package.channels])


def _row(package: Package, times: Floats, values: Floats) -> dict[str, Any]:
    """The observed times of a table as a series of a request."""
    seen = ~np.isnan(values).all(axis=1)
    names = [channel["name"] for channel in package.channels]
    columns = dict(zip(names, values[seen].T, strict=True))
    positions = {package.axes[0]["name"]: times[seen]}
    return {"positions": positions, "values": columns, "units": package.units}

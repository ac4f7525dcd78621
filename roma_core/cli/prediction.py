"""``roma predict``: classify series with a registered model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from roma_core.serving.schema import Series

_AT_ONCE = 1000
_FACTS = ("split", "label", "group")  # columns of `roma data export` that are no input of a model


@click.command()
@click.option(
    "--model",
    required=True,
    help="Registered model, e.g. models:/japanese_vowels@champion, or a package folder.",
)
@click.option(
    "--tracking-uri",
    envvar="MLFLOW_TRACKING_URI",
    default="sqlite:///.roma/mlflow/mlflow.db",
    show_default=True,
    help="MLflow server or store that knows the model.",
)
@click.option(
    "--split",
    default="test",
    show_default=True,
    type=click.Choice(["train", "validation", "test"]),
    help="Series to take if INPUT is a data set.",
)
@click.argument("input", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def predict(model: str, tracking_uri: str, split: str, input: Path, output: Path) -> None:
    """Classify the series of INPUT and write one row each to OUTPUT (Parquet).

    INPUT is a data-set folder, a Parquet file with one row per series (a list column per position
    axis and per channel, optionally `id`), such as `roma data export` writes, or a .jsonl file of {"positions": {…}, "values": {…}}.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    from roma_core.serving.logged_model import Classifier, InvalidSeries, PackageError
    from roma_core.serving.logged_model import Series as LoggedSeries

    try:
        folder, version = _package_of(model, tracking_uri)
        classifier = Classifier.open(folder)
        series = list(_series_of(input, split, classifier))
        rows: list[dict[str, Any]] = []
        for start in tqdm(
            range(0, len(series), _AT_ONCE), desc="predict", unit="k series", disable=None
        ):
            part = [LoggedSeries(**s.model_dump()) for s in series[start : start + _AT_ONCE]]
            for prediction in classifier.predict(part):
                rows.append(prediction.model_dump() | {"model": model, "model_version": version})
    except (InvalidSeries, PackageError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if not rows:
        raise click.ClickException(f"{input} holds no series")
    for row in rows:
        row["probabilities"] = list(row["probabilities"].items())
    probability = pa.map_(pa.string(), pa.float64())
    table = pa.table(
        {
            "id": pa.array([r["id"] for r in rows], pa.string()),
            "label": pa.array([r["label"] for r in rows], pa.string()),
            "probabilities": pa.array([r["probabilities"] for r in rows], probability),
            "model": pa.array([r["model"] for r in rows], pa.string()),
            "model_version": pa.array([r["model_version"] for r in rows], pa.string()),
        }
    )
    pq.write_table(table, output)
    click.echo(f"{len(rows)} series classified by {model} (version {version}): {output}")


def _package_of(model: str, tracking_uri: str) -> tuple[Path, str]:
    """The package folder behind a model's name, and the version."""
    if not model.startswith("models:/"):
        return Path(model), "-"
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    try:
        name, _, alias = model.removeprefix("models:/").partition("@")
        version = (
            mlflow.MlflowClient().get_model_version_by_alias(name, alias).version
            if alias
            else name.rpartition("/")[2]
        )
        path = mlflow.artifacts.download_artifacts(model)
    except MlflowException as error:
        raise ValueError(f"{model} is not in {tracking_uri}: {error.message}") from error
    return Path(path) / "artifacts" / "package", str(version)


def _series_of(path: Path, split: Any, classifier: Any) -> Iterator[Series]:
    from roma_core.serving.schema import Series

    if path.is_dir():
        from roma_core.data.series import raw_series
        from roma_core.data.store import StoredDataset

        subset = StoredDataset(path).split(split)
        yield from (Series(**s) for s in raw_series(subset, range(len(subset))))
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        axes = [axis["name"] for axis in classifier.axes]
        channels = [channel["name"] for channel in classifier.channels]
        known = [name for name in _FACTS if name not in channels]
        for batch in pq.ParquetFile(path).iter_batches(_AT_ONCE):
            for row in batch.to_pylist():
                name = row.pop("id", None)
                for fact in known:
                    row.pop(fact, None)
                yield Series(
                    id=None if name is None else str(name),
                    positions={axis: row.pop(axis) for axis in axes if axis in row},
                    values=row,
                )
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                yield Series(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    else:
        raise ValueError(f"{path}: expected a data-set folder, .parquet or .jsonl")

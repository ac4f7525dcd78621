"""Settings of a new experiment chosen from the data, and its commented ``defs.yaml``."""

from __future__ import annotations

import glob
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from roma_core.data.infer_schema import (
    ColumnRoles,
    SourceStatistics,
    infer_source,
    source_statistics,
    suggest_options,
)
from roma_core.data.infer_tables import InferredSource
from roma_core.data.manifest import SPLITS
from roma_core.data.splits import SplitOptions, Splitter
from roma_core.files import write_bytes
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.sources.base import RawSeries, kinds, source_config
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import (
    DatasetSize,
    DefaultSettings,
    cost_s,
    default_settings,
    primary_metric,
)
from roma_pipelines.experiment import COMPONENT, Experiment, not_shipped, read_yaml
from roma_pipelines.storage import project_folder

_FEW = 5  # objects of a class that a stratified split needs
_VALIDATION_FRACTION, _TEST_FRACTION = 0.1, 0.2
_IN_VALIDATION = 3  # objects of the rarest class, where it has so many
_LACKS = "with these groups a split lacks a class; another name of the experiment splits otherwise"
_GROUP_FRACTIONS = ((_TEST_FRACTION, _VALIDATION_FRACTION), (0.2, 0.15), (0.25, 0.2), (0.3, 0.25))


@dataclass
class NewExperiment:
    """The file of a new experiment."""

    name: str
    text: str  # content of defs.yaml
    notes: list[str]  # how the files were read, what they contain, which settings were chosen
    warnings: list[str]  # findings to check before results are used

    @property
    def path(self) -> Path:
        return project_folder() / "defs" / self.name / "defs.yaml"

    def write(self, force: bool = False) -> None:
        """Write the file; ValueError if it exists and ``force`` is False, or a shipped one does."""
        if not_shipped(self.name, self.path).exists() and not force:
            raise ValueError(f"{self.path} exists; choose another name, or replace it with --force")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, self.text.encode())


def _source_of(
    words: Sequence[str], roles: ColumnRoles, objects: Path | None
) -> tuple[InferredSource, dict[str, Any]]:
    """The source that ``--source`` names, and the data set's settings from a YAML file."""
    if len(words) == 1 and words[0] in kinds() and not Path(words[0]).exists():
        return InferredSource({"kind": words[0]}, [f"source: {words[0]}"]), {}
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        document = read_yaml(Path(words[0]))
        if not isinstance(document, dict) or "source" not in document:
            raise ValueError(f"{words[0]}: expected the settings of a data set with a `source`")
        document.pop("name", None)
        source = document.pop("source")
        return InferredSource(source, [f"source and settings of {words[0]}"]), document
    paths = []
    for word in words:
        if len(words) == 1 and Path(word).is_dir():
            return infer_source([Path(word).absolute()], roles, objects and objects.absolute()), {}
        found = sorted(glob.glob(word))  # noqa: PTH207 - may be absolute
        if not found:
            raise ValueError(f"no file matches {word} in {Path.cwd()}; correct --source")
        paths += [Path(path).absolute() for path in found]
    return infer_source(paths, roles, None if objects is None else objects.absolute()), {}


def new_experiment(
    name: str,
    words: Sequence[str],
    roles: ColumnRoles,
    *,
    cache: Path,
    objects: Path | None = None,
    drop_rate: float | None = None,
    target: str = "local",
) -> NewExperiment:
    """Read the data and choose settings of an experiment.

    Args:
        words: files, patterns or a folder; or one YAML file as for ``roma data build``; or the kind
            of a source that needs no file.
        roles: columns of tables given by option.
        cache: folder for downloads of the source.
        objects: a second table with one row per object.

    Raises:
        ValueError: the data cannot be used, or the name or a setting is invalid.
    """
    inferred, dataset = _source_of(words, roles, objects)
    if drop_rate is not None:
        dataset["drop_rate"] = drop_rate
    source = source_config(inferred.config).open(cache)
    found = source_statistics(source)
    categorical = frozenset(
        a.name for a in source.axes if a.categories or a.unit.startswith("index of ")
    )
    proposal = propose(found, categorical, name, predicts_targets=bool(roles.targets))
    section = {"source": inferred.config, **inferred.dataset, **proposal.dataset, **dataset}
    proposal.warnings[:0] = inferred.warnings
    n_sorted = found.repairs.series_sorted if found.repairs else 0
    if n_sorted and source.axes[0].unit == "s" and found.axes[0].max_abs < 86400:
        proposal.warnings.append(
            f"{source.axes[0].name} is less than a day, and not ascending in {n_sorted:,} series, which are "
            f"sorted by it: if it is a time of day that passes midnight, join it with the date"
        )
    text = _text(name, inferred, found, proposal, section, target)
    Experiment.model_validate(yaml.safe_load(text)["attributes"])  # the written file must load
    notes = [*inferred.notes, _amount(found), *proposal.reasons, *proposal.sizes.reasons.values()]
    notes += [f"task: {proposal.task}; primary metric: {proposal.metric}", _cost(proposal)]
    return NewExperiment(name, text, notes, proposal.warnings)


@dataclass
class Proposal:
    """Chosen settings."""

    task: Literal["classification", "regression"]
    dataset: dict[str, Any]  # besides its source
    sizes: DefaultSettings
    metric: str  # the primary one that `auto` is for these data, and the reason
    reasons: list[str]  # a sentence for each choice in `dataset`
    warnings: list[str]  # findings to check before results are used


def propose(
    statistics: SourceStatistics,
    categorical: frozenset[str] = frozenset(),
    name: str = "data",
    *,
    predicts_targets: bool = False,
) -> Proposal:
    """Splits, repairs, axes, channels and sizes that suit the data.

    Args:
        categorical: axes whose positions are indices of categories.
        name: of the data set, which the split depends on.
        predicts_targets: whether targets were asked for, even if there are classes.

    Raises:
        ValueError: there are no targets, and no labels, or only one class.
    """
    classes = [name for name, count in statistics.classes.items() if count]
    targets = statistics.targets if predicts_targets or len(classes) < 2 else ()
    if not targets and len(classes) < 2:
        these = f"only {classes[0]!r}" if classes else "no labels"
        raise ValueError(
            f"a classifier needs series of at least two classes, and these have {these}; pass --label or "
            f"--target-column"
        )
    dataset, reasons = _dataset_settings(statistics, categorical, name)
    fraction = 1 - dataset.get("test_fraction", 0.0)
    if statistics.recorded_splits:
        fraction = statistics.recorded_splits.get("train", 0) / statistics.n_series
    fraction *= 1 - dataset["validation_fraction"]
    size = DatasetSize(
        n_series=max(1, round(statistics.n_series * fraction)),
        n_observations=max(1, round(statistics.n_observations * fraction)),
        n_channels=1 if statistics.layout == "per_channel" else len(statistics.channels),
        n_axes=max(1, len(statistics.axes) - len(categorical)),
        grid_fill=0.0
        if categorical or statistics.layout == "per_channel"
        else statistics.grid_fill,
        observed=statistics.observed,
    )
    warnings = [*_warnings(statistics), *(_LACKS for reason in reasons if _LACKS in reason)]
    if targets:
        metric = f"r2; of {', '.join(targets)}, of every {statistics.target_level}"
        settings = default_settings(size, statistics.target_level)
        return Proposal("regression", dataset, settings, metric, reasons, warnings)
    metric = "; ".join(primary_metric("auto", {n: statistics.classes[n] for n in classes}))
    return Proposal("classification", dataset, default_settings(size), metric, reasons, warnings)


def _dataset_settings(
    statistics: SourceStatistics, categorical: frozenset[str], name: str
) -> tuple[dict[str, Any], list[str]]:
    """Split, repairs, axes and channels, with a sentence for each choice."""
    dataset: dict[str, Any] = {}
    fractions = {"validation_fraction": _VALIDATION_FRACTION}
    counts = statistics.recorded_splits
    if {"train", "test"} <= counts.keys():
        sizes = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if split in counts)
        reasons = [f"published split: {sizes}"]
        if "validation" in counts:
            fractions["validation_fraction"] = 0.0
    else:
        fractions["test_fraction"] = _TEST_FRACTION
        if statistics.classes_of_group:
            test, validation, reason = _group_fractions(name, statistics.classes_of_group)
            fractions = {"validation_fraction": validation, "test_fraction": test}
            reasons = [f"split by group: {reason}"]
        elif not statistics.classes:
            reasons = ["split by a hash of the id"]
        elif min(statistics.classes.values()) >= _FEW:
            dataset["split"] = {"stratified": True}
            reasons = ["split stratified by class"]
            rare = min(statistics.classes.values()) * (1 - _TEST_FRACTION)  # objects outside test
            if rare * _VALIDATION_FRACTION < _IN_VALIDATION:
                fractions["validation_fraction"] = round(min(0.25, _IN_VALIDATION / rare), 2)
                reasons = ["split stratified by class; the rarest needs a larger validation split"]
        else:
            reasons = [f"split by a hash of the id: some classes have fewer than {_FEW} objects"]
    if statistics.classes_of_group:
        dataset["split"] = {"by": "group"}
    dataset |= fractions
    options, more = suggest_options(statistics, categorical)
    return dataset | options, reasons + more


def _group_fractions(
    name: str, classes_of_group: Mapping[str, set[str | None]]
) -> tuple[float, float, str]:
    """Fractions of test and validation with which every split has every class, and a sentence."""
    none = np.empty((0, 1))
    n_classes = len(set().union(*classes_of_group.values()))
    for test, validation in _GROUP_FRACTIONS:
        splitter = Splitter(name, SplitOptions(by="group"), validation, test)
        found = set()
        for group, classes in classes_of_group.items():
            series = RawSeries(group, none, none.astype(np.float32), group=group)
            found |= {(splitter.assign(series), label) for label in classes}
        if len(found) == 3 * n_classes:
            return test, validation, "no group is in two splits"
    return (_TEST_FRACTION, _VALIDATION_FRACTION, _LACKS)


def _warnings(statistics: SourceStatistics) -> list[str]:
    found = [
        f"{channel.name} never changes within a series: a property of the object rather than a "
        f"measurement, and possibly label leakage; remove it unless it is known at prediction time"
        for channel in statistics.channels
        if not channel.varies
    ]
    if statistics.n_single:
        found.append(
            f"{statistics.n_single:,} of {statistics.n_series:,} series have one observation: nothing "
            f"can be hidden in them, so pretraining leaves them out"
        )
    rare = [name for name, count in statistics.classes.items() if count < _FEW]
    if rare:
        found.append(
            f"classes with fewer than {_FEW} objects: {', '.join(rare[:8])}; their metrics will be "
            f"unreliable"
        )
    repairs, most = statistics.repairs, 0.2 * statistics.n_observations
    if repairs and repairs.observations_not_finite > most:
        found.append(
            "more than a fifth of the observations have no time, or an infinite number, and are dropped"
        )
    if repairs and (n := repairs.duplicate_observations) > most:
        found.append(
            f"{n / (n + statistics.n_observations):.0%} of the rows are at the position of another of their "
            f"object, and merged by the mean: is a column that tells them apart missing (--object, --axis, --quantity)?"
        )
    return found


def _text(
    name: str,
    inferred: InferredSource,
    found: SourceStatistics,
    proposal: Proposal,
    dataset: Mapping[str, Any],
    target: str,
) -> str:
    sizes = proposal.sizes
    reasons = dict(sizes.reasons)
    of_finetuning, of_pretraining = [reasons.pop("finetuning")], [reasons.pop("pretraining")]
    of_first = of_pretraining if "pretraining" in sizes.trainings else of_finetuning
    of_first[:0] = reasons.values()  # it has the fields of input and encoder
    resources = {"target": target, "nodes": 1, "processes_per_node": 1}
    of_task = [f"of the gate and reports: {proposal.metric}"]
    is_regression = proposal.task == "regression"
    body = [
        _block({"name": name, "description": f"{_amount(found)}."}, []),
        *([_block({"task": proposal.task}, of_task)] if is_regression else []),
        _block({"owners": []}, ["e-mail addresses or team:NAME"]),
        _block({"dataset": dict(dataset)}, [*inferred.notes, *proposal.reasons]),
        _block({"pretraining": sizes.trainings.get("pretraining")}, of_pretraining),
        _block({"finetuning": sizes.trainings["finetuning"]}, of_finetuning),
        _block(
            {"resources": resources},
            [
                "where jobs run; slurm and kubernetes take a profile, and stages sections of their own"
            ],
        ),
        *([] if is_regression else [_block({"primary_metric": "auto"}, of_task)]),
        _block(
            {"gate": {"max_primary_drop": 0.02}},
            ["largest accepted loss against the champion; min_primary: 0.9 adds a lower bound"],
        ),
        '# schedule: "0 3 * * 1"   # retrain every Monday at 03:00 UTC, once it is switched on',
    ]
    head = [f"# {_amount(found)}. {_cost(proposal)}."]
    head += [f"# WARNING: {warning}" for warning in proposal.warnings]
    lines = [line for part in head for line in _wrapped(part)]
    attributes = textwrap.indent("\n\n".join(body), "  ")
    return "\n".join([*lines, f"type: {COMPONENT}", "", "attributes:", attributes, ""])


def _block(values: Mapping[str, Any], comments: Sequence[str]) -> str:
    """``values`` as YAML under comments; innermost mappings and lists on one line."""
    lines = [line for comment in comments for line in _wrapped(f"# {comment}")]
    for key, value in values.items():
        flow = None if isinstance(value, dict | list) else False
        options = {"sort_keys": False, "width": 96, "allow_unicode": True}
        lines.append(yaml.safe_dump({key: value}, default_flow_style=flow, **options).rstrip())
    return "\n".join(lines)


def _wrapped(comment: str) -> list[str]:
    return textwrap.wrap(comment, 96, subsequent_indent="#   ", break_long_words=False)


def _amount(found: SourceStatistics) -> str:
    of = f"{len(found.classes)} classes"
    if not found.classes:
        of = f"{len(found.targets)} target{'s' if len(found.targets) > 1 else ''}"
    return (
        f"{found.n_series:,} series of {of}, {found.n_observations:,} "
        f"observations of {len(found.channels)} channel{'s' if len(found.channels) > 1 else ''}, "
        f"{found.n_observations / found.n_series:.0f} a series, {found.max_length} at most"
    )


def _cost(proposal: Proposal) -> str:
    sizes = proposal.sizes
    data = {"n_channels": sizes.size.n_channels, "n_pos_dims": sizes.size.n_axes, "grid_step": 1.0}
    fields = {n: x for n, x in sizes.shape.items() if n in RoMAForPreTrainingConfig.model_fields}
    shape = RoMAForPreTrainingConfig.from_values({**fields, "tubelet_size": (1, 1, 1), **data})
    seconds = sum(
        cost_s(stage, shape, TrainerConfig.from_values(training["trainer"]), sizes.size)
        for stage, training in sizes.trainings.items()
    )
    steps, minutes = sum(sizes.steps.values()), max(1, round(seconds / 60))
    both = "Both trainings" if "pretraining" in sizes.trainings else "The training"
    return f"{both}: about {steps:,} steps, {minutes:,} min on one CPU core"

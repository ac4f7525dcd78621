"""A new experiment's ``defs.yaml``: a survey of the data in, a commented file out.

What a survey of somebody's data suggests for an experiment, each with its reason.
"""

from __future__ import annotations

import glob
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from roma_core.data.infer_schema import (
    AxisSurvey,
    ChannelSurvey,
    Guess,
    Roles,
    Survey,
    guess_source,
    survey,
)
from roma_core.files import write_bytes
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.sources.base import Source, kinds, source_config
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import Amount, Sizes, finetuning_s, pretraining_s, sizes_for
from roma_pipelines.experiment import Experiment


@dataclass
class NewExperiment:
    """The file of an experiment, and what was seen on the way.

    Attributes:
        text: of ``defs.yaml``.
        said: how the files were read, what they hold and what was chosen.
        warnings: what deserves a look before a result is believed.
    """

    name: str
    text: str
    said: list[str]
    warnings: list[str]


def source_of(
    words: Sequence[str], roles: Roles, objects: Path | None = None
) -> tuple[Guess, dict[str, Any]]:
    """What ``--source`` names, and settings of the data set that a YAML file brings along.

    Args:
        words: files, patterns or a folder; or one YAML file as ``roma data build`` takes it; or the
            kind of a source that needs nothing else.
        roles: columns of tables that are named.
        objects: a second table, with a row per object.

    Raises:
        ValueError: there is no such file, or it cannot be told what it is.
    """
    if len(words) == 1 and words[0] in kinds() and not Path(words[0]).exists():
        return Guess({"kind": words[0]}, [f"source: {words[0]}"]), {}
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return _described(Path(words[0]))
    paths = []
    for word in words:
        found = sorted(glob.glob(word))  # noqa: PTH207 - may be absolute
        if not found:
            raise ValueError(f"there is no file {word} (from {Path.cwd()})")
        paths += [Path(path).absolute() for path in found]
    return guess_source(paths, roles, None if objects is None else objects.absolute()), {}


def _described(path: Path) -> tuple[Guess, dict[str, Any]]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or "source" not in document:
        raise ValueError(f"{path}: expected a data set's settings, with a 'source'")
    document.pop("name", None)
    return Guess(document.pop("source"), [f"source and settings as in {path}"]), document


def new_experiment(
    name: str, guess: Guess, cache: Path, dataset: Mapping[str, Any] = {}, target: str = "local"
) -> NewExperiment:
    """Look at the data and choose settings for an experiment with them.

    Args:
        guess: the source; its sentences stand in the file.
        cache: folder for what the source fetches.
        dataset: settings of the data set that are given; they win over chosen ones.

    Raises:
        ValueError: the data cannot be used, or the name or a setting is refused.
    """
    source = source_config(guess.source).open(cache)
    found = survey(source)
    choices = choose(found, _categorical(source))
    section = {"source": guess.source, **choices.dataset, **dataset}
    text = _text(name, guess, found, choices, section, target)
    document = yaml.safe_load(text)["attributes"]
    document["dataset"] = {"name": name, **document["dataset"]}
    Experiment.model_validate(document)  # what is written must load
    said = [*guess.said, _amount(found), *choices.why, *choices.sizes.why.values(), _cost(choices)]
    return NewExperiment(name, text, said, choices.warnings)


def file_of(name: str) -> Path:
    """Where the experiment's file belongs, so that Dagster finds it."""
    return DEFS / name / "defs.yaml"


def write(experiment: NewExperiment, force: bool = False) -> Path:
    """Write the file in its place.

    Raises:
        ValueError: there is one already, and ``force`` was not given.
    """
    path = file_of(experiment.name)
    if path.exists() and not force:
        raise ValueError(f"{path} is there already; take another name, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, experiment.text.encode())
    return path


def _categorical(source: Source) -> frozenset[str]:
    """Axes whose positions are indices of words."""
    return frozenset(axis.name for axis in source.axes if axis.unit.startswith("index of "))


def _text(
    name: str,
    guess: Guess,
    found: Survey,
    choices: Choices,
    dataset: Mapping[str, Any],
    target: str,
) -> str:
    sizes = choices.sizes
    body = [
        _block({"name": name, "description": f"{_amount(found)}."}, []),
        _block({"owners": []}, ["e-mail addresses, or team:NAME"]),
        _block({"dataset": dict(dataset)}, [*guess.said, *choices.why]),
        _block(
            {"pretraining": sizes.pretraining},
            [
                sizes.why[x]
                for x in (
                    *("model", "mask_ratio", "use_cls", "value_features", "neighbours"),
                    "pretraining",
                )
            ],
        ),
        _block({"finetuning": sizes.finetuning}, [sizes.why["finetuning"]]),
        _block(
            {"resources": {"target": target, "nodes": 1, "processes_per_node": 1}},
            ["where trainings run; slurm and kubernetes take a profile, too"],
        ),
        _block(
            {"gate": {"max_accuracy_drop": 0.02}},
            ["a candidate may not be worse than the champion by this much; add min_accuracy: 0.9"],
        ),
        '# schedule: "0 3 * * 1"   # trains anew every Monday at three (UTC), once it is switched on',
    ]
    head = [f"# {_amount(found)}. {_cost(choices)}."]
    head += [f"# LOOK AT THIS: {warning}" for warning in choices.warnings]
    lines = [line for part in head for line in _wrapped(part)]
    return "\n".join([*lines, f"type: {TYPE}", "", "attributes:", _indented("\n\n".join(body)), ""])


def _block(values: Mapping[str, Any], comments: Sequence[str]) -> str:
    """``values`` as YAML, mappings and lists without another inside on one line, under comments."""
    lines = [line for comment in comments for line in _wrapped(f"# {comment}")]
    for key, value in values.items():
        leaves_on_one_line = None if isinstance(value, dict | list) else False
        dumped = yaml.safe_dump(
            {key: value},
            default_flow_style=leaves_on_one_line,
            sort_keys=False,
            width=96,
            allow_unicode=True,
        )
        lines.append(dumped.rstrip())
    return "\n".join(lines)


def _wrapped(comment: str) -> list[str]:
    return textwrap.wrap(comment, 96, subsequent_indent="#   ", break_long_words=False)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")


def _amount(found: Survey) -> str:
    return (
        f"{found.n_series:,} series of {len(found.classes)} classes, {found.n_observations:,} "
        f"observations of {len(found.channels)} channel{'s' if len(found.channels) > 1 else ''}, "
        f"{found.mean_length:.0f} a series, {found.longest} at most"
    )


def _cost(choices: Choices) -> str:
    sizes = choices.sizes
    shape = RoMAForPreTrainingConfig.from_values(
        {
            **sizes.pretraining["model"],
            "tubelet_size": (1, 1, 1),
            "n_channels": sizes.amount.n_channels,
            "n_pos_dims": sizes.amount.n_axes,
        }
    )
    pretrainer, finetrainer = (
        TrainerConfig.from_values(training["trainer"])
        for training in (sizes.pretraining, sizes.finetuning)
    )
    seconds = pretraining_s(shape, pretrainer, sizes.amount)
    seconds += finetuning_s(shape, finetrainer, sizes.amount)
    steps = sum(sizes.steps.values())
    return f"both trainings: {steps:,} steps, about {max(1, round(seconds / 60)):,} min on one CPU core"


DEFS = Path(__file__).parent / "defs"
TYPE = "roma_pipelines.components.RomaExperiment"
_FAR = 100.0  # quartile distances: values beyond are squeezed
_DATES = 1e4  # gaps: positions farther from zero are counted from the series' first
_FEW = 5  # objects of a class that a stratified split needs
_VALIDATION_FRACTION, _TEST_FRACTION = 0.1, 0.2


@dataclass
class Choices:
    """Sections of an experiment's file.

    Attributes:
        dataset: what the data set's section gets besides its source.
        why: sentences about ``dataset``, to stand above it.
        warnings: what a person should look at before believing a result.
    """

    dataset: dict[str, Any]
    sizes: Sizes
    why: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def choose(survey: Survey, categorical: frozenset[str] = frozenset()) -> Choices:
    """Split, repairs, axes, channels and sizes for these data.

    Args:
        categorical: axes whose positions are indices of words.

    Raises:
        ValueError: nothing can be learnt: no classes, or only one.
    """
    found = [name for name, count in survey.classes.items() if count]
    if len(found) < 2:
        these = f"only {found[0]!r}" if found else "no labels; name their column with --label"
        raise ValueError(
            f"a classifier needs series of at least two classes, and these have {these}"
        )
    dataset: dict[str, Any] = {}
    why: list[str] = []
    for said in (_split(survey), _repair(survey), _axes(survey, categorical), _channels(survey)):
        section, sentences = said
        dataset |= section
        why += sentences
    share = (
        survey.recorded_splits.get("train", 0) / survey.n_series
        if survey.recorded_splits
        else 1 - _TEST_FRACTION
    ) * (1 - _VALIDATION_FRACTION)
    amount = Amount(
        n_series=max(1, round(survey.n_series * share)),
        n_observations=max(1, round(survey.n_observations * share)),
        n_channels=len(survey.channels),
        n_axes=len(survey.axes),
    )
    return Choices(dataset, sizes_for(amount), why, _warnings(survey))


Section = tuple[dict[str, Any], list[str]]


def _split(survey: Survey) -> Section:
    shares = {"validation_fraction": _VALIDATION_FRACTION}
    if set(survey.recorded_splits) == {"train", "test"}:
        counts = survey.recorded_splits
        return shares, [
            f"the publisher's split: {counts['train']:,} train, {counts['test']:,} test"
        ]
    shares["test_fraction"] = _TEST_FRACTION
    if survey.has_groups:
        return {"split": {"by": "group"}, **shares}, ["a group is never in two splits"]
    if min(survey.classes.values()) >= _FEW:
        return {"split": {"stratified": True}, **shares}, ["the same shares of every class"]
    return shares, [f"split by a hash of the id: some classes have fewer than {_FEW} objects"]


def _repair(survey: Survey) -> Section:
    found = survey.repairs
    if found is None:
        return {}, []
    repair, why = {}, []
    for name, setting, count in (
        ("not_finite", "drop", found.observations_not_finite),
        ("duplicates", "first", found.duplicate_observations),
        ("empty", "drop", found.empty_series_left_out),
    ):
        if count:
            repair[name] = setting
            why.append(f"repair.{name}: {count:,} found; delete the line to refuse them")
    return ({"repair": repair} if repair else {}), why


def _axes(survey: Survey, categorical: frozenset[str]) -> Section:
    axes, why = {}, []
    for axis in survey.axes:
        if axis.name in categorical:
            why.append(f"{axis.name}: categories; a position is a word's index")
            continue
        axes[axis.name] = {"scale": "auto"}
        if _is_far(axis):
            axes[axis.name]["anchor"] = "first"
            why.append(
                f"{axis.name}: up to {axis.farthest:,.10g} with gaps of {axis.gap:.3g}, so it is counted "
                f"from each series' first"
            )
    return {"axes": axes}, why


def _is_far(axis: AxisSurvey) -> bool:
    return axis.gap > 0 and axis.farthest > max(_DATES * axis.gap, 3 * axis.span)


def _channels(survey: Survey) -> Section:
    far = [channel for channel in survey.channels if _has_far_values(channel)]
    channels = {
        channel.name: {"transform": "arcsinh", "transform_scale": float(f"{channel.spread:.2g}")}
        for channel in far
    }
    why = [
        f"{channel.name}: values up to {channel.reach / channel.spread:,.0f} quartile distances away; "
        f"arcsinh keeps them apart"
        for channel in far[:8]
    ]
    return ({"channels": channels} if channels else {}), why


def _has_far_values(channel: ChannelSurvey) -> bool:
    return channel.spread > 0 and channel.reach > _FAR * channel.spread


def _warnings(survey: Survey) -> list[str]:
    found = [
        f"{channel.name} never changes within a series: a fact of the object rather than a "
        f"measurement, and maybe the answer itself; leave it out unless it will be known in use"
        for channel in survey.channels
        if not channel.varies
    ]
    rare = [name for name, count in survey.classes.items() if count < _FEW]
    if rare:
        found.append(
            f"classes with fewer than {_FEW} objects: {', '.join(rare[:8])}; their scores will mean little"
        )
    if survey.repairs and survey.repairs.observations_not_finite > 0.2 * survey.n_observations:
        found.append(
            "more than a fifth of the observations have a number missing and are left out whole; a "
            "long table with a column that names the quantity loses none"
        )
    return found

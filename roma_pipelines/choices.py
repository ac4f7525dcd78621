"""What a survey of somebody's data suggests for an experiment, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from roma_core.data.surveying import AxisSurvey, ChannelSurvey, Survey
from roma_core.trainer.sizing import Amount, Sizes, sizes_for

_FAR = 100.0  # quartile distances: values beyond are squeezed
_DATES = 1e4  # gaps: positions farther from zero are counted from the series' first
_FEW = 5  # objects of a class that a stratified split needs
_VALIDATION_SHARE, _TEST_SHARE = 0.1, 0.2


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
        else 1 - _TEST_SHARE
    ) * (1 - _VALIDATION_SHARE)
    amount = Amount(
        n_series=max(1, round(survey.n_series * share)),
        n_observations=max(1, round(survey.n_observations * share)),
        n_channels=len(survey.channels),
        n_axes=len(survey.axes),
    )
    return Choices(dataset, sizes_for(amount), why, _warnings(survey))


Section = tuple[dict[str, Any], list[str]]


def _split(survey: Survey) -> Section:
    shares = {"validation_share": _VALIDATION_SHARE}
    if set(survey.recorded_splits) == {"train", "test"}:
        counts = survey.recorded_splits
        return shares, [
            f"the publisher's split: {counts['train']:,} train, {counts['test']:,} test"
        ]
    shares["test_share"] = _TEST_SHARE
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

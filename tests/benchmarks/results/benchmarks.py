"""Benchmarks of the results: an experiment in some cases, beside the figures of others.

A case is the experiment with a few settings changed: another share left out, another pooling, no
pretraining. Protocols, ablations and learning curves over labels are all benchmarks of cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from roma_core.settings import validation_errors
from roma_pipelines.experiment import Experiment, read_yaml

BENCHMARKS = Path(__file__).parent / "benchmarks.yaml"

Training = Literal["pretraining", "finetuning"]
Changes = dict[str, Any]
"""Dotted path of a setting in the experiment's file → its value here."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(_Document):
    """Somebody else's figures."""

    name: str
    source: str = Field(description="Where they come from: a paper, or measured on which protocol.")
    like_for_like: bool = Field(description="Same objects, same observations left out, same split.")
    is_bound: bool = Field(False, description="The best that is possible, nobody to be ahead of.")
    values: dict[str, dict[str, float]] = Field(
        description="Metric, as in metrics.json → name of the case → figure."
    )


class Case(_Document):
    """The experiment with some settings changed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9%._+-]*$")
    changes: Changes = {}
    trainings: tuple[Training, ...] | None = Field(
        None, description="None: those of the benchmark."
    )


class Benchmark(_Document):
    """An experiment in some cases, some seeds each."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    experiment: str = Field(
        description="Name of an experiment, or the path of its file; a relative one from benchmarks.yaml."
    )
    protocol: str
    cases: tuple[Case, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    changes: Changes = Field({}, description="Of all cases; a case's own come after them.")
    trainings: tuple[Training, ...] = Field(
        ("pretraining", "finetuning"),
        description="Finetuning alone starts from new weights; after pretraining alone its "
        "reconstructions are judged.",
    )
    share_encoder: bool = Field(
        False,
        description="Seeds finetune the encoder of the first one, in cases without dropped observations, "
        "which depend on the seed; deviations are then those of finetuning alone.",
    )
    evaluated_on: Literal["test", "validation"] = Field(
        "test", description="Settings are compared on validation, which needs no evaluation job."
    )
    n_observed: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="Reconstructions are judged once more with so many observations left."
    )
    metrics: tuple[str, ...] = ("accuracy", "macro_f1", "log_loss")
    references: tuple[Reference, ...] = ()

    @model_validator(mode="after")
    def _references_name_cases(self) -> Benchmark:
        known = {case.name for case in self.cases}
        for reference in self.references:
            for metric, figures in reference.values.items():
                if unknown := sorted(set(figures) - known):
                    raise ValueError(
                        f"reference {reference.name!r} has a figure of {metric} for {unknown[0]!r}, which is "
                        f"none of the cases {', '.join(sorted(known))}"
                    )
        if self.n_observed and (
            self.evaluated_on == "validation" or "finetuning" in self.trainings
        ):
            raise ValueError(
                "n_observed: only reconstructions on the test split are judged with it"
            )
        return self

    def runs(self) -> list[Run]:
        """All runs; a seed after the other, so that every case has a figure early."""
        return [
            Run(benchmark=self.name, case=case.name, seed=seed)
            for seed in self.seeds
            for case in self.cases
        ]

    def encoder_seed(self, experiment: Experiment) -> int | None:
        """Seed of the pretraining whose encoder all runs finetune; None: each has its own."""
        shared = self.share_encoder and not experiment.dataset.drop_rate
        return self.seeds[0] if shared else None

    def case(self, name: str) -> Case:
        return next(case for case in self.cases if case.name == name)

    def trainings_of(self, case: Case, experiment: Experiment) -> tuple[Training, ...]:
        """Those of the case that the experiment has."""
        wanted = self.trainings if case.trainings is None else case.trainings
        return tuple(name for name in wanted if getattr(experiment, name) is not None)

    def changed(self, experiment: Experiment, case: Case) -> Experiment:
        """The experiment as it is in this case.

        Raises:
            ValueError: a change names no section, or a value is wrong.
        """
        document = experiment.model_dump(mode="json")
        for path, value in {**self.changes, **case.changes}.items():
            *sections, name = path.split(".")
            inner = document
            for section in sections:
                inner = inner.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise ValueError(
                        f"benchmark {self.name}, case {case.name}: {path}: no section there"
                    )
            inner[name] = value
        try:
            return Experiment.model_validate(document)
        except ValidationError as error:
            wrong = "; ".join(str(one) for one in validation_errors(error, Experiment))
            raise ValueError(f"benchmark {self.name}, case {case.name}: {wrong}") from None


class Run(_Document):
    """One training from the data to the metrics.

    ``seed`` chooses the initial weights, the order, the masks and the observations left out.
    """

    benchmark: str
    case: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.case}/{self.seed}"


def read_benchmarks(path: Path = BENCHMARKS) -> dict[str, Benchmark]:
    """All benchmarks by name.

    Raises:
        ValueError: the file cannot be used; a sentence for each mistake names file, benchmark and key, what
            is allowed and what came.
    """
    entries = read_yaml(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of benchmarks, got {type(entries).__name__}")
    benchmarks = [_row(path, number, entry) for number, entry in enumerate(entries, 1)]
    return {benchmark.name: _with_file_beside(path, benchmark) for benchmark in benchmarks}


def _row(path: Path, number: int, entry: Any) -> Benchmark:
    if not isinstance(entry, dict):
        raise ValueError(
            f"{path}: benchmark {number}: expected a mapping of settings, got {entry!r}"
        )
    try:
        return Benchmark.model_validate(entry)
    except ValidationError as error:
        where = f"{path}: benchmark {entry.get('name', number)}"
        raise ValueError(
            "\n".join(f"{where}: {one}" for one in validation_errors(error, Benchmark))
        ) from None


def _with_file_beside(path: Path, benchmark: Benchmark) -> Benchmark:
    if not benchmark.experiment.endswith((".yaml", ".yml")):
        return benchmark
    return benchmark.model_copy(update={"experiment": str(path.parent / benchmark.experiment)})


def chosen(
    benchmarks: dict[str, Benchmark],
    names: Sequence[str],
    cases: Sequence[str],
    seeds: Sequence[int],
) -> list[Run]:
    """The runs of some benchmarks, cases and seeds; empty means all.

    Raises:
        ValueError: there is no such benchmark, or none of the benchmarks has such a case or seed.
    """
    if unknown := [name for name in names if name not in benchmarks]:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; there are {', '.join(benchmarks)}")
    runs = [run for name in names or benchmarks for run in benchmarks[name].runs()]
    _all_known("case", cases, [run.case for run in runs])
    _all_known("seed", seeds, [run.seed for run in runs])
    return [
        run for run in runs if (not cases or run.case in cases) and (not seeds or run.seed in seeds)
    ]


def _all_known(what: str, wanted: Sequence[str | int], known: Sequence[str | int]) -> None:
    if unknown := [value for value in wanted if value not in known]:
        there = ", ".join(map(str, dict.fromkeys(known)))
        raise ValueError(f"these benchmarks have no {what} {unknown[0]!r}; they have {there}")

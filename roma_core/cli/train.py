"""``roma pretrain`` and ``roma finetune``: train in a folder, by hand or as a launched job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

if TYPE_CHECKING:
    from roma_core.data.schema import Manifest
    from roma_core.settings import RomaSettings
    from roma_core.trainer.config import TrainerConfig
    from roma_core.trainer.job import TrainingJobConfig

    Resolve = Callable[[Path, Manifest, dict[str, Any], TrainerConfig], TrainingJobConfig]

_FOLDER = click.Path(file_okay=False, path_type=Path)


def _shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--data", type=_FOLDER, help="Data set, as made by `roma data build`."),
        click.option(
            "--out", type=_FOLDER, help="Folder of the run; one that has begun is resumed."
        ),
        click.option(
            "--set",
            "changes",
            multiple=True,
            metavar="NAME=VALUE",
            help="A setting of model or trainer, e.g. trainer.epochs=5 or model.mask_ratio=0.6; "
            "values as in YAML. Repeatable.",
        ),
        click.option(
            "--train-fraction",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="Share of the training series to use, of every class alike: what labels are worth.",
        ),
        click.option(
            "--show-config", is_flag=True, help="Print every setting with its source and stop."
        ),
        click.option(
            "--job", type=_FOLDER, help="Run the job planned in this folder; no other option."
        ),
    ):
        command = option(command)
    return command


@click.command()
@_shared_options
def pretrain(**options: Any) -> None:
    """Pretrain the masked autoencoder on the training split of a data set.

    Writes checkpoints, metrics.jsonl and, at the end, outputs/model into the folder of the run.
    Start it with python, torchrun or accelerate launch (-m roma_core.cli pretrain …).
    """
    from roma_core.trainer.job import TrainingJobConfig

    _run(options, "ROMA_PRETRAIN_", TrainingJobConfig.pretraining)


@click.command()
@_shared_options
@click.option(
    "--weights", type=_FOLDER, help="Pretrained weights to start from; without: new ones."
)
def finetune(weights: Path | None, **options: Any) -> None:
    """Finetune a classifier on the training split of a data set.

    With --weights RUN/outputs/model it starts from a pretrained encoder; the shape of the model
    then comes from there.
    """
    from roma_core.trainer.job import TrainingJobConfig

    def resolve(
        data: Path, manifest: Manifest, model: dict[str, Any], trainer: TrainerConfig
    ) -> TrainingJobConfig:
        start = None if weights is None else weights.absolute()
        return TrainingJobConfig.finetuning(data, manifest, start, model, trainer)

    _run(options, "ROMA_CLASSIFIER_", resolve)


def _run(options: dict[str, Any], prefix: str, resolve: Resolve) -> None:
    from pydantic import ValidationError

    from roma_core.job import JobFolder

    if options["job"] is not None:
        folder = JobFolder(options["job"].absolute())
    else:
        if options["data"] is None or (options["out"] is None and not options["show_config"]):
            raise click.UsageError("--data and --out are needed (or --job, for a planned job)")
        try:
            folder = _prepared(options, prefix, resolve)
        except (ValueError, ValidationError, OSError) as error:
            raise click.ClickException(str(error)) from error

    from roma_core.trainer.distributed import StopRequests

    with StopRequests():  # from here on, the seconds of the imports included, a stop is noted
        from roma_core.run_job import run_in_folder
        from roma_core.trainer.job import train

        sys.exit(run_in_folder(folder, train))


def _prepared(options: dict[str, Any], prefix: str, resolve: Resolve) -> Any:
    """The folder of a run by hand, with its frozen configuration."""
    from roma_core.data.store import read_manifest
    from roma_core.files import read_json, write_json
    from roma_core.job import JobFolder
    from roma_core.trainer.config import RESUMABLE, TrainerConfig, told, what_may_change
    from roma_core.trainer.job import TrainingJobConfig

    changes = _changes(options["changes"])
    data = options["data"].absolute()
    trainer = TrainerConfig(**changes["trainer"])
    config = resolve(data, read_manifest(data), changes["model"], trainer)
    config = config.model_copy(update={"train_fraction": options["train_fraction"]})
    if options["show_config"]:
        _show(trainer, config, prefix)
        sys.exit(0)
    folder = JobFolder(options["out"].absolute())
    document = config.model_dump(mode="json")
    is_main = os.environ.get("RANK", "0") == "0"
    if folder.config.exists():
        frozen = TrainingJobConfig.model_validate(read_json(folder.config)).completed()
        changed = _differences(frozen.model_dump(mode="json"), document)
        allowed = {f"trainer.{name}" for name in RESUMABLE}
        refused = {name: pair for name, pair in changed.items() if name not in allowed}
        if refused:
            raise ValueError(
                f"{folder.path} belongs to a run with other settings: {told(refused)}; set them back "
                f"to resume it, or give another --out. {what_may_change()}"
            )
        if changed and is_main:
            click.echo(f"{folder.path} goes on with {told(changed)}")
            write_json(folder.config, document)
    elif is_main:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.config, document)
    return folder


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(old, new) of every setting that is not the same, by dotted name; None where there is none."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        then, now = old.get(name), new.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            inner = _differences(then, now)
            differences |= {f"{name}.{field}": pair for field, pair in inner.items()}
        elif then != now:
            differences[name] = (then, now)
    return differences


def _changes(pairs: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``("trainer.epochs=5",)`` → ``{"model": {}, "trainer": {"epochs": 5}}``."""
    changes: dict[str, dict[str, Any]] = {"model": {}, "trainer": {}}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        section, *path = name.split(".")
        if not equals or section not in changes or not path:
            raise ValueError(f"--set {pair}: expected model.NAME=VALUE or trainer.NAME=VALUE")
        here = changes[section]
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = yaml.safe_load(text)
    return changes


def _show(trainer: RomaSettings, config: TrainingJobConfig, prefix: str) -> None:
    click.echo(f"# trainer (ROMA_TRAINER_…)\n{trainer.as_table()}\n")
    click.echo(f"# model ({prefix}…), with what the data decide\n")
    click.echo(yaml.safe_dump(config.model, sort_keys=False))

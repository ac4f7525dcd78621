"""``roma pretrain`` and ``roma finetune``: train in a folder, as a local run or as a launched job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import click
import yaml

from roma_core.cli import with_options

Task = Literal["pretrain", "finetune"]
_FOLDER = click.Path(file_okay=False, path_type=Path)


_shared_options = with_options(
    click.option("--data", type=_FOLDER, help="Data set, as made by `roma data build`."),
    click.option(
        "--run-dir", type=_FOLDER, help="Folder of the run; an unfinished run is resumed."
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set a field of model or trainer, e.g. trainer.epochs=5 or model.mask_ratio=0.6; "
        "values are YAML. Repeatable.",
    ),
    click.option(
        "--train-fraction",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Fraction of the training series of every class to use.",
    ),
    click.option("--show-config", is_flag=True, help="Print settings with their source and exit."),
    click.option(
        "--job", type=_FOLDER, help="Run the job planned in this folder; takes no other option."
    ),
)


@click.command(epilog="Example: roma pretrain --data data/waves/3f2a9c --run-dir runs/a")
@_shared_options
@click.option(
    "--weights",
    type=_FOLDER,
    help="Pretrained weights to continue from, RUN/outputs/model (default: new weights).",
)
def pretrain(weights: Path | None, **options: Any) -> None:
    """Pretrain the masked autoencoder on the training split of a data set.

    With --weights it continues from an autoencoder that was pretrained before, on other data of the
    same channels and axes; these determine the shape of the model.

    Writes checkpoints, metrics.jsonl and, at the end, outputs/model into the folder of the run. For
    several processes start it with torchrun or accelerate launch (-m roma_core.cli pretrain …).
    """
    _run("pretrain", options, None if weights is None else weights.absolute())


@click.command(epilog="Example: roma finetune --data data/waves/3f2a9c --run-dir runs/b")
@_shared_options
@click.option(
    "--weights", type=_FOLDER, help="Pretrained weights to start from (default: new weights)."
)
def finetune(weights: Path | None, **options: Any) -> None:
    """Finetune a classifier or regressor on the training split of a data set.

    With --weights RUN/outputs/model it starts from a pretrained encoder, which then determines the
    shape of the model. Writes the same files as `roma pretrain`.
    """
    _run("finetune", options, None if weights is None else weights.absolute())


def _run(task: Task, options: dict[str, Any], weights: Path | None = None) -> None:
    from roma_core.job import JobFolder, StopRequests

    if options["job"] is not None:
        folder = JobFolder(options["job"].absolute())
    else:
        if options["data"] is None or (options["run_dir"] is None and not options["show_config"]):
            raise click.UsageError(
                "--data and --run-dir are required (or --job, for a planned job)"
            )
        if os.environ.get("RANK", "0") == "0":  # the others wait for it before they read the folder
            _prepare(task, options, weights)
        if options["show_config"]:
            return
        folder = JobFolder(options["run_dir"].absolute())

    with StopRequests():  # a stop request is handled from here on, during slow imports too
        from roma_core.run_job import run_in_folder
        from roma_core.trainer.job import train

        sys.exit(run_in_folder(folder, train))


def _prepare(task: Task, options: dict[str, Any], weights: Path | None) -> None:
    """Freeze the configuration in the folder of a local run, or print it."""
    from roma_core.files import read_json, write_json
    from roma_core.job import JobFolder
    from roma_core.trainer.config import TrainerConfig, describe_changes, describe_resumable
    from roma_core.trainer.job import TrainingJobConfig

    settings = _parse_settings(options["settings"])
    data = options["data"].absolute()
    trainer, fraction = TrainerConfig(**settings["trainer"]), options["train_fraction"]
    config = TrainingJobConfig.resolve(
        task, data, settings["model"], trainer, weights=weights, train_fraction=fraction
    )
    if options["show_config"]:
        click.echo(f"# trainer (ROMA_TRAINER_…)\n{trainer.as_table()}\n")
        prefix = "ROMA_PRETRAIN_" if task == "pretrain" else "ROMA_CLASSIFIER_"
        click.echo(f"# model ({prefix}…), including fields that the data determine\n")
        click.echo(yaml.safe_dump(config.model, sort_keys=False))
        return
    folder = JobFolder(options["run_dir"].absolute())
    document = config.model_dump(mode="json")
    if folder.config.exists():
        frozen = TrainingJobConfig.model_validate(read_json(folder.config)).completed()
        changed = _differences(frozen.model_dump(mode="json"), document)
        allowed = {f"trainer.{name}" for name in TrainerConfig.resumable()}
        # a moved folder is the same if its content is
        allowed |= {name for name in ("dataset", "weights") if f"{name}_digest" not in changed}
        refused = {name: pair for name, pair in changed.items() if name not in allowed}
        if refused:
            raise ValueError(
                f"{folder.path} belongs to a run with other settings: {describe_changes(refused)}; set "
                f"them back to resume it, or give another --run-dir. {describe_resumable()}"
            )
        if changed:
            click.echo(f"{folder.path} resumes with {describe_changes(changed)}")
            write_json(folder.config, document)
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.config, document)


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


def _parse_settings(pairs: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``("trainer.epochs=5",)`` → ``{"model": {}, "trainer": {"epochs": 5}}``."""
    settings: dict[str, dict[str, Any]] = {"model": {}, "trainer": {}}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        section, *path = name.split(".")
        if not equals or section not in settings or not path:
            raise ValueError(f"--set {pair}: expected model.NAME=VALUE or trainer.NAME=VALUE")
        here = settings[section]
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = yaml.safe_load(text)
    return settings

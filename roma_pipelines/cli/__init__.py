"""``roma-pipeline``: run experiments and the pages that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from roma_core.cli import LazyGroup
from roma_core.cli import main as roma
from roma_core.settings import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

_COMMANDS = {
    "status": "roma_pipelines.cli.status:status",
    "demo": "roma_pipelines.cli.demo:demo",
    "up": "roma_pipelines.cli.up:up",
    "plan": "roma_pipelines.cli.plan:plan",
    "tune": "roma_pipelines.cli.tune:tune",
    "launch": "roma_pipelines.cli.jobs:launch",
    "jobs": "roma_pipelines.cli.jobs:jobs",
    "promote": "roma_pipelines.cli.registry:promote",
    "reject": "roma_pipelines.cli.registry:reject",
    "rollback": "roma_pipelines.cli.registry:rollback",
    "lineage": "roma_pipelines.cli.registry:lineage",
    "replay": "roma_pipelines.cli.registry:replay",
    "new-experiment": "roma_pipelines.cli.new_experiment:new_experiment",
    "health": "roma_pipelines.cli.operations:health",
    "gc": "roma_pipelines.cli.operations:gc",
    "backup": "roma_pipelines.cli.operations:backup",
    "restore": "roma_pipelines.cli.operations:restore",
    "completion": "roma_pipelines.cli:completion",
}


TARGETS = click.Choice(["local", "slurm", "kubernetes"])


@click.group(
    epilog="Example: roma-pipeline demo japanese_vowels",
    cls=LazyGroup,
    commands_at=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.pass_context
def main(context: click.Context) -> None:
    """Operate RoMA experiments: Dagster assets, training jobs and the model registry.

    Without a command it prints the state and the next step, as `status` does. State is kept under
    .roma/ (ROMA_STORAGE_ROOT); `up` serves it as web pages.
    """
    if context.invoked_subcommand is None and (status := main.get_command(context, "status")):
        context.invoke(status)


@click.command(epilog="Example: roma-pipeline completion bash")
@click.argument("shell", type=click.Choice(["bash", "zsh"]))
def completion(shell: str) -> None:
    """Print a script that completes `roma` and `roma-pipeline` in SHELL.

    In ~/.bashrc: eval "$(roma-pipeline completion bash)"
    """
    for command, name in ((roma, "roma"), (main, "roma-pipeline")):
        variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
        if found := get_completion_class(shell):
            click.echo(found(command, {}, name, variable).source())


def experiment_names() -> list[str]:
    """Folders of experiments, valid or not, without Dagster, whose import takes a second."""
    from roma_pipelines.storage import defs_files

    return sorted(defs_files())


def _quiet(complete: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Nothing is offered where settings or a registry cannot be read: a traceback would fill the prompt."""

    def offered(*arguments: Any) -> list[Any]:
        with suppress(ValueError, RuntimeError, OSError):
            return complete(*arguments)
        return []

    return offered


@_quiet
def complete_experiment(context: Any, parameter: Any, incomplete: str) -> list[str]:
    """Names of experiments, which are those of their registered models, too."""
    return [name for name in experiment_names() if name.startswith(incomplete)]


@_quiet
def complete_profile(context: Any, parameter: Any, incomplete: str) -> list[str]:
    from roma_pipelines.launching.launcher import profile_folders

    folders = [folder for kind in ("slurm", "kubernetes") for folder in profile_folders(kind)]
    return sorted({path.stem for one in folders for path in one.glob(f"{incomplete}*.yaml")})


@_quiet
def complete_job(context: Any, parameter: Any, incomplete: str) -> list[str]:
    from roma_pipelines.storage import Storage, StorageSettings

    return [path.name for path in Storage(StorageSettings().root).jobs.glob(f"{incomplete}*")]


@_quiet
def complete_version(context: click.Context, parameter: Any, incomplete: str) -> list[Any]:
    """Versions with an alias, such as the candidate, of the model on the command line."""
    from roma_pipelines.registry.store import MlflowSettings
    from roma_pipelines.registry.versions import aliases_without_mlflow
    from roma_pipelines.storage import Storage, StorageSettings

    root = Storage(StorageSettings().root).mlflow
    aliases = aliases_without_mlflow(MlflowSettings(), root).get(context.params.get("name", ""), {})
    found = (
        (version, alias) for alias, version in aliases.items() if version.startswith(incomplete)
    )
    return [CompletionItem(version, help=alias) for version, alias in found]


@contextmanager
def open_registry() -> Iterator[MlflowClient]:
    """The configured registry; its errors become one-line messages."""
    from mlflow.exceptions import MlflowException

    from roma_pipelines.registry.runs import limit_requests, no_answer
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.storage import Storage

    limit_requests(120)
    try:
        yield connect(MlflowSettings(), Storage.open().mlflow)
    except MlflowException as error:
        message = no_answer(error) or without_credentials(error.message)
        raise click.ClickException(message) from error

"""``roma-pipeline promote | reject | rollback | lineage | replay``: the model registry."""

from __future__ import annotations

import getpass
import shutil
import socket
import time
from dataclasses import asdict
from pathlib import Path

import click

from roma_core.cli import json_option, print_json
from roma_core.serving.registry_client import connect
from roma_pipelines.cli import complete_experiment, complete_version, open_registry
from roma_pipelines.registry import promotion
from roma_pipelines.registry.lineage import lineage_of, plan_replay, transfer, versions_from
from roma_pipelines.registry.store import MlflowSettings
from roma_pipelines.registry.versions import get_version, version_at
from roma_pipelines.storage import Storage

_reason = click.option("--reason", required=True, help="Reason, recorded in the audit.")
_actor = click.option(
    "--actor",
    default=lambda: f"{getpass.getuser()}@{socket.gethostname()}",
    help="User recorded in the audit (default: user@host).",
)


@click.command(
    epilog='Example: roma-pipeline promote japanese_vowels 3 --reason "better on rare classes"'
)
@click.argument("name", shell_complete=complete_experiment)
@click.argument("version", shell_complete=complete_version)
@_reason
@_actor
@click.option(
    "--force",
    is_flag=True,
    help="Promote even if VERSION failed the gate, was rejected or rolled back, or was compared with "
    "another champion.",
)
@click.option(
    "--to", "target", metavar="URI", help="Copy VERSION to this MLflow server and promote it there."
)
def promote(
    name: str, version: str, reason: str, actor: str, force: bool, target: str | None
) -> None:
    """Make VERSION of model NAME the champion; the present one becomes `previous`.

    VERSION must have passed the gate against the present champion. Actor, reason and evidence are
    recorded before any alias moves. With --to, checksums are verified on both sides, and the champion
    of that server must be the one that VERSION was compared with.
    """
    with open_registry() as client:
        if target is not None:
            there = connect(target)
            experiment = f"{MlflowSettings().experiment_prefix}/{name}"
            copied = transfer(client, there, f"models:/{name}/{version}", experiment)
            click.echo(
                f"{name}: version {version} is version {copied} of {target}, checksums agree"
            )
            client, version = there, copied
        promotion.require_model(client, name)
        tags = get_version(client, name, version).tags
        keys = ("gate", "compared_with", "evaluation_job", "dagster_run_id")
        already = version_at(client, name, promotion.CHAMPION) == version
        replaced = promotion.promote(
            client,
            name,
            version,
            reason=reason,
            actor=actor,
            evidence={key: tags[f"roma.{key}"] for key in keys if f"roma.{key}" in tags},
            force=force,
        )
        state = "is already champion, nothing was changed" if already else "is champion"
        click.echo(f"{name}: version {version} {state}; previous is {replaced or 'none'}")


@click.command(
    epilog='Example: roma-pipeline reject japanese_vowels 3 --reason "trained on wrong labels"'
)
@click.argument("name", shell_complete=complete_experiment)
@click.argument("version", shell_complete=complete_version)
@_reason
@_actor
@click.option("--delete", is_flag=True, help="Also delete the version and its files.")
def reject(name: str, version: str, reason: str, actor: str, delete: bool) -> None:
    """Exclude VERSION of model NAME from promotion and rollback.

    If it is `previous`, the champion before it becomes `previous`. A version that an alias points to,
    that was champion before, or that is the encoder of another version, is never deleted.
    """
    with open_registry() as client:
        promotion.reject(client, name, version, reason, actor)
        click.echo(f"{name}: version {version} is rejected")
        if delete:
            promotion.delete_version(client, name, version)
            click.echo(f"{name}: version {version} is deleted")


@click.command(
    epilog='Example: roma-pipeline rollback japanese_vowels --reason "alarms since Monday"'
)
@click.argument("name", shell_complete=complete_experiment)
@_reason
@_actor
def rollback(name: str, reason: str, actor: str) -> None:
    """Make the previous champion of model NAME the champion; repeat to go one further back."""
    with open_registry() as client:
        start = time.perf_counter()
        version = promotion.rollback(client, name, reason=reason, actor=actor)
        seconds = time.perf_counter() - start
        click.echo(f"{name}: version {version} is champion again ({seconds:.2f} s)")


@click.command(epilog="Example: roma-pipeline lineage japanese_vowels@champion")
@click.argument("what")
@json_option
def lineage(what: str, as_json: bool) -> None:
    """Print the origin of a version, or the versions that come from an identifier.

    WHAT is NAME@ALIAS or NAME/VERSION; or a job key, run id, data-set version, commit or package
    (at least its first six characters).
    """
    with open_registry() as client:
        if "@" in what or "/" in what:
            found = lineage_of(client, what)
            if as_json:
                print_json(asdict(found))
                return
            click.echo(f"{found.name} version {found.version}")
            for name, value in found.facts.items():
                click.echo(f"  {name:<16} {value}")
            if found.facts.get("commit", "").endswith("-dirty"):
                click.echo("  there were uncommitted changes, which were not recorded")
            width = shutil.get_terminal_size().columns
            for line in found.decisions:
                click.echo(click.wrap_text(line, width, "  ", "    "))
            return
        versions = versions_from(client, what)
        if not versions:
            raise click.ClickException(
                f"no registered version comes from {what!r}; `roma-pipeline lineage NAME@champion` prints "
                f"what one comes from"
            )
        if as_json:
            names = ("name", "version", "role")
            print_json([dict(zip(names, found, strict=True)) for found in versions])
            return
        for name, version, role in versions:
            click.echo(f"{name} version {version} ({role})")


@click.command(epilog="Example: roma-pipeline replay japanese_vowels 3")
@click.argument("name", shell_complete=complete_experiment)
@click.argument("version", shell_complete=complete_version)
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the job folders (default: replay/NAME-VERSION).",
)
def replay(name: str, version: str, run_dir: Path | None) -> None:
    """Prepare the training of VERSION of model NAME again, as job folders and commands.

    The recorded configurations are used, and differences of code and packages are listed. Nothing is
    run.
    """
    with open_registry() as client:
        run_dir = run_dir or Path("replay") / f"{name}-{version}"
        plan = plan_replay(client, name, version, run_dir, Storage.open().datasets)
        for line in plan.differences:
            click.echo(f"# {line}")
        if not plan.differences:
            click.echo("# same code, same packages: the weights will be identical")
        click.echo("\n".join(plan.commands))

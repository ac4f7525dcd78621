"""``roma-pipeline lineage`` and ``replay``: where a version comes from, and how to make it again.

``roma-pipeline promote | reject | rollback``: who is champion, decided by a person.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlflow import MlflowClient

_why = click.option("--why", required=True, help="Goes into the audit; others will read it.")
_who = click.option("--who", help="In whose name; the default is user@host.")


@click.command()
@click.argument("name")
@click.argument("version")
@_why
@_who
@click.option(
    "--despite-gate",
    is_flag=True,
    help="Though it passed no gate, was rejected, or was compared with another champion.",
)
@click.option(
    "--to", "target", metavar="URI", help="Copy it to this MLflow server and promote it there."
)
def promote(
    name: str, version: str, why: str, who: str | None, despite_gate: bool, target: str | None
) -> None:
    """Make VERSION of model NAME the champion; the present one becomes `previous`.

    It must have passed the gate against the present champion. The decision is recorded with who, why
    and the evidence before anything moves. With --to, files are compared with their checksums on both
    sides, and the champion there must be the one that it was compared with here.
    """
    from roma_pipelines.registry import promotion
    from roma_pipelines.registry.versions import version_at

    with registry() as (client, person):
        if target is not None:
            client, version = _copied(client, target, name, version)
        already = version_at(client, name, promotion.CHAMPION) == version
        replaced = promotion.promote(
            client,
            name,
            version,
            why=why,
            who=who or person,
            evidence=_evidence(client, name, version),
            despite_gate=despite_gate,
        )
        is_champion = "is champion already, nothing was changed" if already else "is champion"
        click.echo(f"{name}: version {version} {is_champion}; previous is {replaced or 'none'}")


@click.command()
@click.argument("name")
@click.argument("version")
@_why
@_who
@click.option("--delete", is_flag=True, help="Remove the version and its files, too.")
def reject(name: str, version: str, why: str, who: str | None, delete: bool) -> None:
    """Say that VERSION of model NAME shall not become champion.

    If it is `previous`, the champion before it takes that place. A version that an alias points to,
    that was champion once, or that is the encoder of a classifier, is never deleted.
    """
    from roma_pipelines.registry import promotion
    from roma_pipelines.registry import promotion as deletion

    with registry() as (client, person):
        promotion.reject(client, name, version, why=why, who=who or person)
        click.echo(f"{name}: version {version} is rejected")
        if delete:
            _drop_candidate(client, name, version)
            deletion.delete_version(client, name, version)
            click.echo(f"{name}: version {version} is deleted")


@click.command()
@click.argument("name")
@_why
@_who
def rollback(name: str, why: str, who: str | None) -> None:
    """Put the previous champion of model NAME back. Again: the one before that."""
    from roma_pipelines.registry import promotion

    with registry() as (client, person):
        start = time.perf_counter()
        version = promotion.rollback(client, name, who=who or person, why=why)
        seconds = time.perf_counter() - start
        click.echo(f"{name}: version {version} is champion again ({seconds:.2f} s)")


@contextmanager
def registry() -> Iterator[tuple[MlflowClient, str]]:
    """The configured registry, and who asks; what it refuses is one sentence."""
    from mlflow.exceptions import MlflowException

    from roma_core.serving.registry_client import FetchError
    from roma_pipelines.registry.lock import RegistryBusy
    from roma_pipelines.registry.promotion import whoever_this_is
    from roma_pipelines.registry.store import MlflowSettings, StoreError, connect
    from roma_pipelines.storage import Storage, StorageError

    try:
        yield connect(MlflowSettings(), Storage.open().mlflow), whoever_this_is()
    except MlflowException as error:
        raise click.ClickException(error.message) from error
    except (ValueError, FetchError, StorageError, StoreError, RegistryBusy, OSError) as error:
        raise click.ClickException(str(error)) from error


def _copied(client: MlflowClient, target: str, name: str, version: str) -> tuple[MlflowClient, str]:
    """The other server's client, and the version there."""
    from roma_core.serving.registry_client import connect
    from roma_pipelines.registry.lineage import transfer
    from roma_pipelines.registry.store import MlflowSettings

    there = connect(target)
    experiment = f"{MlflowSettings().experiment_prefix}/{name}"
    copied = transfer(client, there, f"models:/{name}/{version}", experiment)
    click.echo(f"{name}: version {version} is version {copied} of {target}, checksums agree")
    return there, copied


def _evidence(client: MlflowClient, name: str, version: str) -> dict[str, str]:
    """What the gate said of the version and where, by its tags."""
    from roma_pipelines.registry.promotion import must_be_known, the_version

    must_be_known(client, name)
    tags = the_version(client, name, version).tags
    keys = ("roma.gate", "roma.compared_with", "roma.evaluation_job", "roma.dagster_run_id")
    return {key.removeprefix("roma."): tags[key] for key in keys if key in tags}


def _drop_candidate(client: MlflowClient, name: str, version: str) -> None:
    """A rejected version is no candidate any more."""
    from roma_pipelines.registry.versions import CANDIDATE, version_at

    if version_at(client, name, CANDIDATE) == version:
        client.delete_registered_model_alias(name, CANDIDATE)


@click.command()
@click.argument("what")
def lineage(what: str) -> None:
    """Say where a version comes from, or what came of something.

    WHAT is NAME@ALIAS or NAME/VERSION; or a job key, run id, data-set version, commit or package
    (or six characters of its beginning), which lists the versions that come from it.
    """

    from roma_pipelines.registry.lineage import lineage_of, versions_from

    with registry() as (client, _):
        if "@" in what or "/" in what:
            found = lineage_of(client, what)
            click.echo(f"{found.name} version {found.version}")
            for name, value in found.facts.items():
                click.echo(f"  {name:<16} {value}")
            if found.is_dirty:
                click.echo("  the commit had changes beside it that nobody recorded")
            width = shutil.get_terminal_size().columns
            for line in found.decisions:
                click.echo(click.wrap_text(line, width, "  ", "    "))
            return
        versions = versions_from(client, what)
        if not versions:
            raise click.ClickException(f"no registered version comes from {what!r}")
        for name, version, role in versions:
            click.echo(f"{name} version {version} ({role})")


@click.command()
@click.argument("name")
@click.argument("version")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the job folders go; the default is replay/NAME-VERSION.",
)
def replay(name: str, version: str, out: Path | None) -> None:
    """Plan the training of VERSION of model NAME again: job folders and the commands to run them.

    The configurations are those that were recorded; what is different here is said. Nothing is run.
    """

    from roma_pipelines.registry.lineage import plan_replay
    from roma_pipelines.storage import Storage

    with registry() as (client, _):
        out = out or Path("replay") / f"{name}-{version}"
        plan = plan_replay(client, name, version, out, Storage.open().datasets)
        for line in plan.differences:
            click.echo(f"# {line}")
        if not plan.differences:
            click.echo("# same code, same packages: the weights will be the same, bit for bit")
        click.echo("\n".join(plan.commands))

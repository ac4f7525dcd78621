"""``roma-pipeline status``, and ``roma-pipeline`` alone: the state and the next step, in a second.

Reads job folders and the registry's aliases, and imports neither Dagster nor MLflow nor torch.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from textwrap import shorten
from typing import Any

import click

from roma_core.cli import echo_table, json_option, print_json
from roma_core.files import read_json
from roma_pipelines.cli import experiment_names
from roma_pipelines.launching.jobs import Job, all_jobs
from roma_pipelines.launching.outcome import duration
from roma_pipelines.registry.store import MlflowSettings, StoreError
from roma_pipelines.registry.versions import aliases_without_mlflow
from roma_pipelines.storage import Storage, StorageError

_N_FAILURES = 3


@click.command(epilog="Example: roma-pipeline status --json")
@json_option
def status(as_json: bool) -> None:
    """Print experiments, running jobs, last failures, servers, and the next step.

    `roma-pipeline health` checks every component instead, which takes longer.
    """
    found = _state(Storage.open())
    if as_json:
        print_json(found)
        return
    rows = []
    for one in found["experiments"]:
        aliases = [f"{name} {one[name]}" if one[name] else "" for name in ("champion", "candidate")]
        last = "nothing trained yet"
        if one["stage"]:
            last = f"{one['stage']} {one['status']}, {duration(one['age_s'])} ago"
        rows.append((f"  {one['name']}", *aliases, last))
    click.echo("experiments")
    echo_table(rows)
    if found["registry"]:
        click.echo(f"  their champions are unknown: {found['registry']}")
    for title in ("running", "failed"):
        for job in found[title]:
            click.echo(
                f"{title:<10}  {job['key'][:12]}  {job['asset']}: {shorten(job['detail'], 200)}"
            )
    for name, server in found["servers"].items():
        answer = "answers" if server["answers"] else "does not answer"
        click.echo(f"{name:<10}  {server['url']} {answer}")
    click.echo(f"next        {found['next']}")


def _state(storage: Storage) -> dict[str, Any]:
    jobs, now, newest = all_jobs(storage.jobs), time.time(), dict[str, Job]()
    for job in jobs:
        newest.setdefault(job.asset, job)
    found: dict[str, Any] = {"storage": str(storage.root), "experiments": [], "registry": None}
    aliases: dict[str, dict[str, str]] = {}
    try:
        aliases = aliases_without_mlflow(MlflowSettings(), storage.mlflow)
    except (StoreError, StorageError) as error:
        found["registry"] = str(error)
    with_jobs = (asset.partition("/")[0] for asset in newest if "/" in asset)
    for name in sorted({*experiment_names(), *with_jobs}):
        one: dict[str, Any] = dict.fromkeys(("champion", "candidate", "stage", "status", "age_s"))
        one |= {alias: v for alias, v in aliases.get(name, {}).items() if alias in one}
        if last := next((job for job in newest.values() if job.asset.startswith(f"{name}/")), None):
            stage = last.asset.partition("/")[2]
            one |= {"stage": stage, "status": last.status, "age_s": now - last.made_at}
        found["experiments"].append({"name": name, **one})
    alone = "no supervisor; `roma-pipeline up` finds it again, `jobs cancel` ends it"
    found["running"] = [
        {"key": job.key, "asset": job.asset, "detail": job.status if job.supervised else alone}
        for job in jobs
        if job.open_attempt is not None
    ]
    found["failed"] = [
        {"key": job.key, "asset": job.asset, "detail": end.reason}
        for job in newest.values()
        if (end := job.records[-1].end if job.records else None) and end.status == "failed"
    ][:_N_FAILURES]
    addresses = storage.root / "servers.json"
    urls = read_json(addresses) if addresses.exists() else {}
    found["servers"] = {name: {"url": url, "answers": _answers(url)} for name, url in urls.items()}
    return found | {"next": _next_step(found)}


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1.0).close()
    except (OSError, http.client.HTTPException) as error:  # the latter of another protocol
        return isinstance(error, urllib.error.HTTPError)
    return True


def _next_step(found: dict[str, Any]) -> str:
    names = [one["name"] for one in found["experiments"]]
    champions = [one["name"] for one in found["experiments"] if one["champion"]]
    if found["failed"]:
        return f"roma-pipeline jobs logs {found['failed'][0]['key'][:12]}    # why it failed"
    if found["running"]:
        return f"roma-pipeline jobs logs --follow {found['running'][0]['key'][:12]}"
    if champions and not any(one["answers"] for one in found["servers"].values()):
        return "roma-pipeline up    # the overview, Dagster and MLflow pages"
    if champions:
        return f"roma predict --model models:/{champions[0]}@champion INPUT OUTPUT.parquet"
    if names:
        name = "japanese_vowels" if "japanese_vowels" in names else names[0]
        return f"roma-pipeline demo {name}    # trains, evaluates and registers it"
    return "roma-pipeline new-experiment NAME --source FILE"

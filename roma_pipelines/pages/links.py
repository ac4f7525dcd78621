"""Addresses that an asset's page leads to: the MLflow run, the log, the report."""

from __future__ import annotations

import os
from typing import Any

import dagster as dg
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings, without_credentials


class PageSettings(RomaSettings):
    """Where people's browsers find the pages; ``roma-pipeline up`` sets it for what it starts."""

    model_config = SettingsConfigDict(env_prefix="ROMA_PAGE_")

    overview_url: str | None = Field(None, description="Address of the overview; None: no links.")
    mlflow_url: str | None = Field(
        None,
        description="Address of MLflow's page; None takes the tracking server's, if it is one.",
    )


def announce(overview: str, mlflow: str) -> None:
    """Tell processes that are started from now on where the pages are, unless somebody said so."""
    os.environ.setdefault("ROMA_PAGE_OVERVIEW_URL", overview)
    os.environ.setdefault("ROMA_PAGE_MLFLOW_URL", mlflow)


def job_links(key: str, has_report: bool) -> dict[str, dg.MetadataValue[Any]]:
    """Links to what the overview serves of a job; a browser opens no file from a page."""
    overview = PageSettings().overview_url
    if overview is None:
        return {}
    names = ["log", *(["report"] if has_report else [])]
    return {f"open_{name}": dg.MetadataValue.url(f"{overview}/jobs/{key}/{name}") for name in names}


def mlflow_link(
    experiment_id: str, run_id: str, tracking_uri: str
) -> dict[str, dg.MetadataValue[Any]]:
    """Link to a run's page."""
    server = (
        without_credentials(tracking_uri) if tracking_uri.startswith(("http:", "https:")) else None
    )
    mlflow = PageSettings().mlflow_url or server
    if mlflow is None:
        return {}
    address = f"{mlflow.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return {"open_mlflow_run": dg.MetadataValue.url(address)}

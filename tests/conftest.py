"""No test reads the settings, keys or modes of the person who runs it."""

import os

import pytest


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith(("ROMA", "WANDB")) or name == "MLFLOW_RUN_ID":
            monkeypatch.delenv(name)
    monkeypatch.setenv("ROMA_ENV_FILE", os.devnull)

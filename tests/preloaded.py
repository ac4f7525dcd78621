"""What the server of ``tests.forked`` imports before it forks."""

import gc
import importlib

MODULES = (
    "roma_core.evaluation.job",
    "roma_core.trainer.trainer",
    "accelerate",
    "torch._dynamo",  # which the first step of an optimiser imports
    "mlflow.cli",
)

gc.disable()  # what is imported stays, and to look through it takes a tenth of the time
for name in MODULES:
    importlib.import_module(name)
gc.freeze()
gc.enable()

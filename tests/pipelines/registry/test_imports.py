import subprocess
import sys

import pytest

HEAVY = ("torch", "mlflow", "wandb", "pyarrow", "matplotlib", "sklearn")


@pytest.mark.parametrize("module", ["store", "runs", "versions", "promotion"])
def test_the_registry_is_imported_without_anything_heavy(module):
    program = (
        f"import sys, roma_pipelines.registry.{module}; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

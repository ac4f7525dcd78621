"""Objects seen once: their number is said before anything is trained."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from roma_core.cli import main
from tests.cases.commands import build, new_experiment


@pytest.fixture
def alerts(tmp_path):
    """2,000 objects seen once and 200 seen twenty times, as alert streams have them."""
    rng = np.random.default_rng(0)
    lengths = [1] * 2000 + [20] * 200
    ids = np.repeat(np.arange(len(lengths)), lengths)
    mjd = 60000 + np.concatenate([np.sort(rng.uniform(0, 30, n)) for n in lengths])
    columns = {"oid": ids, "mjd": mjd, "mag": rng.normal(19, 1, len(ids))}
    columns["label"] = np.array(["AGN", "SN"])[ids % 2]
    pq.write_table(pa.table(columns), tmp_path / "alerts.parquet")
    return tmp_path / "alerts.parquet"


def test_new_experiment_and_validate_say_what_happens_to_them(alerts, tmp_path):
    config, output = new_experiment(alerts)

    (line,) = [line for line in output.splitlines() if line.startswith("# WARNING: 2,000 of 2,200")]
    assert "WARNING: 2,000 of 2,200 series have one observation" in line
    assert "so pretraining leaves them out" in " ".join(output.replace("#", "").split())
    dataset = build(tmp_path, config | {"name": "alerts"})
    result = CliRunner().invoke(main, ["data", "validate", str(dataset.path)])
    assert result.exit_code == 0
    assert (
        "has one observation: nothing can be hidden, so pretraining leaves it out" in result.output
    )
    assert "… and 1,995 more: single" in result.output


def test_without_any_nothing_is_said(alerts):
    table = pq.read_table(alerts)
    pq.write_table(table.slice(2000), alerts)

    _, output = new_experiment(alerts)

    assert "one observation" not in output

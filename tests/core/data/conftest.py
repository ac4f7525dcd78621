"""An intact data set, to be copied and damaged, and a configuration file."""

import pytest
import yaml

from tests.core.hand_made import built


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return built(tmp_path_factory.mktemp("sound"), drop_rate=0.3)


@pytest.fixture
def yaml_file(tmp_path):
    """A configuration over a ``.ts`` file that lies beside it."""
    lines = [f"{k},{k + 1},{k * k},{2 - k}:{'xy'[k % 2]}" for k in range(8)]
    header = "@dimensions 1\n@classLabel true x y\n@data\n"
    (tmp_path / "all.ts").write_text(header + "\n".join(lines))
    values = {
        "name": "small",
        "source": {"kind": "ts", "files": [{"path": str(tmp_path / "all.ts"), "split": "train"}]},
        "drop_rate": 0.25,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "small.yaml"

"""``roma data build`` and ``roma-pipeline new-experiment`` on the inputs of a case."""

import yaml
from click.testing import CliRunner

from roma_core.cli import main as roma
from roma_core.data import StoredDataset
from roma_pipelines.cli import main as roma_pipeline


def run_build(folder, config):
    """The result of building a configuration in a folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["data", "build", str(folder / "config.yaml"), "--out", str(folder / "out")]
    result = CliRunner().invoke(roma, [*arguments, "--cache", str(folder / "cache")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def build(folder, config):
    """The data set that a configuration describes."""
    result = run_build(folder, config)
    assert result.exit_code == 0, result.output
    return StoredDataset(result.output.splitlines()[-1])


def error_of(folder, config):
    """The sentence with which a configuration is refused."""
    result = run_build(folder, config)
    assert result.exit_code == 1, result.output
    (text,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return text


def new_experiment(source, *options):
    """Settings of the data set that are chosen for a source, and all that is printed."""
    arguments = ["new-experiment", "case", "--source", str(source), "--print", *options]
    result = CliRunner().invoke(roma_pipeline, arguments)
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)["attributes"]["dataset"], result.output

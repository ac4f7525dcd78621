"""What Dagster loads: quickly, without anything heavy, and refusing a wrong file by its name."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from roma_pipelines.components import RomaExperiment
from roma_pipelines.definitions import defs, load
from roma_pipelines.registry.gate import CHECKS
from roma_pipelines.resources import KubernetesJobClient, LocalJobClient, SlurmJobClient
from roma_pipelines.storage import defs_files

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "roma_pipelines" / "defs" / "japanese_vowels" / "defs.yaml"
HEAVY = ("torch", "accelerate", "mlflow", "wandb", "matplotlib", "sklearn", "pandas", "pyarrow")
ASSET_NAMES = {
    "dataset",
    "pretrained_encoder",
    "finetuned_classifier",
    "evaluation_report",
    "registered_classifier",
}


def run(*command, home, **options):
    """A command at the root of the repository; what it writes goes to ``home``."""
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "HOME": str(home),
        "ROMA_STORAGE_ROOT": str(home / "storage"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def test_definitions_load_quickly_and_light(tmp_path):
    program = (
        "import json, sys, time\n"
        "import dagster\n"
        "start = time.process_time()\n"
        "from roma_pipelines.definitions import defs\n"
        "keys = defs().resolve_all_asset_keys()\n"
        "seconds = time.process_time() - start\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "print(json.dumps([len(keys), seconds, heavy]))"
    )

    done = run(sys.executable, "-c", program, home=tmp_path, check=True)

    n_assets, seconds, heavy = json.loads(done.stdout)
    assert n_assets >= 5
    assert heavy == []
    assert seconds < 2.0


@pytest.mark.parametrize(
    "command",
    [("dg", "check", "defs"), ("dagster", "definitions", "validate", "-w", "workspace.yaml")],
    ids=["dg", "dagster"],
)
def test_the_official_checks_pass(command, tmp_path):
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

    done = run(*command, home=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def graph():
    return defs().resolve_asset_graph()


def test_an_experiment_is_five_assets_of_one_group(graph):
    keys = {key for key in graph.get_all_asset_keys() if key.path[0] == "japanese_vowels"}

    assert keys == {dg.AssetKey(["japanese_vowels", noun]) for noun in ASSET_NAMES}
    assert {graph.get(key).group_name for key in keys} == {"japanese_vowels"}


def test_a_component_that_dagster_cannot_load_leaves_the_experiments(monkeypatch):
    def fails(*_):
        raise RuntimeError("the tree of all files") from ValueError("no such setting")

    monkeypatch.setattr("roma_pipelines.definitions._from_folder", fails)
    loaded, errors = load()
    assert errors == {"defs": "ValueError: no such setting"}
    assert {"japanese_vowels", "defs"} < {key.path[0] for key in loaded.resolve_all_asset_keys()}
    files = defs_files() | {"other": Path("other/defs.yaml")}
    monkeypatch.setattr("roma_pipelines.definitions.defs_files", lambda: files)
    assert load()[1] == {"other": "other/defs.yaml: ValueError: no such setting"}


@pytest.mark.parametrize("content", [(), ("README.md",)])
def test_a_project_may_have_no_experiment_yet(monkeypatch, tmp_path, content):
    (tmp_path / "defs").mkdir()
    for name in content:
        (tmp_path / "defs" / name).touch()
    monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))

    definitions, errors = load()

    assert errors == {}
    assert definitions.resolve_asset_graph().has(dg.AssetKey(["japanese_vowels", "dataset"]))


def test_python_files_are_loaded_and_are_named_where_a_broken_file_leaves_them_out(
    monkeypatch, tmp_path, recwarn
):
    folder = tmp_path / "defs" / "own"
    folder.mkdir(parents=True)
    (folder / "assets.py").write_text("import dagster as dg\n\n@dg.asset\ndef own(): pass\n")
    monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))
    assert load()[0].resolve_asset_graph().has(dg.AssetKey("own"))
    assert [one for one in recwarn if one.category in (dg.BetaWarning, dg.PreviewWarning)] == []

    (tmp_path / "defs" / "broken").mkdir()
    (tmp_path / "defs" / "broken" / "defs.yaml").write_text("type: [")
    loaded, errors = load()

    assert errors.keys() == {"broken", "defs/own"}
    assert "only if all experiments are valid" in errors["defs/own"]
    assert dg.AssetKey("own") not in loaded.resolve_all_asset_keys()


def test_the_clients_of_jobs_are_resources_of_the_assets_that_may_run_one(graph):
    definitions = defs()
    clients = {"local": LocalJobClient, "slurm": SlurmJobClient, "kubernetes": KubernetesJobClient}
    assert {name: type(client) for name, client in definitions.resources.items()} == clients
    for noun in ASSET_NAMES:
        asset = definitions.resolve_assets_def(dg.AssetKey(["japanese_vowels", noun]))
        needed = set() if noun == "registered_classifier" else set(clients)
        assert asset.required_resource_keys - {"io_manager"} == needed


def test_checks_block_what_comes_after(graph):
    checks = {key.name: graph.get(key) for key in graph.asset_check_keys}

    assert set(checks) == {"sound", "unsuspicious", *CHECKS}
    assert {name for name, check in checks.items() if not check.blocking} == {"unsuspicious"}


def test_the_schedule_is_off_until_somebody_wants_it():
    (schedule,) = defs().schedules

    assert schedule.name == "japanese_vowels_retraining"
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED


def changed(path, value):
    """The shipped experiment's attributes with one of them changed."""
    attributes = copy.deepcopy(yaml.safe_load(SHIPPED.read_text())["attributes"])
    section = attributes
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return attributes


REFUSED = {
    ("gate", "min_primry"): (
        0.9,
        "gate.min_primry: not a setting; the closest one is gate.min_primary",
    ),
    ("gate", "min_primary"): (9, "gate.min_primary: must be less than or equal to 1"),
    ("dataset", "drop_rat"): (
        0.3,
        "dataset.drop_rat: not a setting; the closest one is dataset.drop_rate",
    ),
    ("dataset", "source", "version"): ("", "dataset.source: version: must match pattern"),
    ("resources", "target"): (
        "laptop",
        "resources.target: must be 'local', 'slurm' or 'kubernetes', got 'laptop'",
    ),
    ("pretraining", "trainer", "epoch"): (
        3,
        "pretraining.trainer.epoch: not a setting; the closest one is epochs",
    ),
    ("pretraining", "trainer", "epochs"): (
        "many",
        "pretraining.trainer.epochs: must be a valid integer",
    ),
    ("pretraining", "trainer", "optimizer_args"): ({"beta": 1}, "optimizer_args ['beta'] are not"),
    ("pretraining", "model", "encoder_config", "dept"): (
        4,
        "pretraining.model.encoder_config.dept: not a setting; the closest one is encoder_config.depth",
    ),
    ("pretraining", "model", "n_channels"): (
        12,
        "pretraining.model.n_channels: determined by the data set; remove it",
    ),
    ("finetuning", "trainer", "checkpoint_dir"): (
        "here",
        "finetuning.trainer.checkpoint_dir: every job has a folder of its own",
    ),
    ("finetuning", "model", "mask_ratio"): (0.5, "finetuning.model.mask_ratio: not a setting"),
    ("finetuning", "model", "use_cls"): (
        True,
        "finetuning.model.use_cls: determined by the pretrained encoder",
    ),
    ("finetuning", "model", "encoder_config"): (
        {"d_model": 64},
        "finetuning.model.encoder_config.d_model: determined by the pretrained encoder",
    ),
    ("finetuning", "model", "pooling"): ("cls", "reads a token that use_cls=False leaves out"),
    ("finetuning", "model", "problem_type"): (
        "regression",
        "finetuning.model.problem_type: regression contradicts task: classification",
    ),
    ("task",): (
        "interpolation",
        "finetuning: an interpolation registers the pretrained autoencoder",
    ),
}


@pytest.mark.parametrize("path", REFUSED, ids=".".join)
def test_a_wrong_setting_is_refused_by_its_name_when_definitions_load(path):
    value, message = REFUSED[path]

    with pytest.raises(ValueError, match="experiment japanese_vowels: ") as caught:
        RomaExperiment.parse(changed(path, value)).build_defs(None)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("gate", {"min_class_recall": 0.5}, "gate.min_class_recall: is for classes"),
        (
            "baselines",
            [{"name": "a", "accuracy": 0.5, "source": "b"}],
            "baselines: is for classes, and the task is regression",
        ),
        ("primary_metric", "auroc", "primary_metric: auroc is a metric of classes"),
    ],
)
def test_settings_of_classes_are_refused_for_a_regression(section, value, message):
    attributes = changed(("task",), "regression") | {"gate": {}, "baselines": [], section: value}

    with pytest.raises(ValueError, match=message):
        RomaExperiment.parse(attributes)


def test_a_gain_over_baselines_needs_baselines():
    attributes = changed(("measure_baselines",), False) | {"gate": {"min_baseline_gain": 0.0}}

    with pytest.raises(ValueError, match=r"gate\.min_baseline_gain: no baseline is measured with"):
        RomaExperiment.parse(attributes)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pretrained_from": "other", "pretraining": {}}, "pretrained_from: an interpolation reg"),
        (
            {"pretraining": {"model": {"pos_encoding": "absolute"}}},
            "pretraining.model.pos_encoding: absolute: such a model cannot predict values at other",
        ),
    ],
)
def test_an_interpolation_refuses_what_it_cannot_serve(section, message):
    dataset = changed(("name",), "any")["dataset"]
    attributes = {"name": "any", "task": "interpolation", "dataset": dataset}

    names = RomaExperiment.parse(attributes).asset_names
    with pytest.raises(ValueError, match=re.escape(message)):
        RomaExperiment.parse(attributes | section)

    assert names[1:] == ("pretrained_encoder", "evaluation_report", "registered_autoencoder")


def test_all_mistakes_are_told_at_once():
    attributes = changed(("gate", "min_primry"), 0.9)
    attributes["dataset"]["drop_rat"] = 0.3

    with pytest.raises(ValueError) as caught:
        RomaExperiment.parse(attributes)

    assert len(str(caught.value).splitlines()) == 2


def test_an_unknown_section_is_refused_by_its_name():
    with pytest.raises(ValueError, match="pretraning"):
        RomaExperiment(**changed(("pretraning",), {}))


def test_a_schedule_that_is_no_cron_expression_is_refused():
    with pytest.raises(ValueError, match="'whenever' is no cron expression"):
        RomaExperiment.parse(changed(("schedule",), "whenever"))

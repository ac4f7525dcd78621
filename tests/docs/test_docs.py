"""README.md and docs/: links lead somewhere, code blocks run, the site builds without a warning.

A block that is not run has a comment before it, ``<!-- not run: reason -->``; its options are checked
nevertheless.
"""

import json
import re
import shlex
import string
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from roma_core import RoMAClassifier
from roma_core.cli import main as roma
from roma_core.data import DatasetConfig, build_dataset
from roma_core.evaluation import packaging
from roma_core.serving.package import SmokeTestFailed
from roma_core.serving.pyfunc_model import Series
from roma_core.settings import RomaSettings
from roma_pipelines.cli import main as roma_pipeline
from roma_pipelines.experiment import Experiment, load_experiment
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.store import MlflowSettings, connect
from tests.core.test_estimators import TINY, irregular
from tests.core.test_settings import Items
from tests.pipelines.registry.conftest import registered_as

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEPLOY = ROOT / "deploy" / "README.md"
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(
    r"(?:^<!-- not run: ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMANDS = {"roma": roma, "roma-pipeline": roma_pipeline}


class Block(NamedTuple):
    reason: str  # why it is not run; empty: it is
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size <= 120_000, picture


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, DEPLOY], ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    dead = []
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_messages_of_the_troubleshooting_table_are_in_the_code():
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    folders = [ROOT / "roma_core", ROOT / "roma_pipelines"]
    code = "".join(path.read_text(encoding="utf-8") for f in folders for path in f.rglob("*.py"))
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)

    assert messages
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, message


def test_the_site_builds_and_its_references_are_whole(tmp_path, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))

    settings = (tmp_path / "settings.html").read_text(encoding="utf-8")
    ours = ("roma_core.", "roma_pipelines.")
    known = [cls for cls in RomaSettings.__subclasses__() if cls.__module__.startswith(ours)]
    for cls in [*known, *(sub for parent in known for sub in parent.__subclasses__())]:
        prefix = cls.model_config["env_prefix"]
        for name in cls.model_fields if prefix else ():
            assert f"{prefix}{name.upper()}" in settings
    fields = (tmp_path / "experiments.html").read_text(encoding="utf-8")
    assert "<code>gate.min_primary</code>" in fields
    texts = (tmp_path / "commands.html").read_text(encoding="utf-8")
    assert 'id="roma-data-build"' in texts and 'id="roma-pipeline-jobs-cancel"' in texts
    for page in tmp_path.rglob("*.html"):
        fetched = (
            r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* rel=\"?stylesheet[^>]*//"
        )
        assert not re.search(fetched, page.read_text(encoding="utf-8")), page


# --- code blocks ------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """The words of a command of ours, without variables in front; none if it is another's."""
    found = re.match(r"\s*(?:[A-Z_]+=\S+ )*((?:roma|roma-pipeline) .*)", line)
    return shlex.split(re.sub(r"[][]", "", found[1]), comments=True) if found else []


def lines_of(code: str) -> list[str]:
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def check_options(words: list[str]) -> None:
    """The command exists, and takes these options and as many arguments."""
    command, words, parent = COMMANDS[words[0]], words[1:], None
    while isinstance(command, click.Group):
        context = click.Context(command, parent=parent, info_name=command.name)
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words, parent = found, words[1:], context
    context = click.Context(command, parent=parent, **command.context_settings)
    command.make_parser(context).parse_args(args=list(words))


@pytest.mark.parametrize("page", [*PAGES, DEPLOY], ids=name_of)
def test_blocks_that_are_not_run_say_why_and_have_options_that_exist(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block.code
        for path in re.findall(r"tests/[\w./]*\w", block.reason):
            assert (ROOT / path).exists(), path
        if block.reason and block.language == "bash":
            for line in lines_of(block.code):
                if words := words_of(line):
                    check_options(words)
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`(roma(?:-pipeline)? [^`]*)`", text):
        check_options(words_of(span))


def stars(folder: Path) -> None:
    """Tables of 40 stars, each in a field of its own, and of 30 patients."""
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    n, m = 40, 12
    star = np.repeat(np.arange(n), m)
    flux = rng.normal(star % 2, 1, n * m)
    bands = rng.choice(["g", "r", "i"], n * m)
    table = {
        "star_id": star,
        "mjd": 60_000 + rng.random(n * m).cumsum(),
        "band": bands,
        "flux": flux,
    }
    table |= {"flux_err": rng.random(n * m), "class": star % 2, "field": star}
    pd.DataFrame(table).to_parquet(folder / "data" / "stars.parquet")
    patient = np.repeat(np.arange(30), 6)
    variable = np.tile(["hr", "lactate"], 90)
    events = {"patient": patient, "hours": np.tile(np.arange(6), 30), "variable": variable}
    events |= {
        "value": rng.normal(70, 9, 180),
        "age": 30 + patient,
        "sex": np.where(patient % 2, "f", "m"),
    }
    pd.DataFrame(events).to_csv(folder / "events.csv", index=False)


def champion(folder: Path, store_template: Path) -> None:
    """A tiny classifier of twelve channels, registered as japanese_vowels."""
    rng = np.random.default_rng(0)
    n, m = 20, 6
    frames = {"id": np.repeat(np.arange(n), m), "frame": np.tile(np.arange(m), n)}
    frames |= {f"c{k:02d}": rng.normal(size=n * m) for k in range(1, 13)}
    pd.DataFrame(frames | {"speaker": frames["id"] % 2}).to_csv(folder / "frames.csv", index=False)
    channels = [{"column": f"c{k:02d}"} for k in range(1, 13)]
    columns = {"object": "id", "axes": [{"column": "frame"}], "channels": channels}
    columns |= {"metadata": {"label": "speaker"}}
    source = {"kind": "table", "files": ["frames.csv"], "columns": columns}
    config = DatasetConfig.model_validate({"name": "vowels", "source": source})
    model = RoMAClassifier(pretrain=False, **TINY).fit(
        build_dataset(config, folder / "sets", folder)
    )
    model.save(folder / "package")
    store = folder / ".roma" / "mlflow"
    store.mkdir(parents=True)
    (store / store_template.name).write_bytes(store_template.read_bytes())
    client = connect(MlflowSettings.from_values({}), store)
    registered_as(client, (folder / "package",), "japanese_vowels", "k1")
    promote(client, "japanese_vowels", "1", reason="first", actor="tester", evidence={})


SYNTHETIC = {"kind": "synthetic", "n_series": 24, "seed": 0}
SMALL = {"D_MODEL": 16, "NHEAD": 2, "DEPTH": 1}


@pytest.fixture
def names(tmp_path, monkeypatch, store_template, request):
    """What the code of a page finds: files in the working folder, settings, variables of Python."""
    import mlflow

    page = request.node.callspec.params["page"].name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / ".roma"))
    monkeypatch.setenv("ROMA_TRAINER_EPOCHS", "1")
    for stack in ("PRETRAIN_ENCODER", "PRETRAIN_DECODER", "CLASSIFIER_ENCODER"):
        for name, value in SMALL.items():
            monkeypatch.setenv(f"ROMA_{stack}_CONFIG__{name}", str(value))
    if page == "data.md":
        stars(tmp_path)
    if page == "training.md":
        monkeypatch.setattr(packaging, "smoke_test_package", no_process)
        for name, process in (("dataset", "spirals"), ("pendulum", "positions")):
            content = {"name": name, "source": {**SYNTHETIC, "process": process}}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    if page in ("README.md", "registry.md"):
        champion(tmp_path, store_template)
    if page in ("README.md", "estimators.md"):
        default = {name: TINY[name] for name in ("model", "trainer", "verbose")}
        monkeypatch.setattr(RoMAClassifier, "__init__", tiny(RoMAClassifier.__init__, default))
    X, y = irregular()
    before = mlflow.get_tracking_uri()
    yield {"X": X, "y": y, "X_test": X, "y_test": y, "train_ds": Items(8), "test_ds": Items(8)}
    mlflow.set_tracking_uri(before)


def no_process(package):
    raise SmokeTestFailed("not tried: tests/core/serving/test_package.py does")


def tiny(original, default):
    def init(self, **given):
        original(self, **{**default, **given})

    return init


def run_shell(code: str, variables: dict[str, str]) -> None:
    """Commands of ours, ``NAME=$(…)`` and ``$NAME``."""
    for line in lines_of(code):
        assigned = re.fullmatch(r"(\w+)=\$\((.*)\)", line)
        words = shlex.split(assigned[2] if assigned else line, comments=True)
        words = [string.Template(word).substitute(variables) for word in words]
        result = CliRunner().invoke(COMMANDS[words[0]], words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        if assigned:
            variables[assigned[1]] = result.stdout.strip()


def check_yaml(text: str, folder: Path) -> None:
    """A whole experiment, a data set, which is built, a run config, or sections of an experiment."""
    document = yaml.safe_load(text)
    shipped = load_experiment("japanese_vowels")
    if "type" in document:
        (folder / "defs.yaml").write_text(text)
        load_experiment(str(folder / "defs.yaml"))
    elif "source" in document:
        (folder / f"{document['name']}.yaml").write_text(text)
        build_dataset(DatasetConfig.model_validate(document), folder / "data", folder)
    elif "ops" in document:
        for op, given in document["ops"].items():
            experiment, _, asset = op.partition("__")
            load_experiment(experiment).with_run_config({asset: given["config"]})
    else:
        given = {name: getattr(shipped, name) for name in shipped.model_fields_set}
        Experiment.parse({**given, "predictions": {"input": "new.parquet"}, **document})


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(not b.reason for b in blocks_of(p))], ids=name_of
)
def test_blocks_run(page, names, tmp_path):
    variables: dict[str, str] = {}
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.language == "yaml":
            check_yaml(block.code, tmp_path)
        elif block.language == "json":
            Series(**json.loads(block.code))
        elif block.language == "bash":
            run_shell(block.code, variables)
        elif block.language == "python":
            exec(compile(block.code, f"{page.name}: {block.code[:60]}", "exec"), names)

"""``roma-pipeline tune``: a hyperparameter search, and its best settings as a change of the file."""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml

from roma_core.files import write_bytes
from roma_pipelines.cli import complete_experiment
from roma_pipelines.storage import Storage, defs_files, project_folder

_MARK = "# tuned by "
# of an earlier search
_EVIDENCE = re.compile(rf"(?m)^ *{_MARK}\S+-[0-9a-f]{{12}}, trial \d+: .*\n\Z")


@click.command(epilog="Example: roma-pipeline tune japanese_vowels --trials 30 --parallel 4")
@click.argument("experiment", shell_complete=complete_experiment)
@click.option("--trials", type=int, help="Trials of the study (default: the file's, else 30).")
@click.option("--parallel", type=int, help="Trials at the same time (default: the file's, else 2).")
@click.option("--hours", type=float, help="GPU- or CPU-hours after which no trial starts.")
@click.option("--write", is_flag=True, help="Write better settings into the file.")
def tune(experiment: str, write: bool, **budget: Any) -> None:
    """Search for settings of EXPERIMENT that are better on its validation split.

    EXPERIMENT is a name or the path of a defs.yaml. Its section `tuning` has the space; by default
    learning rate, weight decay, dropouts and augmentation of the finetuning are searched, and all
    trials share one pretrained encoder, if there is a pretraining:

    \b
        tuning:
          space:
            finetuning.trainer.base_lr: {low: 0.0001, high: 0.01, log: true}
            finetuning.trainer.epochs: {low: 20, high: 80, step: 20}
            pretraining.model.mask_ratio: {choices: [0.25, 0.5, 0.75]}

    Every trial is a job on the target of the experiment, the first with the settings of the file.
    Trials worse than the median are pruned. The same command resumes an interrupted search, and a larger
    --trials extends it; other data, settings of the file or space begin a new study. Better settings are
    printed as a difference of the file, which --write applies. The test split is not read.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from roma_core.data.build import build_dataset
    from roma_pipelines.experiment import load_experiment
    from roma_pipelines.launching.targets import launcher_for
    from roma_pipelines.search_space import Tuning, sections
    from roma_pipelines.tuning import Search

    is_path = experiment.endswith((".yaml", ".yml"))
    found, storage = load_experiment(experiment), Storage.open()
    path = Path(experiment) if is_path else defs_files()[experiment]
    if write and not is_path and not path.is_relative_to(project_folder() / "defs"):
        raise ValueError(
            f"{path} is shipped and not changed; copy it to defs/NAME in your project, with another "
            f"name, or give its path"
        )
    given = {name: value for name, value in budget.items() if value is not None}
    section = (found.tuning or Tuning()).model_dump(exclude_unset=True) | given
    found = found.parse({**dict(found), "tuning": section})
    dataset = build_dataset(found.dataset, storage.datasets, storage.cache, progress=False)
    launcher = partial(launcher_for, storage=storage)
    search = Search(found, dataset, storage, click.echo, launcher)
    try:
        result = search.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; the jobs of running trials, if there are any, continue, and the same "
            "command adopts them; `roma-pipeline jobs cancel` ends one"
        ) from None
    click.echo(f"\n{result.text}\nreport  {result.page}")
    if not result.settings:
        return
    than = "" if result.file is None else f", {result.file:.4f} before"
    evidence = f"{search.name}, trial {result.best.number}: {search.metric} "
    evidence += f"{result.best.value:.4f} on validation{than}; {time.strftime('%Y-%m-%d')}"
    before = path.read_bytes().decode()
    try:
        after = changed_text(before, result.settings, evidence)
        made = found.parse({**yaml.safe_load(after)["attributes"], "tuning": None})
    except (ValueError, yaml.YAMLError):  # anchors, tags, block scalars, …
        made = None
    if made != search.plain.with_settings(**sections(search.plain, result.settings)):
        better = "\n".join(f"  {name}: {value}" for name, value in result.settings.items())
        raise ValueError(f"{path} is too intricate to be edited; set these by hand:\n{better}")
    lines = before.splitlines(), after.splitlines()
    click.echo("\n".join(difflib.unified_diff(*lines, str(path), "tuned", lineterm="", n=1)))
    if write:
        write_bytes(path, after.encode())
    click.echo(f"wrote {path}" if write else "--write applies it")


def changed_text(text: str, settings: Mapping[str, Any], evidence: str) -> str:
    """The text of a ``defs.yaml`` with these settings, by path; all else, comments too, stays.

    A comment with the evidence is above each stage that changed, in the place of an earlier one.
    ValueError or YAMLError if the file has forms that are not edited, such as anchors.
    """
    if "\r\n" in text:
        return changed_text(text.replace("\r\n", "\n"), settings, evidence).replace("\n", "\r\n")
    for path, value in settings.items():
        text = _with_value(text, ["attributes", *path.split(".")], value)
    for stage in {path.partition(".")[0] for path in settings}:
        attributes = next(
            value for key, value in yaml.compose(text).value if key.value == "attributes"
        )
        mark = next(key.start_mark for key, _ in attributes.value if key.value == stage)
        start = mark.index - mark.column
        head = _EVIDENCE.sub("", text[:start])
        text = f"{head}{' ' * mark.column}{_MARK}{evidence}\n{text[start:]}"
    return text


def _with_value(text: str, names: list[str], value: Any) -> str:
    here = yaml.compose(text)
    while names and isinstance(here, yaml.MappingNode):
        inner = next((value for key, value in here.value if key.value == names[0]), None)
        if inner is None:
            break
        here, names = inner, names[1:]
    for name in reversed(names):  # what the file lacks
        value = {name: value}
    new = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    start, end = here.start_mark.index, here.end_mark.index
    if text[start : start + 1] in ("&", "!", "|", ">"):
        raise ValueError(f"line {here.start_mark.line + 1} cannot be edited")
    if not names:
        return f"{text[:start]}{' ' * (start == end)}{new}{text[end:]}"
    if not isinstance(here, yaml.MappingNode):
        raise ValueError(f"line {here.start_mark.line + 1} is no mapping")
    new = new[1:-1]  # without its braces, as the last entry
    if here.flow_style:
        before = text[: end - 1].rstrip()
        return f"{before}{', ' if here.value else ' '}{new} {text[end - 1 :]}"
    last: yaml.Node = here
    while isinstance(last, yaml.CollectionNode) and last.value and not last.flow_style:
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    end = last.end_mark.index
    end = text.find("\n", end - 1 if text[end - 1 : end] == "\n" else end)
    end = len(text) if end < 0 else end
    return f"{text[:end]}\n{' ' * here.start_mark.column}{new}{text[end:]}"

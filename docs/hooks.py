"""What mkdocs builds beside the pages of this folder: files that they link, and the references.

A link that leaves ``docs/`` works in the repository; the site has a copy of what it leads to, at the same
path. README.md is the first page.
"""

import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from roma_core.settings import leaves_of, variable_of
from roma_pipelines.experiment import Experiment
from tests.env_example import SETTINGS

ROOT = Path(__file__).parents[1]
_COPIES = {"README.md": "index.md"}
"""Path in the repository -> page of the site; other files that pages link keep their path."""
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of ``docs/`` that pages link, and those that these link."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += ["README.md", "CHANGELOG.md"]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        source = ROOT / path
        if not path.startswith("docs/"):
            at = _COPIES.get(path, path)
            files.append(File.generated(config, at, abs_src_path=str(source)))
        if path.endswith(".md"):
            for target in _LINK.findall(source.read_text(encoding="utf-8")):
                found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
                if found not in seen and not found.startswith("docs/") and (ROOT / found).is_file():
                    waiting.append(found)
                    seen.add(found)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to where their target is in the site, and fills in the references."""
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT).as_posix()

    def led(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        at = _COPIES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(at, posixpath.dirname(page.file.src_uri) or ".")

    markdown = _LINK.sub(led, markdown)
    for name, make in REFERENCES.items():
        if (marker := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def settings_reference() -> str:
    """Every settings class: variable, default and meaning of each field."""
    text = ""
    for cls in SETTINGS:
        fields = leaves_of(cls)
        rows = [
            (variable_of(cls, name), value, fields[name].description)
            for name, value, _ in cls.from_values({}).resolved()
        ]
        about = inspect.cleandoc(cls.__doc__ or "").replace("``", "`")
        text += f"\n## {cls.__name__}\n\n{about}\n\n" + _table("variable", rows)
    return text


def experiment_reference() -> str:
    """Every field of a ``defs.yaml``."""
    return _table("field", _fields(Experiment))


def _fields(model: type[BaseModel], where: str = "") -> Iterator[tuple[str, Any, str | None]]:
    for name, field in model.model_fields.items():
        default = (
            "required" if field.is_required() else field.get_default(call_default_factory=True)
        )
        sections = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        about = field.description or (sections and sections[0].__doc__) or ""
        yield where + name, "" if isinstance(default, BaseModel) else default, about
        for section in sections:
            yield from _fields(section, f"{where}{name}.")


def command_reference() -> str:
    """The help text of every command."""
    from roma_core.cli import main as roma
    from roma_pipelines.cli import main as roma_pipeline

    return "".join(_helps(roma, "roma")) + "".join(_helps(roma_pipeline, "roma-pipeline"))


def _helps(command: click.Command, name: str) -> Iterator[str]:
    with click.Context(command, info_name=name, terminal_width=100) as context:
        yield f"\n{'##' if ' ' not in name else '###'} {name}\n\n```text\n{command.get_help(context)}\n```\n"
        if isinstance(command, click.Group):
            for each in command.list_commands(context):
                if (found := command.get_command(context, each)) and not found.hidden:
                    yield from _helps(found, f"{name} {each}")


def _table(first: str, rows: Any) -> str:
    def cell(text: Any) -> str:
        return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")

    lines = [f"| {first} | default | meaning |", "| --- | --- | --- |"]
    for name, default, meaning in rows:
        shown = "" if default in ("", None) else f"`{cell(default)}`"
        lines.append(f"| `{name}` | {shown} | {cell(meaning or '')} |")
    return "\n".join(lines) + "\n"


REFERENCES = {
    "settings": settings_reference,
    "experiment": experiment_reference,
    "commands": command_reference,
}

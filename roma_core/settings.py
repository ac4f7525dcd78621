"""Where settings come from: code, the environment, one ``.env`` file, defaults, in this order.

``RomaSettings`` is the one base class that reads the environment. Its subclasses own a prefix
each; sections nested inside them are plain ``BaseModel``s reached with two underscores
(``ROMA_PRETRAIN_ENCODER_CONFIG__DEPTH=3``), and setting one leaf keeps the defaults of the others.
A variable under a class's prefix that no field takes is an error naming the closest field.
Spellings of the published package (``ROMAE_…``) are accepted with a note.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, PrivateAttr, SecretStr
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_FILE_VARIABLE = "ROMA_ENV_FILE"
_DELIMITER = "__"


class SettingsError(ValueError):
    """A setting is misspelt, contradictory or out of range."""


def find_env_file(start: Path | None = None) -> Path | None:
    """The ``.env`` in force: ``$ROMA_ENV_FILE`` if set, else the nearest one at or above ``start``.

    Raises:
        SettingsError: ``$ROMA_ENV_FILE`` names a file that does not exist.
    """
    named = os.environ.get(ENV_FILE_VARIABLE)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise SettingsError(f"{ENV_FILE_VARIABLE}={named}: there is no such file")
        return path
    folder = (start or Path.cwd()).absolute()
    return next((f / ".env" for f in (folder, *folder.parents) if (f / ".env").is_file()), None)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The nested model behind an annotation, ``Optional`` included; None for a leaf."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((s for a in typing.get_args(annotation) if (s := _section(a))), None)
    return None


def leaf_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a settings class: ``base_lr``, ``encoder_config.depth``."""
    names = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        names += leaf_names(section, f"{prefix}{name}.") if section else [prefix + name]
    return names


def _reject_unknown(cls: type[RomaSettings], variables: Mapping[str, Any], where: str) -> None:
    prefix = cls.model_config["env_prefix"].lower()
    leaves = leaf_names(cls)
    sections = {leaf.rsplit(".", i)[0] for leaf in leaves for i in range(1, leaf.count(".") + 1)}
    known = {name.replace(".", _DELIMITER) for name in [*leaves, *sections]}
    for variable in variables:
        name = variable.lower()
        if not name.startswith(prefix) or name.removeprefix(prefix) in known:
            continue
        closest = difflib.get_close_matches(name.removeprefix(prefix), known, n=1, cutoff=0.0)[0]
        raise SettingsError(
            f"{variable.upper()} in {where} is not a setting of {cls.__name__}; "
            f"the closest one is {(prefix + closest).upper()}"
        )


class _WithPublishedSpelling:
    """Reads ``ROMAE_X`` as ``ROMA_X``; if both are set and differ, ``ROMA_X`` wins, with a note."""

    where: str

    def _respelt(
        self, variables: Mapping[str, str | None], cls: type[RomaSettings]
    ) -> dict[str, str | None]:
        prefix = cls.model_config["env_prefix"].lower()
        published = "romae_" + prefix.removeprefix("roma_")
        result = {k: v for k, v in variables.items() if not k.lower().startswith(published)}
        lowered = {k.lower() for k in result}
        for key, value in variables.items():
            if not key.lower().startswith(published):
                continue
            ours = prefix + key.lower().removeprefix(published)
            if ours not in lowered:
                result[ours] = value
                note = f"{key.upper()} in {self.where} is read as {ours.upper()}"
            elif variables.get(ours, variables.get(ours.upper())) == value:
                continue
            else:
                note = f"{key.upper()} in {self.where} is ignored: {ours.upper()} is set too and differs"
            warnings.warn(note, stacklevel=2)
        _reject_unknown(cls, result, self.where)
        return result


class _Environment(_WithPublishedSpelling, EnvSettingsSource):
    where = "the environment"

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._respelt(super()._load_env_vars(), self.settings_cls)  # type: ignore[arg-type]


class _EnvFile(_WithPublishedSpelling, DotEnvSettingsSource):
    def _read_env_files(self) -> Mapping[str, str | None]:
        self.where = str(self.env_file)
        return self._respelt(super()._read_env_files(), self.settings_cls)  # type: ignore[arg-type]


class _Recorded(PydanticBaseSettingsSource):
    """Passes a source through and notes which leaves it gave."""

    def __init__(self, source: PydanticBaseSettingsSource, label: str, notes: dict[str, str]):
        super().__init__(source.settings_cls)
        self.source, self.label, self.notes = source, label, notes

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self.source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        values = self.source()
        for leaf in _leaves(values):
            self.notes.setdefault(leaf, self.label)  # sources are called strongest first
        return values


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in values.items():
        if isinstance(value, BaseModel):
            value = {k: getattr(value, k) for k in type(value).model_fields}
        is_section = isinstance(value, Mapping) and value
        names += _leaves(value, f"{prefix}{name}.") if is_section else [prefix + name]
    return names


class RomaSettings(BaseSettings):
    """Base of every settings class; subclasses set ``env_prefix``, none a prefix of another."""

    model_config = SettingsConfigDict(
        env_nested_delimiter=_DELIMITER,
        extra="forbid",
        dotenv_filtering="match_prefix",
        env_ignore_empty=True,
        frozen=True,
        validate_default=True,
        nested_model_default_partial_update=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    _notes: ClassVar[dict[str, str]] = {}
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        values.setdefault("_env_file", find_env_file())
        notes: dict[str, str] = {}
        type(self)._notes = notes
        super().__init__(**values)
        self._sources = notes

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        env_file = getattr(dotenv_settings, "env_file", None)
        sources: list[tuple[PydanticBaseSettingsSource, str]] = [
            (init_settings, "code"),
            (_Environment(settings_cls), "environment"),
            (_EnvFile(settings_cls, env_file=env_file), str(env_file)),
            (file_secret_settings, "secret file"),
        ]
        return tuple(_Recorded(source, label, cls._notes) for source, label in sources)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> typing.Self:
        """Build from the given values and defaults alone: no environment, no ``.env``.

        For frozen configurations, which the computer they are read on must not change.
        """
        instance = cls.__new__(cls)
        cls.__pydantic_validator__.validate_python(dict(values), self_instance=instance)
        instance._sources = dict.fromkeys(_leaves(values), "file")
        return instance

    @classmethod
    def from_yaml(cls, path: Path | str) -> typing.Self:
        """Build from a YAML file's mapping, which counts as given in code."""
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise SettingsError(
                f"{path}: expected a mapping of settings, got {type(values).__name__}"
            )
        return cls(**values)

    def resolved(self) -> list[tuple[str, Any, str]]:
        """Every leaf as (dotted name, value, source); secrets masked, lists and dicts as they are."""

        def value_of(name: str) -> Any:
            value: Any = self
            for part in name.split("."):
                value = None if value is None else getattr(value, part)
            return str(value) if isinstance(value, SecretStr) else value

        return [(n, value_of(n), self._source_of(n)) for n in leaf_names(type(self))]

    def _source_of(self, leaf: str) -> str:
        parts = leaf.split(".")
        names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        return next((self._sources[n] for n in names if n in self._sources), "default")

    def as_table(self) -> str:
        """Every leaf with its value and source, a line each, for people."""
        rows = [(name, repr(value), source) for name, value, source in self.resolved()]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{n:<{width}}  {v}  [{s}]" for n, v, s in rows)

"""Where settings come from: code, the environment, one ``.env`` file, defaults, in this order.

``RomaSettings`` is the one base class that reads the environment. Its subclasses own a prefix
each; sections nested inside them are plain ``BaseModel``s reached with two underscores
(``ROMA_PRETRAIN_ENCODER_CONFIG__DEPTH=3``), and setting one leaf keeps the others. A leaf is one
value, whatever its type: a dictionary from a stronger source replaces that of a weaker one. An
object given in code for a section sets all its leaves, a dictionary only those it names.
Lists and dictionaries are written as JSON, None as ``null``; an empty variable counts as not set.
A variable under a class's prefix that no field takes is an error naming the closest field, and so
is a field behind a prefix that is misspelt.
Spellings of the published package (``ROMAE_…``) are accepted with a note.

Names and passwords in URLs stay out of everything that is kept or shown.
What is wrong with a description of data, a sentence each: which field, what is allowed, what came.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic_settings
import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    SettingsConfigDict,
)

ENV_FILE_VARIABLE = "ROMA_ENV_FILE"
_DELIMITER = "__"
_ALIKE = 0.75  # of two words, from 0 to 1: trainr and trainer are, pretrain and trainer are not


class Frozen(BaseModel):
    """Base of every configuration section and stored document: no unknown fields, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingsError(ValueError):
    """A setting is misspelt, contradictory or out of range.

    Attributes:
        problems: (dotted name, what is wrong) of every one, where values were validated.
    """

    def __init__(self, message: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def find_env_file(start: Path | None = None) -> Path | None:
    """The ``.env`` in force: ``$ROMA_ENV_FILE`` if set, else the nearest one at or above ``start``.

    ``ROMA_ENV_FILE=/dev/null`` switches it off.

    Raises:
        SettingsError: ``$ROMA_ENV_FILE`` names a file that does not exist.
    """
    named = os.environ.get(ENV_FILE_VARIABLE)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.exists() or path.is_dir():
            raise SettingsError(
                f"{ENV_FILE_VARIABLE}={named}: there is no such file; correct the path or unset it"
            )
        return path
    folder = (start or Path.cwd()).absolute()
    return next((f / ".env" for f in (folder, *folder.parents) if (f / ".env").is_file()), None)


def leaves_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All leaves of a settings class by dotted name: ``base_lr``, ``encoder_config.depth``."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        leaves |= leaves_of(section, f"{prefix}{name}.") if section else {prefix + name: field}
    return leaves


def _section(annotation: Any) -> type[BaseModel] | None:
    """The nested model behind an annotation, ``Optional`` included; None for a leaf."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((s for a in typing.get_args(annotation) if (s := _section(a))), None)
    return None


def variable_of(cls: type[RomaSettings], name: str) -> str:
    """The environment variable of a leaf: ``ROMA_PRETRAIN_ENCODER_CONFIG__DEPTH``."""
    return (cls.model_config["env_prefix"] + name.replace(".", _DELIMITER)).upper()


def _closest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


class _Variables:
    """What both kinds of variables share: published spellings, unknown names, JSON."""

    where: str
    settings_cls: Any

    def _checked(self, variables: Mapping[str, str | None]) -> dict[str, str | None]:
        """``ROMAE_X`` respelt as ``ROMA_X``, which wins if both are set; the names are lower-case.

        Raises:
            SettingsError: a name under either prefix is no setting.
        """
        prefix = self.settings_cls.model_config["env_prefix"].lower()
        published = prefix.replace("roma_", "romae_", 1)
        result = {k: v for k, v in variables.items() if not k.startswith(published)}
        for name in variables:
            for spelling in (prefix, published):
                if name.startswith(spelling):
                    self._refuse_unknown(spelling, name.removeprefix(spelling))
        for name in variables:
            self._refuse_misspelt_prefix(name)
        for name in (n for n in variables if n.startswith(published)):
            ours, value = prefix + name.removeprefix(published), variables[name]
            if ours not in result:
                result[ours] = value
                warnings.warn(
                    f"{name.upper()} in {self.where} is read as {ours.upper()}", stacklevel=2
                )
            elif result[ours] != value:
                warnings.warn(
                    f"{name.upper()} in {self.where} is ignored: {ours.upper()} is set too and differs",
                    stacklevel=2,
                )
        return result

    def _known(self) -> set[str]:
        """Names behind the prefix."""
        known = set()
        for leaf in leaves_of(self.settings_cls):
            parts = leaf.split(".")  # a section may be given whole, as JSON
            known |= {_DELIMITER.join(parts[:i]) for i in range(1, len(parts) + 1)}
        return known

    def _refuse_misspelt_prefix(self, variable: str) -> None:
        """``ROMA_TRAINR_BASE_LR``: a setting of this class behind almost its prefix."""
        project, _, rest = variable.partition("_")
        word, _, name = rest.partition("_")
        ours = self.settings_cls.model_config["env_prefix"].lower().split("_")[1]
        alike = difflib.SequenceMatcher(None, word, ours).ratio() >= _ALIKE
        if project in ("roma", "romae") and word != ours and alike and name in self._known():
            raise SettingsError(
                f"{variable.upper()} in {self.where} is no setting; do you mean "
                f"{variable_of(self.settings_cls, name)}?"
            )

    def _refuse_unknown(self, prefix: str, name: str) -> None:
        known = self._known()
        if name not in known:
            raise SettingsError(
                f"{(prefix + name).upper()} in {self.where} is not a setting of "
                f"{self.settings_cls.__name__}; the closest one is "
                f"{variable_of(self.settings_cls, _closest(name, known))}"
            )

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(
                f"{field_name} of {self.settings_cls.__name__} in {self.where}: expected JSON, such "
                f"""as [1,16,16] or {{"weight_decay": 0.05}}, got {value!r} ({error})"""
            ) from error


class _Environment(_Variables, EnvSettingsSource):
    where = "the environment"

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._checked(super()._load_env_vars())


class _EnvFile(_Variables, DotEnvSettingsSource):
    def _read_env_files(self) -> Mapping[str, str | None]:
        self.where = str(self.env_file)
        return self._checked(super()._read_env_files())


def _flat(
    values: Mapping[str, Any], cls: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf that is given."""
    for name, value in values.items():
        field = cls.model_fields.get(name)
        section = _section(field.annotation) if field else None
        if section and isinstance(value, BaseModel):
            value = dict(value)
        if section and isinstance(value, Mapping):
            yield from _flat(value, section, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        here = nested
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return nested


class RomaSettings(BaseSettings):
    """Base of every settings class; subclasses set ``env_prefix``, none a prefix of another.

    Two settings are equal if their values are, wherever these came from.

    Raises:
        SettingsError: naming every value that is wrong, where it came from, and what was expected.
    """

    model_config = SettingsConfigDict(
        env_nested_delimiter=_DELIMITER,
        extra="forbid",
        dotenv_filtering="match_prefix",
        env_ignore_empty=True,
        env_parse_none_str="null",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)  # of the leaves that were given

    def __init__(self, **values: Any) -> None:
        cls, env_file = type(self), find_env_file()
        try:
            from_file = _EnvFile(cls, env_file=env_file)()
            from_environment = _Environment(cls)()
        except pydantic_settings.SettingsError as error:
            raise SettingsError(str(error.__cause__)) from error
        self._fill((str(env_file), from_file), ("environment", from_environment), ("code", values))

    def _fill(self, *sources: tuple[str, Mapping[str, Any]]) -> None:
        """Validate the values of all sources, weakest first, over the defaults of the sections."""
        cls = type(self)
        sections = {n: f for n, f in cls.model_fields.items() if _section(f.annotation)}
        defaults = {n: f.get_default(call_default_factory=True) for n, f in sections.items()}
        given = dict(_flat({n: v for n, v in defaults.items() if v is not PydanticUndefined}, cls))
        labels: dict[str, str] = {}
        for label, values in sources:
            for name, value in _flat(values, cls):
                for other in list(given):  # a section that becomes None, or is one again
                    if other.startswith(f"{name}.") or name.startswith(f"{other}."):
                        del given[other]
                        labels.pop(other, None)
                given[name], labels[name] = value, label
        try:
            super().__init__(_build_sources=((InitSettingsSource(cls, _nested(given)),), {}))
        except ValidationError as error:
            problems = problems_of(error, cls)
            raise SettingsError(_explained(cls, problems, labels), problems) from None
        self._sources = labels

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and dict(self) == dict(other)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> typing.Self:
        """Build from the given values and defaults alone: no environment, no ``.env``.

        For frozen configurations, which the computer they are read on must not change.
        """
        instance = cls.__new__(cls)
        instance._fill(("file", values))
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

        return [(n, value_of(n), _source_of(n, self._sources)) for n in leaves_of(type(self))]

    def as_table(self) -> str:
        """Every leaf with its value and source, a line each, for people."""
        rows = [(name, repr(value), source) for name, value, source in self.resolved()]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{n:<{width}}  {v}  [{s}]" for n, v, s in rows)


def _source_of(name: str, labels: Mapping[str, str]) -> str:
    parts = name.split(".")
    names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((labels[n] for n in names if n in labels), "default")


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """What pydantic found wrong, in our words: (dotted name of the setting, what is wrong with it)."""
    problems = []
    for detail in error.errors(include_url=False):
        name, message = ".".join(map(str, detail["loc"])), detail["msg"]
        if detail["type"] == "extra_forbidden":
            known = leaves_of(model)
            message = "not a setting" + (
                f"; the closest one is {_closest(name, known)}" if known else ""
            )
        elif detail["type"] == "value_error":
            cause = detail["ctx"]["error"]
            if isinstance(cause, ValidationError):  # of a section that a validator built
                inner = problems_of(cause, BaseModel)
                problems += [(".".join(filter(None, (name, n))), text) for n, text in inner]
                continue
            message = str(cause)  # raised by a check of ours, a whole sentence
        elif detail["type"] != "missing":
            message = f"{message}, got {detail['input']!r}"
        problems.append((name, message))
    return problems


def _explained(
    cls: type[BaseModel], problems: list[tuple[str, str]], labels: Mapping[str, str]
) -> str:
    """Problems with the source of every value that is wrong."""
    lines = []
    for name, message in problems:
        source = _source_of(name, labels)
        place = name if source == "default" else f"{name} ({source})"
        lines.append(f"{place}: {message}" if name else message)
    return f"{cls.__name__}: " + "\n".join(lines)


_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")


def without_credentials(text: str) -> str:
    """A URL, or a text with URLs in it, with ``https://user:password@host`` as ``https://host``."""
    return _USERINFO.sub("", text)


_SHOWN = 60  # letters of a value
_OUR_WORDS = re.compile(r"^(Input|String|List|Tuple|Dictionary|Value) should")


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The errors that pydantic found in values for ``model``, in our words."""
    found: list[str] = []
    alternatives: dict[
        tuple[str, str], list[str]
    ] = {}  # a field of several types has a complaint of each
    details = error.errors(include_url=False)
    for detail in details:
        if _only_follows(detail, details):
            continue
        names = [str(part) for part in detail["loc"] if not _is_branch(part)]
        name = ".".join(names)
        kind = detail["type"]
        if kind == "extra_forbidden":
            known = _fields_beside(model, detail["loc"])
            closest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.0)
            meant = f"; did you mean {closest[0]!r}? There are {', '.join(known)}" if known else ""
            sentence = f"{name} is not a setting{meant}"
        elif kind == "missing":
            sentence = f"{name} is missing"
        elif kind == "value_error":
            cause = detail["ctx"]["error"]  # raised by a check of ours, a whole sentence
            sentence = f"{name}: {cause}" if name else str(cause)
        else:
            allowed = _OUR_WORDS.sub("must", detail["msg"], count=1)
            place = alternatives.setdefault((name, _shown(detail["input"])), [])
            place += [allowed] if allowed not in place else []
            continue
        if sentence not in found:
            found.append(sentence)
    found += [
        f"{name}: {' or '.join(all_)}, got {came}" for (name, came), all_ in alternatives.items()
    ]
    return found


def _only_follows(detail: Any, details: Sequence[Any]) -> bool:
    """Whether a list is called too short for no other reason than that its entries are wrong."""
    place = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in details
    )


def _is_branch(part: int | str) -> bool:
    """Whether this part of a place is pydantic's name for one of several types, not a field's."""
    return isinstance(part, str) and (
        "[" in part or part in ("float", "int", "str") or part.startswith("constrained-")
    )


def _fields_beside(model: Any, place: tuple[int | str, ...]) -> list[str]:
    """The names that would have been right in the section of the last part of ``place``."""
    for part in place[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:
            model = field.annotation
        for inner in getattr(model, "__args__", ()):  # of tuple[X, ...], dict[str, X] or X | None
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(getattr(model, "model_fields", {}))


def _shown(value: Any) -> str:
    text = (
        f"a mapping of {', '.join(map(str, value))}" if isinstance(value, Mapping) else repr(value)
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

"""Settings: from code, the environment, one ``.env`` file, or the defaults, in this order.

Each subclass of ``RomaSettings`` owns a prefix; leaves of nested sections are reached with two
underscores (``ROMA_PRETRAIN_ENCODER_CONFIG__DEPTH=3``) and set one by one. A leaf is one value,
whatever its type. An object given in code for a section sets all its leaves, a dictionary only
those it names. Lists and dictionaries are written as JSON, None as ``null``; an empty variable
counts as not set. A variable under a prefix that is no field, or under a misspelt prefix, is an
error naming the closest field. Spellings of the published package (``ROMAE_…``) give a warning.
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
from typing import Any, NamedTuple

import pydantic_settings
import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ENV_FILE_VARIABLE = "ROMA_ENV_FILE"
_DELIMITER = "__"
_SERVICE_LINK = re.compile(
    r"\w+(_service_(host|port\w*)=|_port_\d+_(tcp|udp|sctp)\w*=|_port=(tcp|udp|sctp)://)"
)
"""Variables that Kubernetes adds to every pod for each Service, so also for one named roma-…."""
_ALIKE = 0.75  # of 0 to 1: trainr and trainer are alike, pretrain and trainer are not


class Frozen(BaseModel):
    """Base of every configuration section and stored document: no unknown fields, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SettingsError(ValueError):
    """A setting is misspelt, contradictory or out of range; ``problems`` lists wrong values."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def find_env_file(start: Path | None = None) -> Path | None:
    """``$ROMA_ENV_FILE`` (/dev/null for none) or the nearest ``.env`` at or above ``start``."""
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


class _Environment(pydantic_settings.EnvSettingsSource):
    """Variables with checked names (lower-case); ``ROMAE_X`` is read as ``ROMA_X``, which wins."""

    where = "the environment"

    def _load_env_vars(self) -> Mapping[str, str | None]:
        variables = super()._load_env_vars()
        cls: Any = self.settings_cls
        prefix = cls.model_config["env_prefix"].lower()
        published = prefix.replace("roma_", "romae_", 1)
        paths = [leaf.split(".") for leaf in leaves_of(cls)]
        # a section may be given whole, as JSON
        known = {_DELIMITER.join(path[:i]) for path in paths for i in range(1, len(path) + 1)}
        variables = {k: v for k, v in variables.items() if not _SERVICE_LINK.match(f"{k}={v}")}
        result: dict[str, str | None] = {}
        for variable, value in variables.items():
            given, own = f"{variable.upper()} in {self.where}", prefix.split("_")[1]
            project, word, name = (*variable.split("_", 2), "", "")[:3]
            if variable.startswith((prefix, published)):
                name = variable.removeprefix(prefix).removeprefix(published)
                if name not in known:
                    closest = variable_of(cls, _closest(name, known))
                    what = f"is not a setting of {cls.__name__}; the closest one is {closest}"
                    raise SettingsError(f"{given} {what}")
            elif (
                project in ("roma", "romae")
                and name in known
                and difflib.SequenceMatcher(None, word, own).ratio() >= _ALIKE
            ):
                what = f"is not a setting; do you mean {variable_of(cls, name)}?"
                raise SettingsError(f"{given} {what}")
            ours = prefix + name if variable.startswith(published) else variable
            if ours == variable or ours not in variables:
                result[ours] = value
            if ours not in variables:
                warnings.warn(f"{given} is read as {ours.upper()}", stacklevel=2)
            elif variables[ours] != value:
                why = f"is ignored: {ours.upper()} is set too and differs"
                warnings.warn(f"{given} {why}", stacklevel=2)
        return result

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError as error:
            raise ValueError(
                f"{field_name} of {self.settings_cls.__name__} in {self.where}: expected JSON, such "
                f"""as [1,16,16] or {{"weight_decay": 0.05}}, got {value!r} ({error})"""
            ) from error


class _EnvFile(_Environment, pydantic_settings.DotEnvSettingsSource):
    @property
    def where(self) -> str:  # type: ignore[override]
        return str(self.env_file)


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


class RomaSettings(pydantic_settings.BaseSettings):
    """Base of every settings class that reads the environment; equality ignores the sources.

    Raises:
        SettingsError: naming every value that is wrong, where it came from, and what was expected.
    """

    model_config = pydantic_settings.SettingsConfigDict(
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
        nested: dict[str, Any] = {}
        for name, value in given.items():
            *path, last = name.split(".")
            here = nested
            for part in path:
                here = here.setdefault(part, {})
            here[last] = value
        try:
            super().__init__(
                _build_sources=((pydantic_settings.InitSettingsSource(cls, nested),), {})
            )
        except ValidationError as error:
            problems, lines = validation_errors(error, cls), []
            for problem in problems:
                source = _source_of(problem.name, labels)
                is_default = source == "default"
                lines.append(
                    str(problem if is_default else f"{problem.name} ({source}): {problem.message}")
                )
            raise SettingsError(f"{cls.__name__}: " + "\n".join(lines), problems) from None
        self._sources = labels

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and dict(self) == dict(other)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> typing.Self:
        """Build from the given values and defaults alone: no environment, no ``.env``."""
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
        """Every leaf with its value and source, a line each."""
        rows = [(name, repr(value), source) for name, value, source in self.resolved()]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{n:<{width}}  {v}  [{s}]" for n, v, s in rows)


def _source_of(name: str, labels: Mapping[str, str]) -> str:
    while name and name not in labels:
        name = name.rpartition(".")[0]
    return labels.get(name, "default")


class Problem(NamedTuple):
    """One wrong value: the setting's dotted name, empty for a whole document, and what is wrong."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" if self.name else self.message


def validation_errors(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic found wrong in values for ``model``: the field, what is allowed, what was given.

    The errors of a field of several types become one.
    """
    found: dict[Problem, None] = {}
    alternatives: dict[tuple[str, str], dict[str, None]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        location, kind = detail["loc"], detail["type"]
        if kind == "too_short" and any(
            len(other["loc"]) > len(location) and other["loc"][: len(location)] == location
            for other in details
        ):
            continue  # entries of the list were wrong, and so do not count
        names = [  # without pydantic's names of the types of a field
            str(part)
            for part in location
            if not re.search(r"\[|^(float|int|str)$|^constrained-", str(part))
        ]
        name = ".".join(names)
        if kind == "extra_forbidden":
            message = "not a setting"
            if known := _fields_beside(model, location):
                closest = ".".join((*names[:-1], _closest(names[-1], known)))
                message += f"; the closest one is {closest}"
                message += f". There are {', '.join(known)}" if len(known) <= _MAX_LISTED else ""
        elif kind == "missing":
            message = "required, but not given"
        elif kind == "value_error":
            cause = detail["ctx"]["error"]
            if isinstance(cause, ValidationError):  # of a section that a validator built
                for inner, text in validation_errors(cause, BaseModel):
                    found[Problem(".".join(filter(None, (name, inner))), text)] = None
                continue
            message = str(cause)  # raised by a validator of this project, a whole sentence
        else:
            allowed = _PYDANTIC_SUBJECT.sub("must", detail["msg"], count=1)
            allowed = re.sub(" or instance of \\w+$", "", allowed)  # no class of ours is in a file
            value = detail["input"]
            fields = isinstance(value, Mapping)
            given = f"a mapping of {', '.join(map(str, value))}" if fields else repr(value)
            given = given if len(given) <= _MAX_SHOWN else f"{given[:_MAX_SHOWN]}…"
            alternatives.setdefault((name, given), {})[allowed] = None
            continue
        found[Problem(name, message)] = None
    return [*found] + [
        Problem(name, f"{' or '.join(allowed)}, got {given}")
        for (name, given), allowed in alternatives.items()
    ]


_MAX_SHOWN = 60  # characters of a value
_MAX_LISTED = 20  # names of settings
_PYDANTIC_SUBJECT = re.compile(r"^(Input|String|List|Tuple|Dictionary|Value) should")


def _fields_beside(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """The fields of the section that contains the last part of ``location``."""
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:
            model = field.annotation
        for inner in getattr(model, "__args__", ()):  # of tuple[X, ...], dict[str, X] or X | None
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(getattr(model, "model_fields", {}))


_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")


def without_credentials(text: str) -> str:
    """A URL, or a text with URLs in it, with ``https://user:password@host`` as ``https://host``."""
    return _USERINFO.sub("", text)

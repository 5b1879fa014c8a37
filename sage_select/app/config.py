"""SageConfig: the complete, serialisable description of a run."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self
from warnings import warn

import yaml
from pydantic import BaseModel, model_validator

from sage_select.app.sections import (
    DataSection,
    ModelSection,
    ReferenceSection,
    ScoringSection,
    SelectionSection,
    StrataSection,
    TrainingSection,
)
from sage_select.arguments import shown
from sage_select.system.files import user_path
from sage_select.system.identity import digest
from sage_select.system.settings import (
    FREE,
    ConfigError,
    Positive,
    Seed,
    Settings,
    describe_problems,
    unknown_name,
)

ENVIRONMENT_PREFIX = "SAGE_SELECT__"
"""Prefix of environment variables that override a setting."""

OTHER_VARIABLES = {
    "SAGE_SELECT_CACHE",  # folder of stored log-probs and tokens
    "SAGE_SELECT_DATA",  # folder of real data, for tests and benchmarks
    "SAGE_SELECT_DEBUG",  # adds the traceback of an error
    "SAGE_SELECT_PATIENCE",  # seconds without a heartbeat that end a run
    "SAGE_SELECT_WRITE_DOCS",  # lets a test write the page that it compares
}
"""Environment variables that are no setting of a run."""

MAX_CHARACTERS = 100_000  # of a file; a configuration with every setting has 3,000
MAX_VALUES = 10_000  # with aliases expanded: a few lines of YAML can stand for billions
MAX_DEPTH = 20  # settings have two levels, three with lists


class SageConfig(Settings):
    """Complete description of a run, from Python, YAML or JSON, with environment overrides.

    Every setting has a default: the paper's value (Table 4) if the paper gives one. Only
    `model.name` and `data.path` must be set before a run.

    Example:
        >>> config = SageConfig(model={"name": "my-model"}, training={"epochs": 1})
        >>> config.training.epochs, config.training.learning_rate
        (1, 5e-07)
        >>> SageConfig(beta=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        sage_select.app.config.ConfigError: SageConfig: beta: should be greater than 0, got 0
    """

    if TYPE_CHECKING:  # sections may be given as plain mappings

        def __init__(self, **sections: Any) -> None: ...

    model: ModelSection = ModelSection()
    reference: ReferenceSection = ReferenceSection()
    data: DataSection = DataSection()
    strata: StrataSection = StrataSection()
    selection: SelectionSection = SelectionSection()
    scoring: ScoringSection = ScoringSection()
    training: TrainingSection = TrainingSection()
    beta: Positive = 0.1
    """Temperature of the implicit reward (Eq. 1), in the score and in the loss."""
    seed: Seed = 0
    """Seed for pool assignment, shuffling, tie-breaking and the held-out split."""
    folder: Annotated[str | None, FREE] = None
    """Run folder; by default `runs/` followed by the configuration's hash. `~` is the home folder;
    all other characters are literal."""

    @model_validator(mode="after")
    def _strata_fit_the_mix(self) -> Self:
        expected = {"judge": 3, "value": len(self.strata.shares), "none": 1}.get(self.strata.by)
        given = len(self.selection.mix_start)
        if expected is not None and given != expected:
            raise ValueError(
                f"selection.mix_start has {given} shares, but strata.by: {self.strata.by} needs "
                f"{expected}; give one share per stratum in mix_start and mix_end"
            )
        return self

    @classmethod
    def paper(cls, **sections: Any) -> Self:
        """Return Table 4 of the paper, written out so that it does not depend on the defaults.

        Args:
            **sections: Settings that are added to it or override it.

        Example:
            >>> SageConfig.paper().selection.keep_end
            0.4
        """
        return cls(**_overridden(TABLE_4, sections))

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        overrides: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Read a configuration from a YAML or JSON file.

        Args:
            path: The file.
            overrides: Values by dotted name that take precedence over file and environment, such as
                `{"training.learning_rate": 1e-6}`.
            environment: Variables that override the file, such as
                `SAGE_SELECT__TRAINING__LEARNING_RATE`; by default `os.environ`.

        Raises:
            FileNotFoundError: If there is no such file.
            ConfigError: If it is not valid YAML or JSON, or a setting is unknown or out of range.
        """
        file = user_path(path)
        if not file.exists():
            raise FileNotFoundError(
                f"SageConfig.read: no file {file}; `sage-select config paper` prints one to start "
                "from"
            )
        try:
            # with "-sig", since editors on Windows begin files with a byte order mark
            with file.open(encoding="utf-8-sig") as opened:
                text = opened.read(MAX_CHARACTERS + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file}: cannot be read: {error}; give a text file in UTF-8"
            ) from None
        values = _parse(text, str(file), as_json=file.suffix == ".json")
        if not isinstance(values, dict):
            raise ConfigError(
                f"{file}: a configuration must be a mapping of settings, as in 'beta: 0.1'"
            )
        variables = os.environ if environment is None else environment
        changes = _from_environment(variables) | dict(overrides or {})

        def origin(setting: str) -> str:
            if setting in (overrides or {}):
                return "overrides (--set)"
            return _variable(setting) if setting in changes else str(file)

        for name, value in changes.items():
            if problem := _unknown_setting(name):
                raise ConfigError(f"{origin(name)}: {problem}")
            values = _overridden(values, _nested(name, value))
        try:
            return cls(**{str(name): value for name, value in values.items()})
        except ConfigError as error:
            raise ConfigError(describe_problems(error.problems, origin), error.problems) from None

    def to_yaml(self, *, changed_only: bool = False) -> str:
        """Return the configuration as YAML, for `read`.

        Args:
            changed_only: Leave out the settings that were not set explicitly.
        """
        values = self.model_dump(mode="json", exclude_unset=changed_only)
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        if yaml.load(text, _Loader) != values:  # a few characters only survive if they are escaped
            text = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
        return text

    @property
    def hash(self) -> str:
        """12 hexadecimal digits that name the run folder.

        They change with every setting that affects the result, and with no other setting.
        """
        return digest(self.deciding())[:12]

    def differences(self, other: "SageConfig") -> list[str]:
        """Return the settings that affect the result and differ, such as "seed was 0, is 1"."""
        before, after = (_flat(config.model_dump()) for config in (self, other))
        deciding = [_flat(config.deciding()) for config in (self, other)]
        return [
            f"{name} was {before[name]!r}, is {after[name]!r}"
            for name in before
            if deciding[0].get(name) != deciding[1].get(name)
        ]

    @property
    def run_folder(self) -> Path:
        """Folder of the run: `folder`, or by default `runs/` followed by the hash."""
        return user_path(self.folder) if self.folder is not None else Path("runs") / self.hash


TABLE_4: dict[str, Any] = {
    "beta": 0.1,
    "data": {"max_length": 32_768},
    "selection": {
        "score": "sage",
        "mix_start": (0.90, 0.10, 0.00),
        "mix_end": (0.40, 0.40, 0.20),
        "keep_start": 1.0,
        "keep_end": 0.4,
        "refresh_steps": 25,
    },
    "training": {"loss": "nca", "learning_rate": 5e-7, "epochs": 3, "batch_size": 16},
}
"""Settings of Table 4, except sequence parallelism of 8, which is left to the training loop."""


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by dotted name."""
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


def _overridden(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with the changes applied, section by section."""
    merged = dict(base)
    for name, value in changes.items():
        if isinstance(value, BaseModel):
            # defaults of a section must not override settings that base has
            value = value.model_dump(exclude_unset=True)
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _overridden(merged[name], value) if both else value
    return merged


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Return `{"a": {"b": value}}` for the name "a.b"."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _unknown_setting(name: str) -> str:
    """Describe a dotted name that is no setting; empty if it is one, or a section."""
    section, dot, setting = name.partition(".")
    if name in _SETTINGS or name in SageConfig.model_fields or name.startswith("data.columns."):
        return ""
    settings = [known.partition(".")[2] for known in _SETTINGS if known.startswith(f"{section}.")]
    if not dot or not settings:
        return unknown_name(section if not settings else name, list(SageConfig.model_fields))
    return f"{section}: {unknown_name(setting, settings)}"


def _variable(setting: str) -> str:
    """Return the environment variable that overrides a setting."""
    return ENVIRONMENT_PREFIX + setting.replace(".", "__").upper()


def _letters(variable: str) -> str:
    """Return a variable's letters and digits in upper case, without separators."""
    return re.sub("[^A-Z0-9]", "", variable.upper())


_SETTINGS = _flat(SageConfig().model_dump())
_VARIABLES = {_letters(name): name for name in (*map(_variable, _SETTINGS), *OTHER_VARIABLES)}
"""The environment variables that are read, by their letters in upper case."""


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the overrides among environment variables, by dotted name.

    Raises:
        ConfigError: If a variable is nearly one that is read, which would be ignored silently.
    """
    changes: dict[str, Any] = {}
    for variable, text in sorted(environment.items()):
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if not variable.startswith(ENVIRONMENT_PREFIX):
            _check_unread(variable)
        elif name in changes:
            raise ConfigError(f"{variable}: the setting {name} is set twice; keep one variable")
        elif name in _SETTINGS or name.split(".")[0] in SageConfig.model_fields:
            changes[name] = parsed_value(text, variable)
        else:
            raise ConfigError(f"{variable}: {_unknown_variable(variable)}")
    return changes


def _check_unread(variable: str) -> None:
    """Refuse a variable that is misspelt; warn about an unknown one that looks like ours."""
    if variable in OTHER_VARIABLES or "SAGE" not in variable.upper():
        return
    letters = _letters(variable)
    sections = "|".join(SageConfig.model_fields)
    begins_with_a_section = re.match(
        rf"_*SAGE_*SELECT_*({sections})_", variable, flags=re.IGNORECASE
    )
    if begins_with_a_section or difflib.get_close_matches(letters, _VARIABLES, cutoff=0.9):
        raise ConfigError(f"{variable}: {_unknown_variable(variable)}")
    if letters.startswith("SAGESELECT"):  # perhaps another program's
        warn(f"{variable}: {_unknown_variable(variable)}; it has no effect", stacklevel=4)


def _unknown_variable(variable: str) -> str:
    """Describe a variable that is not read, and name the nearest that is."""
    close = difflib.get_close_matches(_letters(variable), _VARIABLES, n=1)
    hint = (
        f"did you mean {_VARIABLES[close[0]]}?"
        if close
        else f"one that overrides a setting is written as in {_variable('training.epochs')}"
    )
    return (
        "there is no such environment variable (two underscores separate section and setting, all "
        f"in upper case); {hint}"
    )


def parsed_value(text: str, name: str) -> Any:
    """Parse a value written in YAML.

    Args:
        text: The value.
        name: The option or variable that it comes from, for error messages.

    Raises:
        ConfigError: If it is not valid YAML.
    """
    return _parse(text, name)


def _parse(text: str, origin: str, *, as_json: bool = False) -> Any:
    """Parse YAML or JSON; `origin` begins the error message."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{origin}: cannot be read: it has more than {MAX_CHARACTERS:,} characters, which is "
            "no configuration"
        )
    try:
        if as_json:
            values = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
        else:
            values = yaml.load(text, _Loader)
        _check_size(values, {})
    except RecursionError:
        raise ConfigError(f"{origin}: cannot be read: {TOO_DEEP}") from None
    except Exception as error:  # parsers raise many kinds, and all of them are about the text
        # on one line, since YAML errors quote the text over several
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{origin}: cannot be read: {reason}") from None
    return values


TOO_DEEP = f"it nests more than {MAX_DEPTH} levels; sections contain settings, and no sections"


def _check_size(value: Any, sizes: dict[int, int], depth: int = 0) -> int:
    """Return the number of values inside one, with aliases expanded; refuse too many or too deep.

    Args:
        value: The value.
        sizes: Sizes by identity, so that what aliases share is counted but not walked again.
        depth: Levels around the value.
    """
    if depth > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        inside = value.values() if isinstance(value, dict) else value
        size = 1
        for item in inside:
            size += _check_size(item, sizes, depth + 1)
            if size > MAX_VALUES:
                raise ValueError(f"it has more than {MAX_VALUES:,} values, with aliases expanded")
        sizes[id(value)] = size
    return sizes[id(value)]


def _not_finite(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class _Loader(yaml.SafeLoader):
    """YAML loader for settings: names are text and occur once; values mean what they look like.

    PyYAML follows YAML 1.1, in which 5e-7 is a text, 010 is 8, 1:30 is 90 and 2024-01-01 a date.
    Here the first is a number, as in YAML 1.2, and the others are texts, which a number refuses.
    """

    depth = 0

    # both are filled below, with plain values only: no dates, sets, bytes or Python objects
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or re.fullmatch("tag:.*:(null|bool|int|float|str|seq|map)", tag)
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:  # before PyYAML gets slow, and then recurses too deep
            raise ValueError(TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                kind = shown(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ValueError(
                    f"line {key.start_mark.line + 1}: the name of a setting must be a text, got "
                    f"{kind}"
                )
        _unique([(key.value, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML writer that puts quotes around a text that PyYAML or `_Loader` would read as another."""


_DIGITS = "[0-9]+(_[0-9]+)*"
_EXPONENT = "[eE][-+]?[0-9]{1,3}"  # no longer, so that the revision 12e4567 stays a text
for _type, _pattern in {
    "bool": "(?i:true|false|yes|no|on|off)",
    "null": "(?i:null)|~|",
    "int": "[-+]?(0|[1-9][0-9]*(_[0-9]+)*)|0x[0-9a-fA-F]+",
    "float": rf"[-+]?({_DIGITS}\.[0-9]*|\.[0-9]+)({_EXPONENT})?|[-+]?{_DIGITS}{_EXPONENT}"
    r"|[-+]?\.(?i:inf)|\.(?i:nan)",
}.items():
    for _class in (_Loader, _Dumper):
        _regexp = re.compile(rf"(?:{_pattern})\Z")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", _regexp, None)


def _unique(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the items as a dictionary, or refuse them if a name is repeated."""
    unique = dict(items)
    if len(unique) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is set twice; keep one of them")
    return unique

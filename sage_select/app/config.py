"""SageConfig: the complete, serialisable description of a run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

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
from sage_select.system.identity import digest
from sage_select.system.settings import FREE, ConfigError, Positive, Settings, describe_problems

ENVIRONMENT_PREFIX = "SAGE_SELECT__"
"""Prefix of environment variables that override a setting."""


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
    seed: int = 0
    """Seed for pool assignment, shuffling, tie-breaking and the held-out split."""
    folder: Annotated[str | None, FREE] = None
    """Run folder; by default `runs/` followed by the configuration's hash."""

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
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(
                f"SageConfig.read: no file {file}; `sage-select config paper` prints one to start "
                "from"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
        values = _parse(text, str(file), as_json=file.suffix == ".json")
        if not isinstance(values, dict):
            raise ConfigError(
                f"{file}: a configuration must be a mapping of settings, as in 'beta: 0.1'"
            )
        variables = os.environ if environment is None else environment
        changes = _from_environment(variables) | dict(overrides or {})
        for name, value in changes.items():
            values = _overridden(values, _nested(name, value))
        try:
            return cls(**{str(name): value for name, value in values.items()})
        except ConfigError as error:

            def origin(setting: str) -> str:
                if setting in (overrides or {}):
                    return "overrides (--set)"
                return _variable(setting) if setting in changes else str(file)

            raise ConfigError(describe_problems(error.problems, origin), error.problems) from None

    def to_yaml(self, *, changed_only: bool = False) -> str:
        """Return the configuration as YAML, for `read`.

        Args:
            changed_only: Leave out the settings that were not set explicitly.
        """
        values = self.model_dump(mode="json", exclude_unset=changed_only)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) != values:  # a few characters only survive if they are escaped
            text = yaml.safe_dump(values, sort_keys=False)
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
        return Path(self.folder) if self.folder is not None else Path("runs") / self.hash


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


def _variable(setting: str) -> str:
    """Return the environment variable that overrides a setting."""
    return ENVIRONMENT_PREFIX + setting.replace(".", "__").upper()


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the overrides among environment variables, by dotted name."""
    # a single underscore is an easy mistake, and without this check it would be ignored silently
    for name in environment:
        for section in SageConfig.model_fields:
            if name.startswith(f"SAGE_SELECT_{section.upper()}_"):
                raise ConfigError(
                    f"{name}: a variable that overrides a setting has two underscores between its "
                    f"parts; write it as in {_variable('training.epochs')}"
                )
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): parsed_value(text, name)
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT_PREFIX)
    }


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
    try:
        if as_json:
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, json.JSONDecodeError, ValueError) as error:
        # on one line, since YAML errors quote the text over several
        raise ConfigError(f"{origin}: cannot be read: {' '.join(str(error).split())}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses repeated keys, of which PyYAML silently keeps only the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        _unique([(name, None) for name in names])
        return super().construct_mapping(node, deep)


def _unique(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the items as a dictionary, or refuse them if a name is repeated."""
    names = [name for name, _ in items]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is set twice; keep one of them")
    return dict(items)

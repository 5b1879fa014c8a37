"""SageConfig: the one serialisable description of a run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

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

ENVIRONMENT = "SAGE_SELECT__"
"""What the name of an environment variable that changes a setting starts with."""


class SageConfig(Settings):
    """A run, in full, from Python, YAML or JSON, with overrides from the environment.

    Every setting has a default, which is the paper's (Table 4) where the paper says anything; only
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

    model: ModelSection = ModelSection()
    reference: ReferenceSection = ReferenceSection()
    data: DataSection = DataSection()
    strata: StrataSection = StrataSection()
    selection: SelectionSection = SelectionSection()
    scoring: ScoringSection = ScoringSection()
    training: TrainingSection = TrainingSection()
    beta: Positive = 0.1
    """Temperature of the implicit reward (Eq. 1), for score and loss alike."""
    seed: int = 0
    """Of the deal, the shuffles, the ties and the split."""
    folder: Annotated[str | None, FREE] = None
    """Where the run stands; by default `runs/` and the configuration's hash."""

    @model_validator(mode="after")
    def _strata_fit_the_mix(self) -> Self:
        expected = {"judge": 3, "value": len(self.strata.shares), "none": 1}.get(self.strata.by)
        given = len(self.selection.mix_start)
        if expected is not None and given != expected:
            raise ValueError(
                f"selection.mix_start has {given} shares, but strata by {self.strata.by!r} makes "
                f"{expected} strata; give one share per stratum"
            )
        return self

    @classmethod
    def paper(cls, **sections: Any) -> Self:
        """Table 4 of the paper, written out, whatever the defaults may become; `sections` add to
        it and override it.

        Example:
            >>> SageConfig.paper().selection.keep_end
            0.4
        """
        return cls(**_merged(TABLE_4, sections))

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        overrides: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Read a YAML or JSON file.

        Args:
            path: The file.
            overrides: Dotted names and values that have the last word:
                `{"training.learning_rate": 1e-6}`.
            environment: Where variables such as `SAGE_SELECT__TRAINING__LEARNING_RATE` override the
                file; by default the process's own.

        Raises:
            FileNotFoundError: If there is no such file.
            ConfigError: If it is not YAML or JSON, or describes no run.
        """
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(
                f"SageConfig.read: no file {file}; `sage-select config paper` prints one to start "
                "with"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
        values = _parsed(text, str(file), as_json=file.suffix == ".json")
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: a configuration is a mapping of settings")
        surroundings = os.environ if environment is None else environment
        changes = _from_environment(surroundings) | dict(overrides or {})
        for name, value in changes.items():
            values = _merged(values, _nested(name, value))
        try:
            return cls(**{str(name): value for name, value in values.items()})
        except ConfigError as error:

            def origin(setting: str) -> str:
                if setting in (overrides or {}):
                    return f"--set {setting}"
                return _variable(setting) if setting in changes else str(file)

            raise ConfigError(describe_problems(error.problems, origin), error.problems) from None

    def to_yaml(self, *, changed_only: bool = False) -> str:
        """The same as YAML, which `read` reads back."""
        values = self.model_dump(mode="json", exclude_unset=changed_only)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) != values:  # a rare letter that must be escaped
            text = yaml.safe_dump(values, sort_keys=False)
        return text

    @property
    def hash(self) -> str:
        """12 letters that name this run's caches and logs: they change with whatever decides what
        is computed, and with nothing else."""
        return digest(self.deciding())[:12]

    def differences(self, other: "SageConfig") -> list[str]:
        """The settings that decide the result and differ, such as "seed was 0, is 1"."""
        before, after = (_flat(config.model_dump()) for config in (self, other))
        deciding = [_flat(config.deciding()) for config in (self, other)]
        return [
            f"{name} was {before[name]!r}, is {after[name]!r}"
            for name in before
            if deciding[0].get(name) != deciding[1].get(name)
        ]

    @property
    def run_folder(self) -> Path:
        """Where the run stands."""
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
"""Table 4; its sequence parallelism of 8 is a matter of the host."""


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _nested(name: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for "a.b"."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _variable(setting: str) -> str:
    return ENVIRONMENT + setting.replace(".", "__").upper()


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    for name in environment:
        for section in SageConfig.model_fields:
            if name.startswith(f"SAGE_SELECT_{section.upper()}_"):
                raise ConfigError(
                    f"{name}: a variable that changes a setting has two underscores between its "
                    f"parts, as in {_variable('training.epochs')}"
                )
    return {
        name.removeprefix(ENVIRONMENT).lower().replace("__", "."): parsed_value(text, name)
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT)
    }


def parsed_value(text: str, name: str) -> Any:
    """A value as it would stand in a YAML file.

    Raises:
        ConfigError: If it is not YAML.
    """
    return _parsed(text, name)


def _parsed(text: str, place: str, *, as_json: bool = False) -> Any:
    try:
        if as_json:
            return json.loads(text, object_pairs_hook=_each_once)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, json.JSONDecodeError, ValueError) as error:
        raise ConfigError(f"{place}: cannot be read: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML, but a setting that stands twice is an error: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        _each_once([(name, None) for name in names])
        return super().construct_mapping(node, deep)


def _each_once(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in items]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands there twice; keep one of them")
    return dict(items)

"""Validated settings: unknown names, invalid values, and the settings that decide a result."""

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from sage_select.arguments import LARGEST_COUNT, SEEDS, is_number, is_whole, scalar, shown


def _whole(value: Any) -> Any:
    if not is_whole(number := scalar(value)):  # pydantic would convert True, 2.0 and "2"
        raise ValueError(f"should be a whole number, got {shown(value)}")
    return number


def _number(value: Any) -> Any:
    if not is_number(number := scalar(value)):
        raise ValueError(f"should be a number, got {shown(value)}")
    return number


def _switch(value: Any) -> Any:
    flag = scalar(value)
    if not isinstance(flag, bool):
        raise ValueError(f"should be true or false, got {shown(value)}")
    return flag


# The same rules as for arguments in Python, see `sage_select.arguments`. They stand behind the
# bounds, which otherwise would not reach the JSON schema.
WHOLE, NUMBER = BeforeValidator(_whole), BeforeValidator(_number)

Switch = Annotated[bool, BeforeValidator(_switch)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT), WHOLE]
Seed = Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1]), WHOLE]

FREE = "free"
"""Marks a setting that does not change results beyond rounding: where and how fast they are
computed, and which of them are kept. A resumed run may change it."""

LATER = "later"
"""Marks a setting added by a later version: at its default it does not enter the hash, so that
runs of earlier versions keep theirs."""

Problem = tuple[str, str]
"""A setting's dotted name, and the problem with its value."""


class ConfigError(ValueError):
    """Invalid settings; the message names each of them and the fix.

    Attributes:
        problems: The problem of each invalid setting; empty if only the message describes it.
    """

    def __init__(self, message: str, problems: list[Problem] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or []


class Section(BaseModel):
    """Frozen settings; an unknown name is refused, and the error suggests the nearest one."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        # before pydantic's own check, whose message suggests no name
        if isinstance(values, Mapping):
            for name in values:
                if name not in cls.model_fields:
                    raise ValueError(unknown_name(str(name), list(cls.model_fields)))
        return values

    @classmethod
    def is_free(cls, name: str) -> bool:
        """Return whether results are independent of this setting, see `FREE`."""
        return FREE in cls.model_fields[name].metadata

    def deciding(self) -> dict[str, Any]:
        """Return the settings that results depend on, as plain values."""
        values = self.model_dump(mode="json")
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if FREE in field.metadata or (LATER in field.metadata and value == field.default):
                continue
            kept[name] = value.deciding() if isinstance(value, Section) else values[name]
        return kept


class Settings(Section):
    """Settings that users construct themselves; all problems are raised as one `ConfigError`."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = problems_of(error)
            message = describe_problems(problems, lambda _: type(self).__name__)
            raise ConfigError(message, problems) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, validated like a new one."""
        # only settings that were passed explicitly, so that the others remain defaults
        explicit = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(explicit | changes))


def unknown_name(name: str, known: list[str], what: str = "setting") -> str:
    """Return the error message for a name that does not exist.

    Example:
        >>> unknown_name("epoch", ["epochs", "batch_size"])
        "there is no setting 'epoch'; did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"there is no {what} {shown(name)}; {hint}"


def problems_of(error: ValidationError) -> list[Problem]:
    """List each invalid setting with its problem."""
    problems = []
    for problem in error.errors():
        reason = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if problem["type"] in ("model_type", "model_attributes_type"):
            reason = "should be a mapping of settings"  # pydantic's message names internal classes
        # messages of our own validators contain the value already
        got = "" if problem["type"] == "value_error" else f", got {shown(problem['input'])}"
        if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
            got += "; put quotes around it"
        # a union of types, such as `int | None`, adds the name of the branch that was tried
        names = [str(name) for name in problem["loc"] if not str(name).startswith("function-")]
        problems.append((".".join(names), reason + got))
    return problems


def describe_problems(problems: list[Problem], origin: Callable[[str], str]) -> str:
    """Write a line for each invalid setting.

    Args:
        problems: Names of settings, and their problems.
        origin: Returns the place where a setting was set, which begins the line.
    """
    return "\n".join(
        f"{origin(name)}: {name}{': ' if name else ''}{reason}" for name, reason in problems
    )

"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sage_select.app.config import SageConfig

ConfigFile = Annotated[
    Path, typer.Argument(help="Configuration of the run, a YAML or JSON file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Override a setting, as in --set training.epochs=1, with a value in YAML; repeatable.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Hide progress bars.")]
Interval = Annotated[
    int | None,
    typer.Option(help="Use the pool of this interval of the plan, from 0.", show_default=False),
]
Policy = Annotated[
    str | None,
    typer.Option(help="Checkpoint of the policy; by default model.name.", show_default=False),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the store; by default in the user's cache."),
]


def read_config(path: Path, overrides: list[str] | None) -> "SageConfig":
    """Read a configuration with the overrides of the command line."""
    from sage_select.app.config import SageConfig, parsed_value
    from sage_select.system.settings import ConfigError

    changes = {}
    for text in overrides or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {text}: give a name and a value, as in --set training.epochs=1"
            )
        changes[name] = parsed_value(value, f"--set {name}")
    return SageConfig.read(path, overrides=changes)


def bars(quiet: bool) -> bool | None:
    """Return the value of `show_progress`; None lets the library decide."""
    return False if quiet else None

"""What commands print, and how errors become messages and exit codes."""

import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WRONG_USE, BAD_INPUT, NOT_FIT, INTERRUPTED, BROKEN_PIPE = 2, 3, 4, 130, 141


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turn errors into one message on stderr (with `as_json` also JSON on stdout) and an exit code.

    `SAGE_SELECT_DEBUG=1` adds the traceback.
    """
    _quieten_transformers()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except BrokenPipeError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OSError, ImportError) as error:
        from sage_select.system.settings import ConfigError

        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        if os.environ.get("SAGE_SELECT_DEBUG"):
            traceback.print_exc()
        typer.echo(f"error: {message}", err=True)
        if as_json:
            typer.echo(json.dumps({"error": message}))
        raise typer.Exit(WRONG_USE if isinstance(error, ConfigError) else BAD_INPUT) from None
    except (FloatingPointError, MemoryError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; finished work is kept, run the same command to continue", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _quieten_transformers() -> None:
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def console() -> "Console":
    """A console as wide as the terminal, or 120 columns in a file."""
    from rich.console import Console

    drawn = sys.stdout.isatty()
    return Console(width=None if drawn else 120, highlight=False, soft_wrap=not drawn)


def table(title: str, *columns: str, rows: list[tuple[Any, ...]]) -> "Table":
    """A table for people; columns of numbers are aligned to the right."""
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(readable, row))
    return drawn


def readable(value: Any) -> str:
    """A value for people: thousands separated, four digits of a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def print_values(values: Mapping[str, Any], as_json: bool, *, width: int = 12) -> None:
    """Named values, a line each, or as JSON."""
    if as_json:
        print_json(values)
    else:
        typer.echo("\n".join(f"{name:{width}} {readable(x)}" for name, x in values.items()))


def print_json(value: Any) -> None:
    """A value as JSON, NaN and infinity as null."""
    typer.echo(json.dumps(_without_nan(value), indent=1, default=str))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Output of the commands: tables, JSON, error messages and exit codes."""

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

from sage_select.app.cli.interrupts import acknowledge, was_interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WRONG_USE, BAD_INPUT, DOCTOR_FAILED, BROKEN_PIPE = 2, 3, 4, 141

INPUT_ERRORS = (
    ArithmeticError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Exceptions that are about data, files, settings or models, and no bug of the library."""

FILE_LIBRARIES = {
    "_lzma", "_pickle", "binascii", "jinja2", "polars", "pyarrow", "pyo3_runtime", "safetensors",
    "safetensors_rust", "struct", "tokenizers", "xml", "yaml", "zipfile", "zlib",
}  # fmt: skip
"""Modules whose own exceptions are about the content of a file or a template; `pyo3_runtime` is
the panic of a library in Rust."""


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turn errors into a message on stderr (with `as_json` also JSON on stdout) and an exit code.

    `SAGE_SELECT_DEBUG=1` adds the traceback.
    """
    _silence_transformers()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    # an exit is none of them, and a broken pipe is no error of the input: `main` handles it
    except (SystemExit, GeneratorExit, BrokenPipeError, typer.Exit, typer.Abort):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt) or was_interrupted():
            raise typer.Exit(acknowledge()) from None
        if (cause := _input_error(error)) is None:
            raise
        from sage_select.system.settings import ConfigError

        message = _message(error) if cause is error else f"{_message(cause)} ({_message(error)})"
        if os.environ.get("SAGE_SELECT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        typer.echo(f"error: {message}", err=True)
        if as_json:
            typer.echo(json.dumps({"error": message}))
        raise typer.Exit(WRONG_USE if isinstance(error, ConfigError) else BAD_INPUT) from None


def _input_error(error: BaseException) -> BaseException | None:
    """Return the error that is about the input, this one or a cause of it; None if it is a bug."""
    library = type(error).__module__.partition(".")[0]
    if (
        isinstance(error, INPUT_ERRORS)
        or library in FILE_LIBRARIES
        or type(error) is Exception  # tokenizers raises these
        or type(error).__name__ == "OutOfMemoryError"  # PyTorch's, which is not imported here
    ):
        return error
    # torch.distributed collects the errors of a checkpoint: by rank, each with its traceback
    failures = getattr(error, "failures", None)
    by_rank = list(failures.values()) if isinstance(failures, dict) else []
    causes = [error.__cause__, *(part[0] if isinstance(part, tuple) else part for part in by_rank)]
    inputs = (_input_error(cause) for cause in causes if isinstance(cause, BaseException))
    return next((cause for cause in inputs if cause is not None), None)


def _message(error: BaseException) -> str:
    """Return an error's message, or its type if it has none."""
    if isinstance(error, KeyError) and error.args:  # str() would put the message in quotes
        return str(error.args[0])
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {error}"
    return str(error) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _silence_transformers() -> None:
    # its bars and notices would mix with the output; read by the hub library when it is imported
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def console() -> "Console":
    """Return a console as wide as the terminal, or 120 columns if stdout is a file or pipe."""
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    return Console(width=None if on_terminal else 120, highlight=False, soft_wrap=not on_terminal)


def table(title: str, *columns: str, rows: list[tuple[Any, ...]]) -> "Table":
    """Return a table to print; numeric columns are aligned to the right."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) for row in rows)
        result.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(readable, row))
    return result


def readable(value: Any) -> str:
    """Format a value: integers with thousands separators, other numbers with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def print_values(values: Mapping[str, Any], as_json: bool, *, width: int = 12) -> None:
    """Print named values, one per line or as JSON."""
    if as_json:
        print_json(values)
    else:
        typer.echo("\n".join(f"{name:{width}} {readable(x)}" for name, x in values.items()))


def print_json(value: Any) -> None:
    """Print a value as JSON, with NaN and infinity as null, since JSON has neither."""
    typer.echo(json.dumps(_without_nan(value), indent=1, default=str))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

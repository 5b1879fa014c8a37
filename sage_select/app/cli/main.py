"""The console script, assembled from its commands."""

import os
import sys

import typer

from sage_select.app.cli import configs, runs, stores
from sage_select.app.cli.interrupts import interruptible
from sage_select.app.cli.output import BROKEN_PIPE

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Select the preference pairs that the current policy should train on next.",
    epilog="Exit codes: 0 done, 1 a bug in sage-select, 2 wrong command line or configuration, 3 "
    "data, files or models that cannot be used, 4 doctor found something that would stop the run, "
    "130 interrupted. SAGE_SELECT_DEBUG=1 adds the traceback of an error.",
)
for command in (runs.plan, runs.score, runs.select, runs.train, runs.flips):
    app.command()(command)
app.add_typer(stores.app, name="store")
app.command()(configs.doctor)
app.add_typer(configs.app, name="config")


def main() -> None:
    """Run the command line."""
    with interruptible():
        _search_current_folder_last()
        try:
            app(prog_name="sage-select")
        except BrokenPipeError:
            # the reader of stdout, such as `head`, has closed it; flushing at exit must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE)


def _search_current_folder_last() -> None:
    """Move the current folder, which `python -m` and `-c` put first, to the end of the path.

    Otherwise a stray statistics.py or torch.py in it would be run in place of the real one.
    """
    if sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        sys.path.append(sys.path.pop(0))

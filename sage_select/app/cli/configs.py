"""Commands for configurations: doctor, and config paper | schema | show."""

from pathlib import Path
from typing import Annotated

import typer

from sage_select.app.cli.options import AsJson, ConfigFile, Overrides, Quiet, bars, read_config
from sage_select.app.cli.output import DOCTOR_FAILED, console, print_json, reported

app = typer.Typer(no_args_is_help=True, help="Print and check configurations.")

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    config_file: Annotated[
        Path | None,
        typer.Argument(help="Configuration of a run to check, too.", show_default=False),
    ] = None,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough", help="Also load the models and try the largest batch, without an update."
        ),
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check installation, devices, data and settings for anything that would stop a long run."""
    with reported(as_json):
        from sage_select.app import jobs
        from sage_select.app.doctor import as_records

        config = None if config_file is None else read_config(config_file, overrides)
        findings = jobs.doctor(config, thorough=thorough, show_progress=bars(quiet))
        failed = [finding for finding in findings if finding.verdict == "fail"]
        if as_json:
            print_json({"fit": not failed, "findings": as_records(findings)})
        else:
            screen = console()
            for finding in findings:
                screen.print(f"{finding.verdict:5}", style=COLOURS[finding.verdict], end="")
                screen.print(f"{finding.about:14} {finding.message}", markup=False)
            typer.echo(f"{len(failed)} of {len(findings)} checks failed")
        if failed:
            raise typer.Exit(DOCTOR_FAILED)


@app.command()
def paper() -> None:
    """Print a configuration with every setting, with the values of the paper (Table 4)."""
    with reported():
        from sage_select.app.config import SageConfig

        typer.echo(SageConfig.paper().to_yaml(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of configurations, for completion in editors."""
    with reported():
        from sage_select.app.config import SageConfig

        print_json(SageConfig.model_json_schema())


@app.command()
def show(config_file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration and print every setting, including defaults and overrides."""
    with reported(as_json):
        config = read_config(config_file, overrides)
        if as_json:
            print_json({"hash": config.hash, "config": config.model_dump(mode="json")})
        else:
            typer.echo(f"# {config.hash}\n{config.to_yaml()}", nl=False)

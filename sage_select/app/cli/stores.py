"""Commands for the reference store: list, fill, evict."""

import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sage_select.app.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    Quiet,
    StoreFolder,
    bars,
    read_config,
)
from sage_select.app.cli.output import console, print_json, print_values, reported, table

app = typer.Typer(no_args_is_help=True, help="List, fill and clear the reference store.")


@app.command("list")
def list_references(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """List the references in the store, the most recently used first, and the cached tokens."""
    with reported(as_json):
        from sage_select.data.token_cache import cached_files
        from sage_select.references.eviction import default_store, stored_references

        if store is not None and not store.is_dir():
            raise FileNotFoundError(
                f"--store {store}: there is no such folder; without --store the default is listed"
            )
        references = stored_references(store)
        tokens = sum(file.lstat().st_size for file in cached_files())
        total = sum(reference.size for reference in references)
        if as_json:
            listed = [asdict(reference) for reference in references]
            print_json({"references": listed, "bytes": total, "token_bytes": tokens})
            return
        rows = [
            (
                r.identity,
                r.description.get("model", ""),
                r.description.get("dtype", ""),
                r.sequences,
                r.size,
            )
            for r in references
        ]
        title = f"references in {store or default_store()}"
        headings = ("identity", "model", "dtype", "sequences", "bytes")
        console().print(table(title, *headings, rows=rows))
        typer.echo(f"\n{total:,} bytes of log-probs; {tokens:,} bytes of tokens")


@app.command()
def fill(
    config_file: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure the reference of a run in advance. If killed, the same command resumes."""
    with reported(as_json):
        from sage_select.app import jobs

        config = read_config(config_file, overrides)
        print_values(jobs.fill(config, show_progress=bars(quiet)), as_json, width=20)


@app.command()
def evict(
    identity: Annotated[
        str | None, typer.Option(help="Delete this reference.", show_default=False)
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(help="Delete what was not used for this long: 12h, 30d.", show_default=False),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(help="Delete the oldest above this total: 500MB, 2GB.", show_default=False),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Delete cached tokens instead; needs --older-than.")
    ] = False,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Delete references, or cached tokens, that are no longer needed."""
    with reported(as_json):
        from sage_select.data.token_cache import evict_tokens
        from sage_select.references.eviction import evict as evict_references
        from sage_select.system.settings import ConfigError

        unused_for = None if older_than is None else _seconds(older_than)
        if tokens:
            if unused_for is None:
                raise ConfigError(
                    "store evict --tokens: give a minimum age, as in --older-than 30d"
                )
            files, freed = evict_tokens(unused_for)
            result: dict[str, Any] = {"files": files, "bytes": freed}
        else:
            if identity is None and unused_for is None and max_size is None:
                raise ConfigError(
                    "store evict: give --identity, --older-than or --max-size, or --tokens"
                )
            deleted = evict_references(
                store,
                identity=identity,
                unused_for=unused_for,
                max_size=None if max_size is None else _bytes(max_size),
            )
            freed = sum(reference.size for reference in deleted)
            result = {"references": [r.identity for r in deleted], "bytes": freed}
        if as_json:
            print_json(result)
        else:
            count = result["files"] if tokens else len(result["references"])
            kind = "token files" if tokens else "references"
            typer.echo(f"{count:,} {kind} deleted, {result['bytes']:,} bytes")


def _seconds(text: str) -> float:
    return _amount(text, {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}, "--older-than", "30d")


def _bytes(text: str) -> int:
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return int(_amount(text, units, "--max-size", "2GB"))


def _amount(text: str, units: dict[str, int], option: str, example: str) -> float:
    """Parse a number with a unit."""
    from sage_select.system.settings import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if match is None or match[2] not in units:
        raise ConfigError(
            f"{option} {text}: give a number and one of {', '.join(units)}, as in {example}"
        )
    return float(match[1]) * units[match[2]]

"""The command line: `sage-select plan | score | select | train | flips | store | doctor | config`.

What a person reads goes to stdout as tables, what a script reads as JSON (`--json`); progress,
warnings and errors go to stderr. Exit codes: 0 done, 1 a fault of the library's own, 2 a wrong
command line or configuration, 3 data, files or models that cannot be used, 4 what `doctor` says
would stop the run, 130 interrupted.
"""

import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sage_select.app.config import SageConfig
    from sage_select.app.run import Run

# Heavy imports stand in the commands, so that --help and completion answer at once.

WRONG_USE, BAD_INPUT, NOT_FIT, INTERRUPTED, BROKEN_PIPE = 2, 3, 4, 130, 141

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Which preference pairs the current policy should train on next, and why.",
    epilog="Exit codes: 0 done, 1 a fault of sage-select itself, 2 wrong command line or "
    "configuration, 3 data, files or models that cannot be used, 4 doctor found what would stop a "
    "run, 130 interrupted. SAGE_SELECT_DEBUG=1 shows where an error comes from.",
)
store_app = typer.Typer(no_args_is_help=True, help="The reference store: list, fill, evict.")
config_app = typer.Typer(no_args_is_help=True, help="Configurations: print, check, schema.")
app.add_typer(store_app, name="store")
app.add_typer(config_app, name="config")

ConfigFile = Annotated[
    Path, typer.Argument(help="The run's description, a YAML or JSON file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change a setting, as in --set training.epochs=1; the value as in YAML; may be "
        "given many times.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Interval = Annotated[
    int | None,
    typer.Option(help="The pool of this interval of the plan, from 0.", show_default=False),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option("--store", help="Its folder; by default the one in the user's cache."),
]


def main() -> None:
    """The console script."""
    try:
        app(prog_name="sage-select")
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


@contextmanager
def _reported(as_json: bool = False) -> Iterator[None]:
    """Errors as one message on stderr (and as JSON where that is asked for), and an exit code."""
    _quieten_transformers()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except BrokenPipeError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OSError, ImportError) as error:
        from sage_select.app.config import ConfigError

        wrong_use = isinstance(error, ConfigError)
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        if os.environ.get("SAGE_SELECT_DEBUG"):
            traceback.print_exc()
        typer.echo(f"error: {message}", err=True)
        if as_json:
            typer.echo(json.dumps({"error": message}))
        raise typer.Exit(WRONG_USE if wrong_use else BAD_INPUT) from None
    except (FloatingPointError, MemoryError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; what was written stands, the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _quieten_transformers() -> None:
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _read_config(path: Path, overrides: list[str] | None) -> "SageConfig":
    from sage_select.app.config import ConfigError, SageConfig, parsed_value

    changes = {}
    for text in overrides or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give a name and a value, as in training.epochs=1")
        changes[name] = parsed_value(value, f"--set {name}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # scores and losses of the user's own
    return SageConfig.read(path, overrides=changes)


def _console() -> Console:
    drawn = sys.stdout.isatty()
    return Console(width=None if drawn else 120, highlight=False, soft_wrap=not drawn)


def _table(title: str, *columns: str, rows: list[tuple[Any, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row[columns.index(column)], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_said(value) for value in row))
    return table


def _said(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_without_nan(value), indent=1, default=str))


def _without_nan(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# plan


@app.command()
def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole run before it starts: pairs, strata, pools, mix, keeps, steps and cost.

    It needs the data and the tokenizer; no weight is loaded.
    """
    with _reported(as_json):
        from sage_select.app.forecast import forecast
        from sage_select.app.run import prepare

        config = _read_config(config_file, overrides)
        run = prepare(config, show_progress=_bars(quiet))
        told = forecast(run)
        if as_json:
            _print_json(told)
            return
        console, cost = _console(), told["cost"]
        strata = [(name, n, n / told["pairs"]) for name, n in told["strata"].items()]
        intervals = [tuple(interval.values()) for interval in told["intervals"]]
        costs = [
            (words, cost["tokens"][name] / 1e6, _tera(cost["flops"][name]))
            for name, words in COST_WORDS.items()
        ]
        typer.echo(run.dataset.waterfall())
        for title, columns, rows in (
            ("\nstrata", ("stratum", "pairs", "share"), strata),
            ("\nintervals", tuple(told["intervals"][0]), intervals),
            ("\ncost", ("what", "million tokens", "TFLOP needed"), costs),
        ):
            console.print(_table(title, *columns, rows=rows))
        typer.echo(
            f"\n{told['pairs']:,} pairs to train on, {told['held_out']:,} held out\n"
            f"{run.timeline.plan}\n{told['kept']:,} kept pairs in {told['steps']:,} steps; "
            f"{told['steps_without_selection']:,} steps without selection\n"
            f"{cost['relative']:.2f} of the cost of training on everything; it keeps "
            f"{cost['keep']:.2f} of its candidates, and pays below {cost['break_even']:.2f}\n"
            f"configuration {config.hash}, run folder {config.run_folder}"
        )


COST_WORDS = {
    "reference": "reference, once, if the store knows none of it",
    "scoring": "scoring the pools",
    "training": "training on the kept pairs, if they are as long as the others",
    "evaluation": "evaluating on the held-out pairs",
    "full": "training on everything instead",
}


def _tera(flops: float | None) -> Any:
    return "" if flops is None else flops / 1e12


# score and select


@app.command()
def score(
    config_file: ConfigFile,
    out: Annotated[Path, typer.Option(help="The table to write: .parquet or .csv.")],
    policy: Annotated[
        str | None,
        typer.Option(help="A checkpoint of the policy; by default model.name.", show_default=False),
    ] = None,
    interval: Interval = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure pairs under policy and reference: log-probs, rewards and scores in a table.

    All pairs, those held out included, or those of one interval. Its columns are what
    `select --policy-logps` and `reference.file` read.
    """
    with _reported(as_json):
        from sage_select.app.config import ConfigError
        from sage_select.app.run import prepare

        if out.suffix not in (".parquet", ".csv"):
            raise ConfigError(f"--out {out}: give a .parquet or .csv file")
        _check_writable(out)
        run = prepare(_read_config(config_file, overrides), show_progress=_bars(quiet))
        pool = run.used if interval is None else run.dataset.take(_pool(run, interval))
        table, metrics = _scores(run, pool, policy, _bars(quiet))
        out.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(out) if out.suffix == ".parquet" else table.write_csv(out)
        told = {"pairs": table.height, "out": str(out), **metrics}
        if as_json:
            _print_json(told)
        else:
            typer.echo("\n".join(f"{name:12} {_said(value)}" for name, value in told.items()))


def _scores(
    run: "Run", pool: Any, policy: str | None, show_progress: bool | None
) -> tuple[Any, dict[str, float]]:
    import numpy as np
    import polars as pl

    from sage_select.app.run import load_model, measure_of, open_reference, score_of
    from sage_select.metrics import preference_metrics
    from sage_select.pairs import rewards

    model = load_model(run.config, policy)
    known = open_reference(
        run, policy=model if policy is None else None, show_progress=show_progress
    ).take(pool.index)
    logps = measure_of(run.config, show_progress=show_progress)(model, pool)
    found = rewards(logps, known, beta=run.config.beta)
    table = pl.DataFrame(
        {
            "pair_id": pool.column("pair_id"),
            "row": pool.index,
            "source_row": pool.column("source_row"),
            "held_out": ~np.isin(pool.index, run.pairs.index),
            "chosen_logps": logps.chosen.numpy(),
            "rejected_logps": logps.rejected.numpy(),
            "ref_chosen_logps": known.chosen.numpy(),
            "ref_rejected_logps": known.rejected.numpy(),
            "chosen_tokens": logps.chosen_tokens.numpy(),
            "rejected_tokens": logps.rejected_tokens.numpy(),
            "reward_chosen": found.chosen.numpy(),
            "reward_rejected": found.rejected.numpy(),
            "margin": found.margin.numpy(),
            "score": score_of(run.config)(logps, known).numpy(force=True),
        }
    )
    return table, preference_metrics(logps, known, beta=run.config.beta)


def _pool(run: "Run", interval: int) -> Any:
    from sage_select.app.config import ConfigError

    pools = run.timeline.plan.pools
    if not 0 <= interval < len(pools):
        raise ConfigError(f"--interval {interval}: the plan has intervals 0 to {len(pools) - 1}")
    return pools[interval]


@app.command()
def select(
    config_file: ConfigFile,
    out: Annotated[Path, typer.Option(help="The dataset to write: .jsonl, .json or .parquet.")],
    interval: Interval = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Instead of an interval: keep this share of all.", show_default=False),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="A checkpoint of the policy; by default model.name.", show_default=False),
    ] = None,
    policy_logps: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a policy: its log-probs, and the reference's, as `score` writes them.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["same", "trl", "llamafactory"],
        typer.Option(help="The records as they are, or in the words of a trainer."),
    ] = "same",
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose pairs for a trainer that cannot be touched, and write them as its dataset.

    Beside the dataset stands a table with every candidate: row, source row, id, score, kept,
    weight and the log-probs it was decided by.
    """
    with _reported(as_json):
        from sage_select.app.config import ConfigError
        from sage_select.app.run import prepare
        from sage_select.data.exports import ENDINGS, llamafactory_entries, write_pairs
        from sage_select.data.sources import read_records
        from sage_select.selecting.loader import training_order
        from sage_select.selecting.tables import decisions

        if (interval is None) == (keep is None):
            raise ConfigError("give --interval, for a pool of the plan, or --keep, for a share")
        if policy is not None and policy_logps is not None:
            raise ConfigError("give --policy or --policy-logps, not both")
        if keep is not None and not 0 < keep <= 1:
            raise ConfigError(f"--keep must lie in (0, 1], got {keep}")
        if out.suffix not in ENDINGS:
            raise ConfigError(f"--out {out}: known endings are {', '.join(ENDINGS)}")
        _check_writable(out)
        if format == "llamafactory":
            llamafactory_entries(out)  # a spoiled index is better known before the scoring
        config = _read_config(config_file, overrides)
        run = prepare(config, show_progress=_bars(quiet))
        selection = _selected(run, interval, keep, policy, policy_logps, _bars(quiet))
        kept = run.dataset.take(selection.indices)
        order = training_order(kept, config.seed, interval or 0)
        data = config.data
        write_pairs(
            out,
            read_records(
                str(data.path), split=data.split, subset=data.subset, revision=data.revision
            ),
            run.dataset.take(order).column("source_row").to_numpy(),
            format=format,
            columns=data.columns,
        )
        table = out.with_suffix(".selection.parquet")
        decisions(selection, run.dataset).write_parquet(table)
        told = {
            "candidates": len(selection.pool),
            "kept": len(selection),
            "rule": selection.rule,
            "cut": selection.cut,
            "progress": selection.progress,
            "out": str(out),
            "decisions": str(table),
        }
        if as_json:
            _print_json(told)
        else:
            typer.echo("\n".join(f"{name:12} {_said(value)}" for name, value in told.items()))


def _check_writable(out: Path) -> None:
    """Find out before hours of scoring whether a file can be written."""
    import tempfile

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written: {error.strerror}") from None


def _selected(
    run: "Run",
    interval: int | None,
    keep: float | None,
    policy: str | None,
    policy_logps: Path | None,
    show_progress: bool | None,
) -> Any:
    from sage_select.app.run import load_model, open_reference, selector_of
    from sage_select.references.store import read_reference

    pool = run.pairs if interval is None else run.dataset.take(_pool(run, interval))
    progress = 0.0 if interval is None else run.timeline.plan.progress[interval]
    step = 0 if interval is None else run.timeline.first_step[interval]
    if policy_logps is None:
        model = load_model(run.config, policy)
        reference = open_reference(
            run, policy=model if policy is None else None, show_progress=show_progress
        )
        selector = selector_of(run, reference, keep=keep, show_progress=show_progress)
        return selector.select(model, pool, step, progress=progress)
    logps = read_reference(policy_logps, pool, chosen="chosen_logps", rejected="rejected_logps")
    if run.config.reference.file is None and _has_reference(policy_logps):
        reference = read_reference(policy_logps, pool)
    else:
        reference = open_reference(run, show_progress=show_progress)
    selector = selector_of(run, reference, keep=keep)
    return selector.rank(logps, reference, progress, step, ids=pool.ids)


def _has_reference(table: Path) -> bool:
    """Whether a table of log-probs has the reference's as well, as `score` writes it."""
    import polars as pl

    read = pl.scan_parquet if table.suffix == ".parquet" else pl.scan_csv
    return "ref_chosen_logps" in read(table).collect_schema().names()


# train


@app.command()
def train(
    config_file: ConfigFile,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's newest checkpoint.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train with selection; killed at any moment, it resumes to the same bits.

    On one device, or under torchrun on many (training.strategy):
    torchrun --nproc-per-node 8 --no-python sage-select train run.yaml

    The run folder gets the configuration, metrics, evaluations, the selection log, checkpoints,
    the best weights and the trained model.
    """
    with _reported(as_json):
        from sage_select.system.processes import leave

        config = _read_config(config_file, overrides)
        told = _train(config, resume, quiet)
        leave()
        if told is None:  # another process speaks
            return
        if as_json:
            _print_json(told)
        else:
            _tell_training(told, config)


def _train(config: "SageConfig", resume: bool, quiet: bool) -> dict[str, Any] | None:
    """Train as configured; the first process returns what there is to say."""
    import torch

    from sage_select.adapters.plain import load_best, save_pretrained
    from sage_select.adapters.plain import train as train_plain
    from sage_select.app.forecast import compared, cost_of
    from sage_select.app.run import (
        device_of,
        load_model,
        load_tokenizer,
        open_reference,
        prepare,
        selector_of,
        spread,
        training_of,
    )
    from sage_select.selecting.loader import SelectiveLoader
    from sage_select.selecting.log import SelectionLog
    from sage_select.system.ledger import Ledger, append_costs, side_by_side
    from sage_select.system.processes import Processes, join

    folder = config.run_folder
    training = training_of(config)
    join(device_of(config.model.device).type)
    processes = Processes.all()
    first = processes.rank == 0  # the one that speaks and writes
    quiet = quiet or not first
    run = prepare(config, show_progress=_bars(quiet))
    held = None
    if first:
        typer.echo(f"{run.dataset.waterfall()}\n{run.timeline.plan}", err=True)
        _keep_config(config, folder, resume)
        held = _lock(folder)
        typer.echo(f"{run.timeline.total_steps:,} steps, {_where_it_stands(folder)}", err=True)
    processes.wait()
    torch.manual_seed(config.seed)
    model = load_model(config)
    with Ledger() as spent:
        reference = open_reference(run, policy=model, show_progress=_bars(quiet))
    spent = side_by_side(processes.each(spent))
    if first:
        append_costs(folder / "costs.jsonl", spent)
    model = spread(model, config.training.strategy)
    selector = selector_of(run, reference, show_progress=_bars(quiet))
    loader = SelectiveLoader(
        selector,
        run.timeline,
        run.pairs,
        model,
        seed=config.seed,
        log=SelectionLog(folder / "selection"),
    )
    history = train_plain(
        model,
        loader,
        run.dataset,
        reference,
        training,
        held_out=run.held_out,
        folder=folder,
        resume=resume,
        show_progress=_bars(quiet),
    )
    tokenizer = load_tokenizer(config)

    def save(name: str) -> None:
        save_pretrained(model, folder / name)
        if first:
            _save_tokenizer(tokenizer, folder / name)

    save("model")
    records = history.evaluations or history.steps
    told: dict[str, Any] = {
        "folder": str(folder),
        "steps": len(history.steps),
        "first": records[0],
        "last": records[-1],
        "cost": compared(cost_of(run), history.costs),
    }
    if history.evaluations:
        told["best"] = load_best(model, folder)
        save("best-model")
    if held is not None:
        held.close()
    return told if first else None


def _tell_training(told: dict[str, Any], config: "SageConfig") -> None:
    """What training came to, as tables."""
    columns = [name for name in ("first", "best", "last") if name in told]
    rows = [
        (name, *(told[column][name] for column in columns))
        for name in told["last"]
        if all(name in told[column] for column in columns)
    ]
    title = "held-out pairs" if "best" in told else "batches"
    _console().print(_table(title, "metric", *columns, rows=rows))
    rows = [
        (
            name,
            *(work[flops] / 1e12 for flops in ("forecast", "needed", "executed")),
            work["executed_tokens"] / 1e6,
            work["seconds"],
        )
        for name, work in told["cost"]["phases"].items()
    ]
    heads = ("phase", "TFLOP forecast", "needed", "executed", "million tokens", "seconds")
    _console().print(_table("\ncost", *heads, rows=rows))
    typer.echo(
        "at these speeds selection takes less time than training on everything where it keeps "
        f"less than {told['cost']['break_even']:.2f} of its candidates"
    )
    folder = config.run_folder
    typer.echo(f"the model after the last step stands in {folder / 'model'}")
    if "best" in told:
        by = config.training.best_by
        typer.echo(f"the best by {by} on held-out pairs in {folder / 'best-model'}")


@app.command()
def flips(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(help="The folder of another run of the same plan.")],
    as_json: AsJson = False,
) -> None:
    """Compare what two runs kept: other processes, hosts or devices round otherwise."""
    with _reported(as_json):
        from sage_select.selecting.log import SelectionLog
        from sage_select.selecting.tables import flips as count_flips

        logs = []
        for folder in (run, other):
            if not (folder / "selection").is_dir():
                raise FileNotFoundError(f"flips: there is no selection log in {folder}")
            logs.append(SelectionLog(folder / "selection"))
        table = count_flips(*logs)
        kept, flipped = int(table["kept"].sum()), int(table["flipped"].sum())
        if as_json:
            _print_json({"kept": kept, "flipped": flipped, "intervals": table.to_dicts()})
            return
        heads = ("interval", "kept", "flipped", "distance from the cut")
        _console().print(_table("kept by one run and not by the other", *heads, rows=table.rows()))
        typer.echo(f"{flipped:,} of {kept:,} kept pairs flipped")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Put a tokenizer beside its model, where any other program can read both."""
    tokenizer.save_pretrained(folder)
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():  # some are written for their owner's eyes only
        file.chmod(0o666 & ~mask)


def _lock(folder: Path) -> Any:
    """Hold a run folder for this process alone, until it ends in whatever way."""
    file = (folder / "lock").open("w")
    with suppress(ImportError):  # a system without these locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"train: another process is training in {folder}; wait for its end, or set another "
                "folder"
            ) from None
        except OSError:
            pass  # a file system without these locks
    return file


def _where_it_stands(folder: Path) -> str:
    from sage_select.training.checkpoints import checkpoints

    for newest in checkpoints(folder)[:1]:
        return f"going on from step {int(newest.name.partition('-')[2])}, in {folder}"
    return f"from the start, in {folder}"


def _keep_config(config: "SageConfig", folder: Path, resume: bool) -> None:
    """Put the configuration into the run folder, or hold it against the one that is there."""
    from sage_select.app.config import ConfigError, SageConfig

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"folder: {folder} is a file; give the name of a folder")
    path = folder / "config.yaml"
    if path.exists():
        earlier = SageConfig.read(path, environment={})
        if not resume:
            raise FileExistsError(
                f"train: {folder} holds a run already; pass --resume to go on with it, or set "
                "another folder"
            )
        if differences := _differences(earlier, config):
            raise ConfigError(
                f"train --resume: {folder} was begun with other settings: "
                f"{', '.join(differences)}; set them as they were, or another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_yaml(), encoding="utf-8")


def _differences(earlier: "SageConfig", now: "SageConfig") -> list[str]:
    """Settings that decide what is computed and are not the same."""
    from sage_select.app.config import decides

    before, after = (_flat(config.model_dump()) for config in (earlier, now))
    return [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in after.items()
        if value != before[name] and decides(name)
    ]


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


# store


@store_app.command("list")
def list_references(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """The references of the store, the most recently used first, and the tokens kept."""
    with _reported(as_json):
        from sage_select.data.dataset import tokens_folder
        from sage_select.references.store import default_store, stored_references

        if store is not None and not store.is_dir():
            raise FileNotFoundError(f"--store {store}: there is no such folder")
        references = stored_references(store)
        tokens = sum(f.stat().st_size for f in tokens_folder().glob("*") if f.is_file())
        if as_json:
            _print_json(
                {
                    "references": [asdict(reference) for reference in references],
                    "bytes": sum(reference.size for reference in references),
                    "token_bytes": tokens,
                }
            )
            return
        rows = [
            (r.identity, r.told.get("model", ""), r.told.get("dtype", ""), r.sequences, r.size)
            for r in references
        ]
        title = f"references in {store or default_store()}"
        columns = ("identity", "model", "dtype", "sequences", "bytes")
        _console().print(_table(title, *columns, rows=rows))
        total = sum(reference.size for reference in references)
        typer.echo(f"\n{total:,} bytes of log-probs; {tokens:,} bytes of tokens")


@store_app.command()
def fill(
    config_file: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure the reference of a run beforehand; killed, it goes on where it was."""
    with _reported(as_json):
        from sage_select.app.config import ConfigError
        from sage_select.app.run import load_model, prepare, store_of

        config = _read_config(config_file, overrides)
        if config.reference.file is not None:
            raise ConfigError("reference.file is set: there is nothing to measure")
        run = prepare(config, show_progress=_bars(quiet))
        model = load_model(config, reference=True)
        reference = store_of(run, model, show_progress=_bars(quiet))
        measured = reference.fill()
        told = {
            "identity": reference.identity,
            "folder": str(reference.folder),
            "pairs": len(reference),
            "sequences_measured": measured,
        }
        if as_json:
            _print_json(told)
        else:
            typer.echo("\n".join(f"{name:20} {_said(value)}" for name, value in told.items()))


@store_app.command()
def evict(
    identity: Annotated[
        str | None, typer.Option(help="Delete this reference.", show_default=False)
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(help="Delete what was unused for so long: 12h, 30d.", show_default=False),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(help="Delete the oldest above this size: 500MB, 2GB.", show_default=False),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Delete kept tokens instead, by --older-than.")
    ] = False,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Delete references, or kept tokens, that are no longer needed."""
    with _reported(as_json):
        from sage_select.app.config import ConfigError
        from sage_select.data.dataset import evict_tokens
        from sage_select.references.store import evict as evict_references

        unused_for = None if older_than is None else _seconds(older_than)
        if tokens:
            if unused_for is None:
                raise ConfigError("evict --tokens: say how old with --older-than, as in 30d")
            files, freed = evict_tokens(unused_for)
            told: dict[str, Any] = {"files": files, "bytes": freed}
        else:
            if identity is None and unused_for is None and max_size is None:
                raise ConfigError("evict: say what: --identity, --older-than or --max-size")
            gone = evict_references(
                store,
                identity=identity,
                unused_for=unused_for,
                max_size=None if max_size is None else _bytes(max_size),
            )
            told = {"references": [r.identity for r in gone], "bytes": sum(r.size for r in gone)}
        if as_json:
            _print_json(told)
        else:
            count = told["files"] if tokens else len(told["references"])
            what = "files of tokens" if tokens else "references"
            typer.echo(f"{count:,} {what} deleted, {told['bytes']:,} bytes")


def _seconds(text: str) -> float:
    return _amount(text, {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}, "--older-than", "30d")


def _bytes(text: str) -> int:
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return int(_amount(text, units, "--max-size", "2GB"))


def _amount(text: str, units: dict[str, int], option: str, example: str) -> float:
    from sage_select.app.config import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if match is None or match[2] not in units:
        raise ConfigError(
            f"{option} {text}: give a number and one of {', '.join(units)}, as in {example}"
        )
    return float(match[1]) * units[match[2]]


# doctor


@app.command()
def doctor(
    config_file: Annotated[
        Path | None,
        typer.Argument(help="A run's description, to examine it too.", show_default=False),
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
    """What would stop or spoil an overnight run: installation, devices, data, configuration."""
    with _reported(as_json):
        from sage_select.app.doctor import as_records, examine

        config = None if config_file is None else _read_config(config_file, overrides)
        findings = list(examine(config, thorough=thorough, show_progress=_bars(quiet)))
        failed = [finding for finding in findings if finding.verdict == "fail"]
        if as_json:
            _print_json({"fit": not failed, "findings": as_records(findings)})
        else:
            colours = {"ok": "green", "warn": "yellow", "fail": "red"}
            console = _console()
            for finding in findings:
                console.print(f"{finding.verdict:5}", style=colours[finding.verdict], end="")
                console.print(f"{finding.about:14} {finding.said}", markup=False)
            typer.echo(f"{len(failed)} of {len(findings)} checks failed")
        if failed:
            raise typer.Exit(NOT_FIT)


# config


@config_app.command()
def paper() -> None:
    """Print a configuration with every setting, Table 4 of the paper where it says anything."""
    with _reported():
        from sage_select.app.config import SageConfig

        typer.echo(SageConfig.paper().to_yaml(), nl=False)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of configurations, for editors."""
    with _reported():
        from sage_select.app.config import SageConfig

        _print_json(SageConfig.model_json_schema())


@config_app.command()
def show(config_file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration and print all of it, defaults and overrides included."""
    with _reported(as_json):
        config = _read_config(config_file, overrides)
        if as_json:
            _print_json({"hash": config.hash, "config": config.model_dump(mode="json")})
        else:
            typer.echo(f"# {config.hash}\n{config.to_yaml()}", nl=False)


def _bars(quiet: bool) -> bool | None:
    return False if quiet else None

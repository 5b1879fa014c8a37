"""Commands for runs: plan, score, select, train, flips.

Heavy imports are inside the commands, so that --help and shell completion are fast.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sage_select.app.cli.options import (
    AsJson,
    ConfigFile,
    Interval,
    Overrides,
    Policy,
    Quiet,
    bars,
    read_config,
)
from sage_select.app.cli.output import console, print_json, print_values, reported, table

if TYPE_CHECKING:
    from sage_select.app.jobs import TrainingResult

COST_LABELS = {
    "reference": "reference, once, if the store is empty",
    "scoring": "scoring the pools",
    "training": "training on the kept pairs, if of average length",
    "evaluation": "evaluating on the held-out pairs",
    "full": "training on everything instead",
}


def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a run before it starts: pairs, strata, pools, mix, keep ratios, steps and cost.

    Needs the data and the tokenizer; no weights are loaded.
    """
    with reported(as_json):
        from sage_select.app import jobs

        forecast = jobs.plan(read_config(config_file, overrides), show_progress=bars(quiet))
        if as_json:
            print_json(forecast)
        else:
            _print_forecast(forecast)


def _print_forecast(forecast: dict[str, Any]) -> None:
    screen, cost = console(), forecast["cost"]
    strata = [(name, n, n / forecast["pairs"]) for name, n in forecast["strata"].items()]
    intervals = [tuple(interval.values()) for interval in forecast["intervals"]]
    costs = [
        (label, cost["tokens"][name] / 1e6, _tera(cost["flops"][name]))
        for name, label in COST_LABELS.items()
    ]
    typer.echo(forecast["waterfall"])
    for title, columns, rows in (
        ("\nstrata", ("stratum", "pairs", "share"), strata),
        ("\nintervals", tuple(forecast["intervals"][0]), intervals),
        ("\ncost", ("phase", "million tokens", "TFLOP needed"), costs),
    ):
        screen.print(table(title, *columns, rows=rows))
    typer.echo(
        f"\n{forecast['pairs']:,} pairs to train on, {forecast['held_out']:,} held out\n"
        f"{forecast['plan']}\n{forecast['kept']:,} kept pairs in {forecast['steps']:,} steps; "
        f"{forecast['steps_without_selection']:,} steps without selection\n"
        f"{cost['relative']:.2f} of the cost of training on everything; selection saves compute "
        f"below a keep ratio of {cost['break_even']:.2f}, and this run keeps {cost['keep']:.2f}\n"
        f"configuration {forecast['config']}, run folder {forecast['run_folder']}"
    )


def _tera(flops: float | None) -> Any:
    """Return TFLOPs, or an empty cell if the model's shape is unknown."""
    return "" if flops is None else flops / 1e12


def score(
    config_file: ConfigFile,
    out: Annotated[Path, typer.Option(help="Table to write: .parquet or .csv.")],
    policy: Policy = None,
    interval: Interval = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure pairs under policy and reference: log-probs, rewards and scores in a table.

    Measures all pairs, including those held out, or the pool of one interval. The table can be
    used by `select --policy-logps` and as `reference.file`.
    """
    with reported(as_json):
        from sage_select.app import jobs

        config = read_config(config_file, overrides)
        scores = jobs.score(
            config, out=out, policy=policy, interval=interval, show_progress=bars(quiet)
        )
        print_values({"pairs": scores.table.height, "out": str(out), **scores.metrics}, as_json)


def select(
    config_file: ConfigFile,
    out: Annotated[Path, typer.Option(help="Dataset to write: .jsonl, .json or .parquet.")],
    interval: Interval = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Keep this share of all pairs, instead of an interval.", show_default=False
        ),
    ] = None,
    policy: Policy = None,
    policy_logps: Annotated[
        Path | None,
        typer.Option(
            help="Log-probs of policy and reference, as `score` writes them, instead of a policy.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["same", "trl", "llamafactory"],
        typer.Option(help="Records unchanged, or in the format of a trainer."),
    ] = "same",
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Select pairs for a trainer that you cannot modify, and write them as its dataset.

    A table beside the dataset lists every candidate: row, source row, id, score, kept, weight and
    log-probs.
    """
    with reported(as_json):
        from sage_select.app import jobs

        selection = jobs.select(
            read_config(config_file, overrides),
            interval=interval,
            keep=keep,
            out=out,
            format=format,
            policy=policy,
            policy_logps=policy_logps,
            show_progress=bars(quiet),
        )
        values = {
            "candidates": len(selection.pool),
            "kept": len(selection),
            "rule": selection.rule,
            "cut": selection.cut,
            "progress": selection.progress,
            "out": str(out),
            "decisions": str(jobs.decisions_path(out)),
        }
        print_values(values, as_json)


def train(
    config_file: ConfigFile,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the folder's newest checkpoint.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train with selection. A killed run resumes with --resume and ends with identical weights.

    Runs on one device, or under torchrun on several (training.strategy):
    torchrun --nproc-per-node 8 --no-python sage-select train run.yaml

    The run folder receives the configuration, metrics, evaluations, the selection log, checkpoints,
    the best weights and the trained model.
    """
    with reported(as_json):
        from sage_select.app import jobs
        from sage_select.system.processes import Processes, leave

        config = read_config(config_file, overrides)
        result = jobs.train(
            config,
            resume=resume,
            show_progress=bars(quiet),
            say=lambda text: typer.echo(text, err=True),
        )
        first = Processes.all().rank == 0  # asked before leaving, when there still are ranks
        leave()
        if first and as_json:
            print_json(
                {
                    "folder": str(result.folder.path),
                    "steps": len(result.history.steps),
                    "first": result.first,
                    "last": result.last,
                    "cost": result.cost,
                    **({} if result.best is None else {"best": result.best}),
                }
            )
        elif first:
            _print_result(result, config.training.best_by)


def _print_result(result: "TrainingResult", best_by: str) -> None:
    columns = {"first": result.first, "best": result.best, "last": result.last}
    available = {name: metrics for name, metrics in columns.items() if metrics is not None}
    rows = [
        (name, *(metrics[name] for metrics in available.values()))
        for name in result.last
        if all(name in metrics for metrics in available.values())
    ]
    title = "batches" if result.best is None else "held-out pairs"
    console().print(table(title, "metric", *available, rows=rows))
    rows = [
        (
            name,
            *(work[flops] / 1e12 for flops in ("forecast", "needed", "executed")),
            work["executed_tokens"] / 1e6,
            work["seconds"],
        )
        for name, work in result.cost["phases"].items()
    ]
    headings = ("phase", "TFLOP forecast", "needed", "executed", "million tokens", "seconds")
    console().print(table("\ncost", *headings, rows=rows))
    typer.echo(
        "at these speeds, selection takes less time than training on everything if it keeps less "
        f"than {result.cost['break_even']:.2f} of its candidates"
    )
    typer.echo(f"model after the last step: {result.folder.model}")
    if result.best is not None:
        typer.echo(f"best model by {best_by} on held-out pairs: {result.folder.best_model}")


def flips(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    other: Annotated[Path, typer.Argument(help="Folder of another run with the same plan.")],
    as_json: AsJson = False,
) -> None:
    """Compare which pairs two runs kept; other processes, hosts or devices round differently."""
    with reported(as_json):
        from sage_select.app import jobs

        flipped_by_interval = jobs.flips(run, other)
        kept = int(flipped_by_interval["kept"].sum())
        flipped = int(flipped_by_interval["flipped"].sum())
        if as_json:
            intervals = flipped_by_interval.to_dicts()
            print_json({"kept": kept, "flipped": flipped, "intervals": intervals})
            return
        headings = ("interval", "kept", "flipped", "distance from the cut")
        rows = flipped_by_interval.rows()
        console().print(table("kept by one run and not by the other", *headings, rows=rows))
        typer.echo(f"{flipped:,} of {kept:,} kept pairs flipped")
        unknown = flipped_by_interval.filter(flipped_by_interval["kept"].is_null())["interval"]
        if len(unknown):
            typer.echo(f"not compared, as a log cannot be read: intervals {unknown.to_list()}")

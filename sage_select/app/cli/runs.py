"""Commands around a run: plan, score, select, train, flips.

Heavy imports are inside the commands, so that --help and completion answer at once.
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

COST_WORDS = {
    "reference": "reference, once, if the store is empty",
    "scoring": "scoring the pools",
    "training": "training on the kept pairs, if they are as long as the others",
    "evaluation": "evaluating on the held-out pairs",
    "full": "training on everything instead",
}


def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the whole run before it starts: pairs, strata, pools, mix, keeps, steps and cost.

    It needs the data and the tokenizer; no weights are loaded.
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
        (words, cost["tokens"][name] / 1e6, _tera(cost["flops"][name]))
        for name, words in COST_WORDS.items()
    ]
    typer.echo(forecast["waterfall"])
    for title, columns, rows in (
        ("\nstrata", ("stratum", "pairs", "share"), strata),
        ("\nintervals", tuple(forecast["intervals"][0]), intervals),
        ("\ncost", ("what", "million tokens", "TFLOP needed"), costs),
    ):
        screen.print(table(title, *columns, rows=rows))
    typer.echo(
        f"\n{forecast['pairs']:,} pairs to train on, {forecast['held_out']:,} held out\n"
        f"{forecast['plan']}\n{forecast['kept']:,} kept pairs in {forecast['steps']:,} steps; "
        f"{forecast['steps_without_selection']:,} steps without selection\n"
        f"{cost['relative']:.2f} of the cost of training on everything; it keeps "
        f"{cost['keep']:.2f} of its candidates, and pays off below {cost['break_even']:.2f}\n"
        f"configuration {forecast['config']}, run folder {forecast['run_folder']}"
    )


def _tera(flops: float | None) -> Any:
    return "" if flops is None else flops / 1e12


def score(
    config_file: ConfigFile,
    out: Annotated[Path, typer.Option(help="The table to write: .parquet or .csv.")],
    policy: Policy = None,
    interval: Interval = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure pairs under policy and reference: log-probs, rewards and scores in a table.

    All pairs, including those held out, or those of one interval. `select --policy-logps` and
    `reference.file` read the table.
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
    out: Annotated[Path, typer.Option(help="The dataset to write: .jsonl, .json or .parquet.")],
    interval: Interval = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Instead of an interval: keep this share of all.", show_default=False),
    ] = None,
    policy: Policy = None,
    policy_logps: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a policy: its log-probs, and the reference's, as `score` writes them.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["same", "trl", "llamafactory"],
        typer.Option(help="The records as they are, or as a trainer reads them."),
    ] = "same",
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose pairs for a trainer that you cannot modify, and write them as its dataset.

    A table beside the dataset has every candidate: row, source row, id, score, kept, weight and
    the log-probs that decided.
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

    On one device, or under torchrun on many (training.strategy):
    torchrun --nproc-per-node 8 --no-python sage-select train run.yaml

    The run folder gets the configuration, metrics, evaluations, the selection log, checkpoints,
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
        first = Processes.all().rank == 0
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
    given = {name: metrics for name, metrics in columns.items() if metrics is not None}
    rows = [
        (name, *(metrics[name] for metrics in given.values()))
        for name in result.last
        if all(name in metrics for metrics in given.values())
    ]
    title = "batches" if result.best is None else "held-out pairs"
    console().print(table(title, "metric", *given, rows=rows))
    rows = [
        (
            name,
            *(work[flops] / 1e12 for flops in ("forecast", "needed", "executed")),
            work["executed_tokens"] / 1e6,
            work["seconds"],
        )
        for name, work in result.cost["phases"].items()
    ]
    heads = ("phase", "TFLOP forecast", "needed", "executed", "million tokens", "seconds")
    console().print(table("\ncost", *heads, rows=rows))
    typer.echo(
        "at these speeds selection takes less time than training on everything if it keeps less "
        f"than {result.cost['break_even']:.2f} of its candidates"
    )
    typer.echo(f"the model after the last step: {result.folder.model}")
    if result.best is not None:
        typer.echo(f"the best by {best_by} on held-out pairs: {result.folder.best_model}")


def flips(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(help="The folder of another run of the same plan.")],
    as_json: AsJson = False,
) -> None:
    """Compare what two runs kept: other processes, hosts or devices round differently."""
    with reported(as_json):
        from sage_select.app import jobs

        flipped_by_interval = jobs.flips(run, other)
        kept = int(flipped_by_interval["kept"].sum())
        flipped = int(flipped_by_interval["flipped"].sum())
        if as_json:
            intervals = flipped_by_interval.to_dicts()
            print_json({"kept": kept, "flipped": flipped, "intervals": intervals})
            return
        heads = ("interval", "kept", "flipped", "distance from the cut")
        rows = flipped_by_interval.rows()
        console().print(table("kept by one run and not by the other", *heads, rows=rows))
        typer.echo(f"{flipped:,} of {kept:,} kept pairs flipped")

"""Everything the terminal does, as one Python call each.

from sage_select import SageConfig, jobs
config = SageConfig.read("run.yaml")
jobs.doctor(config); jobs.plan(config); jobs.train(config)
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from sage_select.app.config import SageConfig
from sage_select.app.doctor import Finding, examine
from sage_select.app.forecast import compared, cost_of, forecast
from sage_select.app.loading import device_named
from sage_select.app.run import Run, spread
from sage_select.data.dataset import PreferenceDataset
from sage_select.data.exports import ENDINGS, llamafactory_entries, write_pairs
from sage_select.data.sources import read_records
from sage_select.metrics import preference_metrics
from sage_select.pairs import CHOSEN, REFERENCE, REJECTED, rewards
from sage_select.references.logp_tables import has_column, read_reference
from sage_select.selecting.loader import training_order
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.tables import decisions, flips_of_logs
from sage_select.selection import Selection
from sage_select.system.ledger import Ledger, append_costs, side_by_side
from sage_select.system.processes import Processes, join
from sage_select.system.settings import ConfigError
from sage_select.training.loop import History, fit
from sage_select.training.run_folder import RunFolder, checkpoint_step
from sage_select.training.settings import Training
from sage_select.training.sharding import load_best, save_pretrained

Say = Callable[[str], object]
"""Receives messages for people, a few lines each."""


def plan(config: SageConfig, *, show_progress: bool | None = None) -> dict[str, Any]:
    """The whole run before it starts: rows, strata, intervals, steps and cost, as plain values.

    It needs the data and the tokenizer; no weights are loaded.

    Args:
        config: The run's description.
        show_progress: False for no progress bars.
    """
    return forecast(Run.prepare(config, show_progress=show_progress))


def doctor(
    config: SageConfig | None = None, *, thorough: bool = False, show_progress: bool | None = None
) -> list[Finding]:
    """What would stop or spoil an overnight run, looked for beforehand.

    Args:
        config: The run's description; without it, the installation and the devices are examined.
        thorough: Whether to load the models and try the largest batch, without an update.
        show_progress: False for no progress bars.
    """
    return list(examine(config, thorough=thorough, show_progress=show_progress))


class Scores(NamedTuple):
    """What `score` gives.

    Attributes:
        table: One row per pair: ids and rows, log-probs, rewards, margin and score.
        metrics: Means over these pairs, see `preference_metrics`.
    """

    table: pl.DataFrame
    metrics: dict[str, float]


def score(
    config: SageConfig,
    *,
    out: str | Path | None = None,
    policy: str | None = None,
    interval: int | None = None,
    show_progress: bool | None = None,
) -> Scores:
    """Measure pairs under policy and reference: log-probs, rewards and scores.

    Args:
        config: The run's description.
        out: A `.parquet` or `.csv` file to write the table to; `select` and `reference.file` read
            it.
        policy: A checkpoint of the policy; by default `model.name`.
        interval: The pool of this interval of the plan, from 0; by default all pairs, including
            those held out.
        show_progress: False for no progress bars.

    Raises:
        ConfigError: If the file's ending is unknown, or the plan has no such interval.
    """
    if out is not None:
        out = _writable(out, (".parquet", ".csv"))
    run = Run.prepare(config, show_progress=show_progress)
    pool = run.used if interval is None else _pool(run, interval)
    model = run.load_policy(policy)
    reference = run.open_reference(model if policy is None else None).take(pool.index)
    logps = run.reader(model, pool)
    implicit = rewards(logps, reference, beta=config.beta)
    table = pl.DataFrame(
        {
            "pair_id": pool.column("pair_id"),
            "row": pool.index,
            "source_row": pool.column("source_row"),
            "held_out": ~np.isin(pool.index, run.pairs.index),
            **logps.columns(),
            **reference.columns(REFERENCE),
            "chosen_tokens": logps.chosen_tokens.numpy(),
            "rejected_tokens": logps.rejected_tokens.numpy(),
            "reward_chosen": implicit.chosen.numpy(),
            "reward_rejected": implicit.rejected.numpy(),
            "margin": implicit.margin.numpy(),
            "score": run.score(logps, reference).numpy(force=True),
        }
    )
    if out is not None:
        table.write_parquet(out) if out.suffix == ".parquet" else table.write_csv(out)
    return Scores(table, preference_metrics(logps, reference, beta=config.beta))


def select(
    config: SageConfig,
    *,
    interval: int | None = None,
    keep: float | None = None,
    out: str | Path | None = None,
    format: str = "same",
    policy: str | None = None,
    policy_logps: str | Path | None = None,
    show_progress: bool | None = None,
) -> Selection:
    """Choose pairs: of an interval's pool as the plan says, or a share of all.

    Args:
        config: The run's description.
        interval: The interval of the plan, from 0.
        keep: Instead of an interval, the share of all pairs to keep, in (0, 1].
        out: A `.jsonl`, `.json` or `.parquet` file for the kept records, as a trainer's dataset, in
            seeded training order. A table of all candidates, `.selection.parquet`, is written
            beside it.
        format: "same" writes the records as they are; or "trl", or "llamafactory".
        policy: A checkpoint of the policy; by default `model.name`.
        policy_logps: Instead of a policy: a file of its log-probs, as `score` writes it, perhaps
            with the reference's.
        show_progress: False for no progress bars.

    Raises:
        ConfigError: If neither or both of interval and keep are given, or one does not fit.
    """
    if (interval is None) == (keep is None):
        raise ConfigError("give --interval, for a pool of the plan, or --keep, for a share")
    if policy is not None and policy_logps is not None:
        raise ConfigError("give --policy or --policy-logps, not both")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"--keep must lie in (0, 1], got {keep}")
    if out is not None:
        out = _writable(out, ENDINGS)
        if format == "llamafactory":
            llamafactory_entries(out)  # better to know that its index is broken before scoring
    run = Run.prepare(config, show_progress=show_progress)
    pool, progress, step = run.pairs, 0.0, 0
    if interval is not None:
        pool = _pool(run, interval)
        progress = run.timeline.plan.progress[interval]
        step = run.timeline.first_step[interval]
    if policy_logps is None:
        model = run.load_policy(policy)
        reference = run.open_reference(model if policy is None else None)
        selection = run.selector(reference, keep=keep).select(model, pool, step, progress=progress)
    else:
        logps = read_reference(policy_logps, pool, chosen=CHOSEN, rejected=REJECTED)
        if config.reference.file is None and has_column(policy_logps, REFERENCE + CHOSEN):
            reference = read_reference(policy_logps, pool)
        else:
            reference = run.open_reference()
        selector = run.selector(reference, keep=keep)
        selection = selector.rank(logps, reference, progress, step, ids=pool.ids)
    if out is not None:
        _write_selection(run, selection, out, format, interval or 0)
    return selection


def _write_selection(run: Run, selection: Selection, out: Path, format: str, interval: int) -> None:
    data = run.config.data
    kept = run.dataset.take(selection.indices)
    order = training_order(kept, run.config.seed, interval)
    records = read_records(
        str(data.path), split=data.split, subset=data.subset, revision=data.revision
    )
    rows = run.dataset.take(order).column("source_row").to_numpy()
    write_pairs(out, records, rows, format=format, columns=data.columns)
    decisions(selection, run.dataset).write_parquet(decisions_path(out))


def decisions_path(out: Path) -> Path:
    """Where `select` writes its table of candidates, beside the dataset."""
    return out.with_suffix(".selection.parquet")


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to.

    Attributes:
        folder: The run's folder.
        history: Records of all steps and evaluations, and what they cost.
        first: The first evaluation; the first step's metrics if nothing was held out.
        last: The same of the last one.
        best: The evaluation that the best weights won; None if nothing was held out.
        cost: What was forecast and what was spent, phase by phase.
    """

    folder: RunFolder
    history: History
    first: dict[str, float]
    last: dict[str, float]
    best: dict[str, float] | None
    cost: dict[str, Any]


def train(
    config: SageConfig,
    *,
    resume: bool = False,
    show_progress: bool | None = None,
    say: Say | None = None,
) -> TrainingResult:
    """Train with selection. A killed run resumes with `resume` and ends with bit-identical weights.

    On one device, or under torchrun on many, all of which call this (`training.strategy` says how
    they hold the policy); end such a program with `leave()`. The run folder gets the configuration,
    metrics, evaluations, the selection log, checkpoints, the best weights and the trained model.

    Args:
        config: The run's description.
        resume: Resume from the folder's newest checkpoint.
        show_progress: False for no progress bars.
        say: Receives what a person should know before the first step, in process 0.

    Raises:
        FileExistsError: If the folder holds a run already and resume is False, or another process
            trains there.
        ConfigError: If the folder's run has other settings.

    Example:
        >>> result = train(SageConfig.read("run.yaml"))  # doctest: +SKIP
        >>> result.last["accuracy"], result.folder.best_model  # doctest: +SKIP
    """
    join(device_named(config.model.device).type)
    processes = Processes.all()
    first = processes.rank == 0  # the process that speaks and writes
    run = Run.prepare(config, show_progress=show_progress if first else False)
    training = run.training  # a function that cannot be imported is refused before measuring
    folder = RunFolder(config.run_folder)
    if first:
        _keep_config(config, folder, resume)
    with folder.hold() if first else nullcontext():
        if first and say is not None:
            say(f"{run.dataset.waterfall()}\n{run.timeline.plan}")
            say(f"{run.timeline.total_steps:,} steps, {_where_it_stands(folder)}")
        processes.barrier()
        return _train(run, training, folder, resume)


def _train(run: Run, training: Training, folder: RunFolder, resume: bool) -> TrainingResult:
    config, processes = run.config, Processes.all()
    torch.manual_seed(config.seed)
    model = run.load_policy()
    with Ledger() as spent:
        reference = run.open_reference(model)
    spent = side_by_side(processes.all_gather_object(spent))
    if processes.rank == 0:
        append_costs(folder.costs, spent)
    model = spread(model, config.training.strategy)
    loader = run.loader(model, reference, log=SelectionLog(folder.selection))
    history = fit(
        model,
        loader,
        run.dataset,
        reference,
        training,
        held_out=run.held_out,
        folder=folder,
        resume=resume,
        show_progress=run.show_progress,
    )
    _save(model, run.tokenizer, folder.model)
    best = None
    if history.evaluations:
        best = load_best(model, folder.path)
        _save(model, run.tokenizer, folder.best_model)
    records = history.evaluations or history.steps
    cost = compared(cost_of(run), history.costs)
    return TrainingResult(folder, history, records[0], records[-1], best, cost)


def fill(config: SageConfig, *, show_progress: bool | None = None) -> dict[str, Any]:
    """Measure the reference of a run beforehand, into the store. A killed one resumes.

    Args:
        config: The run's description.
        show_progress: False for no progress bars.

    Returns:
        `identity` and `folder` of the reference, `pairs` known, and `sequences_measured` now.

    Raises:
        ConfigError: If the reference is a file.
    """
    if config.reference.file is not None:
        raise ConfigError("reference.file is set: there is nothing to measure")
    run = Run.prepare(config, show_progress=show_progress)
    store = run.store(run.load_reference())
    measured = store.fill()
    return {
        "identity": store.identity,
        "folder": str(store.folder),
        "pairs": len(store),
        "sequences_measured": measured,
    }


def flips(run: str | Path, other: str | Path) -> pl.DataFrame:
    """Compare what two runs kept, interval by interval, see `flips_of_logs`.

    Args:
        run: The folder of a run.
        other: The folder of another run of the same plan.

    Raises:
        FileNotFoundError: If one has no selection log.
    """
    logs = []
    for folder in map(RunFolder, (run, other)):
        if not folder.selection.is_dir():
            raise FileNotFoundError(f"flips: there is no selection log in {folder.path}")
        logs.append(SelectionLog(folder.selection))
    return flips_of_logs(*logs)


def _pool(run: Run, interval: int) -> PreferenceDataset:
    pools = run.timeline.plan.pools
    if not 0 <= interval < len(pools):
        raise ConfigError(f"--interval {interval}: the plan has intervals 0 to {len(pools) - 1}")
    return run.dataset.take(pools[interval])


def _writable(path: str | Path, endings: tuple[str, ...]) -> Path:
    """A file's path, once it is known, before hours of scoring, that it can be written."""
    out = Path(path)
    if out.suffix not in endings:
        raise ConfigError(f"--out {out}: known endings are {', '.join(endings)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written: {error.strerror}") from None
    return out


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer where any other program can read both."""
    save_pretrained(model, folder)
    if Processes.all().rank != 0:
        return
    tokenizer.save_pretrained(folder)
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():  # some are written readable by their owner alone
        file.chmod(0o666 & ~mask)


def _where_it_stands(folder: RunFolder) -> str:
    for newest in folder.checkpoints()[:1]:
        return f"resuming from step {checkpoint_step(newest)}, in {folder.path}"
    return f"from the start, in {folder.path}"


def _keep_config(config: SageConfig, folder: RunFolder, resume: bool) -> None:
    """Write the configuration into the run folder, or compare it with the one that is there."""
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"folder: {folder.path} is a file; give the name of a folder")
    if folder.config.exists():
        earlier = SageConfig.read(folder.config, environment={})
        if not resume:
            raise FileExistsError(
                f"train: {folder.path} holds a run already; pass --resume (resume=True) to resume "
                "it, or set another folder"
            )
        if differences := earlier.differences(config):
            raise ConfigError(
                f"train --resume: {folder.path} was begun with other settings: "
                f"{', '.join(differences)}; set them as they were, or another folder"
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(config.to_yaml(), encoding="utf-8")

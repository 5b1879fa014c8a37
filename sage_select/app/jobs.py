"""The commands of the terminal as Python functions, one call each.

from sage_select import SageConfig, jobs

config = SageConfig.read("run.yaml")
jobs.doctor(config)
jobs.plan(config)
jobs.train(config)
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import numpy as np
import polars as pl
import torch

from sage_select.app.config import SageConfig
from sage_select.app.doctor import Finding, examine
from sage_select.app.forecast import compared, cost_of, forecast
from sage_select.app.loading import device_named
from sage_select.app.run import Run, spread
from sage_select.data.dataset import PreferenceDataset
from sage_select.data.exports import ENDINGS, FORMATS, llamafactory_entries, write_pairs
from sage_select.data.sources import read_records
from sage_select.metrics import preference_metrics
from sage_select.pairs import CHOSEN, REFERENCE, REJECTED, rewards
from sage_select.references.logp_tables import has_column, read_reference
from sage_select.selecting.loader import training_order
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.tables import decisions, flips_of_logs
from sage_select.selection import Selection
from sage_select.system.files import (
    SpoiledFile,
    check_content,
    named_on_failure,
    partial_path,
    replace_durably,
    user_path,
    written_whole,
)
from sage_select.system.ledger import Ledger, append_costs, side_by_side
from sage_select.system.processes import Processes, join
from sage_select.system.settings import ConfigError
from sage_select.training.loop import History, fit
from sage_select.training.run_folder import RunFolder, checkpoint_step
from sage_select.training.settings import Training
from sage_select.training.sharding import load_best, save_pretrained

Say = Callable[[str], object]
"""Callback that receives messages for the user, a few lines each."""


def plan(config: SageConfig, *, show_progress: bool | None = None) -> dict[str, Any]:
    """Forecast a run before it starts: rows, strata, intervals, steps and cost.

    Needs the data and the tokenizer; no weights are loaded.

    Args:
        config: The run's configuration.
        show_progress: False to hide progress bars.

    Returns:
        Plain values by name, as `sage-select plan --json` prints them.

    Example:
        >>> jobs.plan(SageConfig.read("run.yaml"))["steps"]  # doctest: +SKIP
    """
    return forecast(Run.prepare(config, show_progress=show_progress))


def doctor(
    config: SageConfig | None = None, *, thorough: bool = False, show_progress: bool | None = None
) -> list[Finding]:
    """Check for anything that would stop or spoil a long run, before it starts.

    Args:
        config: The run's configuration; without it, only the installation and the devices are
            checked.
        thorough: Also load the models and try the largest batch, without an update.
        show_progress: False to hide progress bars.

    Returns:
        One finding per check; the run would fail if the verdict of any of them is "fail".

    Example:
        >>> [f for f in jobs.doctor(config) if f.verdict == "fail"]  # doctest: +SKIP
    """
    return list(examine(config, thorough=thorough, show_progress=show_progress))


class Scores(NamedTuple):
    """Result of `score`.

    Attributes:
        table: One row per pair: ids and rows, log-probs, rewards, margin and score.
        metrics: Means over these pairs, by name; see `preference_metrics`.
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
        config: The run's configuration.
        out: `.parquet` or `.csv` file for the table; `select(policy_logps=...)` and
            `reference.file` read it.
        policy: Checkpoint of the policy; by default `model.name`.
        interval: Measure only the pool of this interval of the plan, from 0; by default all pairs,
            including those held out.
        show_progress: False to hide progress bars.

    Returns:
        The table and the metrics.

    Raises:
        ConfigError: If the file's extension is unsupported, or the plan has no such interval.
        OSError: If the file cannot be written.

    Example:
        >>> jobs.score(config, policy="run/best-model").metrics["accuracy"]  # doctest: +SKIP
    """
    if out is not None:
        out = _checked_output("score", out, (".parquet", ".csv"))
    run = Run.prepare(config, show_progress=show_progress)
    pool = run.used if interval is None else _pool_of("score", run, interval)
    model = run.load_policy(policy)
    # a checkpoint is not the initial policy, so the reference is then loaded separately
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
        _write_table(table, out)
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
    """Select pairs: from the pool of one interval as planned, or a share of all pairs.

    Args:
        config: The run's configuration.
        interval: Interval of the plan, from 0.
        keep: Share of all pairs to keep, in (0, 1], instead of an interval.
        out: `.jsonl`, `.json` or `.parquet` file for the kept records, as a trainer's dataset in
            seeded training order. A table of all candidates is written beside it, with the
            extension `.selection.parquet`.
        format: "same" writes the records unchanged, "trl" and "llamafactory" in the format of that
            trainer.
        policy: Checkpoint of the policy; by default `model.name`.
        policy_logps: File with the policy's log-probs, as `score` writes it, instead of a policy.
            The reference's log-probs are read from it, too, if it has them and `reference.file`
            is not set.
        show_progress: False to hide progress bars.

    Returns:
        The decision, with the kept rows of the dataset, best first, and its evidence.

    Raises:
        ConfigError: If both or neither of interval and keep are given, or an argument is out of
            range.
        OSError: If the file cannot be written.

    Example:
        >>> kept = jobs.select(config, keep=0.5, out="kept.jsonl")  # doctest: +SKIP
        >>> len(kept), kept.cut  # doctest: +SKIP
    """
    if (interval is None) == (keep is None):
        raise ConfigError(
            "select: give interval (--interval), for a pool of the plan, or keep (--keep), for a "
            "share of all pairs"
        )
    if policy is not None and policy_logps is not None:
        raise ConfigError(
            "select: give policy (--policy) or policy_logps (--policy-logps), not both"
        )
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"select: keep (--keep) must be in (0, 1], got {keep}")
    if out is not None:
        out = _checked_output("select", out, ENDINGS)
        if format not in FORMATS:
            raise ConfigError(
                f"select: format (--format) must be one of {', '.join(FORMATS)}, got {format!r}"
            )
        if format == "llamafactory":
            llamafactory_entries(out)  # an unreadable index must fail before the scoring, not after
    run = Run.prepare(config, show_progress=show_progress)
    pool, progress, step = run.pairs, 0.0, 0
    if interval is not None:
        pool = _pool_of("select", run, interval)
        progress = run.timeline.plan.progress[interval]
        step = run.timeline.first_step[interval]
    if policy_logps is None:
        model = run.load_policy(policy)
        reference = run.open_reference(model if policy is None else None)
        selection = run.selector(reference, keep=keep).select(model, pool, step, progress=progress)
    else:
        logps = read_reference(policy_logps, pool, chosen=CHOSEN, rejected=REJECTED)
        # with the reference in the same table, no weights have to be loaded
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
        str(data.path),
        mapped=frozenset((data.columns or {}).values()),
        split=data.split,
        subset=data.subset,
        revision=data.revision,
    )
    # records are looked up in the source, since the dataset keeps tokens, not records
    written = run.dataset.take(order)
    rows = written.column("source_row").to_numpy()
    write_pairs(
        out,
        records,
        rows,
        format=format,
        columns=data.columns,
        ids=written.ids.tolist(),
        chat_template_kwargs=data.chat_template_kwargs or None,
    )
    _write_table(decisions(selection, run.dataset), decisions_path(out))


def _write_table(table: pl.DataFrame, path: Path) -> None:
    # opened here: polars expands "*" and "~" in a path, and leaves half a file on a full disk
    with written_whole(path, checked=True) as partial, partial.open("wb") as file:
        table.write_parquet(file) if path.suffix == ".parquet" else table.write_csv(file)


def decisions_path(out: Path) -> Path:
    """Return the path of the table of candidates that `select` writes beside its dataset."""
    return out.with_suffix(".selection.parquet")


@dataclass(frozen=True)
class TrainingResult:
    """Result of `train`.

    Attributes:
        folder: The run folder.
        history: Records of all steps and evaluations, and their costs.
        first: Metrics of the first evaluation, or of the first step if nothing was held out.
        last: Metrics of the last evaluation, or of the last step if nothing was held out.
        best: Evaluation of the best weights; None if nothing was held out.
        cost: Forecast and actual work of each phase, and the break-even keep ratio.
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

    Runs on one device, or under torchrun on several, where every process makes this call
    (`training.strategy` shards or replicates the policy) and ends its program with `leave()`. The
    run folder receives the configuration, metrics, evaluations, the selection log, checkpoints, the
    best weights and the trained model.

    Args:
        config: The run's configuration.
        resume: Resume from the newest checkpoint in the run folder; start a new run if it has none.
        show_progress: False to hide progress bars.
        say: Receives the plan and the starting point before the first step, on rank 0 only.

    Returns:
        The run folder, with the history, metrics and cost of the run.

    Raises:
        FileExistsError: If the folder already has a run and resume is False, or another process is
            training there.
        ConfigError: If the run in the folder has different settings.

    Example:
        >>> result = train(SageConfig.read("run.yaml"))  # doctest: +SKIP
        >>> result.last["accuracy"], result.folder.best_model  # doctest: +SKIP
    """
    join(device_named(config.model.device).type)
    processes = Processes.all()
    first = processes.rank == 0  # the only rank that prints and writes
    run = Run.prepare(config, show_progress=show_progress if first else False)
    training = run.training  # a loss that cannot be imported must fail before hours of measuring
    folder = RunFolder(config.run_folder)
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"folder: {folder.path} is a file; give the name of a folder")
    with folder.hold():
        if first:
            _write_config(config, folder, resume)
            if say is not None:
                say(f"{run.dataset.waterfall()}\n{run.timeline.plan}")
                say(f"{run.timeline.total_steps:,} steps, {_starting_point(folder)}")
        processes.barrier()  # no rank starts before rank 0 has written the configuration
        return _train(run, training, folder, resume)


def _train(run: Run, training: Training, folder: RunFolder, resume: bool) -> TrainingResult:
    config, processes = run.config, Processes.all()
    # for dropout, and for weights that the checkpoint lacks and the model initialises
    torch.manual_seed(config.seed)
    model = run.load_policy()
    with Ledger() as spent:
        reference = run.open_reference(model)
    spent = side_by_side(processes.all_gather_object(spent))
    if processes.rank == 0:  # fit appends the costs of its own phases
        append_costs(folder.costs, spent)
    # only after the reference was measured on the policy as it was loaded
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
    _save_with_tokenizer(model, run.tokenizer, folder.model)
    best = None
    if history.evaluations:
        try:
            best = load_best(model, folder.path)  # overwrites the last weights, saved by now
        except (SpoiledFile, FileNotFoundError) as error:
            warn(f"train: {error}; {folder.best_model} is not written", stacklevel=3)
        else:
            _save_with_tokenizer(model, run.tokenizer, folder.best_model)
    records = history.evaluations or history.steps
    cost = compared(cost_of(run), history.costs)
    return TrainingResult(folder, history, records[0], records[-1], best, cost)


def fill(config: SageConfig, *, show_progress: bool | None = None) -> dict[str, Any]:
    """Measure the reference of a run into the store, before the run; resumes if it was killed.

    Args:
        config: The run's configuration.
        show_progress: False to hide progress bars.

    Returns:
        `identity` and `folder` of the reference in the store, `pairs` in it for this run, and
        `sequences_measured` by this call.

    Raises:
        ConfigError: If the reference is a file.

    Example:
        >>> jobs.fill(SageConfig.read("run.yaml"))["sequences_measured"]  # doctest: +SKIP
    """
    if config.reference.file is not None:
        raise ConfigError(
            "fill: reference.file is set, so there is nothing to measure; unset it to measure a "
            "model"
        )
    run = Run.prepare(config, show_progress=show_progress)
    store = run.store(run.load_reference())
    num_measured = store.fill()
    return {
        "identity": store.identity,
        "folder": str(store.folder),
        "pairs": len(store),
        "sequences_measured": num_measured,
    }


def flips(run: str | Path, other: str | Path) -> pl.DataFrame:
    """Compare which pairs two runs kept, interval by interval.

    Args:
        run: Folder of a run.
        other: Folder of another run with the same plan.

    Returns:
        One row per interval that both runs have, see `flips_of_logs`.

    Raises:
        FileNotFoundError: If a folder has no selection log.

    Example:
        >>> jobs.flips("runs/one", "runs/two")["flipped"].sum()  # doctest: +SKIP
    """
    logs = []
    for folder in map(RunFolder, (run, other)):
        if not folder.selection.is_dir():
            raise FileNotFoundError(
                f"flips: there is no selection log in {folder.path}; give the folder of a run"
            )
        logs.append(SelectionLog(folder.selection))
    return flips_of_logs(*logs)


def _pool_of(job: str, run: Run, interval: int) -> PreferenceDataset:
    pools = run.timeline.plan.pools
    if not 0 <= interval < len(pools):
        raise ConfigError(
            f"{job}: interval (--interval) {interval}: the plan has intervals 0 to {len(pools) - 1}"
        )
    return run.dataset.take(pools[interval])


def _checked_output(job: str, path: str | Path, extensions: tuple[str, ...]) -> Path:
    """Return the path of a file to write, after checking that it can be written.

    The check comes before the scoring, which may take hours.
    """
    out = user_path(path)
    if out.suffix not in extensions:
        raise ConfigError(
            f"{job}: out (--out) {out}: the file name must end in {', '.join(extensions)}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"{job}: out (--out) {out}: cannot be written: {error.strerror}") from None
    return out


def _save_with_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer in a folder that other programs and users can read."""
    partial = partial_path(folder)
    try:
        with named_on_failure(folder):
            save_pretrained(model, partial)  # collective: every rank has a shard
            if Processes.all().rank != 0:
                return
            tokenizer.save_pretrained(partial)
            mask = os.umask(0)  # the umask can only be read by setting it
            os.umask(mask)
            folder.mkdir(exist_ok=True)
            for file in partial.iterdir():  # some are created with permissions for the owner only
                file.chmod(0o666 & ~mask)
                # one by one: other files in the folder are the user's, such as a converted model
                replace_durably(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _starting_point(folder: RunFolder) -> str:
    for newest in folder.checkpoints()[:1]:
        return f"resuming from step {checkpoint_step(newest)}, in {folder.path}"
    return f"from the start, in {folder.path}"


def _write_config(config: SageConfig, folder: RunFolder, resume: bool) -> None:
    """Write the configuration into the run folder; if it has one, refuse a different one.

    A damaged one is named and replaced by the given configuration: what the run was trained with
    is in its checkpoints too, and they refuse other settings.
    """
    text = config.to_yaml()
    if folder.config.exists():
        if not resume:
            raise FileExistsError(
                f"train: {folder.path} already has a run; pass resume=True (--resume) to resume "
                "it, or set another folder"
            )
        try:
            # as it was saved: environment variables of this process do not belong to that run
            check_content(folder.config)
            earlier = SageConfig.read(folder.config, environment={})
        except (OSError, ValueError) as error:
            reason = str(error).removeprefix(f"{folder.config} is spoiled: ")
            warn(
                f"train: {folder.config} cannot be used and is written again from the given "
                f"configuration: {reason}",
                stacklevel=3,
            )
        else:
            if differences := earlier.differences(config):
                raise ConfigError(
                    f"train: {folder.path} was started with different settings: "
                    f"{', '.join(differences)}; to resume it, set them as they were; otherwise set "
                    "another folder"
                )
            if folder.config.read_text(encoding="utf-8") == text:
                return
    with written_whole(folder.config, checked=True) as partial:
        partial.write_text(text, encoding="utf-8")

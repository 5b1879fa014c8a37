"""Trains in child processes and kills them with SIGKILL; prints what each run ended with.

Forking after the imports makes a trial cost a second, not ten. It is a script of its own, since a
process that has used several threads must not fork: what starts threads (polars, the tokenizer) is
left to the children.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
from worlds import arithmetic_pairs, arithmetic_world

from sage_select import SelectionLog, SelectiveLoader
from sage_select.adapters.plain import Training, train
from sage_select.models import measuring


def run(folder: Path) -> None:
    """One run of SAGE, from the start or from the newest checkpoint."""
    world = arithmetic_world(num_pairs=64, refresh_steps=4)
    loader = SelectiveLoader(
        world.selector,
        world.timeline,
        world.dataset,
        world.model,
        log=SelectionLog(folder / "selection"),
    )
    train(
        world.model,
        loader,
        world.dataset,
        world.selector.reference,
        Training(learning_rate=1e-3, checkpoint_every=2, evaluate_every=3),
        held_out=world.dataset.take(range(8)),
        folder=folder,
        resume=True,
    )
    weights, log = world.model.state_dict(), SelectionLog(folder / "selection").read()
    left_behind = {
        "weights": b"".join(weights[name].numpy().tobytes() for name in sorted(weights)),
        "kept": json.dumps(log.select("interval", "pair_id", "kept", "score").rows()).encode(),
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "evaluations": (folder / "evaluations.jsonl").read_bytes(),
    }
    digests = {name: hashlib.sha256(value).hexdigest() for name, value in left_behind.items()}
    (folder / "outcome.json").write_text(json.dumps(digests))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_torch_save(nth: int) -> None:
    real, calls = torch.save, iter(range(1000))

    def save(state: object, path: Path) -> None:
        real(state, path)
        if isinstance(path, Path) and next(calls) == nth:  # checkpoints are made of others, too
            os.truncate(path, path.stat().st_size // 2)
            die()

    torch.save = save


def die_in_write_parquet(nth: int) -> None:
    real, calls = pl.DataFrame.write_parquet, iter(range(1000))

    def write(table: pl.DataFrame, path: Path) -> None:
        real(table, path)
        if next(calls) == nth:
            os.truncate(path, path.stat().st_size // 2)
            die()

    pl.DataFrame.write_parquet = write  # type: ignore[method-assign, assignment]


def die_while_scoring(nth: int) -> None:
    real, calls = measuring.forward_logps, iter(range(1000))

    def score(*args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled() and next(calls) == nth:
            die()
        return real(*args, **kwargs)  # type: ignore[arg-type]

    measuring.forward_logps = score  # type: ignore[assignment]


PLACES: dict[str, Callable[[int], None]] = {
    "checkpoint write": die_in_torch_save,
    "log write": die_in_write_parquet,
    "scoring": die_while_scoring,
}


def child(folder: Path, prepare: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            prepare()
            run(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def was_killed(pid: int) -> bool:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return False


def outcome(folder: Path) -> dict[str, str]:
    """Digests of all that a run left behind."""
    digests: dict[str, str] = json.loads((folder / "outcome.json").read_text())
    return digests


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random-trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    arithmetic_pairs()  # made once, before the first fork
    trials: list[tuple[str, list[Callable[[], None] | float]]] = []
    for place, prepare in PLACES.items():
        # a forward pass each: reference, evaluation, evaluation, pool, evaluation, pool, ...
        for nth in (3, 5, 7) if place == "scoring" else (0, 1, 3):
            trials.append((f"{place} {nth}", [lambda p=prepare, n=nth: p(n)]))  # type: ignore[misc]
    start = time.monotonic()
    assert not was_killed(child(args.folder / "whole", lambda: None))
    duration = time.monotonic() - start
    for i in range(args.random_trials):
        delays = [draw.uniform(0, duration) for _ in range(draw.randint(1, 4))]
        trials.append((f"random {i}", list(delays)))

    results = [{"trial": "never killed", "kills": 0, **outcome(args.folder / "whole")}]
    for name, deaths in trials:
        folder, kills = args.folder / name.replace(" ", "-"), 0
        for death in deaths:
            if isinstance(death, float):
                pid = child(folder, lambda: None)
                time.sleep(death)
                os.kill(pid, signal.SIGKILL)
            else:
                pid = child(folder, death)
            kills += was_killed(pid)
        assert not was_killed(child(folder, lambda: None))
        results.append({"trial": name, "kills": kills, **outcome(folder)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()

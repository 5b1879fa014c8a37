"""Train in child processes, kill them with SIGKILL, and print digests of each run's results.

Forking after the imports reduces the cost of a trial from ten seconds to one. This is a separate
script because a process with several threads must not fork: only the children use libraries that
start threads (polars, the tokenizer).
"""

import argparse
import hashlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from worlds import arithmetic_pairs, arithmetic_world

from sage_select import SelectionLog, SelectiveLoader
from sage_select.adapters.plain import Training, train
from sage_select.models import measuring
from sage_select.selecting import log
from sage_select.training import checkpoints


def run(folder: Path) -> None:
    """Run SAGE to its end, from the start or from the newest checkpoint."""
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
    weights, table = world.model.state_dict(), SelectionLog(folder / "selection").read()
    results = {
        "weights": b"".join(weights[name].numpy().tobytes() for name in sorted(weights)),
        "kept": json.dumps(table.select("interval", "pair_id", "kept", "score").rows()).encode(),
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "evaluations": (folder / "evaluations.jsonl").read_bytes(),
    }
    digests = {name: hashlib.sha256(value).hexdigest() for name, value in results.items()}
    (folder / "outcome.json").write_text(json.dumps(digests))


def die() -> None:
    """Kill this process; nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_checkpoint(nth: int) -> None:
    """Make the n-th write of a checkpoint leave half a file and die."""
    real, calls = checkpoints.save, iter(range(1000))

    def save(state: object, path: Path) -> None:
        real(state, path)
        if next(calls) == nth:
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoints.save = save


def die_in_log(nth: int) -> None:
    """Make the n-th write of the selection log leave half a file and die."""
    real, calls = log.written_whole, iter(range(1000))

    @contextmanager
    def written(path: Path, **options: bool) -> Iterator[Path]:
        with real(path, **options) as partial:
            yield partial
            if next(calls) == nth:
                os.truncate(partial, partial.stat().st_size // 2)
                die()

    log.written_whole = written


def die_while_scoring(nth: int) -> None:
    """Die at the n-th forward pass without gradients."""
    real, calls = measuring.forward_logps, iter(range(1000))

    def score(*args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled() and next(calls) == nth:
            die()
        return real(*args, **kwargs)  # type: ignore[arg-type]

    measuring.forward_logps = score  # type: ignore[assignment]


PLACES: dict[str, Callable[[int], None]] = {
    "checkpoint write": die_in_checkpoint,
    "log write": die_in_log,
    "scoring": die_while_scoring,
}


def child(folder: Path, prepare: Callable[[], None]) -> int:
    """Fork a child that prepares its death and trains; return its process id."""
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
            os._exit(status)  # not sys.exit: the child must not run the parent's cleanup
    return pid


def was_killed(pid: int) -> bool:
    """Wait for a child, and return whether it was killed; an error of its own fails the script."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return False


def outcome(folder: Path) -> dict[str, str]:
    """Return the digests of a run's results."""
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
    arithmetic_pairs()  # cached before the first fork, so that all children share them
    trials: list[tuple[str, list[Callable[[], None] | float]]] = []
    for place, prepare in PLACES.items():
        # forward passes in order: reference, evaluation, evaluation, pool, evaluation, pool, ...
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
        assert not was_killed(child(folder, lambda: None))  # the last try runs to the end
        results.append({"trial": name, "kills": kills, **outcome(folder)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Train the contract's runs on one host: import it once, then fork the processes of each attempt.

Importing a framework takes longer than a run. This is a separate script, since a process that has
used several threads must not fork.
"""

import argparse
import importlib
import json
import os
import shutil
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from contract import Case

TIMEOUT = 120.0  # seconds for the processes of one attempt


def child(host: str, case: Case, port: int) -> int:
    """Fork a process that trains the case, and return its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        output = case.folder / f"output-{case.attempt}-{case.rank}.txt"
        out = os.open(output, os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if case.world > 1:
            names = {
                "RANK": case.rank,
                "LOCAL_RANK": case.rank,
                "WORLD_SIZE": case.world,
                "LOCAL_WORLD_SIZE": case.world,
                "GROUP_RANK": 0,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "contract",
            }
            os.environ |= {name: str(value) for name, value in names.items()}
        importlib.import_module(host).run(case)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # skips the parent's exit handlers, which the fork has inherited


def attempt(host: str, folder: Path, strategy: str, world: int, **options: Any) -> list[int]:
    """Run one attempt and return all exit codes; if one process fails, kill the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {}
    for rank in range(world):
        case = Case(folder, strategy, rank, world, **options)
        running[child(host, case, port)] = rank
    codes = [0] * world
    deadline = time.monotonic() + TIMEOUT
    while running:
        for pid, rank in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                codes[rank] = os.waitstatus_to_exitcode(status)
        if any(codes) or time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, 9)
        time.sleep(0.02)
    return codes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", help="a JSON list of {name, attempts}")
    args = parser.parse_args()
    importlib.import_module(args.host)
    report = {}
    for run in json.loads(args.runs):
        folder = args.folder / run["name"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        codes = [
            attempt(args.host, folder, **{"attempt": n, **options})
            for n, options in enumerate(run["attempts"])
        ]
        report[run["name"]] = codes
    (args.folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()

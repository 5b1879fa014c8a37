"""Doctor: what would stop or spoil an overnight run, looked for beforehand."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sage_select.cache import cache_folder
from sage_select.config import ConfigError, SageConfig
from sage_select.forecast import num_parameters
from sage_select.runs import (
    DTYPES,
    device_of,
    load_tokenizer,
    model_settings,
    prepare,
    score_of,
    training_of,
)

PACKAGES = ("sage-select", "torch", "transformers", "numpy", "polars", "pyarrow", "pydantic")
OPTIONAL = ("datasets", "peft", "accelerate", "lightning", "trl", "triton")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: What.
        verdict: "ok", "warn" (it will run, but look at it) or "fail" (it will not).
        said: What was found, and what to do about it.
    """

    about: str
    verdict: Literal["ok", "warn", "fail"]
    said: str


def examine(config: SageConfig | None, *, show_progress: bool | None = None) -> Iterator[Finding]:
    """Look at the installation and the devices; with a configuration, at all that its run needs."""
    yield from _installation()
    yield from _devices()
    yield from _checked("cache", lambda: _room(cache_folder()))
    if config is None:
        return
    yield Finding("configuration", "ok", f"hash {config.hash}, run folder {config.run_folder}")
    yield from _checked("functions", lambda: _functions(config))
    yield from _checked("device", lambda: _device(config))
    yield from _checked("tokenizer", lambda: _tokenizer(config))
    yield from _checked("model", lambda: _model(config))
    yield from _checked("data and plan", lambda: _data(config, show_progress))
    yield from _checked("run folder", lambda: _run_folder(config))


def _checked(about: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except (ConfigError, OSError, ValueError, TypeError, ImportError) as error:
        yield Finding(about, "fail", str(error))


def _installation() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        yield Finding(name, "ok", importlib.metadata.version(name))
    for name in OPTIONAL:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "ok", "not installed (optional)")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        cores = os.cpu_count()
        yield Finding("devices", "warn", f"no CUDA device; everything runs on {cores} CPU cores")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        verdict: Literal["ok", "warn"] = "ok" if free > 0.9 * total else "warn"
        yield Finding(f"cuda:{number}", verdict, f"{name}, {_size(free)} of {_size(total)} free")


def _room(folder: Path) -> Iterator[Finding]:
    """Whether files can be written there, and how much room is left."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"written")
    free = shutil.disk_usage(folder).free
    verdict: Literal["ok", "warn"] = "ok" if free > 10e9 else "warn"
    yield Finding("cache", verdict, f"{folder}, {_size(free)} free")


def _functions(config: SageConfig) -> Iterator[Finding]:
    score_of(config)
    training_of(config)
    yield Finding("functions", "ok", f"{config.selection.score}, {config.training.loss}")


def _device(config: SageConfig) -> Iterator[Finding]:
    device = device_of(config.model.device)
    wants_bf16 = config.training.mixed_precision == "bfloat16"
    if wants_bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        yield Finding("device", "fail", f"{device} has no bfloat16; mixed_precision: none")
        return
    yield Finding("device", "ok", str(device))


def _tokenizer(config: SageConfig) -> Iterator[Finding]:
    tokenizer = load_tokenizer(config)
    if tokenizer.eos_token is None:
        yield Finding(
            "tokenizer", "warn", "no end token: pairs of plain text will be refused (not chats)"
        )
    template = "with" if tokenizer.chat_template else "without"
    yield Finding("tokenizer", "ok", f"{len(tokenizer):,} tokens, {template} a chat template")


def _model(config: SageConfig) -> Iterator[Finding]:
    settings = model_settings(config).get_text_config()
    parameters = num_parameters(config) or 0
    yield Finding("model", "ok", f"{config.model.name}, {parameters:,} parameters")
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        yield Finding(
            "model",
            "warn",
            f"data.max_length {config.data.max_length:,} is more than the model's {positions:,} "
            "positions; longer pairs will be scored where the model was never trained",
        )
    dtype = DTYPES.get(config.model.dtype, getattr(settings, "dtype", None) or torch.float32)
    if dtype == torch.float16:
        yield Finding(
            "model", "fail", "weights in float16 overflow in training; model.dtype: float32"
        )
    elif dtype == torch.bfloat16 and config.training.learning_rate < 1e-5:
        yield Finding(
            "model",
            "warn",
            f"a learning rate of {config.training.learning_rate:g} rounds to no change in bfloat16 "
            "weights; model.dtype: float32 with training.mixed_precision: bfloat16",
        )
    # weights, gradients and Adam's two moments
    needed = 4 * parameters * dtype.itemsize
    device = device_of(config.model.device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _free_memory()
    if needed > free:
        yield Finding(
            "memory",
            "fail",
            f"weights, gradients and optimizer take {_size(needed)} before any activation; "
            f"{device} has {_size(free)} free",
        )
    else:
        yield Finding(
            "memory", "ok", f"{_size(needed)} of {_size(free)} before any activation, on {device}"
        )


def _data(config: SageConfig, show_progress: bool | None) -> Iterator[Finding]:
    run = prepare(config, show_progress=show_progress)
    aside, read = run.dataset.set_aside.height, len(run.dataset) + run.dataset.set_aside.height
    cut = int(run.dataset.column("truncated").sum())
    verdict: Literal["ok", "warn"] = "warn" if aside + cut > 0.1 * read else "ok"
    yield Finding(
        "data",
        verdict,
        f"{read:,} rows, {aside:,} set aside, {cut:,} of {len(run.dataset):,} pairs cut at "
        f"{config.data.max_length:,} tokens",
    )
    plan, steps = run.timeline.plan, run.timeline.total_steps
    yield Finding("plan", "ok", f"{plan}, {steps:,} steps")
    if run.held_out is None:
        yield Finding("evaluation", "warn", "none: data.held_out is 0, so best weights are unknown")


def _run_folder(config: SageConfig) -> Iterator[Finding]:
    folder = config.run_folder
    if (folder / "metrics.jsonl").exists():
        yield Finding("run folder", "warn", f"{folder} holds a run; go on with train --resume")
        return
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("run folder", "fail", f"{existing} cannot be written")
        return
    parameters = num_parameters(config) or 0
    # a checkpoint has weights and two moments; best weights and the final model stand beside them
    needed = 4 * parameters * (3 * (config.training.keep_checkpoints + 1) + 2)
    free = shutil.disk_usage(existing).free
    verdict: Literal["ok", "fail"] = "ok" if needed < free else "fail"
    yield Finding(
        "run folder", verdict, f"{folder}, about {_size(needed)} needed, {_size(free)} free"
    )


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system
        return 1 << 62


def _size(num_bytes: float) -> str:
    """Bytes for people.

    Example:
        >>> _size(1.5e9)
        '1.5 GB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def as_records(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values."""
    return [{"about": f.about, "verdict": f.verdict, "said": f.said} for f in findings]

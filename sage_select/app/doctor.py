"""Doctor: check for anything that would stop or spoil a long run, before it starts."""

import importlib.metadata
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import numpy as np
import torch

from sage_select.app.config import SageConfig
from sage_select.app.forecast import num_parameters
from sage_select.app.loading import (
    DTYPES,
    device_named,
    load_loss,
    load_score,
    load_tokenizer,
    policy_config,
    reference_config,
)
from sage_select.app.run import Run
from sage_select.pairs import PairLogps
from sage_select.references.eviction import default_store
from sage_select.references.logp_tables import read_reference
from sage_select.system.files import cache_folder, user_path
from sage_select.system.processes import Processes
from sage_select.system.settings import ConfigError
from sage_select.training.micro_batches import dealt
from sage_select.training.run_folder import RunFolder
from sage_select.training.sharding import checkpoint_activations
from sage_select.training.update import add_gradients

PACKAGES = ("sage-select", "torch", "transformers", "numpy", "polars", "pyarrow", "pydantic")
OPTIONAL = ("datasets", "peft", "accelerate", "lightning", "trl", "triton")


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        about: Subject of the check, such as "model".
        verdict: "ok", "warn" (the run will work, but have a look) or "fail" (it will not).
        message: The observation, and the remedy if one is needed.
    """

    about: str
    verdict: Literal["ok", "warn", "fail"]
    message: str


def examine(
    config: SageConfig | None, *, thorough: bool = False, show_progress: bool | None = None
) -> Iterator[Finding]:
    """Check the installation and the devices, and everything that a run needs.

    Args:
        config: The run's configuration; without it, only installation and devices are checked.
        thorough: Also load the models and try the largest batch, without an update.
        show_progress: False to hide progress bars.

    Yields:
        Findings, as the checks finish.
    """
    yield from _installation()
    yield from _devices()
    yield from _findings("cache", lambda: _disk_space(cache_folder()))
    if config is None:
        return
    yield Finding("configuration", "ok", f"hash {config.hash}, run folder {config.run_folder}")
    yield from _findings("functions", lambda: _functions(config))
    yield from _findings("device", lambda: _device(config))
    loaded = _Loaded()
    yield from _findings("tokenizer", lambda: _tokenizer(config, loaded))
    yield from _findings("model", lambda: _model(config, loaded))
    yield from _findings("data and plan", lambda: _data(config, loaded, show_progress))
    yield from _findings("reference", lambda: _reference_findings(config, loaded))
    yield from _findings("run folder", lambda: _run_folder(config))
    if thorough and loaded.run is not None:
        run = loaded.run
        yield from _findings("largest batch", lambda: _largest_batch(run))


@dataclass
class _Loaded:
    """Objects that a check has loaded and later checks use."""

    tokenizer: Any = None
    run: Run | None = None


def _findings(about: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run a check; an error becomes a finding, so that the other checks still run."""
    try:
        yield from check()
    except (ConfigError, OSError, ValueError, TypeError, ImportError) as error:
        yield Finding(about, "fail", str(error))
    except (RuntimeError, ArithmeticError) as error:  # out of memory, or a value is not finite
        # torch may append a C++ stack trace after the first line
        yield Finding(about, "fail", str(error).splitlines()[0])


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


def _disk_space(folder: Path, about: str = "cache") -> Iterator[Finding]:
    """Check that files can be written in a folder, and report its free space."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"written")
    free = shutil.disk_usage(folder).free
    verdict: Literal["ok", "warn"] = "ok" if free > 10e9 else "warn"
    yield Finding(about, verdict, f"{folder}, {_size(free)} free")


def _functions(config: SageConfig) -> Iterator[Finding]:
    # two made-up pairs show a wrong signature or shape in a moment, without data or model
    logps, num_tokens = torch.tensor([-10.0, -20.0]), torch.tensor([10, 20])
    pairs = PairLogps(torch.arange(2), logps, logps - 1, num_tokens, num_tokens)
    for name, function in (
        (config.selection.score, load_score(config)),
        (config.training.loss, partial(load_loss(config), beta=config.beta)),
    ):
        try:
            shape = torch.as_tensor(function(pairs, pairs)).shape
        except Exception as error:  # a custom function may raise anything
            yield Finding("functions", "fail", f"{name}(policy, reference) fails: {error}")
            return
        if shape != (2,):
            yield Finding(
                "functions",
                "fail",
                f"{name} returned shape {list(shape)} for two pairs; return one value per pair, "
                "shape [2]",
            )
            return
    yield Finding("functions", "ok", f"{config.selection.score}, {config.training.loss}")
    if config.training.learning_rate > 1e-2:
        rate = config.training.learning_rate
        yield Finding("functions", "warn", f"a learning rate of {rate:g} is far too high to train")


def _device(config: SageConfig) -> Iterator[Finding]:
    device = device_named(config.model.device)
    wants_bf16 = config.training.mixed_precision == "bfloat16"
    if wants_bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        yield Finding(
            "device",
            "fail",
            f"{device} does not support bfloat16; set training.mixed_precision: none",
        )
        return
    yield Finding("device", "ok", str(device))


def _tokenizer(config: SageConfig, loaded: _Loaded) -> Iterator[Finding]:
    tokenizer = loaded.tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token is None:
        yield Finding(
            "tokenizer",
            "warn",
            "no end token: pairs of plain text will be refused (conversations are not affected); "
            "set model.eos_token",
        )
    template = "with" if tokenizer.chat_template else "without"
    yield Finding("tokenizer", "ok", f"{len(tokenizer):,} tokens, {template} a chat template")


def _model(config: SageConfig, loaded: _Loaded) -> Iterator[Finding]:
    settings = policy_config(config.model).get_text_config()
    parameters = num_parameters(config) or 0
    yield Finding("model", "ok", f"{config.model.name}, {parameters:,} parameters")
    yield from _weight_findings(config.model.name)
    tokens, vocabulary = len(loaded.tokenizer or ()), settings.vocab_size
    if tokens > vocabulary:
        yield Finding(
            "model",
            "fail",
            f"the tokenizer has {tokens:,} tokens but the model {vocabulary:,}; they do not match: "
            "set model.tokenizer to the model's tokenizer",
        )
    if config.model.attention == "flash_attention_2" and not find_spec("flash_attn"):
        yield Finding(
            "model",
            "fail",
            "model.attention: flash_attn is not installed; install it, or set "
            "model.attention: sdpa",
        )
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        yield Finding(
            "model",
            "warn",
            f"data.max_length {config.data.max_length:,} is more than the model's {positions:,} "
            "positions; longer pairs will be scored where the model was not trained",
        )
    dtype = DTYPES.get(config.model.dtype, getattr(settings, "dtype", None) or torch.float32)
    if dtype == torch.float16:
        yield Finding(
            "model", "fail", "float16 weights overflow in training; set model.dtype: float32"
        )
    elif dtype == torch.bfloat16 and config.training.learning_rate < 1e-5:
        yield Finding(
            "model",
            "warn",
            f"a learning rate of {config.training.learning_rate:g} rounds to no change in bfloat16 "
            "weights; set model.dtype: float32 and training.mixed_precision: bfloat16",
        )
    # four tensors per weight: the weight, its gradient and Adam's two moments
    needed = 4 * parameters * dtype.itemsize
    device = device_named(config.model.device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _free_memory()
    if needed > free:
        yield Finding(
            "memory",
            "fail",
            f"weights, gradients and optimizer take {_size(needed)}, without activations; {device} "
            f"has {_size(free)} free",
        )
    else:
        yield Finding(
            "memory", "ok", f"{_size(needed)} of {_size(free)} without activations, on {device}"
        )


def _weight_findings(name: str | None) -> Iterator[Finding]:
    """Report a local model folder without weights; hub models are not looked up."""
    folder = user_path(name or "")
    patterns = ("*.safetensors", "*.bin")
    if folder.is_dir() and not any(file for pattern in patterns for file in folder.glob(pattern)):
        yield Finding("model", "fail", f"{folder} has no weights ({', '.join(patterns)})")


def _reference_findings(config: SageConfig, loaded: _Loaded) -> Iterator[Finding]:
    reference = config.reference
    if reference.file is not None:
        if loaded.run is not None:
            read_reference(reference.file, loaded.run.used, key=reference.key)
        yield Finding("reference", "ok", f"{reference.file} has every pair")
        return
    if reference.device is not None:
        device_named(reference.device, "reference.device")
    if reference.model is not None:
        vocabulary = reference_config(reference).get_text_config().vocab_size
        tokens = len(loaded.tokenizer or ())
        if tokens > vocabulary:
            yield Finding(
                "reference",
                "fail",
                f"the tokenizer has {tokens:,} tokens but {reference.model} {vocabulary:,}; they "
                "do not match: use a reference with the policy's tokenizer",
            )
        yield from _weight_findings(reference.model)
    store = user_path(reference.store) if reference.store is not None else default_store()
    yield from _disk_space(store, "reference")


def _largest_batch(run: Run) -> Iterator[Finding]:
    """Measure the longest pairs under policy and reference, and compute their gradients."""
    training, reference = run.training, run.config.reference
    lengths = run.used.num_tokens
    size = training.micro_batch_size or run.config.training.batch_size
    longest = run.used.take(run.used.index[np.argsort(-lengths, kind="stable")[:size]])
    policy = run.load_policy()
    if reference.file is None:
        logps = run.reader(run.load_reference(), longest)
    else:
        logps = read_reference(reference.file, longest, key=reference.key)
    run.reader(policy, longest)
    # only now: the scoring pass runs without gradients, so it needs no activation checkpointing
    if training.activation_checkpointing:
        checkpoint_activations(policy)
    (micro,) = dealt(longest.index, Processes(), len(longest))
    _, losses = add_gradients(policy.train(), longest, logps, training, micro)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    verdict: Literal["ok", "fail"] = "ok" if math.isfinite(norm) else "fail"
    yield Finding(
        "largest batch",
        verdict,
        f"{len(longest)} pairs of up to {int(lengths.max()):,} tokens: loss "
        f"{losses.mean().item():.4g}, gradient norm {norm:.4g}; optimizer memory not included",
    )


def _data(config: SageConfig, loaded: _Loaded, show_progress: bool | None) -> Iterator[Finding]:
    run = Run.prepare(config, tokenizer=loaded.tokenizer, show_progress=show_progress)
    loaded.run = run
    set_aside = run.dataset.set_aside.height
    rows_read = len(run.dataset) + set_aside
    truncated = int(run.dataset.column("truncated").sum())
    verdict: Literal["ok", "warn"] = "warn" if set_aside + truncated > 0.1 * rows_read else "ok"
    yield Finding(
        "data",
        verdict,
        f"{rows_read:,} rows, {set_aside:,} set aside, {truncated:,} of {len(run.dataset):,} pairs "
        f"cut at {config.data.max_length:,} tokens",
    )
    with catch_warnings(record=True) as warned:
        simplefilter("always")  # also a warning that was already shown in this process
        plan, steps = run.timeline.plan, run.timeline.total_steps
    for warning in warned:
        yield Finding("plan", "warn", str(warning.message))
    yield Finding("plan", "ok", f"{plan}, {steps:,} steps")
    if run.held_out is None:
        yield Finding(
            "evaluation", "warn", "none: data.held_out is 0, so no best weights will be saved"
        )


def _run_folder(config: SageConfig) -> Iterator[Finding]:
    folder = config.run_folder
    if folder.exists() and not folder.is_dir():
        yield Finding("run folder", "fail", f"{folder} is a file; give the name of a folder")
        return
    if RunFolder(folder).holds_a_run():
        yield Finding(
            "run folder",
            "warn",
            f"{folder} already has a run; resume it with resume=True (train --resume), or set "
            "another folder",
        )
        return
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(existing, os.W_OK):
        yield Finding(
            "run folder", "fail", f"{folder}: {existing} is not writable; set another folder"
        )
        return
    parameters = num_parameters(config) or 0
    # 4 bytes per weight; a checkpoint has the weights and two moments, and one more is written
    # before the oldest is deleted; then come the best weights and the two saved models
    needed = 4 * parameters * (3 * (config.training.keep_checkpoints + 1) + 3)
    free = shutil.disk_usage(existing).free
    verdict: Literal["ok", "fail"] = "ok" if needed < free else "fail"
    yield Finding(
        "run folder", verdict, f"{folder}, about {_size(needed)} needed, {_size(free)} free"
    )


def _free_memory() -> int:
    """Return the free main memory in bytes, or more than any model needs if it is unknown."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # this system does not report it
        return 1 << 62


def _size(num_bytes: float) -> str:
    """Format a number of bytes with a unit.

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
    """Return findings as plain values."""
    return [{"about": f.about, "verdict": f.verdict, "message": f.message} for f in findings]

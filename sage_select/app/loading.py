"""Load the tokenizers, models, devices and functions that a configuration names."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sage_select.app.config import SageConfig
from sage_select.app.sections import ModelSection, ReferenceSection
from sage_select.losses import LOSSES
from sage_select.pairs import Score
from sage_select.scores import SCORES
from sage_select.system.files import user_path
from sage_select.system.settings import ConfigError

CUSTOM_SCORE_SETTINGS = ("beta", "eps", "length_norm", "seed")
"""The settings that a score of the user's own gets, if it has parameters of these names."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {None: "none"}
"""Name of each dtype in a configuration; None means no mixed precision."""


def load_tokenizer(model: ModelSection) -> Any:
    """Load the tokenizer and set the configured chat template and end token."""
    name = model.tokenizer or required(model.name, "model.name")
    setting = "model.name" if model.tokenizer is None else "model.tokenizer"
    revision = model.revision if model.tokenizer is None else None
    tokenizer = _from_pretrained(AutoTokenizer, name, setting, revision=revision)
    # from a folder without a tokenizer, transformers may return one with special tokens only
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FileNotFoundError(
            f"{setting}: there is no tokenizer in {name!r}; set model.tokenizer to where it is"
        )
    if model.eos_token is not None:
        token = tokenizer.convert_tokens_to_ids(model.eos_token)
        if token in (None, tokenizer.unk_token_id):
            raise ConfigError(
                f"model.eos_token: {model.eos_token!r} is not a token of {name!r}; give a token of "
                "its vocabulary"
            )
        tokenizer.eos_token = model.eos_token
    if model.chat_template is not None:
        file = user_path(model.chat_template)
        if not file.is_file():
            raise ConfigError(f"model.chat_template: there is no file {file}")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def load_policy(model: ModelSection, checkpoint: str | None = None) -> Any:
    """Load the policy, or a checkpoint of it, onto its device.

    Args:
        model: The `model` section of the configuration.
        checkpoint: Folder or hub name to load instead of `model.name`.
    """
    name, setting = checkpoint or required(model.name, "model.name"), "model.name"
    # the revision belongs to model.name, not to a checkpoint
    revision = model.revision if checkpoint is None else None
    if checkpoint is not None:
        setting = "policy (--policy)"
    return _load_model(model, name, setting, revision).to(device_named(model.device))


def load_reference(model: ModelSection, reference: ReferenceSection) -> Any:
    """Load the reference onto its device: `reference.model`, by default the initial policy."""
    if reference.model is not None:
        loaded = _load_model(model, reference.model, "reference.model", reference.revision)
    else:
        name = required(model.name, "model.name")
        loaded = _load_model(model, name, "model.name", model.revision)
    if reference.device is not None:
        return loaded.to(device_named(reference.device, "reference.device"))
    return loaded.to(device_named(model.device))


def policy_config(model: ModelSection) -> Any:
    """Load the transformers configuration of the policy, without weights."""
    name = required(model.name, "model.name")
    return _from_pretrained(AutoConfig, name, "model.name", revision=model.revision)


def reference_config(reference: ReferenceSection) -> Any:
    """Load the transformers configuration of `reference.model`, without weights."""
    name = required(reference.model, "reference.model")
    return _from_pretrained(AutoConfig, name, "reference.model", revision=reference.revision)


def device_named(name: str, setting: str = "model.device") -> torch.device:
    """Return the device of this name; "auto" is cuda if available, otherwise cpu.

    Raises:
        ConfigError: If the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)  # torch.device alone accepts devices that do not exist
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}: {name!r} cannot be used here: {reason}; auto uses what is available"
        ) from None


def function_named(
    name: str, table: dict[str, Callable[..., Any]], setting: str
) -> Callable[..., Any]:
    """Return a function of the library by name, or import a custom one, `module:function`.

    A custom one may be in the current folder, which is searched last: a file there never takes the
    place of an installed module.

    Raises:
        ConfigError: If it cannot be imported.
    """
    if name in table:
        return table[name]
    module_name, _, attribute = name.partition(":")
    # a console script starts without the current folder on the path, unlike `python -m`
    if not {"", folder := str(Path.cwd())}.intersection(sys.path):
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{setting}: {name!r} cannot be imported: {reason}") from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        place = getattr(module, "__file__", None) or "Python itself"
        raise ConfigError(
            f"{setting}: {name!r} cannot be imported: module {module_name!r}, from {place}, has no "
            f"function {attribute!r}; if you mean another file, rename it"
        )
    return function


def load_score(config: SageConfig) -> Score:
    """Return the score, with the settings bound that it has parameters for.

    A score of the library gets beta, the seed and any setting of the selection section; one of the
    user's own only `CUSTOM_SCORE_SETTINGS`, so that a new setting never replaces its defaults.
    """
    name, section = config.selection.score, config.selection
    score = function_named(name, SCORES, "selection.score")
    selection = {field: getattr(section, field) for field in type(section).model_fields}
    settings = {"beta": config.beta, **selection, "seed": config.seed}
    allowed = settings.keys() if name in SCORES else CUSTOM_SCORE_SETTINGS
    parameters = signature(score).parameters
    bound = {key: x for key, x in settings.items() if key in parameters and key in allowed}
    return partial(score, **bound)


def load_loss(config: SageConfig) -> Callable[..., Tensor]:
    """Return the loss, `(policy, reference, beta=...) -> [P]`."""
    return function_named(config.training.loss, LOSSES, "training.loss")


def required(value: str | None, setting: str) -> str:
    """Return the value of a setting that has no default.

    Raises:
        ConfigError: If it is not set.
    """
    if value is None:
        raise ConfigError(f"{setting} is not set; it has no default, so give a value")
    return value


def _load_model(model: ModelSection, name: str, setting: str, revision: str | None) -> Any:
    options: dict[str, Any] = {"revision": revision, "dtype": DTYPES.get(model.dtype, "auto")}
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    return _from_pretrained(AutoModelForCausalLM, name, setting, **options)


def _from_pretrained(kind: Any, name: str, setting: str, **options: Any) -> Any:
    # transformers would take a missing folder or a file for a hub name and report a failed download
    if name.startswith("~"):
        name = str(user_path(name))
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{setting}: there is no folder {name}")
    if Path(name).is_file():
        raise FileNotFoundError(
            f"{setting}: {name} is a file; give the folder of a model, as save_pretrained writes it"
        )
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{setting}: {name!r} cannot be loaded: {reason}") from error

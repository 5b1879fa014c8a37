"""SageConfig: the one serialisable description of a run."""

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sage_select.losses import LOSSES
from sage_select.scores import SCORES
from sage_select.system.identity import digest

ENVIRONMENT = "SAGE_SELECT__"
"""What the name of an environment variable that changes a setting starts with."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that describes no run; the message names each setting and the fix.

    Attributes:
        problems: What is wrong, by setting, where more than one thing may be.
    """

    def __init__(self, message: str, problems: list[tuple[str, str]] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or []


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_settings(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in values:
                if name not in cls.model_fields:
                    raise ValueError(_unknown(str(name), list(cls.model_fields)))
        return values


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"there is no setting {name!r}; {hint}"


class ModelSection(_Section):
    """The policy."""

    name: str | None = None
    """A folder or a hub name."""
    revision: str | None = None
    """Which revision of it on a hub."""
    tokenizer: str | None = None
    """A folder or a hub name; by default the model's own."""
    chat_template: str | None = None
    """A file with a Jinja chat template, in place of the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends a response, in place of the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto is the dtype they were saved in."""
    device: str = "auto"
    """Such as cuda, cuda:1 or cpu; auto is cuda where there is one."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Which implementation of attention; auto is the model's own choice."""


class ReferenceSection(_Section):
    """The reference: a model whose log-probs are kept in the store, or a file of log-probs."""

    model: str | None = None
    """A folder or a hub name; by default the policy as it is before training."""
    revision: str | None = None
    """Which revision of it on a hub."""
    device: str | None = None
    """Where it is measured; by default the policy's device."""
    store: str | None = None
    """The folder of the store; by default `reference` in the user's cache."""
    file: str | None = None
    """Log-probs computed elsewhere, instead of a model (Parquet, CSV or JSON Lines)."""
    key: str = "pair_id"
    """The column that names pairs in that file, and among the data's columns."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and (self.model is not None or self.store is not None):
            raise ValueError("a file replaces model and store; set one or the other")
        return self


class DataSection(_Section):
    """The pairs."""

    path: str | None = None
    """A file, a folder of files, or a hub name."""
    split: str = "train"
    """Which split of a hub's set."""
    subset: str | None = None
    """Which subset of a hub's set."""
    revision: str | None = None
    """Which revision of a hub's set."""
    columns: dict[str, str] = {}
    """Where fields have other names, ours to theirs,
    as in `{prompt: question}`."""
    max_length: Annotated[int, Field(ge=2)] = 32_768
    """Tokens of prompt and response together; longer ones are cut at the end."""
    limit: Count | None = None
    """Use the first so many usable pairs; by default all."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts kept apart for evaluation; 0 evaluates nothing."""
    on_bad: Literal["set_aside", "error"] = "set_aside"
    """What to do with rows that cannot be used."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that check and tokenise."""


class StrataSection(_Section):
    """The difficulty of pairs."""

    by: Literal["judge", "value", "stratum", "none"] = "judge"
    """A judge's two labels (section 3.2); a number that is higher for easier pairs; a column that
    holds the strata, 0 being the easiest; or no strata at all."""
    clarity: str = "clarity"
    """The column of the judge's high, medium or low."""
    rejected_score: str = "rejected_score"
    """The column of the judge's 1 to 5 for the rejected response."""
    value: str = "margin"
    """The column of the number."""
    shares: tuple[Share, ...] = (0.65, 0.25, 0.10)
    """Shares of the pairs at which the number is cut, the easiest stratum first."""
    stratum: str = "stratum"
    """The column that holds the strata."""

    @field_validator("shares")
    @classmethod
    def _sum_to_one(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        return _checked_shares(shares)


class SelectionSection(_Section):
    """Which pairs are kept: the score, the pools and the schedules."""

    score: str = "sage"
    """What ranks pairs, by its name;
    one of your own as `module:function`."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Of Eq. 8."""
    length_norm: Literal["total", "sqrt", "none", "stratified"] = "total"
    """How Eq. 8 divides by the number of response tokens."""
    mix_start: tuple[Share, ...] = (0.90, 0.10, 0.00)
    """Shares of easy, medium and hard pairs in the first pool."""
    mix_end: tuple[Share, ...] = (0.40, 0.40, 0.20)
    """The same in the last pool."""
    keep_start: Share = 1.0
    """Keep ratio of the first pool."""
    keep_end: Share = 0.4
    """Keep ratio of the last pool."""
    refresh_steps: Count = 25
    """Candidate batches per pool."""
    scope: Literal["run", "epoch", "single_pass"] = "run"
    """What a plan covers, the whole run, each epoch anew, or every pair once."""
    progress: Literal["inclusive", "k_over_K"] = "inclusive"
    """Progress of pool k of K, (k - 1) / (K - 1), or k / K as printed in the paper."""
    on_infeasible: Literal["rebalance", "error"] = "rebalance"
    """What to do where the data cannot follow the mix."""
    multiple: Count = 1
    """Kept counts are rounded down to a multiple of this."""
    no_signal: Literal["hash", "score"] = "hash"
    """What is kept where the rewards are all alike, any at random, or by the score all the same."""

    @field_validator("score")
    @classmethod
    def _known_score(cls, score: str) -> str:
        return _named_function(score, list(SCORES))

    @field_validator("mix_start", "mix_end")
    @classmethod
    def _sum_to_one(cls, mix: tuple[float, ...]) -> tuple[float, ...]:
        return _checked_shares(mix)

    @model_validator(mode="after")
    def _same_strata(self) -> Self:
        if len(self.mix_start) != len(self.mix_end):
            raise ValueError(
                f"mix_start has {len(self.mix_start)} shares and mix_end {len(self.mix_end)}; give "
                "one share per stratum in both"
            )
        return self


class ScoringSection(_Section):
    """How log-probs are measured, under the policy and the reference alike."""

    max_batch_tokens: Count = 16_384
    """Tokens of one forward pass; what does not fit in memory is halved."""
    impl: Literal["auto", "chunked", "fused"] = "auto"
    """What computes the head's log-probs: by blocks of the vocabulary in PyTorch,
    or fused in Triton on a GPU; auto is chunked. Training follows."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """Sequences end to end without padding,
    or padded to the longest; auto packs where that is exact. Training follows."""


class TrainingSection(_Section):
    """How to train."""

    loss: str = "nca"
    """What pairs are trained on, by its name;
    one of your own as `module:function`."""
    learning_rate: Positive = 5e-7
    """Peak of the schedule."""
    epochs: Count = 3
    """Traversals of the data."""
    batch_size: Count = 16
    """Pairs per optimizer step."""
    micro_batch_size: Count | None = None
    """Pairs per process, forward and backward pass; by default all that it has of a batch."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Decay of the learning rate over the exact total of steps."""
    warmup_share: Share = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["none", "bfloat16"] = "none"
    """Autocast dtype of the body; the head, the loss and the sums stay in fp32 or wider."""
    strategy: Literal["fsdp2", "ddp"] = "fsdp2"
    """How several processes have the policy, sharded over them or replicated in each."""
    activation_checkpointing: bool = False
    """Whether to compute each layer again in the backward pass, for less memory."""
    compile_model: bool = False
    """Whether to compile the model's body."""
    evaluate_every: Count = 50
    """Steps between evaluations on held-out pairs."""
    best_by: Literal["loss", "accuracy", "margin"] = "loss"
    """Metric by which the best weights are kept."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many are kept."""

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str) -> str:
        return _named_function(loss, list(LOSSES))

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than batch_size "
                f"{self.batch_size}; make it at most that"
            )
        return self


class SageConfig(_Section):
    """A run, in full, from Python, YAML or JSON, with overrides from the environment.

    Every setting has a default, which is the paper's (Table 4) where the paper says anything; only
    `model.name` and `data.path` must be set before a run.

    Example:
        >>> config = SageConfig(model={"name": "my-model"}, training={"epochs": 1})
        >>> config.training.epochs, config.training.learning_rate
        (1, 5e-07)
        >>> SageConfig(beta=0)
        Traceback (most recent call last):
        ...
        sage_select.app.config.ConfigError: SageConfig: beta: should be greater than 0, got 0
    """

    model: ModelSection = ModelSection()
    reference: ReferenceSection = ReferenceSection()
    data: DataSection = DataSection()
    strata: StrataSection = StrataSection()
    selection: SelectionSection = SelectionSection()
    scoring: ScoringSection = ScoringSection()
    training: TrainingSection = TrainingSection()
    beta: Positive = 0.1
    """Temperature of the implicit reward (Eq. 1), for score and loss alike."""
    seed: int = 0
    """Of the deal, the shuffles, the ties and the split."""
    folder: str | None = None
    """Where the run stands; by default `runs/` and the configuration's hash."""

    def __init__(self, **sections: Any) -> None:
        try:
            super().__init__(**sections)
        except ValidationError as error:
            problems = _problems(error)
            raise ConfigError(_told(problems, lambda _: "SageConfig"), problems) from None

    @model_validator(mode="after")
    def _strata_fit_the_mix(self) -> Self:
        expected = {"judge": 3, "value": len(self.strata.shares), "none": 1}.get(self.strata.by)
        given = len(self.selection.mix_start)
        if expected is not None and given != expected:
            raise ValueError(
                f"selection.mix_start has {given} shares, but strata by {self.strata.by!r} makes "
                f"{expected} strata; give one share per stratum"
            )
        return self

    @classmethod
    def paper(cls, **sections: Any) -> Self:
        """Table 4 of the paper, written out, whatever the defaults may become; `sections` add to
        it and override it.

        Example:
            >>> SageConfig.paper().selection.keep_end
            0.4
        """
        return cls(**_merged(TABLE_4, sections))

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        overrides: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Read a YAML or JSON file.

        Args:
            path: The file.
            overrides: Dotted names and values that have the last word:
                `{"training.learning_rate": 1e-6}`.
            environment: Where variables such as `SAGE_SELECT__TRAINING__LEARNING_RATE` override the
                file; by default the process's own.

        Raises:
            FileNotFoundError: If there is no such file.
            ConfigError: If it is not YAML or JSON, or describes no run.
        """
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(
                f"SageConfig.read: no file {file}; `sage-select config paper` prints one to start "
                "with"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
        values = _parsed(text, str(file), as_json=file.suffix == ".json")
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: a configuration is a mapping of settings")
        surroundings = os.environ if environment is None else environment
        changes = _from_environment(surroundings) | dict(overrides or {})
        for name, value in changes.items():
            values = _merged(values, _nested(name, value))
        try:
            return cls(**{str(name): value for name, value in values.items()})
        except ConfigError as error:

            def origin(setting: str) -> str:
                if setting in (overrides or {}):
                    return f"--set {setting}"
                return _variable(setting) if setting in changes else str(file)

            raise ConfigError(_told(error.problems, origin), error.problems) from None

    def to_yaml(self, *, changed_only: bool = False) -> str:
        """The same as YAML, which `read` reads back."""
        values = self.model_dump(mode="json", exclude_unset=changed_only)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) != values:  # a rare letter that must be escaped
            text = yaml.safe_dump(values, sort_keys=False)
        return text

    @property
    def hash(self) -> str:
        """12 letters that name this run's caches and logs: they change with whatever decides what
        is computed, and with nothing else."""
        values = self.model_dump(mode="json")
        for section, names in _NO_MATTER.items():
            for name in names:
                del (values[section] if section else values)[name]
        return digest(values)[:12]

    @property
    def run_folder(self) -> Path:
        """Where the run stands."""
        return Path(self.folder) if self.folder is not None else Path("runs") / self.hash


TABLE_4: dict[str, Any] = {
    "beta": 0.1,
    "data": {"max_length": 32_768},
    "selection": {
        "score": "sage",
        "mix_start": (0.90, 0.10, 0.00),
        "mix_end": (0.40, 0.40, 0.20),
        "keep_start": 1.0,
        "keep_end": 0.4,
        "refresh_steps": 25,
    },
    "training": {"loss": "nca", "learning_rate": 5e-7, "epochs": 3, "batch_size": 16},
}
"""Table 4; its sequence parallelism of 8 is a matter of the host."""


def decides(setting: str) -> bool:
    """Whether a setting, by its dotted name, decides what is computed."""
    section, _, name = setting.rpartition(".")
    return name not in _NO_MATTER.get(section, ())


_NO_MATTER = {
    "": ["folder"],
    "data": ["num_workers"],
    "reference": ["store", "device"],
    "model": ["device"],
    "scoring": ["max_batch_tokens", "impl", "layout"],
    "training": [
        "strategy",
        "activation_checkpointing",
        "compile_model",
        "micro_batch_size",
        "evaluate_every",
        "best_by",
        "checkpoint_every",
        "keep_checkpoints",
    ],
}
"""Settings that decide where and how fast something is computed, or what of it is kept."""


def _checked_shares(shares: tuple[float, ...]) -> tuple[float, ...]:
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1, these sum to {sum(shares):g}")
    return shares


def _named_function(name: str, known: list[str]) -> str:
    if name not in known and ":" not in name:
        raise ValueError(
            _unknown(name, known).replace("setting", "function") + "; one of your own is "
            "'module:function'"
        )
    return name


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _nested(name: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for "a.b"."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _variable(setting: str) -> str:
    return ENVIRONMENT + setting.replace(".", "__").upper()


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    for name in environment:
        for section in SageConfig.model_fields:
            if name.startswith(f"SAGE_SELECT_{section.upper()}_"):
                raise ConfigError(
                    f"{name}: a variable that changes a setting has two underscores between its "
                    f"parts, as in {_variable('training.epochs')}"
                )
    return {
        name.removeprefix(ENVIRONMENT).lower().replace("__", "."): parsed_value(text, name)
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT)
    }


def parsed_value(text: str, name: str) -> Any:
    """A value as it would stand in a YAML file.

    Raises:
        ConfigError: If it is not YAML.
    """
    return _parsed(text, name)


def _parsed(text: str, place: str, *, as_json: bool = False) -> Any:
    try:
        if as_json:
            return json.loads(text, object_pairs_hook=_each_once)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, json.JSONDecodeError, ValueError) as error:
        raise ConfigError(f"{place}: cannot be read: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML, but a setting that stands twice is an error: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        _each_once([(name, None) for name in names])
        return super().construct_mapping(node, deep)


def _each_once(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in items]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands there twice; keep one of them")
    return dict(items)


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    """Each setting that is wrong, and what is."""
    found = []
    for problem in error.errors():
        what = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if problem["type"] in ("model_type", "model_attributes_type"):
            what = "should be a mapping of settings"
        got = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
        found.append((".".join(map(str, problem["loc"])), what + got))
    return found


def _told(problems: list[tuple[str, str]], origin: Callable[[str], str]) -> str:
    """One line for each setting that is wrong, with where it was set."""
    return "\n".join(
        f"{origin(where)}: {where}{': ' if where else ''}{what}" for where, what in problems
    )

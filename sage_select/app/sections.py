"""The sections of a configuration, setting by setting."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sage_select.data.dataset import OnBad
from sage_select.losses import LOSSES
from sage_select.models.trials import Layout
from sage_select.plan import OnInfeasible, ProgressRule, Scope
from sage_select.scores import SCORES, LengthNorm
from sage_select.selecting.selector import NoSignal
from sage_select.system.settings import (
    FREE,
    LATER,
    Count,
    NotNegative,
    Section,
    Share,
    unknown_name,
)
from sage_select.training.settings import UpdateSettings


class ModelSection(Section):
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
    device: Annotated[str, FREE] = "auto"
    """Such as cuda, cuda:1 or cpu; auto is cuda where there is one."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Which implementation of attention; auto is the model's own choice."""


class ReferenceSection(Section):
    """The reference: a model whose log-probs are kept in the store, or a file of log-probs."""

    model: str | None = None
    """A folder or a hub name; by default the policy as it is before training."""
    revision: str | None = None
    """Which revision of it on a hub."""
    device: Annotated[str | None, FREE] = None
    """Where it is measured; by default the policy's device."""
    store: Annotated[str | None, FREE] = None
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


class DataSection(Section):
    """The pairs."""

    path: str | None = None
    """A file, a folder of files, or a hub name."""
    split: str = "train"
    """Which split of a hub's set."""
    subset: str | None = None
    """Which subset of a hub's set."""
    revision: str | None = None
    """Which revision of a hub's set."""
    columns: dict[str, str] = Field(default={})
    """Where fields have other names, ours to theirs,
    as in `{prompt: question}`."""
    max_length: Annotated[int, Field(ge=2)] = 32_768
    """Tokens of prompt and response together; longer ones are cut at the end."""
    limit: Count | None = None
    """Use the first so many usable pairs; by default all."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts kept apart for evaluation; 0 evaluates nothing."""
    on_bad: OnBad = "set_aside"
    """What to do with rows that cannot be used."""
    num_workers: Annotated[int, Field(ge=0), FREE] = 0
    """Processes that check and tokenise."""


class StrataSection(Section):
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


class SelectionSection(Section):
    """Which pairs are kept: the score, the pools and the schedules."""

    score: str = "sage"
    """What ranks pairs, by its name;
    one of your own as `module:function`."""
    eps: NotNegative = 1e-6
    """Of Eq. 8."""
    length_norm: LengthNorm = "total"
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
    scope: Scope = "run"
    """What a plan covers, the whole run, each epoch anew, or every pair once."""
    progress: ProgressRule = "inclusive"
    """Progress of pool k of K, (k - 1) / (K - 1), or k / K as printed in the paper."""
    on_infeasible: OnInfeasible = "rebalance"
    """What to do where the data cannot follow the mix."""
    multiple: Count = 1
    """Kept counts are rounded down to a multiple of this."""
    no_signal: NoSignal = "hash"
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


class ScoringSection(Section):
    """How log-probs are measured, under the policy and the reference alike."""

    max_batch_tokens: Annotated[Count, FREE] = 16_384
    """Tokens of one forward pass; what does not fit in memory is halved."""
    impl: Annotated[Literal["auto", "chunked", "fused"], LATER] = "auto"
    """What computes the head's log-probs: by blocks of the vocabulary in PyTorch,
    or fused in Triton on a GPU; auto is chunked. Training follows."""
    layout: Annotated[Layout, FREE] = "auto"
    """Sequences end to end without padding,
    or padded to the longest; auto packs where that is exact. Training follows."""


class TrainingSection(UpdateSettings):
    """How to train."""

    loss: str = "nca"
    """What pairs are trained on, by its name;
    one of your own as `module:function`."""
    epochs: Count = 3
    """Traversals of the data."""
    batch_size: Count = 16
    """Pairs per optimizer step, over all processes."""
    mixed_precision: Literal["none", "bfloat16"] = "none"
    """Autocast dtype of the body; the head, the loss and the sums stay in fp32 or wider."""
    strategy: Annotated[Literal["fsdp2", "ddp"], FREE] = "fsdp2"
    """How several processes hold the policy: sharded over them, or replicated in each."""

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


def _checked_shares(shares: tuple[float, ...]) -> tuple[float, ...]:
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1, these sum to {sum(shares):g}")
    return shares


def _named_function(name: str, known: list[str]) -> str:
    if name not in known and ":" not in name:
        raise ValueError(
            unknown_name(name, known, "function") + "; one of your own is 'module:function'"
        )
    return name

"""Sections of a configuration: every setting with its default and its meaning."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sage_select.arguments import LARGEST_COUNT
from sage_select.data.dataset import OnBad
from sage_select.data.tokenising import SpecialTokens
from sage_select.losses import LOSSES
from sage_select.models.trials import Layout
from sage_select.plan import OnInfeasible, ProgressRule, Scope
from sage_select.scores import SCORES, LengthNorm
from sage_select.selecting.selector import NoSignal
from sage_select.system.settings import (
    FREE,
    LATER,
    NUMBER,
    WHOLE,
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
    """Local folder or hub name."""
    revision: str | None = None
    """Revision on the hub."""
    tokenizer: str | None = None
    """Local folder or hub name of the tokenizer; by default that of the model."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    eos_token: str | None = None
    """Token that ends a response; by default the tokenizer's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto keeps the one they were saved in."""
    device: Annotated[str, FREE] = "auto"
    """Device, such as cuda, cuda:1 or cpu; auto is cuda if available, otherwise cpu."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; auto is the model's default."""


class ReferenceSection(Section):
    """The reference model, whose log-probs are kept in the store, or a file of its log-probs."""

    model: str | None = None
    """Local folder or hub name; by default the policy before training."""
    revision: str | None = None
    """Revision on the hub."""
    device: Annotated[str | None, FREE] = None
    """Device on which it is measured; by default the policy's."""
    store: Annotated[str | None, FREE] = None
    """Folder of the store; by default `reference` in the user's cache."""
    file: str | None = None
    """Precomputed log-probs instead of a model (Parquet, CSV or JSON Lines)."""
    key: str = "pair_id"
    """Column that identifies pairs, both in that file and in the data."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and (self.model is not None or self.store is not None):
            raise ValueError("file replaces model and store; set file alone, or unset it")
        return self


class DataSection(Section):
    """The preference pairs."""

    path: str | None = None
    """File, folder of files, or hub name."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Subset of a hub dataset."""
    revision: str | None = None
    """Revision of a hub dataset."""
    columns: dict[str, str] = Field(default={})
    """Names of fields in the data, by the names expected here, as in `{prompt: question}`."""
    max_length: Annotated[int, Field(ge=2, le=LARGEST_COUNT), WHOLE] = 32_768
    """Maximum tokens of prompt and response together; longer sequences are cut at the end."""
    limit: Count | None = None
    """Number of pairs to use, the first usable ones; by default all."""
    held_out: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), NUMBER] = 0.0
    """Share of the prompts held out for evaluation; with 0 nothing is evaluated."""
    on_bad: OnBad = "set_aside"
    """Unusable rows are set aside with a reason, or stop the run with an error."""
    chat_template_kwargs: Annotated[dict[str, Any], LATER] = Field(default={})
    """Options of the chat template for all rows, as in `{enable_thinking: false}`."""
    special_tokens: Annotated[SpecialTokens, LATER] = "allow"
    """Texts that contain a special token, such as `<|im_end|>`: allow, or set_aside the row."""
    num_workers: Annotated[int, Field(ge=0, le=1024), WHOLE, FREE] = 0
    """Worker processes that check and tokenise; 0 uses the main process."""


class StrataSection(Section):
    """Difficulty strata of the pairs."""

    by: Literal["judge", "value", "stratum", "none"] = "judge"
    """Source of the strata: two labels from a judge (section 3.2); a numeric value, higher for
    easier pairs; a column of strata numbered from 0, the easiest; or none, for a single stratum."""
    clarity: str = "clarity"
    """Column with the judge's clarity: high, medium or low."""
    rejected_score: str = "rejected_score"
    """Column with the judge's rating of the rejected response, 1 to 5."""
    value: str = "margin"
    """Column with the numeric value."""
    shares: tuple[Share, ...] = (0.65, 0.25, 0.10)
    """Share of the pairs in each stratum made from the numeric value, the easiest first."""
    stratum: str = "stratum"
    """Column with the number of the stratum."""

    @field_validator("shares")
    @classmethod
    def _sum_to_one(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        return _check_sum(shares)


class SelectionSection(Section):
    """Score, pools and schedules of the selection."""

    score: str = "sage"
    """Score that ranks pairs: a name, or `module:function` for a custom one."""
    eps: NotNegative = 1e-6
    """Epsilon in Eq. 8."""
    length_norm: LengthNorm = "total"
    """Normalisation by the number of response tokens in Eq. 8."""
    mix_start: tuple[Share, ...] = (0.90, 0.10, 0.00)
    """Shares of easy, medium and hard pairs in the first pool."""
    mix_end: tuple[Share, ...] = (0.40, 0.40, 0.20)
    """Shares of easy, medium and hard pairs in the last pool."""
    keep_start: Share = 1.0
    """Keep ratio of the first pool."""
    keep_end: Share = 0.4
    """Keep ratio of the last pool."""
    refresh_steps: Count = 25
    """Candidate batches per pool."""
    scope: Scope = "run"
    """One plan for the whole run, a new plan for each epoch, or one that uses every pair once."""
    progress: ProgressRule = "inclusive"
    """Progress of pool k of K: (k - 1) / (K - 1), or k / K as printed in the paper."""
    on_infeasible: OnInfeasible = "rebalance"
    """If the data cannot follow the mix, come as close as possible or stop with an error."""
    multiple: Count = 1
    """Kept counts are rounded down to a multiple of this."""
    no_signal: NoSignal = "hash"
    """Selection if all rewards of a pool agree up to rounding: random, or still by the score."""

    @field_validator("score")
    @classmethod
    def _known_score(cls, score: str) -> str:
        return _named_function(score, list(SCORES))

    @field_validator("mix_start", "mix_end")
    @classmethod
    def _sum_to_one(cls, mix: tuple[float, ...]) -> tuple[float, ...]:
        return _check_sum(mix)

    @model_validator(mode="after")
    def _same_strata(self) -> Self:
        if len(self.mix_start) != len(self.mix_end):
            raise ValueError(
                f"mix_start has {len(self.mix_start)} shares and mix_end {len(self.mix_end)}; give "
                "one share per stratum in both"
            )
        return self


class ScoringSection(Section):
    """Measurement of log-probs, the same for policy and reference."""

    max_batch_tokens: Annotated[Count, FREE] = 16_384
    """Tokens per forward pass; a batch that does not fit in memory is split in half."""
    impl: Annotated[Literal["auto", "chunked", "fused"], LATER] = "auto"
    """Log-probs from the output head: in PyTorch by blocks of the vocabulary, or fused in Triton
    on a GPU; auto is chunked. Also used in training."""
    layout: Annotated[Layout, FREE] = "auto"
    """Sequences packed end to end without padding, or padded to the longest; auto packs if that is
    exact. Also used in training."""


class TrainingSection(UpdateSettings):
    """Training on the kept pairs."""

    loss: str = "nca"
    """Loss to train on: a name, or `module:function` for a custom one."""
    epochs: Count = 3
    """Passes over the data."""
    batch_size: Count = 16
    """Pairs per optimizer step, over all processes."""
    mixed_precision: Literal["none", "bfloat16"] = "none"
    """Autocast dtype of the model's body; head, loss and sums stay in fp32 or wider."""
    strategy: Annotated[Literal["fsdp2", "ddp"], FREE] = "fsdp2"
    """Distribution of the policy over processes: sharded (fsdp2) or replicated (ddp)."""

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str) -> str:
        return _named_function(loss, list(LOSSES))

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than batch_size "
                f"{self.batch_size}; set it to {self.batch_size} or less"
            )
        return self


def _check_sum(shares: tuple[float, ...]) -> tuple[float, ...]:
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1, but these sum to {sum(shares):g}")
    return shares


def _named_function(name: str, names: list[str]) -> str:
    # a custom function is imported later: reading a configuration must not run the user's code
    if name not in names and ":" not in name:
        raise ValueError(
            unknown_name(name, names, "function") + "; write 'module:function' for a custom one"
        )
    return name

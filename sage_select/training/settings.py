"""Training settings, shared by the loop, Lightning's module and configurations."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import SkipValidation, field_validator
from torch import Tensor

from sage_select.losses import nca
from sage_select.models.reader import Reader
from sage_select.system.identity import describe
from sage_select.system.settings import (
    FREE,
    Count,
    NotNegative,
    Positive,
    Section,
    Settings,
    Share,
    Switch,
)

LearningRateSchedule = Literal["linear", "cosine", "constant_with_warmup"]
Metric = Literal["loss", "accuracy", "margin"]


class UpdateSettings(Section):
    """Settings that the loop and a configuration's `training` section share.

    Defaults are the paper's (Table 4) if the paper gives a value. Fields marked `FREE` may change
    when a run is resumed.
    """

    loss: Any = "nca"
    """The loss function."""
    learning_rate: Positive = 5e-7
    """Peak of the schedule."""
    micro_batch_size: Annotated[Count | None, FREE] = None
    """Pairs per process in one forward and backward pass; by default its share of a batch."""
    schedule: LearningRateSchedule = "linear"
    """Decay of the learning rate over the exact total of steps."""
    warmup_share: Share = 0.1
    """Share of the steps over which the learning rate warms up."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    activation_checkpointing: Annotated[Switch, FREE] = False
    """Recompute each layer in the backward pass, to save memory."""
    compile_model: Annotated[Switch, FREE] = False
    """Compile the model's body with torch.compile."""
    evaluate_every: Annotated[Count, FREE] = 50
    """Steps between evaluations on held-out pairs; also at the start and at the end."""
    best_by: Annotated[Metric, FREE] = "loss"
    """Held-out metric that determines the best weights."""
    checkpoint_every: Annotated[Count, FREE] = 50
    """Steps between checkpoints; also at the end."""
    keep_checkpoints: Annotated[Count, FREE] = 2
    """Number of checkpoints to keep."""


class Training(UpdateSettings, Settings):
    """Training settings of `fit`, `update` and Lightning's `PreferenceModule`.

    Example:
        >>> Training(learning_rate=1e-6).max_grad_norm
        1.0
        >>> Training(learning_rate=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        ConfigError: Training: learning_rate: should be greater than 0, got 0
    """

    beta: Positive = 0.1
    """Temperature of the implicit reward, passed to the loss."""
    loss: Callable[..., Tensor] = nca
    """`(policy, reference, beta=...) -> [P]`."""
    reader: SkipValidation[Reader] = Reader()
    """Reader of the policy in updates and evaluations; equal to the selector's."""

    @field_validator("reader")
    @classmethod
    def _check_reader(cls, reader: Any) -> Any:
        if not isinstance(reader, Reader):
            raise ValueError(f"should be a Reader, got {type(reader).__name__}")
        if reader.mixed_precision == torch.float16:
            raise ValueError(
                "float16 autocast needs a gradient scaler, which this loop does not have; use "
                "Reader(mixed_precision=torch.bfloat16)"
            )
        return reader

    def resume_settings(self) -> dict[str, str]:
        """Return the settings that a resumed run must share with the run it resumes."""
        values = {name: repr(getattr(self, name)) for name in type(self).model_fields}
        del values["reader"]  # of the reader, only precision and impl are compared
        return {name: value for name, value in values.items() if not self.is_free(name)} | {
            "loss": describe(self.loss),
            **self.reader.resume_settings(),
        }

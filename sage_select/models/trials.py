"""Trials: whether this library reads a model right, found out by trying, before it is believed."""

from collections.abc import Sequence
from typing import Literal
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn

from sage_select.data.pair_table import TokenSequence
from sage_select.models.batches import pack, pad
from sage_select.models.forward import (
    call,
    device_of,
    eval_mode,
    forward_logps,
    logits_of,
    precision_of,
)
from sage_select.models.heads import of_transformers
from sage_select.models.known import known, own_attention
from sage_select.models.wrappers import is_sharded
from sage_select.ops.token_logps import Implementation
from sage_select.system.processes import Processes

Layout = Literal["auto", "packed", "padded"]

NATS_PER_ROOT_TOKEN = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Nats per root of a sequence's tokens by which another batch may change its log-prob."""
LEAK = 1e-6  # nats: products of the same shapes round alike, so that nothing else may be left


def _path(model: nn.Module) -> tuple[object, ...]:
    dtype = next(model.parameters()).dtype
    return (
        device_of(model),
        dtype,
        precision_of(model),
        own_attention(getattr(model, "config", None)),
    )


def check_head(
    model: nn.Module, sequence: TokenSequence, impl: Implementation, *, again: bool = True
) -> None:
    """Hold one short piece against the model's own logits: some models rescale them.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    path = _path(model)
    if path in known(model).checked_heads and not again:
        return
    tokens = sequence.tokens[max(0, sequence.response_start - 32) : sequence.response_start + 32]
    piece = pad([TokenSequence(tokens, min(sequence.response_start, 32))])
    with eval_mode(model):
        found = forward_logps(model, piece, impl)[0]
        batch = piece.to(device_of(model))
        logits = logits_of(call(model, batch))
        logps = logits[0, batch.predicts].float().log_softmax(-1)
        expected = logps.gather(-1, batch.targets[:, None]).sum()
    error = abs(float(expected) - float(found)) / len(batch.targets)
    if error > (1e-3 if logits.dtype == torch.float32 else 0.2):  # bf16 logits are that coarse
        raise ValueError(
            f"measure: {type(model).__name__} changes its logits after the output head in a way "
            f"this library does not know: its own log-probs differ by {error:.3g} nats per token. "
            "Pass your own measure to the Selector"
        )
    known(model).checked_heads.add(path)


def packs_exactly(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    layout: Layout,
    impl: Implementation,
    max_tokens: int | None = None,
) -> bool:
    """Whether to pack: if it was asked for, and gives what each sequence gives alone.

    Tried once per model, and again for sequences longer than any before: windows and chunks show
    only then.

    Args:
        model: The model.
        sequences: Those to batch, or the longest of them.
        layout: What was asked for.
        impl: How the head's log-probs are computed.
        max_tokens: Of a batch; by default any number.

    Raises:
        ValueError: If packing was asked for and is not right, or the layout is none.
    """
    if layout not in ("auto", "packed", "padded"):
        raise ValueError(f"measure: layout must be auto, packed or padded, got {layout!r}")
    if layout == "padded":
        return False
    path, record = _path(model), known(model)
    longest = max(sequences, key=lambda s: len(s.tokens))
    if is_sharded(model):  # whether to try, and how often, must be the same in all processes
        (lengths,) = zip(*Processes.all().all_gather([len(longest.tokens)]), strict=True)
        longest = TokenSequence(np.resize(longest.tokens, max(lengths)), longest.response_start)
    proven, reason = record.packing.get(path, (0, ""))
    if not (reason := _unfit(model) or reason) and len(longest.tokens) > proven:
        try:
            with eval_mode(model):
                found = _why_not_packed(model, longest, impl, max_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False  # padded, it will be a batch of its own, or an error of its own
        if found is None:
            return True  # not finite: which says nothing of packing, and is an error of its own
        reason = found
        record.packing[path] = len(longest.tokens), reason
    if reason and layout == "auto" and (path, reason) not in record.warned:
        record.warned.add((path, reason))
        warn(
            f"measure: batches of {type(model).__name__} are padded, not packed, which costs "
            f"time: {reason}. layout='padded' says that it is meant",
            stacklevel=4,
        )
    if reason and layout == "packed":
        raise ValueError(
            f"measure: batches of {type(model).__name__} cannot be packed: {reason}; use "
            "layout='auto' or 'padded'"
        )
    return not reason


def _unfit(model: nn.Module) -> str:
    """Why not even to try, or nothing."""
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        return "it is compiled, and would be compiled again for every packed batch"
    if not of_transformers(model):
        return "it is no model of transformers, whose attention can be told of sequences"
    return ""


def _why_not_packed(
    model: nn.Module, longest: TokenSequence, impl: Implementation, max_tokens: int | None
) -> str | None:
    """What speaks against packing; nothing, or None where nothing can be said."""
    few = _few(longest.tokens)
    whole = TokenSequence(longest.tokens, 1)  # every position tells

    def logps(*sequences: TokenSequence, packed: bool) -> Tensor:
        batch = pack(sequences) if packed else pad(sequences)
        return forward_logps(model, batch, impl).cpu()

    alone = torch.cat([logps(s, packed=False) for s in (*few, whole)])
    if not bool(alone.isfinite().all()):
        return None
    try:
        packed = logps(*few, whole, packed=True)
        before, after = (logps(c, *few[1:], packed=True)[1:] for c in (few[0], _changed(few[0])))
    except Exception as refusal:  # whatever a model does with what it does not know
        if is_out_of_memory(refusal):
            raise
        return f"its forward refuses them: {(str(refusal) or repr(refusal)).splitlines()[0]}"
    leak = float((before - after).abs().max())
    if not leak <= LEAK:
        return f"what one response says changes the log-probs of others by {leak:.2g} nats"
    roots = torch.tensor([float(len(s.tokens) - s.response_start) for s in (*few, whole)]).sqrt()
    error = float(((packed - alone).abs() / roots).max())
    rounding = NATS_PER_ROOT_TOKEN.get(precision_of(model), NATS_PER_ROOT_TOKEN[torch.float32])
    if max_tokens is None or 2 * len(longest.tokens) <= max_tokens:
        together = logps(few[2], whole, packed=False)
        noise = float(((together - alone[2:]).abs() / roots[2:]).max())
        if noise > rounding:
            warn(
                f"measure: log-probs under {type(model).__name__} depend on what stands beside a "
                f"sequence, padded too, by {noise:.2g} nats per root of its tokens (positions that "
                "scale with the longest, activations that are quantised together); reference and "
                "policy meet in different batches, and this passes for a change of the policy",
                stacklevel=5,
            )
            rounding = 4 * noise
    if not error <= rounding:
        return (
            f"log-probs of {len(alone)} packed sequences of up to {len(longest.tokens)} tokens "
            f"differ from those of each alone by {error:.2g} nats per root of their tokens"
        )
    return ""


def _few(tokens: np.ndarray) -> list[TokenSequence]:
    """Two responses to one prompt and one to another, made of these tokens."""
    some = np.resize(tokens, 40)
    prompt, one, other = np.split(some, [8, 24])
    responses = (np.concatenate([prompt, one]), np.concatenate([prompt, other]), some[:15:-1])
    return [TokenSequence(np.ascontiguousarray(r), 8) for r in responses]


def _changed(sequence: TokenSequence) -> TokenSequence:
    """The same prompt with another response of the same length."""
    tokens = sequence.tokens.copy()
    tokens[sequence.response_start :] = tokens[sequence.response_start :].max() == 0
    return TokenSequence(tokens, sequence.response_start)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory does not suffice."""
    told = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)

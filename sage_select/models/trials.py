"""Trials of a model, which show that this library reads it correctly before it is trusted."""

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
"""Change of a log-prob in a different batch that counts as rounding, in nats per square root of
the sequence's tokens."""
MAX_LEAK = 1e-6  # nats: products of equal shapes round equally, so a leak cannot hide in rounding


def _path(model: nn.Module) -> tuple[object, ...]:
    """Device, dtypes and attention of the model: a trial's result holds for these only."""
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
    """Compare the log-prob of a short piece with the model's own logits: some models rescale them.

    Args:
        model: The model.
        sequence: The sequence from which the piece is taken, around the start of its response; all
            tokens of the piece but the first are compared.
        impl: Implementation of the head's log-probs.
        again: False to skip models that were checked before on the same device and in the same
            precision.

    Raises:
        ValueError: If the two differ by more than rounding.
    """
    path = _path(model)
    if path in known(model).checked_heads and not again:
        return
    # short, since all logits of the piece are in memory
    tokens = sequence.tokens[max(0, sequence.response_start - 32) : sequence.response_start + 32]
    piece = pad([TokenSequence(tokens, 1)])
    with eval_mode(model):
        measured = forward_logps(model, piece, impl)[0]
        batch = piece.to(device_of(model))
        logits = logits_of(call(model, batch))
        logps = logits[0, batch.predicts].float().log_softmax(-1)
        expected = logps.gather(-1, batch.targets[:, None]).sum()
    count = len(batch.targets)
    error = abs(float(expected) - float(measured)) / count
    # logits in half precision are coarse, but their rounding averages out over the tokens
    coarse = max(0.05, 0.2 / count**0.5)
    if error > (1e-3 if logits.dtype == torch.float32 else coarse):
        raise ValueError(
            f"measure: {type(model).__name__} changes its logits after the output head in a way "
            "that is not supported: log-probs of its own logits differ by "
            f"{error:.3g} nats per token. Pass your own measure to the Selector"
        )
    known(model).checked_heads.add(path)


def packs_exactly(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    layout: Layout,
    impl: Implementation,
    max_tokens: int | None = None,
) -> bool:
    """Return whether to pack: if the layout allows it and packing does not change log-probs.

    Packing is tried once per model, and again for sequences longer than any before: windows and
    chunks affect only those.

    Args:
        model: The model.
        sequences: The sequences to batch, or the longest of them.
        layout: The layout requested.
        impl: Implementation of the head's log-probs.
        max_tokens: Token budget of a batch; by default unlimited.

    Raises:
        ValueError: If layout is "packed" and packing changes log-probs, or it is no layout.
    """
    if layout not in ("auto", "packed", "padded"):
        raise ValueError(f"measure: layout must be auto, packed or padded, got {layout!r}")
    if layout == "padded":
        return False
    path, record = _path(model), known(model)
    longest = max(sequences, key=lambda s: len(s.tokens))
    if is_sharded(model):  # a trial is a collective: all ranks must run it with one length
        (lengths,) = zip(*Processes.all().all_gather([len(longest.tokens)]), strict=True)
        longest = TokenSequence(np.resize(longest.tokens, max(lengths)), longest.response_start)
    tried_length, reason = record.packing.get(path, (0, ""))
    if not (reason := _reason_not_to_try(model) or reason) and len(longest.tokens) > tried_length:
        try:
            with eval_mode(model):
                outcome = _reason_not_to_pack(model, longest, impl, max_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False  # padded, the sequence is a batch by itself, or raises an error by itself
        if outcome is None:
            return True  # not finite, which says nothing about packing; measuring reports it
        reason = outcome
        record.packing[path] = len(longest.tokens), reason
    if reason and layout == "auto" and (path, reason) not in record.warned:
        record.warned.add((path, reason))
        warn(
            f"measure: batches of {type(model).__name__} are padded, not packed, which costs "
            f"time: {reason}. Pass layout='padded' if that is intended",
            stacklevel=4,
        )
    if reason and layout == "packed":
        raise ValueError(
            f"measure: batches of {type(model).__name__} cannot be packed: {reason}; use "
            "layout='auto' or 'padded'"
        )
    return not reason


def _reason_not_to_try(model: nn.Module) -> str:
    """Return the reason not to try packing, or ""."""
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        return "it is compiled, and would be recompiled for every packed batch"
    if not of_transformers(model):
        return "it is not a transformers model, whose attention can be replaced"
    return ""


def _reason_not_to_pack(
    model: nn.Module, longest: TokenSequence, impl: Implementation, max_tokens: int | None
) -> str | None:
    """Try to pack, and return the reason not to, "", or None if log-probs are not finite."""
    short = _short_sequences(longest.tokens)
    long = TokenSequence(longest.tokens, 1)  # all but the first token are scored

    def logps(*sequences: TokenSequence, packed: bool) -> Tensor:
        batch = pack(sequences) if packed else pad(sequences)
        return forward_logps(model, batch, impl).cpu()

    alone = torch.cat([logps(s, packed=False) for s in (*short, long)])
    if not bool(alone.isfinite().all()):
        return None
    try:
        packed = logps(*short, long, packed=True)
        before, after = (
            logps(first, *short[1:], packed=True)[1:] for first in (short[0], _changed(short[0]))
        )
    except Exception as failure:  # models may raise any exception on unexpected arguments
        if is_out_of_memory(failure):
            raise
        message = (str(failure) or repr(failure)).splitlines()[0]
        return f"its forward pass fails on them: {message}"
    leak = float((before - after).abs().max())
    if not leak <= MAX_LEAK:  # NaN also fails
        return f"the content of one response changes the log-probs of others by {leak:.2g} nats"
    # rounding errors of tokens add up like a random walk
    roots = torch.tensor([float(len(s.tokens) - s.response_start) for s in (*short, long)]).sqrt()
    error = float(((packed - alone).abs() / roots).max())
    rounding = NATS_PER_ROOT_TOKEN.get(precision_of(model), NATS_PER_ROOT_TOKEN[torch.float32])
    if max_tokens is None or 2 * len(longest.tokens) <= max_tokens:
        together = logps(short[2], long, packed=False)
        noise = float(((together - alone[2:]).abs() / roots[2:]).max())
        if noise > rounding:
            warn(
                f"measure: log-probs under {type(model).__name__} depend on the other sequences of "
                f"a batch, even if padded, by {noise:.2g} nats per square root of a sequence's "
                "tokens (positions that scale with the longest sequence, activations that are "
                "quantised together); reference and policy are measured in different batches, so "
                "this looks like a change in the policy",
                stacklevel=5,
            )
            rounding = 4 * noise  # packing is not at fault for differences that padding has, too
    if not error <= rounding:
        return (
            f"log-probs of {len(alone)} packed sequences of up to {len(longest.tokens)} tokens "
            f"differ from those of each alone by {error:.2g} nats per square root of their tokens"
        )
    return ""


def _short_sequences(tokens: np.ndarray) -> list[TokenSequence]:
    """Return two responses to one prompt and one to another, made of these tokens."""
    material = np.resize(tokens, 40)
    prompt, one, other = np.split(material, [8, 24])
    responses = (np.concatenate([prompt, one]), np.concatenate([prompt, other]), material[:15:-1])
    return [TokenSequence(np.ascontiguousarray(r), 8) for r in responses]


def _changed(sequence: TokenSequence) -> TokenSequence:
    """Return the same prompt with a different response of the same length."""
    tokens = sequence.tokens.copy()
    # token 0 throughout, or 1 if the response was all 0
    tokens[sequence.response_start :] = tokens[sequence.response_start :].max() == 0
    return TokenSequence(tokens, sequence.response_start)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device is out of memory."""
    # by message, since only some of PyTorch's allocators raise OutOfMemoryError
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)

"""Measuring: forward passes of a causal language model over pairs, to `PairLogps`."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from warnings import warn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sage_select.dataset import PreferenceDataset, TokenSequence
from sage_select.hashing import Int64Array
from sage_select.ops.token_logps import Implementation, sequence_logps
from sage_select.pairs import PairLogps
from sage_select.progress import progress_bar

HASHED_AT_ONCE = 4096  # sequences whose tokens are in memory while keys are made


def measure(
    model: nn.Module,
    pool: PreferenceDataset,
    *,
    max_batch_tokens: int = 16_384,
    impl: Implementation = "auto",
    mixed_precision: torch.dtype | None = None,
    show_progress: bool | None = None,
) -> PairLogps:
    """Summed log-probs of every response of a pool under a model: one forward-only pass.

    The model runs in eval mode, without gradients or cache. Its modes, its gradients and the
    generators' state are left as they were. Distinct responses, not pairs, are sorted by length and
    batched to a token budget, the longest first, so that what does not fit in memory fails at once.

    Args:
        model: A Hugging Face causal language model.
        pool: The pairs, `dataset` or `dataset.take(rows)`.
        max_batch_tokens: Padded tokens of one forward pass; a longer sequence runs alone. Where
            so many do not fit in memory, the budget is halved, with a warning, and no pair is lost.
        impl: How the head's log-probs are computed, see `token_logps`.
        mixed_precision: Autocast dtype of the body, as in training; the head stays in fp32.
        show_progress: False for no progress bar.

    Returns:
        Log-probs of the pool's pairs, in its order, on the CPU.

    Raises:
        TypeError: If the model has no output head to reach.
        ValueError: If a token is outside the model's vocabulary, the model does something to its
            logits that this library does not know, or a log-prob is not finite.
        MemoryError: If a single sequence does not fit in memory.
    """
    distinct = distinct_sequences(pool)
    logps = torch.zeros(len(distinct), dtype=torch.float64)

    def keep(places: list[int], found: Tensor) -> None:
        logps[places] = found

    measure_sequences(
        model,
        distinct,
        keep,
        max_batch_tokens=max_batch_tokens,
        impl=impl,
        mixed_precision=mixed_precision,
        show_progress=show_progress,
    )
    return joined(pool, logps[distinct.of_pairs])


Keys = npt.NDArray[np.bytes_]
"""16 bytes per sequence. Fixed-size byte strings are compared whole: numpy ignores zeros at an end,
but two strings of one size that differ in nothing else are equal."""


@dataclass(frozen=True)
class DistinctSequences:
    """D different sequences among the 2P of some pairs, the longest first.

    Pairs of one prompt often share a response. Ordered by length and content, what is batched with
    what does not depend on the order of the rows. Tokens are looked up when they are needed: a set
    larger than memory can be measured.

    Attributes:
        pairs: The pairs.
        keys: [D], a hash of each sequence's tokens and of where the response starts.
        lengths: int64 [D], tokens.
        largest_token: Of all of them.
        of_pairs: int64 [2P], for all chosen and then all rejected, which sequence it is.
    """

    pairs: PreferenceDataset
    keys: Keys
    lengths: Int64Array
    largest_token: int
    of_pairs: Int64Array
    _first: Int64Array  # [D], a place among the 2P where it stands

    def __len__(self) -> int:
        return len(self.keys)

    def sequences(self, places: Sequence[int]) -> list[TokenSequence]:
        """The sequences at these places."""
        return self.pairs.sequences_at(self._first[list(places)])


def sequence_keys(pairs: PreferenceDataset) -> tuple[Keys, int]:
    """[2P], the keys of all chosen sequences and then of all rejected ones; the largest token."""
    hashes, largest = [], 0
    for start in range(0, 2 * len(pairs), HASHED_AT_ONCE):
        places = np.arange(start, min(start + HASHED_AT_ONCE, 2 * len(pairs)))
        for tokens, begin in pairs.sequences_at(places):
            largest = max(largest, int(tokens.max()))
            salt = begin.to_bytes(16, "little")
            hashes.append(hashlib.blake2b(tokens.tobytes(), digest_size=16, salt=salt).digest())
    return np.frombuffer(b"".join(hashes), dtype="S16"), largest


def distinct_sequences(pairs: PreferenceDataset) -> DistinctSequences:
    """Each sequence of these pairs once, the longest first."""
    keys, largest = sequence_keys(pairs)
    distinct, first, of_pairs = np.unique(keys, return_index=True, return_inverse=True)
    lengths = pairs.sequence_lengths[first]
    order = np.lexsort((distinct, -lengths))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return DistinctSequences(
        pairs, distinct[order], lengths[order], largest, rank[of_pairs], first[order]
    )


def measure_sequences(
    model: nn.Module,
    distinct: DistinctSequences,
    on_batch: Callable[[list[int], Tensor], None],
    *,
    known: Collection[int] = (),
    max_batch_tokens: int = 16_384,
    impl: Implementation = "auto",
    mixed_precision: torch.dtype | None = None,
    desc: str = "scoring",
    show_progress: bool | None = None,
) -> None:
    """Log-probs of sequences, handed over batch by batch: what `measure` and the store share.

    Batches are composed of all sequences before those that are known already are left out, so that
    a pass which is interrupted and resumed computes the same bits as one which is not.

    Args:
        model: As for `measure`.
        distinct: The sequences.
        on_batch: Called with places in `distinct` and their log-probs, float64 on the CPU.
        known: Places that need not be measured.
        max_batch_tokens: As for `measure`; so are the others.
        impl: How the head's log-probs are computed.
        mixed_precision: Autocast dtype of the body.
        desc: What the progress bar says.
        show_progress: False for no progress bar.
    """
    _check_fit(model, distinct)  # a model that cannot be measured is refused before anything runs
    if len(known) == len(distinct):
        return
    with (
        _undisturbed(model),
        autocast(model, mixed_precision),
        progress_bar(
            len(distinct), desc, "responses", initial=len(known), show=show_progress
        ) as bar,
    ):
        _check_head(model, distinct.sequences([len(distinct) - 1])[0], impl)
        budget = _Budget(distinct.lengths.tolist())
        for batch in _batches(budget.lengths, max_batch_tokens):
            waiting = budget.parts([i for i in batch if i not in known])
            while waiting:
                places = waiting.pop(0)
                found = _unless_out_of_memory(
                    lambda some: response_logps(model, distinct.sequences(some), impl=impl).cpu(),
                    places,
                )
                if found is None:
                    budget.lower(places)
                    waiting = budget.parts(places) + waiting
                else:
                    on_batch(places, found)
                    bar.update(len(places))


class _Budget:
    """How many padded tokens fit in memory, learnt where too many did not."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.limit: int | None = None

    def parts(self, places: list[int]) -> list[list[int]]:
        """Places in runs that fit, as far as is known."""
        if self.limit is None or not places:
            return [places] if places else []
        lengths = [self.lengths[i] for i in places]
        return [[places[i] for i in part] for part in _batches(lengths, self.limit)]

    def lower(self, places: list[int]) -> None:
        """Learn that these did not fit.

        Raises:
            MemoryError: If it is one sequence, which cannot be made smaller.
        """
        longest = self.lengths[places[0]]
        if len(places) == 1:
            raise MemoryError(
                f"measure: a sequence of {longest:,} tokens does not fit in memory, though alone; "
                "read the pairs with a smaller max_length, or measure on a larger device"
            )
        self.limit = longest * len(places) // 2
        warn(
            f"measure: {len(places)} sequences of up to {longest:,} tokens do not fit in memory; "
            f"going on with batches of {self.limit:,} padded tokens. Pass max_batch_tokens="
            f"{self.limit} to begin with that",
            stacklevel=5,
        )


def _unless_out_of_memory(call: Callable[[list[int]], Tensor], places: list[int]) -> Tensor | None:
    """What a call gives, or None where the device's memory does not suffice."""
    try:
        return call(places)
    except RuntimeError as error:
        words = str(error)
        if "out of memory" not in words and "can't allocate memory" not in words:
            raise
    # outside the handler, which would keep alive what the call had allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def pair_logps(
    model: nn.Module, pairs: PreferenceDataset, *, impl: Implementation = "auto"
) -> PairLogps:
    """Log-probs of a few pairs in one padded batch, differentiable: what a training step needs.

    Args:
        model: A Hugging Face causal language model, in the mode it should run in.
        pairs: The pairs, `dataset.take(rows)`.
        impl: How the head's log-probs are computed, see `token_logps`.

    Returns:
        Log-probs on the model's device; gradients flow to its parameters.
    """
    logps = response_logps(model, pairs.sequences(), impl=impl)
    return joined(pairs, logps)


def response_logps(
    model: nn.Module, sequences: Sequence[TokenSequence], *, impl: Implementation = "auto"
) -> Tensor:
    """Summed log-prob of each sequence's response, float64 [S], in one padded batch.

    The head is reached from inside the model's own forward, where its weight is whole even when
    it is sharded. There it sees the positions that predict response tokens, and no others.
    """
    head = _head(model)
    device = next(model.parameters()).device
    batch = _pad(sequences)
    result: list[Tensor] = []

    def score_instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = args[0]
        result.append(
            sequence_logps(
                hidden[batch.predicts.to(device)] * head.scale,
                head.weight,
                batch.targets.to(device),
                batch.cu_seqlens,
                bias=head.bias,
                softcap=head.softcap,
                impl=impl,
            )
        )
        return (hidden[:, :0],)  # the model goes on with logits of no positions

    hook = head.module.register_forward_pre_hook(score_instead)
    try:
        model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        )
    finally:
        hook.remove()
    if len(result) != 1:
        raise TypeError(
            f"measure: the forward of {type(model).__name__} called its output head "
            f"{len(result)} times, not once"
        )
    return result[0]


class _Batch(NamedTuple):
    """S sequences padded to T tokens, and their n response tokens."""

    input_ids: Tensor  # int64 [S, T]
    attention_mask: Tensor  # int64 [S, T]
    predicts: Tensor  # bool [S, T]: the next token is scored
    targets: Tensor  # int64 [n]: these tokens, sequence by sequence
    cu_seqlens: Tensor  # int64 [S + 1]


def _pad(sequences: Sequence[TokenSequence]) -> _Batch:
    shape = (len(sequences), max(len(s.tokens) for s in sequences))
    input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    predicts = np.zeros(shape, np.bool_)
    for i, (tokens, start) in enumerate(sequences):
        input_ids[i, : len(tokens)] = tokens
        attention_mask[i, : len(tokens)] = 1
        predicts[i, start - 1 : len(tokens) - 1] = True
    targets = np.concatenate([tokens[start:] for tokens, start in sequences]).astype(np.int64)
    return _Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.from_numpy(predicts),
        torch.from_numpy(targets),
        torch.from_numpy(np.concatenate([[0], np.cumsum(predicts.sum(axis=1))])),
    )


def _batches(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[range]:
    """Runs of sequences that fit the budget when padded to their first, which is the longest."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[start] > max_batch_tokens:
            yield range(start, end)
            start = end


def joined(pairs: PreferenceDataset, logps: Tensor) -> PairLogps:
    """From sequences, all chosen and then all rejected, to pairs."""
    chosen, rejected = logps[: len(pairs)], logps[len(pairs) :]
    bad = ~(chosen.isfinite() & rejected.isfinite())
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"measure: pair {pairs.ids[first]} (row {pairs.index[first]}) has log-probs "
            f"{chosen[first].item()} and {rejected[first].item()}; the model's weights or "
            "activations are not finite"
        )
    return PairLogps(
        index=torch.from_numpy(pairs.index),
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=torch.from_numpy(pairs.chosen_tokens),
        rejected_tokens=torch.from_numpy(pairs.rejected_tokens),
    )


class _Head(NamedTuple):
    """The output head, and what the model does to its logits."""

    module: nn.Module
    softcap: float | None
    scale: float

    @property
    def weight(self) -> Tensor:
        """[V, H], looked up when it is used: a sharded weight is whole only inside the forward."""
        return cast(Tensor, self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """[V], or none."""
        return cast(Tensor | None, getattr(self.module, "bias", None))


def _head(model: nn.Module) -> _Head:
    find = getattr(model, "get_output_embeddings", None)
    module = find() if find is not None else None
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"measure: {type(model).__name__} has no output head (get_output_embeddings); pass a "
            "Hugging Face causal language model, or your own measure to the Selector"
        )
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return _Head(
        module,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
        scale=getattr(config, "logit_scale", 1.0)  # Cohere
        / getattr(config, "logits_scaling", 1.0),  # Granite
    )


def _check_fit(model: nn.Module, distinct: DistinctSequences) -> None:
    """Refuse tokens that the model cannot embed; warn of positions it was not made for."""
    _head(model)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if distinct.largest_token >= vocabulary:
        raise ValueError(
            f"measure: token {distinct.largest_token} is outside the model's vocabulary of "
            f"{vocabulary}; read the pairs with the model's own tokenizer"
        )
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    positions = getattr(config, "max_position_embeddings", None)
    longest = int(distinct.lengths.max(initial=0))
    if positions is not None and longest > positions:
        warn(
            f"measure: a sequence of {longest} tokens is longer than the {positions} positions of "
            f"{type(model).__name__}; read the pairs with max_length={positions}",
            stacklevel=3,
        )


def _check_head(model: nn.Module, sequence: TokenSequence, impl: Implementation) -> None:
    """Hold one short piece against the model's own logits: some models rescale them."""
    tokens = sequence.tokens[max(0, sequence.response_start - 32) : sequence.response_start + 32]
    start = min(sequence.response_start, 32)
    input_ids = torch.from_numpy(tokens.astype(np.int64))[None].to(next(model.parameters()).device)
    logits = model(input_ids=input_ids, use_cache=False).logits[0, start - 1 : -1]
    expected = logits.float().log_softmax(-1).gather(-1, input_ids[0, start:, None]).sum()
    found = response_logps(model, [TokenSequence(tokens, start)], impl=impl)[0]
    error = abs(float(expected) - float(found)) / (len(tokens) - start)
    if error > (1e-3 if logits.dtype == torch.float32 else 0.2):  # bf16 logits are that coarse
        raise ValueError(
            f"measure: {type(model).__name__} changes its logits after the output head in a way "
            f"this library does not know: its own log-probs differ by {error:.3g} nats per token. "
            "Pass your own measure to the Selector"
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; modes and generators as before afterwards."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def autocast(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision on the model's device; none where the dtype is None."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield

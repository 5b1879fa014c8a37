"""Measuring: forward passes of a causal language model over pairs, to `PairLogps`."""

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar
from warnings import warn
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sage_select.costs import BACKWARD, BoolArray, Shape, book, recording, shape_of
from sage_select.dataset import PreferenceDataset, TokenSequence
from sage_select.hashing import Int64Array
from sage_select.heads import head_of, of_transformers, text_config
from sage_select.ops.token_logps import Implementation, sequence_logps
from sage_select.packing import Batch, Packing, pack, packed_attention, packs, pad
from sage_select.pairs import PairLogps
from sage_select.progress import progress_bar

Layout = Literal["auto", "packed", "padded"]
In = TypeVar("In")
Out = TypeVar("Out")

HASHED_AT_ONCE = 4096  # sequences whose tokens are in memory while keys are made


def measure(
    model: nn.Module,
    pool: PreferenceDataset,
    *,
    max_batch_tokens: int = 16_384,
    layout: Layout = "auto",
    impl: Implementation = "auto",
    mixed_precision: torch.dtype | None = None,
    show_progress: bool | None = None,
) -> PairLogps:
    """Summed log-probs of every response of a pool under a model: one forward-only pass.

    The model runs in eval mode, without gradients or cache. Its modes, its gradients and the
    generators' state are left as they were. Distinct responses, not pairs, are batched to a token
    budget, the longest first, so that what does not fit in memory fails at once; responses to one
    prompt stand together, and the prompt is computed once.

    Args:
        model: A Hugging Face causal language model; or any module that maps token ids to logits
            and whose forward calls its `lm_head`.
        pool: The pairs, `dataset` or `dataset.take(rows)`.
        max_batch_tokens: Tokens of one forward pass; a longer sequence runs alone. Where so many
            do not fit in memory, the budget is halved, with a warning, and no pair is lost.
        layout: "packed" lays the sequences of a batch end to end, with attention to each one alone;
            "padded" fills them up to the longest; "auto" packs if a first batch shows that the
            model gives the same log-probs so, and else pads, with a warning.
        impl: How the head's log-probs are computed, see `token_logps`.
        mixed_precision: Autocast dtype of the body, as in training; the head stays in fp32.
        show_progress: False for no progress bar.

    Returns:
        Log-probs of the pool's pairs, in its order, on the CPU.

    Raises:
        TypeError: If the model has no output head to reach.
        ValueError: If a token is outside the model's vocabulary, the model does something to its
            logits that this library does not know, cannot be packed though that was asked for,
            or a log-prob is not finite.
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
        layout=layout,
        impl=impl,
        mixed_precision=mixed_precision,
        show_progress=show_progress,
    )
    return joined(pool, logps[distinct.of_pairs])


Keys = npt.NDArray[np.bytes_]
"""16 bytes per sequence. Fixed-size byte strings are compared whole: numpy ignores zeros at an end,
but two strings of one size that differ in nothing else are equal."""


class SequenceKeys(NamedTuple):
    """What tells the 2P sequences of some pairs apart, all chosen and then all rejected."""

    sequences: Keys  # [2P], of the tokens and of where the response starts
    prompts: Keys  # [2P], of the tokens before that
    starts: Int64Array  # [2P], where the response starts
    largest_token: int

    def at(self, rows: Int64Array) -> "SequenceKeys":
        """Those of some of the pairs, by their places."""
        places = np.concatenate([rows, rows + len(self.starts) // 2])
        return SequenceKeys(
            self.sequences[places], self.prompts[places], self.starts[places], self.largest_token
        )


@dataclass(frozen=True)
class DistinctSequences:
    """D different sequences among the 2P of some pairs, those of one prompt together.

    Pairs of one prompt often share a response. Ordered by length and content, what is batched with
    what does not depend on the order of the rows. Tokens are looked up when they are needed: a set
    larger than memory can be measured.

    Attributes:
        pairs: The pairs.
        keys: [D], a hash of each sequence's tokens and of where the response starts.
        prompts: int64 [D], a number for each prompt.
        starts: int64 [D], tokens of the prompt.
        lengths: int64 [D], tokens; those of one prompt descend.
        largest_token: Of all of them.
        of_pairs: int64 [2P], for all chosen and then all rejected, which sequence it is.
    """

    pairs: PreferenceDataset
    keys: Keys
    prompts: Int64Array
    starts: Int64Array
    lengths: Int64Array
    largest_token: int
    of_pairs: Int64Array
    _first: Int64Array  # [D], a place among the 2P where it stands

    def __len__(self) -> int:
        return len(self.keys)

    def sequences(self, places: Sequence[int]) -> list[TokenSequence]:
        """The sequences at these places."""
        return self.pairs.sequences_at(self._first[list(places)])

    def tokens(self, places: Sequence[int], *, packed: bool) -> int:
        """Tokens of a batch of these places: padding counts, and a shared prompt once."""
        lengths = self.lengths[list(places)]
        if not packed:
            return int(lengths.max()) * len(lengths)
        return int(lengths.sum() - self.starts[places][~self.first_of_prompt(places)].sum())

    def first_of_prompt(self, places: Sequence[int] | Int64Array) -> BoolArray:
        """bool, False where the place before has the same prompt."""
        prompts = self.prompts[list(places)]
        return np.concatenate([[True], prompts[1:] != prompts[:-1]])[: len(prompts)]

    def needed(self, places: Int64Array) -> tuple[Int64Array, Int64Array, BoolArray]:
        """What `Shape.needed` takes: of these places, starts, lengths and which come first."""
        return self.starts[places], self.lengths[places], self.first_of_prompt(places)

    def batches(
        self, max_tokens: int, *, packed: bool, among: Sequence[int] | None = None
    ) -> Iterator[list[int]]:
        """Places in batches of at most so many tokens; a longer sequence stands alone.

        Args:
            max_tokens: Tokens that go through the model: padding counts, and a shared prompt once.
            packed: Whether batches are packed, or else padded to their longest.
            among: The places to batch, all by default.
        """
        order = np.arange(len(self)) if among is None else np.sort(np.asarray(among, np.int64))
        if not packed:
            order = order[np.argsort(-self.lengths[order], kind="stable")]
        prompts, starts, lengths = (
            x[order].tolist() for x in (self.prompts, self.starts, self.lengths)
        )
        batch: list[int] = []
        used = 0
        for i, place in enumerate(order.tolist()):
            if packed:
                shared = starts[i] if batch and prompts[i] == prompts[i - 1] else 0
                after = used + lengths[i] - shared
            else:
                after = (len(batch) + 1) * lengths[i - len(batch)]
            if batch and after > max_tokens:
                yield batch
                batch, after = [], lengths[i]
            batch.append(place)
            used = after
        if batch:
            yield batch


def sequence_keys(pairs: PreferenceDataset) -> SequenceKeys:
    """Hashes of all chosen sequences and then of all rejected ones."""
    hashes, prompts, starts, largest = [], [], [], 0
    for start in range(0, 2 * len(pairs), HASHED_AT_ONCE):
        places = np.arange(start, min(start + HASHED_AT_ONCE, 2 * len(pairs)))
        for tokens, begin in pairs.sequences_at(places):
            largest = max(largest, int(tokens.max()))
            salt = begin.to_bytes(16, "little")
            key = hashlib.blake2b(tokens[:begin].tobytes(), digest_size=16, salt=salt)
            prompts.append(key.digest())
            key.update(tokens[begin:].tobytes())
            hashes.append(key.digest())
            starts.append(begin)
    return SequenceKeys(
        np.frombuffer(b"".join(hashes), dtype="S16"),
        np.frombuffer(b"".join(prompts), dtype="S16"),
        np.array(starts, dtype=np.int64),
        largest,
    )


def distinct_sequences(
    pairs: PreferenceDataset, keys: SequenceKeys | None = None
) -> DistinctSequences:
    """Each sequence of these pairs once, the prompt of the longest first.

    Args:
        pairs: The pairs.
        keys: Their keys, where they are at hand.
    """
    sequences, prompts, starts, largest = sequence_keys(pairs) if keys is None else keys
    distinct, first, of_pairs = np.unique(sequences, return_index=True, return_inverse=True)
    lengths = pairs.sequence_lengths[first]
    _, prompt = np.unique(prompts[first], return_inverse=True)
    longest = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(longest, prompt, lengths)
    order = np.lexsort((distinct, -lengths, prompt, -longest[prompt]))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return DistinctSequences(
        pairs,
        distinct[order],
        prompt[order],
        starts[first][order],
        lengths[order],
        largest,
        rank[of_pairs],
        first[order],
    )


def measure_sequences(
    model: nn.Module,
    distinct: DistinctSequences,
    on_batch: Callable[[list[int], Tensor], None],
    *,
    known: Collection[int] = (),
    max_batch_tokens: int = 16_384,
    layout: Layout = "auto",
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
        layout: How batches are laid out.
        impl: How the head's log-probs are computed.
        mixed_precision: Autocast dtype of the body.
        desc: What the progress bar says.
        show_progress: False for no progress bar.
    """
    _check_fit(model, distinct)  # a model that cannot be measured is refused before anything runs
    if len(known) == len(distinct):
        return
    new = np.setdiff1d(np.arange(len(distinct)), np.fromiter(known, np.int64))
    with _undisturbed(model), autocast(model, mixed_precision):
        _check_head(model, distinct.sequences([len(distinct) - 1])[0], impl)
        packed = _packed(model, _sample(distinct), layout, impl)
        learnt = _learnt(model)
        if recording():
            book(learnt.shape.needed(*distinct.needed(new)))
        with (
            packed_attention(model) if packed else nullcontext(),
            _Rates(distinct, int(distinct.lengths[new].sum()), desc, show_progress) as rates,
        ):
            lay_out = pack if packed else pad
            for batch in distinct.batches(max_batch_tokens, packed=packed):
                waiting = _parts(distinct, [i for i in batch if i not in known], packed, learnt)
                while waiting:
                    places = waiting.pop(0)
                    found = _unless_out_of_memory(
                        lambda some: _forward(model, lay_out(distinct.sequences(some)), impl).cpu(),
                        places,
                    )
                    if found is None:
                        learnt.limit = _smaller(distinct, places, packed, learnt.limit)
                        waiting = _parts(distinct, places, packed, learnt) + waiting
                    else:
                        on_batch(places, found)
                        rates.update(places)


def _parts(
    distinct: DistinctSequences, places: list[int], packed: bool, learnt: "_Learnt"
) -> list[list[int]]:
    """Places in runs that fit in memory, as far as is known."""
    if learnt.limit is None or not places:
        return [places] if places else []
    return list(distinct.batches(learnt.limit, packed=packed, among=places))


def _smaller(
    distinct: DistinctSequences, places: list[int], packed: bool, limit: int | None
) -> int:
    """Half of the tokens that did not fit.

    Raises:
        MemoryError: If it is one sequence, which cannot be made smaller.
    """
    longest = int(distinct.lengths[places].max())
    if len(places) == 1:
        raise MemoryError(
            f"measure: a sequence of {longest:,} tokens does not fit in memory, though alone; "
            "read the pairs with a smaller max_length, or measure on a larger device"
        )
    used = distinct.tokens(places, packed=packed)
    half = min(used, limit or used) // 2
    warn(
        f"measure: {len(places)} sequences of up to {longest:,} tokens do not fit in memory; "
        f"going on with batches of {half:,} tokens. Pass max_batch_tokens={half} to begin with "
        "that",
        stacklevel=4,
    )
    return half


class _Rates:
    """A progress bar over tokens, of which there are as many in a second at the end as before."""

    def __init__(
        self, distinct: DistinctSequences, total: int, desc: str, show: bool | None
    ) -> None:
        self.lengths = distinct.lengths
        self.pairs_per_token = len(distinct.pairs) / max(1, int(distinct.lengths.sum()))
        self.bar = progress_bar(total, desc, "tokens", scaled=True, show=show)

    def __enter__(self) -> "_Rates":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, places: list[int]) -> None:
        """These were measured."""
        self.bar.update(int(self.lengths[places].sum()))
        seconds = time.perf_counter() - self.start
        pairs = self.pairs_per_token * self.bar.n
        self.bar.set_postfix_str(f"{pairs / seconds:.3g} pairs/s", refresh=False)


def _sample(distinct: DistinctSequences) -> list[TokenSequence]:
    """The longest sequence, two of one prompt if there are, and the last."""
    repeated = np.flatnonzero(~distinct.first_of_prompt(np.arange(len(distinct))))[:1]
    places = {0, len(distinct) - 1, *(repeated - 1).tolist(), *repeated.tolist()}
    return distinct.sequences(sorted(places))


_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")


def _unless_out_of_memory(call: Callable[[list[In]], Out], batch: list[In]) -> Out | None:
    """What a call gives, or None where the device's memory does not suffice."""
    try:
        return call(batch)
    except RuntimeError as error:
        if not _OUT_OF_MEMORY.search(str(error)):
            raise
    # outside the handler, which would keep alive what the call had allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def pair_logps(
    model: nn.Module,
    pairs: PreferenceDataset,
    *,
    layout: Layout = "auto",
    impl: Implementation = "auto",
) -> PairLogps:
    """Log-probs of a few pairs in one batch, differentiable: what a training step needs.

    Args:
        model: A Hugging Face causal language model, in the mode it should run in.
        pairs: The pairs, `dataset.take(rows)`.
        layout: As in `measure`. With activation checkpointing a packed batch needs its backward
            pass inside `packed_attention(model)` too; where it is not, "auto" pads.
        impl: How the head's log-probs are computed, see `token_logps`.

    Returns:
        Log-probs on the model's device; gradients flow to its parameters.
    """
    return joined(pairs, response_logps(model, pairs.sequences(), layout=layout, impl=impl))


@contextmanager
def updating(
    model: nn.Module,
    pairs: PreferenceDataset,
    *,
    layout: Layout = "auto",
    mixed_precision: torch.dtype | None = None,
) -> Iterator[None]:
    """Around forward and backward of one batch: `pair_logps` packs inside, where that is exact.

    Without it `pair_logps` packs too, but for models whose activations are recomputed in backward.

    Args:
        model: As for `pair_logps`.
        pairs: The batch.
        layout: As in `measure`.
        mixed_precision: Autocast dtype of the forward pass.
    """
    with autocast(model, mixed_precision):
        packed = _packed(model, pairs.sequences(), layout, "auto")
    with packed_attention(model) if packed else nullcontext():
        yield


def response_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    layout: Layout = "auto",
    impl: Implementation = "auto",
) -> Tensor:
    """Summed log-prob of each sequence's response, float64 [S], in one batch; differentiable.

    Args:
        model: As for `pair_logps`; so are the others.
        sequences: Such as `pairs.responses()`.
        layout: How the batch is laid out.
        impl: How the head's log-probs are computed.
    """
    if recording():
        starts = np.array([s.response_start for s in sequences])
        lengths = np.array([len(s.tokens) for s in sequences])
        prompts = np.array([hash(s.tokens[: s.response_start].tobytes()) for s in sequences])
        first = np.zeros(len(sequences), dtype=bool)
        first[np.unique(prompts, return_index=True)[1]] = True
        needed = _learnt(model).shape.needed(starts, lengths, first)
        book(needed.with_backward if torch.is_grad_enabled() else needed)
    if packs(model):
        return _forward(model, pack(sequences), impl)
    if not _packed(model, sequences, layout, impl):
        return _forward(model, pad(sequences), impl)
    if torch.is_grad_enabled() and _recomputes(model):
        if layout == "packed":
            raise ValueError(
                "pair_logps: the model recomputes its activations in the backward pass, where a "
                "packed batch needs its attention again; put forward and backward inside `with "
                "packed_attention(model):`"
            )
        return _forward(model, pad(sequences), impl)
    with packed_attention(model):
        return _forward(model, pack(sequences), impl)


def _forward(model: nn.Module, batch: Batch, impl: Implementation) -> Tensor:
    """Log-probs of a batch's responses, in the mode in which the model is.

    The head is reached from inside the model's own forward, where its weight is whole even when
    it is sharded. There it sees the positions that predict response tokens, and no others.
    """
    head = head_of(model)
    on_device = batch.to(_device(model))
    result: list[Tensor] = []

    def score_instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = args[0]
        result.append(
            sequence_logps(
                hidden.reshape(-1, hidden.shape[-1])[on_device.predicts] * head.scale,
                head.weight,
                on_device.targets,
                on_device.cu_seqlens,
                bias=head.bias,
                softcap=head.softcap,
                impl=impl,
            )
        )
        return (hidden[:, :0],)  # the model goes on with logits of no positions

    hook = head.module.register_forward_pre_hook(score_instead)
    try:
        _call(model, on_device.inputs)
    finally:
        hook.remove()
    if len(result) != 1:
        raise TypeError(
            f"measure: the forward of {type(model).__name__} called its output head "
            f"{len(result)} times, not once"
        )
    if recording():
        rows, length = batch.inputs["input_ids"].shape
        packing: Packing | None = batch.inputs.get("packing")
        lengths = np.full(rows, length) if packing is None else np.diff(packing.bounds)
        work = _learnt(model).shape.executed(rows * length, len(batch.targets), lengths)
        if torch.is_grad_enabled():
            work = work.with_passes(1 + BACKWARD + _recomputes(model))
        book(work)
    return result[0]


def _recomputes(model: nn.Module) -> bool:
    """Whether layers are computed again in the backward pass (activation checkpointing)."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's forward; a module that is not of transformers gets token ids alone."""
    if of_transformers(model):
        return model(**inputs)
    return model(inputs["input_ids"])  # padding on the right cannot reach the tokens before it


@dataclass
class _Learnt:
    """What is known of a model after it was tried."""

    shape: Shape
    limit: int | None = None  # tokens of a batch that fit in memory
    packs: dict[tuple[object, ...], str] = field(default_factory=dict)  # why it does not, or ""


_models: WeakKeyDictionary[nn.Module, _Learnt] = WeakKeyDictionary()


def _learnt(model: nn.Module) -> _Learnt:
    if model not in _models:
        _models[model] = _Learnt(shape_of(model))
    return _models[model]


def _packed(
    model: nn.Module, sequences: Sequence[TokenSequence], layout: Layout, impl: Implementation
) -> bool:
    """Whether to pack: if it was asked for and gives what padding gives, tried once per model.

    Raises:
        ValueError: If it was asked for and does not.
    """
    if layout not in ("auto", "packed", "padded"):
        raise ValueError(f"measure: layout must be auto, packed or padded, got {layout!r}")
    if layout == "padded":
        return False
    device = _device(model)
    weight = next(model.parameters())
    autocasts = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    prompts = {s.tokens[: s.response_start].tobytes() for s in sequences}
    shares = len(prompts) < len(sequences)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    path = (device, weight.dtype, autocasts, attention, shares)
    reasons = _learnt(model).packs
    if path not in reasons:
        with _undisturbed(model):
            reasons[path] = _proof(model, _telling(sequences), impl)
        if reasons[path] and layout == "auto":
            warn(
                f"measure: batches of {type(model).__name__} are padded, not packed, which costs "
                f"time: {reasons[path]}. layout='padded' says that it is meant",
                stacklevel=4,
            )
    if reasons[path] and layout == "packed":
        raise ValueError(
            f"measure: batches of {type(model).__name__} cannot be packed: {reasons[path]}; use "
            "layout='auto' or 'padded'"
        )
    return not reasons[path]


def _proof(model: nn.Module, sequences: list[TokenSequence], impl: Implementation) -> str:
    """Why not to pack, from as many of these as fit in memory; "" if nothing speaks against it."""
    for start in range(len(sequences)):
        reason = _unless_out_of_memory(
            lambda some: _why_not_packed(model, some, impl), sequences[start:]
        )
        if reason is not None:
            return reason
    return "not even its shortest sequence fits in memory beside itself"


def _telling(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """A few sequences that would tell if packing were wrong: the longest, one that shares its
    prompt with another and that other, and the shortest."""
    ordered = sorted(sequences, key=lambda s: -len(s.tokens))
    by_prompt: dict[bytes, TokenSequence] = {}
    chosen = {id(ordered[0]): ordered[0], id(ordered[-1]): ordered[-1]}
    for s in ordered:
        other = by_prompt.setdefault(s.tokens[: s.response_start].tobytes(), s)
        if other is not s:
            chosen |= {id(other): other, id(s): s}
            break
    return list(chosen.values())


PACKING_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Nats per root of a response's tokens by which packing may change a log-prob: rounding alone."""


def _why_not_packed(model: nn.Module, sequences: list[TokenSequence], impl: Implementation) -> str:
    """Hold a packed batch against the same sequences one by one; the reason if it will not do."""
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        return "it is compiled, and would be compiled again for every packed batch"
    if not of_transformers(model):
        return "it is no model of transformers, whose attention can be told of sequences"
    alone = torch.cat([_forward(model, pad([s]), impl) for s in sequences])
    if not bool(alone.isfinite().all()):
        return ""  # which says nothing of packing, and is an error of its own
    together = _forward(model, pad(sequences), impl)
    try:
        with packed_attention(model):
            packed = _forward(model, pack(sequences), impl)
    except (TypeError, ValueError, RuntimeError, ImportError) as refusal:
        if _OUT_OF_MEMORY.search(str(refusal)):
            raise  # which says nothing of packing either
        return f"its forward refuses them: {str(refusal).splitlines()[0]}"
    roots = torch.tensor([float(len(s.tokens) - s.response_start) for s in sequences]).sqrt()
    error, noise = (
        float(((found - alone).abs().cpu() / roots).max()) for found in (packed, together)
    )
    device = _device(model).type
    dtype = next(model.parameters()).dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if error <= PACKING_ERROR.get(dtype, 1e-4) + 4 * noise:
        return ""
    return (
        f"log-probs of {len(sequences)} packed sequences differ from those of each alone by "
        f"{error:.2g} nats per root of their tokens, where padding gives {noise:.2g}"
    )


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


def _check_fit(model: nn.Module, distinct: DistinctSequences) -> None:
    """Refuse tokens that the model cannot embed; warn of positions it was not made for."""
    head = head_of(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = len(head.weight) if embedding is None else embedding.num_embeddings
    if distinct.largest_token >= vocabulary:
        raise ValueError(
            f"measure: token {distinct.largest_token} is outside the model's vocabulary of "
            f"{vocabulary}; read the pairs with the model's own tokenizer"
        )
    positions = getattr(text_config(model), "max_position_embeddings", None)
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
    piece = TokenSequence(tokens, min(sequence.response_start, 32))
    batch = pad([piece]).to(_device(model))
    output = _call(model, batch.inputs)
    logits = getattr(output, "logits", output)[0, piece.response_start - 1 :]
    expected = logits.float().log_softmax(-1).gather(-1, batch.targets[:, None]).sum()
    found = _forward(model, pad([piece]), impl)[0]
    error = abs(float(expected) - float(found)) / len(batch.targets)
    if error > (1e-3 if logits.dtype == torch.float32 else 0.2):  # bf16 logits are that coarse
        raise ValueError(
            f"measure: {type(model).__name__} changes its logits after the output head in a way "
            f"this library does not know: its own log-probs differ by {error:.3g} nats per token. "
            "Pass your own measure to the Selector"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; modes and generators as before afterwards."""
    training = [module for module in model.modules() if module.training]
    device = _device(model)
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
    with torch.autocast(_device(model).type, dtype=dtype, enabled=dtype is not None):
        yield

"""Measuring: forward passes of a causal language model over pairs, to `PairLogps`."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn

from sage_select.arrays import BoolArray
from sage_select.data.dataset import PreferenceDataset, TokenSequence
from sage_select.models.forward import autocast, forward_logps, known_shape, recomputes, undisturbed
from sage_select.models.heads import head_of, text_config
from sage_select.models.packing import Batch, pack, packed_attention, packs, pad
from sage_select.models.sequences import DistinctSequences, distinct_sequences
from sage_select.models.trials import Layout, check_head, is_out_of_memory, packs_exactly
from sage_select.models.wrappers import checked, is_sharded, resharded, uncompiled, unwrapped
from sage_select.ops.token_logps import Implementation
from sage_select.pairs import PairLogps
from sage_select.system.heartbeats import at, watched
from sage_select.system.ledger import book, recording
from sage_select.system.processes import Processes
from sage_select.system.progress_bars import progress_bar


def measure(
    model: nn.Module,
    pool: PreferenceDataset,
    *,
    max_batch_tokens: int = 16_384,
    layout: Layout = "auto",
    impl: Implementation = "auto",
    mixed_precision: torch.dtype | None = None,
    processes: Processes | None = None,
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
        processes: Those that share the work, all of which must call with the same pool; by default
            every process that torch.distributed knows of. `Processes()` is this one alone.
        show_progress: False for no progress bar.

    Returns:
        Log-probs of the pool's pairs, in its order, on the CPU; the same bits in every process and
        for any number of processes.

    Raises:
        TypeError: If the model has no output head to reach.
        ValueError: If a token is outside the model's vocabulary, the model does something to its
            logits that this library does not know, cannot be packed though that was asked for,
            or a log-prob is not finite.
        MemoryError: If a single sequence does not fit in memory.
    """
    processes = Processes.all() if processes is None else processes
    distinct = distinct_sequences(pool)
    logps = torch.zeros(len(distinct), dtype=torch.float64)

    def keep(places: list[int], found: Tensor) -> None:
        logps[places] = found

    with watched(processes):
        measure_sequences(
            model,
            distinct,
            keep,
            max_batch_tokens=max_batch_tokens,
            layout=layout,
            impl=impl,
            mixed_precision=mixed_precision,
            processes=processes,
            show_progress=show_progress,
        )
        # each log-prob comes from one process, and is zero in the others: the sum changes no bit
        logps = processes.total(logps.to(processes.device)).cpu()
    return joined(pool, logps[distinct.of_pairs])


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
    processes: Processes | None = None,
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
        processes: Those among which batches are dealt; each hands over those it measured.
        desc: What the progress bar says.
        show_progress: False for no progress bar.
    """
    processes = Processes.all() if processes is None else processes
    model = checked(model)
    new = np.ones(len(distinct), dtype=bool)
    new[list(known)] = False
    _check_same(processes, distinct, new, max_batch_tokens)
    _check_fit(model, distinct)  # a model that cannot be measured is refused before anything runs
    if not new.any():
        return
    sharded = is_sharded(model)
    with resharded(model), undisturbed(model), autocast(model, mixed_precision):
        check_head(model, distinct.sequences([len(distinct) - 1])[0], impl)
        packed = packs_exactly(model, distinct.sequences([0]), layout, impl, max_batch_tokens)
        # batches are composed before they are dealt: the same for any number of processes
        batches = [b for b in distinct.batches(max_batch_tokens, packed=packed) if new[b].any()]
        own = batches[processes.rank :: processes.size]
        if recording():
            # in their order, where those of one prompt stand together
            mine = np.sort([place for batch in own for place in batch if new[place]])
            book(known_shape(model).needed(*distinct.needed(mine.astype(np.int64))))
        limit = max_batch_tokens
        total = int(sum(distinct.lengths[b][new[b]].sum() for b in own))
        show = show_progress if processes.rank == 0 else False
        with _Rates(distinct, total, desc, show, processes.size) as rates:
            for i, batch in enumerate(own, 1):
                first, last = distinct.rows(batch)
                at(f"{desc}, batch {i} of {len(own)}, pairs in rows {first} to {last}")
                waiting = [batch]
                while waiting:
                    # parts, too, are composed before those that are known are left out
                    part, *rest = distinct.batches(limit, packed=packed, among=waiting.pop(0))
                    waiting = rest + waiting
                    places = [place for place in part if new[place]]
                    if not places:
                        continue
                    sequences = distinct.sequences(places)
                    found = _if_it_fits(model, pack(sequences) if packed else pad(sequences), impl)
                    if found is not None:
                        on_batch(places, found)
                        rates.update(places)
                        continue
                    limit = _smaller(distinct, part, packed)
                    if sharded and processes.size > 1:  # the others wait for this very forward
                        raise MemoryError(
                            "measure: processes that share a model's weights cannot make a batch "
                            f"smaller one by one; begin with max_batch_tokens={limit}"
                        )
                    waiting = [part, *waiting]
        if sharded and len(own) < len(batches[:: processes.size]):
            # every process makes as many forward calls, or the others would wait for its weights
            sequences = distinct.sequences([place for place in batches[-1] if new[place]])
            forward_logps(model, pack(sequences) if packed else pad(sequences), impl)
    at(f"{desc}, done with {len(own)} batches")


def _check_same(
    processes: Processes, distinct: DistinctSequences, new: BoolArray, max_batch_tokens: int
) -> None:
    """All processes must be about to measure the same.

    Raises:
        ValueError: If they are not.
    """
    said = hashlib.blake2b(str(max_batch_tokens).encode(), digest_size=7)
    said.update(distinct.keys.tobytes())
    said.update(new.tobytes())
    facts = [len(distinct.pairs), len(distinct), int.from_bytes(said.digest())]
    every = processes.agree(facts)
    for rank, facts in enumerate(every):
        if facts != every[0]:
            raise ValueError(
                f"measure: process {rank} came with {facts[0]} pairs of {facts[1]} responses, "
                f"process 0 with {every[0][0]} of {every[0][1]}, or with others; processes that "
                "measure together need the same pool, budget and reference store. To measure in "
                "one process alone, pass processes=Processes()"
            )


def _smaller(distinct: DistinctSequences, places: list[int], packed: bool) -> int:
    """About half of the tokens that did not fit: a power of two, the same wherever it is learnt.

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
    half = 1 << (used - 1).bit_length() - 1
    warn(
        f"measure: {len(places)} sequences of up to {longest:,} tokens do not fit in memory; "
        f"going on with batches of {half:,} tokens. Pass max_batch_tokens={half} to begin with "
        "that",
        stacklevel=4,
    )
    return half


def _if_it_fits(model: nn.Module, batch: Batch, impl: Implementation) -> Tensor | None:
    """A batch's log-probs on the CPU, or None where the device's memory does not suffice."""
    try:
        return forward_logps(model, batch, impl).cpu()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler, which would keep alive what the call had allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class _Rates:
    """A progress bar over tokens, of which there are as many in a second at the end as before."""

    def __init__(
        self,
        distinct: DistinctSequences,
        total: int,
        desc: str,
        show: bool | None,
        processes: int,
    ) -> None:
        self.lengths = distinct.lengths
        pairs_per_token = len(distinct.pairs) / max(1, int(distinct.lengths.sum()))
        self.pairs_per_token = pairs_per_token * processes
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
            pass inside `updating` or `packed_attention`, too; where it is not, "auto" pads.
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
    model = unwrapped(model)
    with autocast(model, mixed_precision):
        packed = packs_exactly(model, pairs.sequences(), layout, "auto")
    with packed_attention(model) if packed else nullcontext():
        yield


def check_updates(
    model: nn.Module,
    pairs: PreferenceDataset,
    *,
    layout: Layout = "auto",
    impl: Implementation = "auto",
    mixed_precision: torch.dtype | None = None,
) -> None:
    """Find out before training whether and how batches of these pairs can be made.

    Args:
        model: As for `pair_logps`.
        pairs: All that will be trained on; the longest sequence is tried.
        layout: As in `measure`.
        impl: How the head's log-probs are computed.
        mixed_precision: Autocast dtype of the forward pass.

    Raises:
        ValueError: If the model cannot be read, or not be packed though that was asked for.
    """
    longest = pairs.sequences_at(
        np.flatnonzero(pairs.sequence_lengths == pairs.sequence_lengths.max())[:1]
    )
    model = checked(model)
    with resharded(model), autocast(model, mixed_precision):
        check_head(model, longest[0], impl, again=False)
        packs_exactly(model, longest, layout, impl)


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
    if not sequences:
        return torch.zeros(0, dtype=torch.float64)
    through, model = uncompiled(model), checked(model)
    check_head(model, sequences[0], impl, again=False)
    packed = packs_exactly(model, sequences, layout, impl)
    if packed and torch.is_grad_enabled() and recomputes(model) and not packs(model):
        if layout == "packed":
            raise ValueError(
                "pair_logps: the model recomputes its activations in the backward pass, where a "
                "packed batch needs its attention again; put forward and backward inside `with "
                "updating(model, pairs):`"
            )
        packed = False
    if recording():
        _book_needed(model, sequences)
    return forward_logps(through, pack(sequences) if packed else pad(sequences), impl)


def _book_needed(model: nn.Module, sequences: Sequence[TokenSequence]) -> None:
    prompts = [s.tokens[: s.response_start].tobytes() for s in sequences]
    starts = np.array([s.response_start for s in sequences])
    lengths = np.array([len(s.tokens) for s in sequences])
    first = np.array([prompts.index(prompt) == i for i, prompt in enumerate(prompts)])
    shape = known_shape(model)
    needed = shape.needed(starts, lengths, first)
    book(needed * shape.passes if torch.is_grad_enabled() else needed)


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
    vocabulary = len(head.weight if embedding is None else embedding.weight)
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

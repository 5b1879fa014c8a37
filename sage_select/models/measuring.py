"""Forward-only passes over many sequences: checks, batches that fit in memory, progress."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from sage_select.arrays import BoolArray
from sage_select.models.batches import Batch, lay_out
from sage_select.models.forward import forward_logps
from sage_select.models.heads import base_layer, head_of, text_config
from sage_select.models.sequences import DistinctSequences
from sage_select.models.trials import is_out_of_memory
from sage_select.ops.token_logps import Implementation
from sage_select.system.heartbeats import beat
from sage_select.system.processes import Processes
from sage_select.system.progress_bars import progress_bar


def forward_batches(
    model: nn.Module,
    distinct: DistinctSequences,
    batches: Sequence[Sequence[int]],
    new: BoolArray,
    *,
    packed: bool,
    impl: Implementation,
    max_tokens: int,
    may_shrink: bool,
    desc: str,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run batches in order, splitting those that do not fit in memory.

    Args:
        model: The model, in eval mode and without gradients.
        distinct: The sequences.
        batches: Indices into `distinct`, batch by batch.
        new: bool [D], False for sequences that need not be measured.
        packed: True for packed batches, False for padded ones.
        impl: Implementation of the head's log-probs.
        max_tokens: Token budget for splitting, halved whenever a part does not fit.
        may_shrink: False if other processes take part in the same forward pass.
        desc: Name of the pass, for heartbeats.

    Yields:
        Indices, and the summed log-probs of their responses, float64 on the CPU.

    Raises:
        MemoryError: If a single sequence does not fit, or a part does not and `may_shrink` is
            False.
    """
    for i, batch in enumerate(batches, 1):
        first, last = distinct.rows(batch)
        beat(f"{desc}, batch {i} of {len(batches)}, pairs in rows {first} to {last}")
        waiting: list[Sequence[int]] = [batch]
        while waiting:
            # known sequences are skipped only after splitting, so that a resumed pass computes
            # the same parts
            part, *rest = distinct.batches(max_tokens, packed=packed, among=waiting.pop(0))
            waiting = [*rest, *waiting]
            places = [place for place in part if new[place]]
            if not places:
                continue
            logps = _logps_if_fit(model, lay_out(distinct.sequences(places), packed=packed), impl)
            if logps is not None:
                yield places, logps
                continue
            max_tokens = _smaller(distinct, part, packed)
            if not may_shrink:
                raise MemoryError(
                    "measure: a batch does not fit in memory, and processes that share a model's "
                    "weights cannot split it independently; start with "
                    f"max_batch_tokens={max_tokens}"
                )
            waiting = [part, *waiting]


def check_same_pass(
    processes: Processes, distinct: DistinctSequences, new: BoolArray, max_batch_tokens: int
) -> None:
    """Refuse a pass for which processes have different sequences, budgets or stores.

    Raises:
        ValueError: If they differ in any rank.
    """
    fingerprint = hashlib.blake2b(str(max_batch_tokens).encode(), digest_size=7)  # fits in int64
    fingerprint.update(distinct.keys.tobytes())
    fingerprint.update(new.tobytes())
    facts = [len(distinct.pairs), len(distinct), int.from_bytes(fingerprint.digest())]
    by_rank = processes.all_gather(facts)
    for rank, facts in enumerate(by_rank):
        if facts != by_rank[0]:
            raise ValueError(
                f"measure: process {rank} came with {facts[0]} pairs of {facts[1]} responses, "
                f"process 0 with {by_rank[0][0]} of {by_rank[0][1]}, or their contents differ; "
                "processes that measure together need the same pool, budget and reference store. "
                "To measure in this process only, pass processes=Processes()"
            )


def _smaller(distinct: DistinctSequences, places: list[int], packed: bool) -> int:
    """Return about half of the tokens that did not fit, with a warning.

    Raises:
        MemoryError: If it is a single sequence, which cannot be split.
    """
    longest = int(distinct.lengths[places].max())
    if len(places) == 1:
        raise MemoryError(
            f"measure: a sequence of {longest:,} tokens does not fit in memory, even alone; "
            "read the pairs with a smaller max_length, or measure on a larger device"
        )
    used = distinct.tokens(places, packed=packed)
    # a power of two, so that processes and runs settle on equal budgets
    half = 1 << (used - 1).bit_length() - 1
    warn(
        f"measure: {len(places)} sequences of up to {longest:,} tokens do not fit in memory; "
        f"continuing with batches of {half:,} tokens. Pass max_batch_tokens={half} to start with "
        "that size",
        stacklevel=4,
    )
    return half


def _logps_if_fit(model: nn.Module, batch: Batch, impl: Implementation) -> Tensor | None:
    """Return a batch's log-probs on the CPU, or None if the device runs out of memory."""
    try:
        return forward_logps(model, batch, impl).cpu()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler, where the exception would keep the failed call's tensors alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class Rates:
    """A progress bar in tokens, whose rate stays steady while sequences get shorter."""

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

    def __enter__(self) -> "Rates":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, places: list[int]) -> None:
        """Advance the bar by the sequences with these indices."""
        self.bar.update(int(self.lengths[places].sum()))
        seconds = time.perf_counter() - self.start
        pairs = self.pairs_per_token * self.bar.n
        self.bar.set_postfix_str(f"{pairs / seconds:.3g} pairs/s", refresh=False)


def check_tokens_fit(model: nn.Module, distinct: DistinctSequences) -> None:
    """Refuse tokens outside the model's vocabulary; warn of sequences beyond its positions."""
    head = head_of(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    layer: Any = base_layer(head.module if embedding is None else embedding)
    vocabulary = len(layer.weight)
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

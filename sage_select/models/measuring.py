"""One forward-only pass over many sequences: checks before it, batches that fit, and its rates."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from warnings import warn

import torch
from torch import Tensor, nn

from sage_select.arrays import BoolArray
from sage_select.models.batches import Batch, lay_out
from sage_select.models.forward import forward_logps
from sage_select.models.heads import head_of, text_config
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
    """Run batches one after the other, in smaller parts where one does not fit in memory.

    Args:
        model: The model, ready for a pass without gradients.
        distinct: The sequences.
        batches: Places in `distinct`, batch by batch.
        new: bool [D], False where a sequence need not be measured.
        packed: Whether batches are packed, or else padded.
        impl: How the head's log-probs are computed.
        max_tokens: The budget by which parts are composed, halved when a part does not fit.
        may_shrink: False if other processes wait for this very forward call.
        desc: What the pass is for, for heartbeats.

    Yields:
        Places, and the summed log-probs of their responses, float64 on the CPU.

    Raises:
        MemoryError: If one sequence does not fit, or a part does not and it may not shrink.
    """
    for i, batch in enumerate(batches, 1):
        first, last = distinct.rows(batch)
        beat(f"{desc}, batch {i} of {len(batches)}, pairs in rows {first} to {last}")
        waiting: list[Sequence[int]] = [batch]
        while waiting:
            # known sequences are left out after the parts are composed, as for whole batches
            part, *rest = distinct.batches(max_tokens, packed=packed, among=waiting.pop(0))
            waiting = [*rest, *waiting]
            places = [place for place in part if new[place]]
            if not places:
                continue
            logps = _if_it_fits(model, lay_out(distinct.sequences(places), packed=packed), impl)
            if logps is not None:
                yield places, logps
                continue
            max_tokens = _smaller(distinct, part, packed)
            if not may_shrink:
                raise MemoryError(
                    "measure: processes that share a model's weights cannot make a batch "
                    f"smaller one by one; begin with max_batch_tokens={max_tokens}"
                )
            waiting = [part, *waiting]


def check_same_pass(
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
    every = processes.all_gather(facts)
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


class Rates:
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

    def __enter__(self) -> "Rates":
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


def check_tokens_fit(model: nn.Module, distinct: DistinctSequences) -> None:
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

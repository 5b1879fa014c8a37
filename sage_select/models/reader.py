"""The reader: one set of options by which a run reads its models, in scoring and in updates."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from sage_select.arguments import shown, switch, whole_number
from sage_select.data.dataset import PreferenceDataset
from sage_select.data.pair_table import TokenSequence
from sage_select.models.attention import packed_attention, packs
from sage_select.models.batches import lay_out
from sage_select.models.forward import autocast, eval_mode, forward_logps, known_shape, recomputes
from sage_select.models.measuring import (
    Rates,
    check_same_pass,
    check_tokens_fit,
    forward_batches,
)
from sage_select.models.sequences import DistinctSequences, as_pair_logps, distinct_sequences
from sage_select.models.trials import Layout, check_head, packs_exactly
from sage_select.models.wrappers import (
    checked,
    computes_in,
    is_sharded,
    resharded,
    uncompiled,
    unwrapped,
)
from sage_select.ops.token_logps import Implementation, resolved
from sage_select.pairs import PairLogps
from sage_select.system.heartbeats import beat, monitored
from sage_select.system.ledger import book, recording
from sage_select.system.processes import Processes


@dataclass(frozen=True)
class Reader:
    """Options for reading a model, shared by selector, reference and updates of a run.

    Log-probs are comparable only if they come from equal readers: a difference between two readers
    would look like a change in the policy. So make one reader and pass it everywhere:
    `Selector(..., measure=reader)`, `ReferenceStore(..., reader=reader)`,
    `Training(reader=reader)`.

    Args:
        layout: "packed" lays the sequences of a batch end to end, with attention within each;
            "padded" pads them to the longest; "auto" packs if a trial shows that the model then
            gives the same log-probs, and otherwise pads, with a warning.
        impl: Implementation of the head's log-probs, see `token_logps`.
        mixed_precision: Autocast dtype of the model's body, such as torch.bfloat16; the head and
            the sums stay in fp32 or wider. None computes in the model's own dtype.
        max_batch_tokens: Tokens per forward-only pass; a longer sequence runs alone. If a batch
            does not fit in memory, the budget is halved, with a warning, and no pair is lost.
        show_progress: False for no progress bar; ignored when readers are compared.

    Example:
        >>> Reader(mixed_precision=torch.bfloat16) == Reader()
        False
        >>> Reader(show_progress=False) == Reader()
        True

    Raises:
        TypeError: If max_batch_tokens is not a whole number, or show_progress not a bool or None.
        ValueError: If an option has an invalid value.
    """

    layout: Layout = "auto"
    impl: Implementation = "auto"
    mixed_precision: torch.dtype | None = None
    max_batch_tokens: int = 16_384
    show_progress: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, values in (("layout", get_args(Layout)), ("impl", get_args(Implementation))):
            if (value := getattr(self, name)) not in values:
                raise ValueError(
                    f"Reader: {name} must be one of {', '.join(values)}, got {value!r}"
                )
        dtype = self.mixed_precision
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                "Reader: mixed_precision must be None or a floating dtype such as torch.bfloat16, "
                f"got {dtype!r}"
            )
        tokens = whole_number(self.max_batch_tokens, "Reader: max_batch_tokens")
        # the dataclass is frozen, so its own __setattr__ would refuse
        object.__setattr__(self, "max_batch_tokens", tokens)
        switch(self.show_progress, "Reader: show_progress", optional=True)

    def __call__(
        self, model: nn.Module, pool: PreferenceDataset, *, processes: Processes | None = None
    ) -> PairLogps:
        """Summed log-probs of every response of a pool, from one forward-only pass.

        Args:
            model: As in `measure`.
            pool: The pairs, `dataset` or `dataset.take(rows)`.
            processes: The processes that share the work, see `measure`.

        Returns:
            As in `measure`.
        """
        if not isinstance(pool, PreferenceDataset):
            raise TypeError(
                f"measure: pool must be a PreferenceDataset, got {shown(pool)}; make one with "
                "PreferenceDataset.from_records, and pass dataset.take(rows) for a part of it"
            )
        if not (processes is None or isinstance(processes, Processes)):
            raise TypeError(
                f"measure: processes must be a Processes or None, got {shown(processes)}"
            )
        processes = Processes.all() if processes is None else processes
        distinct = distinct_sequences(pool)
        logps = torch.zeros(len(distinct), dtype=torch.float64)

        def keep(places: list[int], measured: Tensor) -> None:
            logps[places] = measured

        with monitored(processes):
            self.measure_sequences(model, distinct, keep, processes=processes)
            # each log-prob is zero on all ranks but one, so the sum changes no bit
            logps = processes.all_reduce(logps.to(processes.device)).cpu()
        precision = self.mixed_precision or computes_in(unwrapped(model))
        return as_pair_logps(pool, logps[distinct.of_pairs]).measured_in(precision)

    def measure_sequences(
        self,
        model: nn.Module,
        distinct: DistinctSequences,
        on_batch: Callable[[list[int], Tensor], None],
        *,
        skip: Collection[int] = (),
        processes: Processes | None = None,
        desc: str = "scoring",
    ) -> None:
        """Measure sequences, passing log-probs to a callback batch by batch.

        Batches are composed from all sequences before any is skipped, so that a pass that is
        interrupted and resumed computes the same bits as one that is not.

        Args:
            model: As in `measure`.
            distinct: The sequences.
            on_batch: Called with indices into `distinct` and their log-probs, float64 on the CPU.
            skip: Indices of sequences that need not be measured.
            processes: The processes that share the batches; each calls `on_batch` only for those
                that it measured itself.
            desc: Label of the progress bar.
        """
        processes = Processes.all() if processes is None else processes
        model = checked(model)
        new = np.ones(len(distinct), dtype=bool)
        new[list(skip)] = False
        check_same_pass(processes, distinct, new, self.max_batch_tokens)
        check_tokens_fit(model, distinct)
        if not new.any():
            return
        # forward passes of a sharded model are collectives: every rank must make as many
        in_lockstep = is_sharded(model) and processes.size > 1
        with resharded(model), eval_mode(model), autocast(model, self.mixed_precision):
            check_head(model, distinct.sequences([len(distinct) - 1])[0], self.impl)
            longest = distinct.sequences([0])
            packed = packs_exactly(model, longest, self.layout, self.impl, self.max_batch_tokens)
            # composed before they are dealt, so that batches do not depend on the world size
            composed = distinct.batches(self.max_batch_tokens, packed=packed)
            batches = [batch for batch in composed if new[batch].any()]
            own_batches = batches[processes.rank :: processes.size]
            if recording():
                # sorted, so that sequences of one prompt are adjacent and the prompt counts once
                places = np.sort([place for batch in own_batches for place in batch if new[place]])
                book(known_shape(model).needed(*distinct.needed(places.astype(np.int64))))
            total = int(sum(distinct.lengths[b][new[b]].sum() for b in own_batches))
            show = self.show_progress if processes.rank == 0 else False
            with Rates(distinct, total, desc, show, processes.size) as rates:
                for measured, logps in forward_batches(
                    model,
                    distinct,
                    own_batches,
                    new,
                    packed=packed,
                    impl=self.impl,
                    max_tokens=self.max_batch_tokens,
                    may_shrink=not in_lockstep,
                    desc=desc,
                ):
                    on_batch(measured, logps)
                    rates.update(measured)
            if in_lockstep and len(own_batches) < len(batches[:: processes.size]):
                # this rank has one batch fewer: repeat the last one, so that no other rank waits
                sequences = distinct.sequences([place for place in batches[-1] if new[place]])
                forward_logps(model, lay_out(sequences, packed=packed), self.impl)
        beat(f"{desc}, done with {len(own_batches)} batches")

    def pair_logps(self, model: nn.Module, pairs: PreferenceDataset) -> PairLogps:
        """Differentiable log-probs of a few pairs in one batch, for an update.

        Args:
            model: A Hugging Face causal language model, in the mode it should run in.
            pairs: The pairs, `dataset.take(rows)`.

        Returns:
            Log-probs on the model's device; gradients flow to its parameters.

        Raises:
            ValueError: If layout is "packed" and the model recomputes its activations in the
                backward pass, outside `updating`.
        """
        return as_pair_logps(pairs, self.response_logps(model, pairs.sequences()))

    def response_logps(self, model: nn.Module, sequences: Sequence[TokenSequence]) -> Tensor:
        """Summed log-prob of each sequence's response, float64 [S], in one batch; differentiable.

        Args:
            model: As in `pair_logps`.
            sequences: The sequences, such as `pairs.responses()`.
        """
        if not sequences:
            return torch.zeros(0, dtype=torch.float64)
        through, model = uncompiled(model), checked(model)
        with self._precision(model):
            check_head(model, sequences[0], self.impl, again=False)
            packed = packs_exactly(model, sequences, self.layout, self.impl)
            if packed and torch.is_grad_enabled() and recomputes(model) and not packs(model):
                if self.layout == "packed":
                    raise ValueError(
                        "pair_logps: the model recomputes its activations in the backward pass, "
                        "where a packed batch needs packed attention again; put forward and "
                        "backward inside `with reader.updating(model, pairs):`"
                    )
                packed = False
            if recording():
                _book_needed(model, sequences)
            return forward_logps(through, lay_out(sequences, packed=packed), self.impl)

    @contextmanager
    def updating(self, model: nn.Module, pairs: PreferenceDataset) -> Iterator[None]:
        """Wrap forward and backward of one batch: inside, `pair_logps` packs if that is exact.

        Outside, it packs as well, except for models with activation checkpointing.

        Args:
            model: As in `pair_logps`.
            pairs: The batch.
        """
        model = unwrapped(model)
        with self._precision(model):
            packed = packs_exactly(model, pairs.sequences(), self.layout, "auto")
        with packed_attention(model) if packed else nullcontext():
            yield

    def check(self, model: nn.Module, pairs: PreferenceDataset) -> None:
        """Check before training that the model can be read, and whether its batches can be packed.

        Args:
            model: As in `pair_logps`.
            pairs: All pairs that will be trained on; the longest sequence is tried.

        Raises:
            ValueError: If the model cannot be read, or cannot be packed and layout is "packed".
        """
        lengths = pairs.sequence_lengths
        longest = pairs.sequences_at(np.flatnonzero(lengths == lengths.max())[:1])
        model = checked(model)
        with resharded(model), self._precision(model):
            check_head(model, longest[0], self.impl, again=False)
            packs_exactly(model, longest, self.layout, self.impl)

    def resume_settings(self) -> dict[str, str]:
        """Return the settings that decide a run's result, which a resumed run must share."""
        return {"mixed_precision": repr(self.mixed_precision), "impl": repr(self.impl)}

    def rounding(self, model: nn.Module) -> dict[str, str]:
        """Return everything besides the weights that decides how a model's log-probs round."""
        config: Any = getattr(model, "config", None)
        return {
            "dtype": str(computes_in(model)),
            "mixed_precision": str(self.mixed_precision),
            "device": next(model.parameters()).device.type,
            "attention": str(getattr(config, "_attn_implementation", "")),
            "head": resolved(self.impl),
        }

    def _precision(self, model: nn.Module) -> AbstractContextManager[None]:
        """Autocast for updates; with mixed_precision=None, a host's autocast stays in effect."""
        if self.mixed_precision is None:  # `autocast(model, None)` would switch the host's off
            return nullcontext()
        return autocast(model, self.mixed_precision)


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
    """Summed log-probs of every response of a pool under a model, from one forward-only pass.

    The model runs in eval mode, without gradients or cache; its modes, its gradients and the state
    of the random generators are left unchanged. Distinct responses, not pairs, are batched to a
    token budget, the longest first, so that a lack of memory shows at once. Responses to one prompt
    share a batch, and the prompt is computed once.

    To use other options than the defaults repeatedly, make a `Reader` and call it.

    Args:
        model: A Hugging Face causal language model; or any module that maps token ids to logits
            and whose forward calls its `lm_head`.
        pool: The pairs, `dataset` or `dataset.take(rows)`.
        max_batch_tokens: As in `Reader`.
        layout: As in `Reader`.
        impl: As in `Reader`.
        mixed_precision: As in `Reader`.
        processes: The processes that share the work; all of them must call with the same pool. By
            default all processes of torch.distributed; `Processes()` is this one alone.
        show_progress: As in `Reader`.

    Returns:
        Log-probs of the pool's pairs, in its order, on the CPU; the same bits in every process and
        for any number of processes.

    Raises:
        TypeError: If the model has no output head, or it cannot be used, or the pool is not a
            PreferenceDataset.
        ValueError: If a token is outside the model's vocabulary, the model changes its logits in a
            way that is not supported, cannot be packed and layout is "packed", or a log-prob is
            not finite.
        MemoryError: If a single sequence does not fit in memory.
    """
    reader = Reader(layout, impl, mixed_precision, max_batch_tokens, show_progress)
    return reader(model, pool, processes=processes)


def pair_logps(
    model: nn.Module, pairs: PreferenceDataset, reader: Reader | None = None
) -> PairLogps:
    """Differentiable log-probs of a few pairs in one batch, as by `Reader.pair_logps`.

    Args:
        model: A Hugging Face causal language model, in the mode it should run in.
        pairs: The pairs, `dataset.take(rows)`.
        reader: Options for reading the model; by default `Reader()`.

    Returns:
        Log-probs on the model's device; gradients flow to its parameters.
    """
    return (reader or Reader()).pair_logps(model, pairs)


def _book_needed(model: nn.Module, sequences: Sequence[TokenSequence]) -> None:
    """Book the FLOPs that these sequences need, including the backward pass if there is one."""
    prompts = [s.tokens[: s.response_start].tobytes() for s in sequences]
    starts = np.array([s.response_start for s in sequences])
    lengths = np.array([len(s.tokens) for s in sequences])
    scored = np.array([len(s.scored) for s in sequences])
    first = np.array([prompts.index(prompt) == i for i, prompt in enumerate(prompts)])
    shape = known_shape(model)
    needed = shape.needed(starts, lengths, scored, first)
    book(needed * shape.passes if torch.is_grad_enabled() else needed)

"""What scoring and training cost: FLOPs that are needed and FLOPs that are executed, tokens, time.

A ledger books the passes that run inside it, each under the phase it runs in:

    >>> ledger = Ledger()
    >>> with ledger, phase("scoring"):
    ...     book(Work(tokens=300))
    >>> ledger["scoring"].tokens
    300
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sage_select.hashing import Int64Array
from sage_select.heads import text_config

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Work:
    """What some passes take; additive, but for the peak of memory.

    Attributes:
        needed: FLOPs, each distinct token in its context once, the head at response tokens alone.
        executed: FLOPs that were run, padding and repeated prompts and recomputation included.
        tokens: Distinct tokens in their contexts.
        executed_tokens: Tokens that went through the model, padding included.
        seconds: Wall-clock time.
        peak_bytes: Largest memory of the device while they ran; 0 where it keeps no count.
    """

    needed: float = 0.0
    executed: float = 0.0
    tokens: int = 0
    executed_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __mul__(self, passes: float) -> "Work":
        """The same tokens, with the FLOPs of so many forward passes."""
        return replace(self, needed=passes * self.needed, executed=passes * self.executed)

    def repeated(self, times: float) -> "Work":
        """The same so many times."""
        return replace(self * times, tokens=round(times * self.tokens))

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.needed + other.needed,
            self.executed + other.executed,
            self.tokens + other.tokens,
            self.executed_tokens + other.executed_tokens,
            self.seconds + other.seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


class Ledger(dict[str, Work]):
    """Work by phase: "reference", "scoring", "training", "evaluation"; outside any, "other"."""

    def __enter__(self) -> "Ledger":
        _ledgers.set((*_ledgers.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _ledgers.set(_ledgers.get()[:-1])

    def add(self, name: str, work: Work) -> None:
        """Add work to a phase."""
        self[name] = self.get(name, Work()) + work


def side_by_side(ledgers: list[Ledger]) -> Ledger:
    """What several processes did at the same time: the sum of their work, in the longest's time.

    Example:
        >>> one, other = Ledger(scoring=Work(needed=2.0, seconds=3.0)), Ledger()
        >>> side_by_side([one, one, other])["scoring"].needed
        4.0
    """
    together = Ledger()
    for name in dict.fromkeys(name for ledger in ledgers for name in ledger):
        works = [ledger[name] for ledger in ledgers if name in ledger]
        longest = max(work.seconds for work in works)
        together[name] = replace(sum(works, Work()), seconds=longest)
    return together


def append_costs(path: Path, ledger: Ledger, interval: int | None = None) -> None:
    """Add a line for each phase to a file of costs; an interval may have several."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write("" if whole else "\n")  # a kill cut the last line short
        for name, work in ledger.items():
            line = {"interval": interval, "phase": name, **asdict(work)}
            file.write(json.dumps(line) + "\n")


def read_costs(path: Path) -> Ledger:
    """All that a file of costs has; steps that were taken again have been paid for again."""
    ledger = Ledger()
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # a line that a kill cut short
            record = json.loads(line)
            del record["interval"]
            ledger.add(record.pop("phase"), Work(**record))
    return ledger


_ledgers: ContextVar[tuple[Ledger, ...]] = ContextVar("ledgers", default=())
_phases: ContextVar[tuple["_Clock", ...]] = ContextVar("phases", default=())


def recording() -> bool:
    """Whether a ledger is open."""
    return bool(_ledgers.get())


def book(work: Work) -> None:
    """Add work to the ledgers that are open, under the innermost phase."""
    phases = _phases.get()
    for ledger in _ledgers.get():
        ledger.add(phases[-1].name if phases else "other", work)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Book what runs inside under this name, and its time; an inner phase stops the outer's clock.

    Without an open ledger it does nothing.
    """
    if not _ledgers.get():
        yield
        return
    if outer := _phases.get():
        outer[-1].stop()
    clock = _Clock(name)
    token = _phases.set((*outer, clock))
    try:
        yield
    finally:
        clock.stop()
        _phases.reset(token)
        if outer:
            outer[-1].start()


class _Clock:
    def __init__(self, name: str) -> None:
        self.name = name
        self.start()

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()

    def stop(self) -> None:
        peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        work = Work(seconds=time.perf_counter() - self._since, peak_bytes=peak)
        for ledger in _ledgers.get():
            ledger.add(self.name, work)


@dataclass(frozen=True)
class Shape:
    """What decides a model's FLOPs.

    Attributes:
        body: Weights that multiply each token, without embeddings and head; of a mixture of
            experts, those of the experts that a token is sent to.
        head: Weights of the output head.
        attention: Layers x heads x head size; 0 where the model does not say.
        trained: Share of the weights that have a gradient: few with low-rank adapters.
    """

    body: int
    head: int
    attention: int
    trained: float = 1.0

    @property
    def passes(self) -> float:
        """Forward and backward, in forward passes: a product forward is one for the gradient of
        its input and, where the weight is trained, one for that of the weight."""
        return 2 + self.trained

    def forward(self, tokens: float, scored: float, squares: float) -> float:
        """FLOPs of a forward pass.

        Args:
            tokens: That go through the body.
            scored: At which the head is computed.
            squares: Of L tokens each, the sum of L (L + 1) / 2: pairs of tokens that causal
                attention looks at. Sliding windows are not taken off.
        """
        return 2 * self.body * tokens + 2 * self.head * scored + 4 * self.attention * squares

    def needed(self, starts: Int64Array, lengths: Int64Array, first: BoolArray) -> Work:
        """What a forward pass over sequences needs, whatever the batches.

        Args:
            starts: [S], tokens of their prompts.
            lengths: [S], tokens.
            first: [S], False where the prompt is that of another sequence before.
        """
        read = lengths - 1  # a sequence's last token predicts nothing
        again = np.where(first, 0, starts)
        tokens = int((read - again).sum())
        squares = float((_squares(read) - _squares(again)).sum())
        return Work(
            needed=self.forward(tokens, int((lengths - starts).sum()), squares), tokens=tokens
        )

    def executed(self, tokens: int, scored: int, lengths: Int64Array) -> Work:
        """What a batch took: tokens that went through the model, in sequences of these lengths."""
        squares = float(_squares(lengths).sum())
        return Work(executed=self.forward(tokens, scored, squares), executed_tokens=tokens)


def _squares(lengths: Int64Array) -> Int64Array:
    """Pairs of tokens that causal attention looks at."""
    squares: Int64Array = lengths * (lengths + 1) // 2
    return squares


def shape_of(model: nn.Module) -> Shape:
    """The shape of a live model, or of one on the meta device."""
    config = text_config(model)
    output = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    looked_up = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    apart = {id(p) for m in (*looked_up, output) if m is not None for p in m.parameters()}
    routed = _share_of_experts(config)
    multiplied = {
        name: (parameter, routed if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in apart
    }
    body = sum(share * _weights(parameter) for parameter, share in multiplied.values())
    weight = getattr(output, "weight", None)
    head = 0 if weight is None else _weights(weight)
    trained = sum(s * _weights(p) for p, s in multiplied.values() if p.requires_grad)
    trained += head if weight is not None and weight.requires_grad else 0
    return Shape(round(body), head, _attention(config), trained / max(body + head, 1))


def _weights(parameter: torch.Tensor) -> int:
    """Weights of a parameter; of four bits, two stand in a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _share_of_experts(config: Any) -> float:
    """The share of its experts that a token goes through; 1 without experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(config, name, None):
            used: int = getattr(config, "num_experts_per_tok", None) or count
            return used / int(count)
    return 1.0


def _attention(config: Any) -> int:
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not (layers and heads and hidden):
        return 0
    return int(layers * heads * (getattr(config, "head_dim", None) or hidden // heads))


def break_even(scoring: float, training: float) -> float:
    """The keep ratio below which selection costs less than training on everything.

    Scoring the pools and training on a share k costs s + k t, training on all of them costs t:
    k = 1 - s / t, or 1 - 1 / c where training costs c times as much as scoring.

    Args:
        scoring: Cost of scoring what is scored, in any unit.
        training: Cost of training on all, in the same.

    Returns:
        At most 1; where it is not positive, nothing pays. NaN where nothing is trained.

    Example:
        >>> round(break_even(scoring=1, training=3), 3)  # a forward pass, and a backward one
        0.667
    """
    return 1 - scoring / training if training else math.nan

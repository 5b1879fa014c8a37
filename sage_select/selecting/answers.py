"""Checks of what functions of the user's own return, against what they were asked for.

A measure, a reference, a score, a schedule and a selector are trusted by all that follows: answers
for other rows would train other pairs without a sign of it. Each check is a few vectorised
comparisons, and each message names the call, what it returned and what to return instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sage_select.arrays import Float64Array, Int64Array, all_different, checked_rows
from sage_select.pairs import MAX_LOGP, PairLogps
from sage_select.selection import Selection


def checked_logps(
    answer: Any, call: str, rows: Int64Array | None = None, *, measured: bool = True
) -> PairLogps:
    """Return a measure's or reference's answer as [P] tensors of one device, or refuse it.

    An answer for the rows that were asked, in another order, is put in their order by its index.

    Args:
        answer: What was returned.
        call: The call that returned it, for the error messages.
        rows: The dataset rows that were asked for; None if they are not known.
        measured: True if log-probs must be those of a model, and hence not whole numbers.

    Returns:
        Detached log-probs in float64, row numbers and token counts in int64.

    Raises:
        TypeError: If it is no `PairLogps`, or a field is no tensor of the right kind.
        ValueError: If fields have different shapes, or it has other rows than were asked for.
    """
    if not isinstance(answer, PairLogps):
        raise TypeError(
            f"{call} returned {type(answer).__name__}; return a PairLogps with the fields "
            f"{', '.join(PairLogps._fields)}, one value per pair"
        )
    for name, field in zip(PairLogps._fields, answer, strict=True):
        if not isinstance(field, Tensor) or field.is_meta or field.layout != torch.strided:
            kind = field.device if isinstance(field, Tensor) else type(field).__name__
            raise TypeError(
                f"{call} returned {name} as {kind}; every field of a PairLogps is a dense tensor "
                "with data, such as torch.from_numpy(array)"
            )
    shapes = [list(field.shape) for field in answer]
    if answer.index.dim() != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"{call} returned fields of the shapes {shapes}; every field of a PairLogps is [P], "
            "one value per pair"
        )
    for name in ("chosen", "rejected"):
        kind = getattr(answer, name).dtype
        if kind.is_complex or kind == torch.bool or (measured and not kind.is_floating_point):
            raise TypeError(
                f"{call} returned {name} in {kind}; log-probs are sums of logarithms: return them "
                "in torch.float64, without rounding them to whole numbers"
            )
    device = answer.chosen.device
    logps = PairLogps(
        _whole_numbers(answer, "index", call).to(device),
        answer.chosen.detach().double(),
        answer.rejected.detach().to(device).double(),
        _whole_numbers(answer, "chosen_tokens", call).to(device),
        _whole_numbers(answer, "rejected_tokens", call).to(device),
    ).measured_in(answer.precision)
    return logps if rows is None else _in_order_of(logps, rows, call)


def check_token_counts(logps: PairLogps, pool: Any, call: str) -> None:
    """Refuse log-probs of other tokens than the pool's; a pool without token counts passes."""
    for name in ("chosen_tokens", "rejected_tokens"):
        expected, counted = getattr(pool, name, None), getattr(logps, name).numpy(force=True)
        if not isinstance(expected, np.ndarray) or expected.shape != counted.shape:
            continue
        for place in np.flatnonzero(counted != expected)[:1]:
            raise ValueError(
                f"{call} counted {counted[place]} {name} for row {logps.index[place].item()}, and "
                f"the pool has {expected[place]}; measure exactly the tokens of the pool, its end "
                "tokens included, and return log-probs and counts of one pair at one position"
            )


def check_log_probs(logps: PairLogps, call: str) -> None:
    """Refuse log-probs above 0 by more than rounding."""
    above = (logps.chosen > MAX_LOGP) | (logps.rejected > MAX_LOGP)
    if bool(above.any()):
        place = int(above.nonzero()[0])
        raise ValueError(
            f"{call} returned log-probs above 0 for {int(above.sum())} of {len(above)} pairs: row "
            f"{logps.index[place].item()} has {logps.chosen[place].item():g} (chosen) and "
            f"{logps.rejected[place].item():g} (rejected); return natural logarithms of "
            "probabilities, summed over each response, and not losses (their negatives) or logits"
        )


def checked_reference(answer: Any, pairs: Any, call: str) -> PairLogps:
    """Return a reference's log-probs of some pairs, in their order, or refuse them.

    Args:
        answer: What the reference returned for the rows of the pairs.
        pairs: The pairs.
        call: The call that returned it, for the error messages.

    Raises:
        TypeError: As `checked_logps`.
        ValueError: If it has other rows or tokens than the pairs, or log-probs that are above 0 or
            not finite.
    """
    logps = checked_logps(answer, call, pairs.index)
    check_token_counts(logps, pairs, call)
    check_log_probs(logps, call)
    finite = logps.chosen.isfinite() & logps.rejected.isfinite()
    for row in logps.index[~finite][:1].tolist():
        raise ValueError(
            f"{call} returned log-probs of row {row} that are not finite; check the reference's "
            "weights for NaN, and its precision for overflow"
        )
    return logps


def checked_scores(answer: Any, rows: Int64Array) -> Float64Array:
    """Return a score's answer as float64 [P], or refuse it.

    Raises:
        TypeError: If it is not made of real numbers.
        ValueError: If there is not one number per pair, or one is NaN.
    """
    try:
        values = torch.as_tensor(answer)
        if values.is_complex() or values.is_meta:
            raise TypeError
        array: Float64Array = values.double().numpy(force=True)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise TypeError(
            f"Selector: the score returned {kind}; it must return a tensor [P] of real numbers, "
            "one per pair, higher for pairs to keep first"
        ) from None
    if array.shape != rows.shape:
        raise ValueError(
            f"Selector: the score must return one value per pair, [{len(rows)}], got shape "
            f"{list(array.shape)}"
        )
    undefined = np.isnan(array)
    for row in rows[undefined][:1]:
        raise ValueError(
            f"Selector: the score is NaN for {undefined.sum()} of {len(rows)} pairs, the first is "
            f"row {row}; return a number for every pair, such as -inf for those to keep last"
        )
    return array


def check_selection(selection: Any, rows: Int64Array, count: int, call: str) -> None:
    """Refuse a selector's decision unless it keeps the planned number of the pool's rows.

    Args:
        selection: What the selector returned.
        rows: [P], rows of the pool.
        count: Number of rows to keep.
        call: The caller, for the error messages.

    Raises:
        TypeError: If it is no `Selection`.
        ValueError: If pool, kept rows, mask and scores do not fit the pool or each other.
    """
    if not isinstance(selection, Selection):
        raise TypeError(
            f"{call}: select returned {type(selection).__name__}; a selector must return a "
            "Selection of the pool that it was given"
        )
    if len(selection) != count:
        raise ValueError(
            f"{call}: the timeline plans to keep {count} of {len(rows)} pairs, but the selector "
            f"kept {len(selection)}; a selector must return the planned number"
        )
    pool, kept = np.asarray(selection.pool), np.asarray(selection.kept)
    chosen = checked_rows(selection.indices, f"{call}: Selection.indices")
    if not np.array_equal(pool, rows):
        raise ValueError(
            f"{call}: Selection.pool has other rows than the pool, or another order; it must be "
            "pool.index"
        )
    for row in chosen[~np.isin(chosen, rows)][:1]:
        raise ValueError(
            f"{call}: Selection.indices has row {row}, which is not in the pool; it must have rows "
            "of pool.index"
        )
    if not all_different(chosen):
        raise ValueError(f"{call}: Selection.indices has a row twice; keep each row once")
    marked = kept.dtype == np.bool_ and kept.shape == rows.shape
    if not marked or not np.array_equal(np.sort(rows[kept]), np.sort(chosen)):
        raise ValueError(
            f"{call}: Selection.kept must be bool [P] and mark the rows of Selection.indices, as "
            "np.isin(pool.index, indices) does"
        )
    if np.shape(selection.scores) != rows.shape:
        raise ValueError(
            f"{call}: Selection.scores must be [P] = [{len(rows)}], one per row of the pool, got "
            f"shape {list(np.shape(selection.scores))}; use NaN if the pool was not scored"
        )


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Restore the modes of a model's modules, the grad mode and the random generators afterwards.

    A measure that leaves the model in eval mode would train it without dropout from then on.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    weight = next(model.parameters(), None) if modules else None
    devices = [weight.device] if weight is not None and weight.device.type == "cuda" else []
    enabled = torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_grad_enabled(enabled)
        for module, training in modes:
            module.training = training


def _whole_numbers(logps: PairLogps, name: str, call: str) -> Tensor:
    """Return a field as int64, or refuse it if that would change a value."""
    field: Tensor = getattr(logps, name).detach()
    if field.dtype == torch.int64:
        return field
    if not field.is_complex() and field.dtype != torch.bool:
        values = field.long()
        if torch.equal(values.to(field.dtype), field):
            return values
    raise TypeError(f"{call} returned {name} in {field.dtype}; return whole numbers in torch.int64")


def _in_order_of(logps: PairLogps, rows: Int64Array, call: str) -> PairLogps:
    """Return log-probs in the order of the rows that were asked for, or refuse them."""
    returned: Int64Array = logps.index.numpy(force=True)
    if np.array_equal(returned, rows):
        return logps
    positions = np.array_equal(returned, np.arange(len(returned)))
    # positions are no rows: for a pool of rows 0 to P - 1 in another order they only look like it
    if not positions and np.array_equal(np.sort(returned), np.sort(rows)):
        return logps.take(rows)
    fix = (
        "these are positions in the pool: return index=torch.from_numpy(pool.index)"
        if positions
        else "return index=torch.from_numpy(pool.index) and one value for each of these rows"
    )
    strange, missing = np.setdiff1d(returned, rows), np.setdiff1d(rows, returned)
    faults = [
        f"{len(strange)} that were not asked for, such as {strange[0]}" if len(strange) else "",
        f"{len(missing)} missing, such as {missing[0]}" if len(missing) else "",
        "" if all_different(returned) else "repeated rows",
    ]
    found = ", ".join(fault for fault in faults if fault) or "another order"
    raise ValueError(f"{call} returned {len(returned)} pairs for {len(rows)} rows: {found}; {fix}")

"""One update: forward and backward passes over a batch, and one optimizer step.

`update` does all of it, for the library's loop and for custom loops. Lightning runs its own loop,
so its module uses the parts: `preference_losses`, `Passes` and `clip_gradients`.
"""

import math

import torch
from torch import Tensor, nn

from sage_select.data.dataset import PreferenceDataset
from sage_select.metrics import preference_metrics
from sage_select.models.wrappers import check_spread, gradient_sync, whole
from sage_select.pairs import Loss, PairLogps, Reference
from sage_select.selecting.answers import checked_logps, checked_reference
from sage_select.system.heartbeats import beat
from sage_select.system.ledger import phase
from sage_select.system.processes import Processes
from sage_select.training.micro_batches import MicroBatch, dealt
from sage_select.training.settings import Training

TAKE = "update: reference.take(rows)"  # the call, in error messages


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: PreferenceDataset,
    reference: Reference,
    training: Training | None = None,
) -> dict[str, float]:
    """Train on one batch: with default settings, the NCA update of its pairs (Eq. 4).

    Gradients of micro-batches are accumulated and clipped, and the optimizer makes one step. With
    several processes, all call this with the same batch, each with the model replicated by
    DistributedDataParallel or sharded by `shard`; the batch is dealt to the processes, and the
    update equals that of one process up to rounding.

    Args:
        model: The policy, in the mode it should train in, on its device, bare or wrapped.
        optimizer: The optimizer of its parameters; gradients are cleared afterwards.
        batch: The pairs of this step over all processes, `dataset.take(rows)`.
        reference: Reference log-probs that cover the batch.
        training: Loss, beta, micro-batches, clipping and reader; by default `Training()`.

    Returns:
        `loss` (mean over the batch, in nats), the metrics of `preference_metrics`, and
        `gradient_norm` before clipping; equal on all ranks.

    Raises:
        FloatingPointError: If the gradient or a loss is not finite; the optimizer then makes no
            step.
        TypeError: If there are several processes, but the model is neither replicated nor sharded.

    Example:
        >>> for rows in loader:  # doctest: +SKIP
        ...     update(model, optimizer, dataset.take(rows), reference)
    """
    training = training or Training()
    check_spread("update", model)
    processes, passes = Processes.all(), Passes()
    micro_batches = dealt(batch.index, processes, training.micro_batch_size or len(batch))
    for number, micro in enumerate(micro_batches, 1):
        beat(f"pass {number} of {len(micro_batches)}")
        pairs = batch.take(micro.rows)
        logps = reference.take(pairs.index)
        # Only the last pass all-reduces the gradients, which have added up until then.
        with phase("training"), gradient_sync(model, number == len(micro_batches)):
            policy, losses = add_gradients(model, pairs, logps, training, micro)
        passes.add(micro, policy, losses)
    with phase("training"):
        norm = clip_gradients(model, training.max_grad_norm)
    # The norm is that of the whole batch, so all ranks raise together and none is left waiting.
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient has norm {norm}; the rows of the batch are {batch.index.tolist()}"
        )
    policy, losses = passes.gathered(processes)
    for row in policy.index[~losses.isfinite()][:1].tolist():  # its gradient can be finite
        raise FloatingPointError(
            f"the loss of row {row} is not finite; the rows of the batch are {batch.index.tolist()}"
        )
    with phase("training"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # a reference may answer in another order
    logps = checked_logps(reference.take(policy.index), TAKE, policy.index.numpy(force=True))
    return {
        "loss": losses.mean().item(),
        **preference_metrics(policy, logps, beta=training.beta),
        "gradient_norm": norm,
    }


def preference_losses(
    model: nn.Module, pairs: PreferenceDataset, reference: PairLogps, training: Training
) -> tuple[PairLogps, Tensor]:
    """Return the policy's log-probs and the losses [P] of a micro-batch, in a forward pass.

    Call it inside `training.reader.updating(model, pairs)`.

    Args:
        model: The policy, in the mode it should train in.
        pairs: The micro-batch.
        reference: Its reference log-probs, in its order.
        training: Loss, beta and reader.

    Raises:
        TypeError: If the loss or the reference returned something else than it should.
        ValueError: If the loss has other values than one per pair, or no gradient; or if the
            reference has other rows or tokens than the pairs, or log-probs above 0.
    """
    reference = checked_reference(reference, pairs, TAKE)
    policy = training.reader.pair_logps(model, pairs)
    losses = training.loss(policy, reference.to(policy.chosen.device), beta=training.beta)
    return policy, checked_losses(losses, policy, training.loss)


def checked_losses(
    losses: Tensor, policy: PairLogps, loss: Loss, *, call: str = "update"
) -> Tensor:
    """Return a loss's values, or refuse them.

    There must be one per pair, with a gradient if the policy's log-probs have one.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(
            f"{call}: the loss {name} returned {kind}; it must return a floating tensor [P] with "
            "one loss per pair"
        )
    if losses.shape != policy.chosen.shape:
        raise ValueError(
            f"{call}: the loss {name} returned shape {list(losses.shape)} for "
            f"{len(policy.chosen)} pairs; return one loss per pair, [P], without a mean or a sum "
            "over pairs"
        )
    if policy.chosen.requires_grad and not losses.requires_grad:
        raise ValueError(
            f"{call}: the loss {name} has no gradient; compute it from policy.chosen and "
            "policy.rejected with torch, without detach(), item(), numpy() or no_grad()"
        )
    return losses


def add_gradients(
    model: nn.Module,
    pairs: PreferenceDataset,
    reference: PairLogps,
    training: Training,
    micro: MicroBatch,
) -> tuple[PairLogps, Tensor]:
    """Run forward and backward of one micro-batch; its gradients are added to the model's.

    Args:
        model: The policy, in the mode it should train in.
        pairs: The pairs of the micro-batch.
        reference: Their reference log-probs.
        training: Loss, beta and reader.
        micro: The micro-batch, with the weights of its losses.

    Returns:
        The policy's log-probs, and the losses [P].
    """
    with training.reader.updating(model, pairs):
        policy, losses = preference_losses(model, pairs, reference, training)
        losses = weighted(losses, micro)
        torch.autograd.backward(losses.sum() * micro.share)
    return policy, losses


def weighted(losses: Tensor, micro: MicroBatch) -> Tensor:
    """Return the losses [P] times the weights of their pairs, if the micro-batch has any."""
    return losses if micro.weights is None else losses * torch.from_numpy(micro.weights).to(losses)


class Passes:
    """Log-probs and losses of this rank's passes in one update, for its metrics."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = [
            torch.empty(0, len(PairLogps._fields) + 1, dtype=torch.float64)
        ]  # the empty part lets a rank without pairs join the gather

    def add(self, micro: MicroBatch, policy: PairLogps, losses: Tensor) -> None:
        """Record a pass, unless it is a dummy that was made for the collectives only."""
        if micro.share:
            columns = [x.detach().double().cpu() for x in (*policy, losses)]
            self._parts.append(torch.stack(columns, dim=1))

    def gathered(self, processes: Processes) -> tuple[PairLogps, Tensor]:
        """Gather the whole batch's log-probs and losses from all ranks, and clear the record."""
        table = torch.cat(self._parts)
        del self._parts[1:]
        index, *logps, losses = processes.gather_rows(table).T
        return PairLogps(index.long(), *logps), losses


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip the gradients of a model to a norm, and return their norm before clipping."""
    return float(whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item())


def optimizer_of(
    model: nn.Module, training: Training, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW and its learning-rate schedule over `steps` steps."""
    from transformers import get_scheduler  # slow to import, and `update` does not need it

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
    )
    scheduler = get_scheduler(
        training.schedule,
        optimizer,
        num_warmup_steps=round(training.warmup_share * steps),
        num_training_steps=steps,
    )
    return optimizer, scheduler

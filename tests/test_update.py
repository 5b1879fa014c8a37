"""One update: the same in the library's loop and in a loop of one's own."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from sage_select import (
    Processes,
    Reader,
    SelectiveLoader,
    ShuffledLoader,
    Training,
    fit,
    nca,
    pair_logps,
    update,
)
from sage_select.training.micro_batches import dealt
from sage_select.training.update import add_gradients

TRAINING = Training(learning_rate=1e-3, schedule="constant_with_warmup", warmup_share=0.0,
                    micro_batch_size=3)  # fmt: skip


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_loop_of_ones_own_makes_the_updates_of_the_librarys(world):
    own = deepcopy(world.model)
    reference = world.selector.reference
    loader = SelectiveLoader(world.selector, world.timeline, world.dataset, world.model)
    history = fit(world.model, loader, world.dataset, reference, TRAINING, show_progress=False)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, weight_decay=0.0)
    own.train()
    loader = SelectiveLoader(world.selector, world.timeline, world.dataset, own)
    for step, rows in zip(history.steps, loader, strict=True):
        metrics = update(own, optimizer, world.dataset.take(rows), reference, TRAINING)
        assert {name: step[name] for name in metrics} == metrics
    assert torch.equal(weights(own), weights(world.model))


def test_without_settings_it_is_the_nca_update(world):
    rows = next(iter(ShuffledLoader(world.dataset, batch_size=8)))
    batch, reference = world.dataset.take(rows), world.selector.reference
    optimizer = torch.optim.SGD(world.model.parameters(), lr=0.0)
    metrics = update(world.model, optimizer, batch, reference)
    expected = nca(pair_logps(world.model, batch), reference.take(rows)).mean()
    assert metrics["loss"] == pytest.approx(expected.item())


def test_an_infinite_gradient_makes_no_step(world):
    def infinite(policy, reference, *, beta):
        return nca(policy, reference, beta=beta) * torch.inf

    before = weights(world.model).clone()
    optimizer = torch.optim.AdamW(world.model.parameters(), lr=1.0)
    batch = world.dataset.take([3, 1])
    with pytest.raises(FloatingPointError, match=r"\[3, 1\]"):
        update(world.model, optimizer, batch, world.selector.reference, Training(loss=infinite))
    assert torch.equal(weights(world.model), before)


def test_pairs_weigh_in_an_update_what_their_weights_say(world):
    rows, factors = np.arange(4), np.array([0.0, 0.5, 1.0, 2.5])
    training = Training(reader=Reader(layout="padded"))
    pairs, reference = world.dataset.take(rows), world.selector.reference.take(rows)
    (micro,) = dealt(rows, Processes(), 4, weights=factors)
    _, losses = add_gradients(world.model, pairs, reference, training, micro)
    ours = gradients(world.model)
    world.model.zero_grad()
    by_hand = nca(training.reader.pair_logps(world.model, pairs), reference)
    (by_hand * torch.from_numpy(factors)).mean().backward()
    assert losses.tolist() == pytest.approx((by_hand * torch.from_numpy(factors)).tolist())
    assert torch.allclose(ours, gradients(world.model), atol=1e-7)


def test_weights_follow_their_pairs_to_every_process_and_pass():
    class Rank(Processes):
        rank = property(lambda self: self.group)
        size = property(lambda self: 3)

    rows = np.arange(10, 21)
    parts = [part for rank in range(3) for part in dealt(rows, Rank(rank), 2, weights=rows / 2)]
    trained = [part for part in parts if part.share]
    assert all(np.array_equal(part.weights, part.rows / 2) for part in trained)
    assert sorted(np.concatenate([part.rows for part in trained])) == rows.tolist()

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sage_select import (
    Reader,
    ReferenceStore,
    SelectionLog,
    SelectiveLoader,
    ShuffledLoader,
    dpo,
    measure,
)
from sage_select.adapters.plain import Training, load_best, train

TRAINING = Training(learning_rate=1e-3, evaluate_every=5, checkpoint_every=4)


def run(world, *, training=TRAINING, rows=64, seed=0, **options):
    loader = ShuffledLoader(world.dataset.take(np.arange(rows)), batch_size=8, seed=seed)
    return train(world.model, loader, world.dataset, world.selector.reference, training, **options)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def worlds(world):
    """Return a function that returns fresh copies of the world."""
    from copy import deepcopy

    return lambda: replace(world, model=deepcopy(world.model))


def test_training_lowers_the_loss_on_the_training_pairs(world):
    held_out = world.dataset.take(np.arange(64))
    loader = ShuffledLoader(held_out, batch_size=8, epochs=4)
    history = train(world.model, loader, world.dataset, world.selector.reference,
                    TRAINING, held_out=held_out)  # fmt: skip
    first, last = history.evaluations[0], history.evaluations[-1]
    assert first["loss"] == pytest.approx(2 * np.log(2), abs=1e-4)
    assert first["accuracy"] == 0.5
    assert last["loss"] < first["loss"] - 0.1
    assert last["accuracy"] > 0.8
    assert [e["step"] for e in history.evaluations] == [0, 5, 10, 15, 20, 25, 30, 32]


def test_a_step_against_torch_by_hand(worlds):
    """Compare one step of the loop with Eq. 4, clipping and AdamW written out."""
    ours, by_hand = worlds(), worlds()
    training = Training(learning_rate=1e-3, schedule="constant_with_warmup", warmup_share=0.0)
    run(ours, training=training, rows=8)
    from torch.nn.functional import logsigmoid

    from sage_select import pair_logps

    optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=1e-3, weight_decay=0.0)
    by_hand.model.train()
    rows = next(iter(ShuffledLoader(by_hand.dataset.take(np.arange(8)), batch_size=8)))
    policy = pair_logps(by_hand.model, by_hand.dataset.take(rows))
    reference = by_hand.selector.reference.take(rows)
    c, r = (0.1 * (getattr(policy, s) - getattr(reference, s)) for s in ("chosen", "rejected"))
    (-logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)).mean().backward()
    torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
    optimizer.step()
    assert torch.equal(weights(ours.model), weights(by_hand.model))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_accumulation_changes_rounding_only(micro_batch_size, worlds):
    whole, parts = worlds(), worlds()
    first = run(whole).steps
    second = run(parts, training=TRAINING.replace(micro_batch_size=micro_batch_size)).steps
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    assert torch.allclose(weights(whole.model), weights(parts.model), atol=1e-3)


def test_layout_and_activation_checkpointing_change_rounding_only(worlds):
    first, *others = (
        run(worlds(), rows=24, training=TRAINING.replace(**settings)).steps
        for settings in (
            {"reader": Reader(layout="padded")},
            {"reader": Reader(layout="packed")},
            {"reader": Reader(layout="packed"), "activation_checkpointing": True},
        )
    )
    for steps in others:
        for one, other in zip(first, steps, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_a_reference_that_is_measured_during_training(worlds, tmp_path):
    """A LoRA policy with its adapters off is the same reference at any step."""
    runs = []
    for filled in (True, False):
        torch.manual_seed(0)
        world = worlds()
        policy = get_peft_model(world.model, LoraConfig(r=4, target_modules="all-linear"))
        store = ReferenceStore(policy, world.dataset, folder=tmp_path / str(filled))
        if filled:
            store.fill()
        loader = ShuffledLoader(world.dataset.take(np.arange(16)), batch_size=4)
        history = train(policy, loader, world.dataset, store, TRAINING)
        assert ("reference" in history.costs) is not filled
        runs.append([step["loss"] for step in history.steps])
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_learning_rates_follow_the_exact_total(world):
    training = TRAINING.replace(warmup_share=0.25)
    rates = [step["learning_rate"] for step in run(world, training=training).steps]
    # warm-up over a quarter of the steps, then linear decay towards zero
    assert rates == pytest.approx([0.0, 5e-4, *(1e-3 * k / 6 for k in range(6, 0, -1))])


def test_metrics_of_every_step(world, tmp_path):
    loader = SelectiveLoader(world.selector, world.timeline, world.dataset, world.model,
                             log=SelectionLog(tmp_path / "selection"))  # fmt: skip
    history = train(world.model, loader, world.dataset, world.selector.reference, TRAINING,
                    folder=tmp_path)  # fmt: skip
    assert len(history.steps) == len(loader) == world.timeline.total_steps
    assert set(history.steps[0]) == {
        "step", "loss", "reward_chosen", "reward_rejected", "margin", "accuracy",
        "likelihood_accuracy", "gradient_norm", "learning_rate", "pairs", "tokens_trained",
        "interval", "kept_share", "tokens_scored",
    }  # fmt: skip
    assert sum(step["pairs"] for step in history.steps) == world.timeline.total_kept
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history.steps
    kept = SelectionLog(tmp_path / "selection").read().filter("kept")["row"].to_list()
    lengths = dict(
        zip(world.dataset.index.tolist(), world.dataset.num_tokens.tolist(), strict=True)
    )
    assert history.steps[-1]["tokens_trained"] == sum(lengths[row] for row in kept)
    first = world.timeline.plan.pools[0]
    assert world.timeline.kept_count[0] == len(first)
    unscored = sum(lengths[row] for row in first.tolist())  # it is kept whole
    assert history.steps[-1]["tokens_scored"] == sum(lengths.values()) - unscored


def test_the_best_weights_are_kept(world, tmp_path):
    held_out = world.dataset.take(np.arange(64, 80))
    wild = TRAINING.replace(learning_rate=0.3, warmup_share=0.0, evaluate_every=1)
    history = run(world, training=wild, held_out=held_out, folder=tmp_path)
    losses = [evaluation["loss"] for evaluation in history.evaluations]
    assert losses[-1] > min(losses)
    best = load_best(world.model, tmp_path)
    assert best["loss"] == min(losses)
    policy = measure(world.model, held_out)
    reference = world.selector.reference.take(held_out.index)
    assert TRAINING.loss(policy, reference).mean().item() == pytest.approx(min(losses))


def test_resuming_in_the_middle_gives_the_same_bits(worlds, tmp_path, monkeypatch):
    whole, interrupted = worlds(), worlds()
    run(whole, folder=tmp_path / "whole")
    real, calls = torch.optim.AdamW.step, iter(range(100))

    def step(optimizer):
        if next(calls) == 6:
            raise KeyboardInterrupt
        real(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, folder=tmp_path / "parts")
    resumed = worlds()
    history = run(resumed, folder=tmp_path / "parts", resume=True)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert [step["step"] for step in history.steps] == list(range(1, 9))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert len(list((tmp_path / "parts").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("part", ["*.distcp", ".metadata", "run.pt"])
def test_a_damaged_checkpoint_is_skipped(part, worlds, tmp_path):
    run(worlds(), folder=tmp_path)
    newest = max(tmp_path.glob("checkpoint-*"))
    for shard in newest.glob(part):
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cannot be read, trying an older one"):
        history = run(worlds(), folder=tmp_path, resume=True)
    assert len(history.steps) == 8


def test_a_folder_that_holds_a_run_is_not_overwritten(worlds, tmp_path):
    run(worlds(), folder=tmp_path)
    with pytest.raises(FileExistsError, match="pass resume=True to resume it"):
        run(worlds(), folder=tmp_path)


def test_a_gradient_that_is_not_finite_ends_the_run(world):
    def loss(policy, reference, *, beta):
        return TRAINING.loss(policy, reference, beta=beta) * torch.inf

    with pytest.raises(
        FloatingPointError, match=r"step 1: the gradient has norm .* rows .* are \["
    ):
        run(world, training=TRAINING.replace(loss=loss))


OPTIONS = [
    {"reader": Reader(mixed_precision=torch.bfloat16)},
    {"loss": dpo, "beta": 1.0},
    {"schedule": "cosine"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, world):
    history = run(world, training=TRAINING.replace(**options), rows=32)
    assert len(history.steps) == 4
    assert all(np.isfinite(step["loss"]) for step in history.steps)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_model_trains_the_same_up_to_rounding(worlds):
    plain, compiled = worlds(), worlds()
    first = run(plain, rows=24).steps
    second = run(compiled, rows=24, training=TRAINING.replace(compile_model=True)).steps
    assert [s["loss"] for s in first] == pytest.approx([s["loss"] for s in second], rel=1e-3)


REFUSED = [
    ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is now 0.002"),
    ({"loss": dpo}, "loss was sage_select.losses.nca and is now sage_select.losses.dpo"),
    (
        {"beta": 0.2, "schedule": "cosine"},
        "is now 'cosine'; beta was 0.1 and is now 0.2",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_resuming_with_different_settings_is_refused(change, message, worlds, tmp_path):
    run(worlds(), folder=tmp_path, rows=8)
    with pytest.raises(ValueError, match=message):
        run(worlds(), folder=tmp_path, rows=8, resume=True, training=TRAINING.replace(**change))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_restarted(worlds, tmp_path):
    run(worlds(), folder=tmp_path, rows=8)
    for path in tmp_path.glob("checkpoint-*/run.pt"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match="none of the 1 checkpoints"),
    ):
        run(worlds(), folder=tmp_path, rows=8, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text()


def build_loader(world, selector=None, model=None) -> SelectiveLoader:
    return SelectiveLoader(
        selector or world.selector, world.timeline, world.dataset, model or world.model
    )


def test_a_loader_of_another_model_is_refused(worlds):
    world, other = worlds(), worlds()
    with pytest.raises(ValueError, match="pools with a different model than the one to train"):
        train(world.model, build_loader(world, model=other.model), world.dataset,
              world.selector.reference, TRAINING)  # fmt: skip


def test_a_loader_of_another_precision_is_refused(world):
    mixed = TRAINING.replace(reader=Reader(mixed_precision=torch.bfloat16))
    with pytest.raises(ValueError, match=r"measure=Reader\(mixed_precision=torch.bfloat16\)"):
        train(world.model, build_loader(world), world.dataset, world.selector.reference, mixed)
    selector = replace(world.selector, measure=Reader(mixed_precision=torch.bfloat16))
    reference = measure(world.model, world.dataset, mixed_precision=torch.bfloat16)
    train(world.model, build_loader(world, selector), world.dataset, reference, mixed)


def test_a_loader_that_has_handed_out_batches_is_refused(world):
    loader = build_loader(world)
    next(iter(loader))
    with pytest.raises(ValueError, match="the loader has handed out 1 batches already"):
        train(world.model, loader, world.dataset, world.selector.reference, TRAINING)


def test_an_empty_held_out_set_is_refused(world):
    with pytest.raises(ValueError, match="held_out has no pairs"):
        run(world, held_out=world.dataset.take([]))

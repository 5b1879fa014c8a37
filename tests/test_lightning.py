"""The Lightning host: training, refusals and resuming."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, launched
from contract import BATCH, BETA, LEARNING_RATE, STEPS, dataset
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning_worker import (
    SHORT_LAST,
    TRAINING,
    fit,
    loader,
    policy,
    reference_logps,
    saved,
    trainer,
)

from sage_select import PairLogps, Reader, measure, nca
from sage_select.adapters.lightning import (
    Batches,
    PreferenceModule,
    SageSelection,
    held_out_batches,
)
from sage_select.adapters.plain import History, Training, train
from sage_select.training.micro_batches import MicroBatch
from sage_select.training.refusals import Refused

WORKER = Path(__file__).with_name("lightning_worker.py")


@cache
def plain(pairs: int = 48) -> tuple[dict[str, torch.Tensor], History]:
    """Return the weights and metrics of the same run in the plain loop."""
    batches = loader(pairs)
    history = train(
        batches.model, batches, dataset(), reference_logps(), TRAINING, show_progress=False
    )
    return batches.model.state_dict(), history


def difference(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> float:
    return max(float((x - weights[name]).abs().max()) for name, x in model.state_dict().items())


class Logged(Callback):
    """The metrics logged by each update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > len(self.updates):
            self.updates.append({name: float(x) for name, x in trainer.callback_metrics.items()})


@pytest.mark.parametrize("pairs", [48, SHORT_LAST])
def test_a_run_equals_that_of_the_plain_loop_even_with_a_short_last_batch(pairs):
    batches, logged = loader(pairs), Logged()
    made = fit(batches, logged)
    weights, history = plain(pairs)
    assert made.global_step == len(batches) == len(history.steps)
    assert made.num_training_batches == 2 * len(batches)
    assert (history.steps[-1]["pairs"] < BATCH) == (pairs == SHORT_LAST)
    assert difference(batches.model, weights) < 1e-6
    for ours, theirs in zip(logged.updates, history.steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        for name in ("interval", "kept_share", "tokens_scored"):
            assert ours[f"selection/{name}"] == pytest.approx(theirs[name])


def test_without_weighting_short_passes_the_run_differs():
    class Unweighted(SageSelection):
        def on_before_backward(self, *_):
            pass

    batches = loader(SHORT_LAST)
    selection = Unweighted(batches)
    trainer(selection).fit(PreferenceModule(batches, TRAINING), selection.batches)
    assert difference(batches.model, plain(SHORT_LAST)[0]) > 1e-5


class Custom(LightningModule):
    """A user's module, independent of this library: it sums log-probs from logits."""

    def __init__(self, model: Any, reference: PairLogps) -> None:
        super().__init__()
        self.model = model
        self.reference = reference

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches  # sets up the loop before it is restored
        self.estimated = steps
        optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens, starts, ends = batch["tokens"], batch["starts"], batch["ends"]
        logps = self.model(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
        logps = logps.gather(-1, tokens[:, 1:, None])[..., 0].double()
        position = torch.arange(1, tokens.shape[1])
        in_response = (position >= starts[:, None]) & (position < ends[:, None])
        chosen, rejected = (logps * in_response).sum(dim=1).chunk(2)
        reference = self.reference.take(batch["rows"])
        policy = reference._replace(chosen=chosen, rejected=rejected)
        return nca(policy, reference, beta=BETA).mean()


def collate(pairs: Any) -> dict[str, torch.Tensor]:
    sequences = pairs.sequences()
    tokens = [torch.as_tensor(s.tokens, dtype=torch.int64) for s in sequences]
    return {
        "tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
        "starts": torch.tensor([s.response_start for s in sequences]),
        "ends": torch.tensor([len(s.tokens) for s in sequences]),
        "rows": torch.from_numpy(pairs.index),
    }


def test_a_custom_module_that_asks_for_estimated_steps_trains_and_resumes(tmp_path):
    options = {"collate": collate, "gradient_clip_val": 1.0}
    whole = loader(SHORT_LAST)
    estimates = []

    class Estimating(Custom):
        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            estimates.append((self.estimated, len(whole.on_select)))
            return optimizers

    fit(
        whole,
        saved(tmp_path, every_n_train_steps=1),
        module=Estimating(whole.model, reference_logps()),
        **options,
    )
    assert estimates == [(len(whole), 0)]  # the estimate has scored no pool
    assert difference(whole.model, plain(SHORT_LAST)[0]) < 1e-3  # other kernels, other rounding

    for step in (2, 3):  # within an interval, and at its end
        rest = loader(SHORT_LAST)
        module = Custom(rest.model, reference_logps())
        fit(rest, module=module, resume=tmp_path / f"step={step}.ckpt", **options)
        assert rest.on_select[0][0] == 1
        assert difference(rest.model, whole.model.state_dict()) == 0


@pytest.mark.parametrize(
    ("written", "resumed"),
    [(2, 2), (2, 1), (2, 4), (4, 2)],
    ids=lambda passes: f"{passes} passes",
)
def test_a_run_resumes_from_within_an_update_and_with_other_passes(tmp_path, written, resumed):
    class Midway(Callback):
        """A callback that saves a checkpoint after the first pass of the fifth update."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4 * written:
                assert trainer.global_step == 4
                trainer.save_checkpoint(tmp_path / "midway.ckpt")

    whole, rest = loader(), loader()
    fit(whole, Midway(), accumulate_grad_batches=written)
    made = fit(rest, resume=tmp_path / "midway.ckpt", accumulate_grad_batches=resumed)
    assert made.global_step == STEPS
    assert [k for k, _ in rest.on_select] == [2, 3]
    assert difference(rest.model, whole.model.state_dict()) < (1e-9 if written == resumed else 1e-4)


def test_held_out_pairs_and_the_best_checkpoint(tmp_path):
    held_out = held_out_batches(dataset().take(range(40, 48)))
    best = saved(tmp_path, monitor="held_out/loss")
    batches = loader(40)
    steps = len(batches)
    made = fit(batches, best, held_out=held_out, val_check_interval=3)  # within updates, too
    weights = deepcopy(batches.model.state_dict())
    losses = sorted(float(loss) for loss in best.best_k_models.values())
    assert len(losses) > 2
    assert losses[0] == pytest.approx(float(best.best_model_score))
    module = PreferenceModule(batches, TRAINING)
    (metrics,) = made.validate(module, held_out, ckpt_path=best.best_model_path, verbose=False)
    assert metrics["held_out/loss"] == pytest.approx(losses[0], abs=1e-6)
    assert {"held_out/accuracy", "held_out/margin"} <= set(metrics)

    rest = loader(40)
    path = min(best.best_k_models, key=lambda path: int(re.findall(r"step=(\d+)", path)[0]))
    resumed = fit(rest, held_out=held_out, val_check_interval=3, resume=path)
    assert resumed.global_step == steps
    assert difference(rest.model, weights) < 1e-9


@pytest.mark.parametrize("checkpointed", [False, True])
def test_mixed_precision_and_packed_batches_with_activation_checkpointing(checkpointed):
    bfloat16 = torch.bfloat16
    reference = measure(policy(), dataset(), mixed_precision=bfloat16)
    batches = loader(reference=reference, mixed_precision=bfloat16)
    training = Training(
        learning_rate=LEARNING_RATE,
        beta=BETA,
        warmup_share=0.0,
        activation_checkpointing=checkpointed,
        reader=Reader(layout="packed", mixed_precision=bfloat16),
        micro_batch_size=2,
    )
    fit(batches, module=PreferenceModule(batches, training), precision="bf16-mixed")
    twin = loader(reference=reference, mixed_precision=bfloat16)
    train(twin.model, twin, dataset(), reference, training, show_progress=False)
    assert difference(batches.model, twin.model.state_dict()) == 0
    assert difference(batches.model, plain()[0]) > 0


REFUSALS = {
    "epochs": ({"max_epochs": 3}, r"max_epochs=3\) does not fit: .* set max_epochs=1"),
    "no epochs": ({"max_epochs": None}, "set max_epochs=1"),
    "steps": ({"max_steps": 5}, r"max_steps=5\) does not fit: the run has 8 steps"),
    "batches": ({"limit_train_batches": 0.5}, "limit_train_batches=0.5.* 16 batches; leave it out"),
    "few batches": ({"limit_train_batches": 1}, r"limit_train_batches=1\)"),
    "overfitting": ({"overfit_batches": 2}, "overfit_batches=2"),
    "smoke": ({"fast_dev_run": True}, "fast_dev_run as well"),
    "reloading": ({"reload_dataloaders_every_n_epochs": 1}, "leave it out"),
    "passes": (
        {"accumulate_grad_batches": 3},
        r"4 pairs per optimizer step cannot be dealt evenly to processes x passes = 1 x 3",
    ),
    "half precision": ({"precision": "bf16-true"}, "'bf16-true'.* load the policy in bfloat16"),
    "double precision": ({"precision": "64-true"}, "use 'bf16-mixed'"),
    "other precision": (
        {"precision": "bf16-mixed"},
        "updates run in torch.bfloat16, but the selector measures in full precision.*"
        "mixed_precision=torch.bfloat16",
    ),
}


@pytest.fixture(scope="module")
def untouched():
    """A loader that must have scored nothing once all refusals are tested."""
    batches = loader()
    yield batches
    assert batches.on_select == []
    assert batches.step == 0


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_trainers_before_anything_is_scored(untouched, options, message):
    with pytest.raises(ValueError, match=message):
        fit(untouched, **options)


def test_everything_that_does_not_fit_is_reported_at_once(untouched):
    with pytest.raises(Refused, match="3 incompatible settings") as error:
        fit(untouched, max_epochs=3, max_steps=5, precision="64-true")
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, TypeError)  # of settings and of objects alike
    for fix in ("set max_epochs=1", "max_steps=5", "use 'bf16-mixed'"):
        assert fix in str(error.value)


REFUSED_CALLBACKS = {
    "accumulation": (lambda: callbacks.GradientAccumulationScheduler({0: 4}), "changes the run"),
    "learning rate": (callbacks.LearningRateFinder, "changes the run"),
    "stochastic averaging": (
        lambda: callbacks.StochasticWeightAveraging(1e-3),
        "replaces the trained weights by an average, .* average the weights of saved checkpoints",
    ),
    "averaging": (lambda: callbacks.WeightAveraging(), "puts an average in the place of"),
    "exponential averaging": (
        lambda: callbacks.EMAWeightAveraging(),
        "EMAWeightAveraging puts an average in the place of",
    ),
    "pruning": (
        lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5),
        "sets trained weights to zero .* prune the trained model after the run",
    ),
    "unfreezing": (callbacks.BackboneFinetuning, r"freezes .* requires_grad_\(False\) before fit"),
    "stopping": (
        lambda: callbacks.EarlyStopping("held_out/loss"),
        r"would end the run .*ModelCheckpoint\(monitor='held_out/loss'\)",
    ),
    "a time limit": (
        lambda: callbacks.Timer({"hours": 1}),
        r"Trainer\(max_time=...\), would end the run .* resume with fit\(ckpt_path=...\)",
    ),
    "a callback of one's own that averages": (
        lambda: type("Mine", (callbacks.WeightAveraging,), {})(),
        "Mine puts an average",
    ),
}


@pytest.mark.parametrize(
    ("make", "message"), REFUSED_CALLBACKS.values(), ids=REFUSED_CALLBACKS.keys()
)
def test_refused_callbacks(untouched, make, message):
    try:
        callback = make()
    except AttributeError:
        pytest.skip("this version of Lightning does not have it")
    with pytest.raises(ValueError, match=message):
        fit(untouched, callback)


def test_a_time_limit_of_the_trainer_is_refused_and_a_clock_is_not(untouched):
    with pytest.raises(ValueError, match="Timer with a duration, as of Trainer"):
        fit(untouched, max_time="00:01:00:00")
    batches = loader(8)
    fit(batches, clock := callbacks.Timer())
    assert clock.time_elapsed() > 0


def test_a_static_graph_that_accumulates_is_refused(untouched):
    strategy = DDPStrategy(static_graph=True)
    options = COMPATIBLE | {"accumulate_grad_batches": 2}
    with pytest.raises(ValueError, match="leave static_graph out, or set accumulate_grad_batches"):
        SageSelection(untouched).setup(
            SimpleNamespace(strategy=strategy, **options), LightningModule(), "fit"
        )


@pytest.mark.parametrize("within_an_update", [False, True])
def test_a_run_that_was_stopped_early_says_so_and_resumes(tmp_path, within_an_update):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop |= batch_idx == 9 + within_an_update

    whole, cut, rest = loader(), loader(), loader()
    fit(whole)
    with pytest.warns(UserWarning, match="ended after 5 of 8 updates.*Resume from its checkpoint"):
        stopped = fit(cut, Stop())
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")  # its only epoch counts as done
    made = fit(rest, resume=tmp_path / "stopped.ckpt")
    assert made.global_step == STEPS
    assert difference(rest.model, whole.model.state_dict()) < 1e-9


def splitting() -> ModelParallelStrategy:
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}  # type: ignore
    return strategy


COMPATIBLE = {
    "accumulate_grad_batches": 1,
    "callbacks": [],
    "limit_train_batches": 1.0,
    "max_epochs": 1,
    "max_steps": -1,
    "overfit_batches": 0,
    "precision": "32-true",
    "reload_dataloaders_every_n_epochs": 0,
    "world_size": 2,
}
"""Settings of a trainer that are compatible with selection."""


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (object.__new__(FSDPStrategy), "FSDP1, .*data_parallel_size=2, tensor_parallel_size=1"),
        (
            object.__new__(DeepSpeedStrategy),
            "DeepSpeedStrategy runs optimizer steps and",
        ),
        (SimpleNamespace(), "SimpleNamespace is not supported; use one device"),
        (splitting(), "meaning of 'auto'.*data_parallel_size=2, tensor_parallel_size=1"),
    ],
    ids=["FSDP1", "DeepSpeed", "unsupported", "tensor parallel"],
)
def test_refused_strategies(untouched, strategy, message):
    with pytest.raises(TypeError, match=message):
        SageSelection(untouched).setup(
            SimpleNamespace(strategy=strategy, **COMPATIBLE), LightningModule(), "fit"
        )


def test_refused_modules_and_batches(untouched):
    class Manual(PreferenceModule):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

    with pytest.raises(TypeError, match="Manual steps its optimizers itself"):
        fit(untouched, module=Manual(untouched, TRAINING), accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="scores pools with a different model than Custom trains"):
        fit(untouched, module=Custom(policy(), reference_logps()))
    selection = SageSelection(untouched)
    other = Batches(lambda: 1, lambda: iter([MicroBatch(untouched.dataset.index[:2], 1.0, 1.0)]))
    with pytest.raises(ValueError, match=r"use Trainer\(callbacks=\[selection\]\)"):
        trainer().fit(PreferenceModule(untouched, TRAINING), selection.batches)
    with pytest.raises(ValueError, match=r"trainer.fit\(module, selection.batches\)"):
        trainer(selection).fit(PreferenceModule(untouched, TRAINING), other)
    sharded = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(TypeError, match=r"call shard\(model, mesh="):
        selection.on_fit_start(sharded, PreferenceModule(untouched, TRAINING))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a checkpoint of step 2, and a copy without the selection's state."""
    folder = tmp_path_factory.mktemp("checkpoints")
    fit(loader(), saved(folder, every_n_train_steps=2))
    path = folder / "step=2.ckpt"
    state = torch.load(path, weights_only=False)
    del state["callbacks"]["SageSelection"]
    torch.save(state, folder / "foreign.ckpt")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("foreign", {}, "checkpoint of step 2 was written without this callback"),
        ("step=2", {"batch_size": 2}, "4 pairs per optimizer step .*, and now they would be 2"),
        ("step=2", {"pairs": 40}, "belongs to another run"),
    ],
)
def test_refused_checkpoints(checkpoint, name, options, message):
    with pytest.raises(ValueError, match=message):
        fit(loader(**options), resume=checkpoint / f"{name}.ckpt")


def test_a_loader_that_has_handed_out_batches_is_refused():
    batches = loader()
    next(iter(batches))
    with pytest.raises(ValueError, match="the trainer is at step 0, but the loader is at 1"):
        fit(batches)


def test_a_gradient_that_is_not_finite_names_the_rows():
    batches = loader()

    def broken(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
        return nca(policy, reference, beta=beta) * torch.inf

    module = PreferenceModule(batches, Training(loss=broken))
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient .* batch are \[\d+"):
        fit(batches, module=module)


@pytest.mark.slow
def test_the_example(tmp_path):
    script = ROOT / "examples" / "lightning_sage.py"
    output = launched(script, "--strategy", "fsdp2", "--folder", tmp_path, processes=2).stdout
    before, after = re.findall(r"held-out loss +([\d.]+) -> +([\d.]+)", output)[0]
    assert float(before) == pytest.approx(1.3863, abs=1e-4)
    assert float(after) < float(before)
    assert list(tmp_path.rglob("last.ckpt"))


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_pair_in_the_last_pass(tmp_path):
    launched(WORKER, 2, tmp_path, processes=2)
    report = torch.load(tmp_path / "0.pt")
    alone = loader(SHORT_LAST)
    module = PreferenceModule(alone, TRAINING)
    held_out = held_out_batches(dataset().take(range(40, 48)))
    best = saved(tmp_path, monitor="held_out/loss")
    fit(alone, best, module=module, held_out=held_out, val_check_interval=8)
    for strategy in ("ddp", "fsdp2"):
        weights, score, validated = report[strategy]
        assert difference(alone.model, weights) < 1e-5
        assert score == pytest.approx(validated, abs=1e-6)
        assert score == pytest.approx(float(best.best_model_score), abs=1e-4)
    assert "Unsharded to shard" in report["unsharded"]
    assert "call shard(model, mesh=" in report["unsharded"]
    assert "processes x passes = 2 x 4" in report["uneven"]

"""SAGE on TRL's DPOTrainer: trained pairs, reference log-probs and refusals."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed, so there is no DPOTrainer to attach to")
import trl
from conftest import ROOT, launched
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from small_models import small_model
from transformers import TrainerCallback
from trl_host import SETTINGS, Batches
from worlds import base

from arithmetic import make_problems
from sage_select import PreferenceDataset, SageConfig, SelectionLog, build_loader, measure
from sage_select.adapters.trl import attach, pairs_of
from sage_select.system.settings import ConfigError
from sage_select.training.refusals import Refused

OLD = trl.__version__.startswith("0.")
PAIRS = 24
WITHOUT_STRATA = {"refresh_steps": 3, "mix_start": [1.0], "mix_end": [1.0], "keep_end": 0.5}


def configured(**selection):
    """Return a configuration that keeps all 12 pairs of the first pool, then 6 of 12."""
    return SageConfig(
        strata={"by": "none"}, selection=WITHOUT_STRATA | selection, training={"epochs": 1}
    )


CONFIG = configured()
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")


def records(count=PAIRS):
    """Return pairs of a right solution and one of another problem, for the same prompt."""
    problems = make_problems(PAIRS + 1, seed=7, zipf=0.3)
    return [
        {"prompt": problem.prompt, "chosen": problem.solution, "rejected": other.solution}
        for problem, other in pairwise(problems)
    ][:count]


def make(folder, rows=None, model=None, evaluated=None, callbacks=(), **settings):
    """Return a trainer as users build it, with a tiny policy."""
    model = small_model("qwen2") if model is None else model
    adapted = hasattr(model, "peft_config")
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "save_strategy": "no",
    } | settings
    return trl.DPOTrainer(
        model=model,
        ref_model=None if adapted else small_model("qwen2"),
        args=trl.DPOConfig(output_dir=str(folder / "run"), **(SETTINGS | options)),
        train_dataset=Dataset.from_list(records() if rows is None else rows),
        eval_dataset=evaluated,
        processing_class=base()[1],
        callbacks=list(callbacks),
    )


class Observed:
    """A trainer's run: pairs of each micro-batch, and updates before each pool is scored."""

    def __init__(self, trainer, config=CONFIG, **options):
        self.pairs = pairs_of(trainer)
        self.loader = attach(trainer, config, show_progress=False, **options)
        self.trained, self.selections, self.trainer = [], [], trainer
        batches, compute_loss = Batches(self.pairs), trainer.compute_loss

        def compute(model, inputs, *args, **kwargs):
            if model.training:
                self.trained.append(batches.ids_of(inputs))
            return compute_loss(model, inputs, *args, **kwargs)

        def select(interval, selection):
            self.selections.append((trainer.state.global_step, selection))

        trainer.compute_loss, self.loader.on_select = compute, select

    def train(self, **options):
        self.trainer.train(**options)
        return self

    @property
    def logs(self):
        return [log for log in self.trainer.state.log_history if "loss" in log]

    @property
    def weights(self):
        return self.trainer.model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return an uninterrupted run."""
    return Observed(make(tmp_path_factory.mktemp("whole"))).train()


def test_it_trains_on_the_selected_pairs(whole):
    steps, selections = zip(*whole.selections, strict=True)
    assert steps == (0, 3)
    kept = [set(whole.pairs.take(s.indices).ids) for s in selections]
    assert [len(ids) for ids in kept] == [12, 6]
    assert [len(ids) for ids in whole.trained] == [2] * 8 + [1] * 2  # the last update is short
    trained = [i for ids in whole.trained for i in ids]
    assert set(trained[:12]) == kept[0]
    assert set(trained[12:]) == kept[1]
    assert whole.trainer.state.global_step == len(whole.loader) == 5


def test_the_log_has_the_selection_and_an_exact_schedule(whole):
    rates = [log["learning_rate"] for log in whole.logs]
    np.testing.assert_allclose(rates, [1e-3 * (1 - step / 5) for step in range(5)])
    assert [log["selection/interval"] for log in whole.logs] == [0, 0, 0, 1, 1]
    assert whole.logs[-1]["selection/kept_share"] == 0.5
    assert whole.logs[-1]["selection/tokens_scored"] > 0
    np.testing.assert_allclose([log["epoch"] for log in whole.logs], np.arange(1, 6) / 5)
    assert SelectionLog(whole.trainer.args.output_dir + "/selection").read().height == PAIRS


def test_ids_are_hashes_of_the_text(whole):
    ours = PreferenceDataset.from_records(records(), tokenizer=base()[1], max_length=64)
    if not OLD:  # old versions do not keep the text
        assert set(whole.pairs.ids) == set(ours.ids)
    assert whole.pairs.sequences()[0].tokens.tolist() == ours.sequences()[0].tokens.tolist()


def test_data_loader_workers_do_not_change_the_run(whole, tmp_path):
    observed = Observed(make(tmp_path, dataloader_num_workers=2)).train()
    assert [step for step, _ in observed.selections] == [0, 3]
    assert observed.trained == whole.trained
    assert same(observed.weights, whole.weights)


class Stop(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.after


@pytest.mark.parametrize(("after", "restores"), [(2, False), (3, True), (4, False)])
def test_a_run_resumes_at_its_last_step(whole, tmp_path, after, restores):
    saves = {"save_strategy": "steps", "save_steps": 1}
    first = Observed(make(tmp_path, callbacks=[Stop(after)], **saves)).train()
    saves |= {"restore_callback_states_from_checkpoint": restores}
    second = Observed(make(tmp_path, **saves)).train(resume_from_checkpoint=True)
    assert first.trained + second.trained == whole.trained
    assert len(first.selections + second.selections) == 2  # no pool is scored again
    assert same(second.weights, whole.weights)
    assert second.logs[-1]["epoch"] == 1.0


def test_a_trained_policy_is_refused_as_the_reference_of_a_resumed_run(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    first = make(tmp_path, callbacks=[Stop(2)], **saves)
    Observed(first).train()
    second = make(tmp_path, **saves)
    second.ref_model = first.model  # as if the trainer was built from a checkpoint
    with pytest.raises(ValueError, match="the reference is another than the run's"):
        Observed(second).train(resume_from_checkpoint=True)


def test_reference_logps_equal_the_stores(tmp_path):
    trainer = make(tmp_path, evaluated=Dataset.from_list(records(3) + records(1)))
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    if OLD:
        theirs = trainer.compute_ref_log_probs(batch)
    else:
        theirs = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    pairs = pairs_of(trainer)
    ours = measure(trainer.ref_model, pairs)
    attach(trainer, CONFIG, show_progress=False)
    train, evaluated = trainer.train_dataset, trainer.eval_dataset
    assert train["ref_chosen_logps"][:] == ours.chosen.tolist()
    assert train["ref_rejected_logps"][:] == ours.rejected.tolist()
    assert evaluated["ref_chosen_logps"][:] == [*ours.chosen[:3].tolist(), ours.chosen[0].item()]
    torch.testing.assert_close(theirs[1], ours.rejected[:2].float(), rtol=1e-5, atol=1e-4)
    assert trainer.ref_model is None
    with pytest.raises(ValueError, match="pass this dataset to the trainer in eval_dataset"):
        trainer.evaluate(Dataset.from_list(records(2)) if not OLD else train.remove_columns(
            ["ref_chosen_logps", "ref_rejected_logps"]))  # fmt: skip


def test_a_lora_policy(tmp_path):
    """The reference is measured with adapters off, and the policy with adapters on."""
    trainer = make(tmp_path, model=get_peft_model(small_model("qwen2"), LORA)) if OLD else (
        trl.DPOTrainer(small_model("qwen2"), args=make(tmp_path).args, peft_config=LORA,
                       train_dataset=Dataset.from_list(records()), processing_class=base()[1])
    )  # fmt: skip
    observed, bare = Observed(trainer), measure(small_model("qwen2"), attached_pairs(trainer))
    assert trainer.train_dataset["ref_chosen_logps"][:] == bare.chosen.tolist()
    select = observed.loader.on_select

    def compared(interval, selection):
        select(interval, selection)
        if interval:
            pool = observed.pairs.take(selection.pool)
            assert torch.equal(measure(trainer.model, pool).chosen, selection.policy.chosen)
            assert not torch.equal(selection.reference.chosen, selection.policy.chosen)
            np.testing.assert_array_equal(
                selection.reference.chosen.numpy(), bare.take(selection.pool).chosen.numpy()
            )

    observed.loader.on_select = compared
    observed.train()
    assert len(observed.selections) == 2


def attached_pairs(trainer):
    """Return the pairs of a trainer that SAGE is attached to."""
    return trainer.get_train_dataloader().loader.dataset


def test_a_lora_policy_that_was_trained_before(tmp_path):
    """The reference is a copy of the policy's adapter, not the base model."""
    model = get_peft_model(small_model("qwen2"), LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    settings = {}
    if OLD:
        settings = {"ref_adapter_name": "ref", "model_adapter_name": "default"}
        model.add_adapter("ref", LORA)
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
    trainer = make(tmp_path, model=model, **settings)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with_adapter = measure(model, pairs_of(trainer))
    observed = Observed(trainer)
    assert trainer.train_dataset["ref_chosen_logps"][:] == with_adapter.chosen.tolist()
    assert model.active_adapter == "default"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    observed.train()
    # policy and reference are equal before the first update
    assert abs(observed.logs[0]["rewards/chosen"]) < 1e-5


def test_rows_that_cannot_be_used(tmp_path):
    """TRL drops some rows, the library sets others aside; the rest keep their ids."""
    rows = [row | {"pair_id": f"pair {n}"} for n, row in enumerate(records())]
    rows.insert(1, rows[1] | {"prompt": "1+1+" * 40 + "1?", "pair_id": "too long"})
    rows.insert(5, rows[5] | {"rejected": rows[5]["chosen"], "pair_id": "the same"})
    rows.append(rows[0])
    trainer = make(tmp_path, rows)
    with pytest.warns(UserWarning, match=r"[23] of 2[67] rows.*identical") as warnings:
        pairs_of(trainer)
    assert "duplicate pair" in str(warnings[0].message)
    observed = Observed(trainer).train()
    assert observed.pairs.ids.tolist() == [f"pair {n}" for n in range(PAIRS)]
    assert {i for ids in observed.trained for i in ids} <= set(observed.pairs.ids)
    assert sum(map(len, observed.trained)) == 18


def test_evaluation_and_the_best_checkpoint(tmp_path):
    """The end of an interval triggers what is due at the end of an epoch."""
    evaluated = {name: Dataset.from_list(records(n)) for name, n in (("few", 3), ("more", 5))}
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True,
                "metric_for_best_model": "eval_more_loss", "loss_type": ["sigmoid"]}  # fmt: skip
    observed = Observed(make(tmp_path, evaluated=evaluated, **settings)).train()
    assert observed.logs[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    losses = {
        log["step"]: log["eval_more_loss"]
        for log in observed.trainer.state.log_history
        if "eval_more_loss" in log
    }
    assert list(losses) == [3, 5]
    best = min(losses, key=losses.get)
    assert observed.trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    loss = observed.trainer.evaluate()["eval_more_loss"]
    assert loss == pytest.approx(min(losses.values()), abs=1e-6)


@pytest.mark.parametrize(("argument", "launcher"), [(True, "no"), (False, "bf16"), (False, "no")])
def test_precision_is_the_trainers(tmp_path, monkeypatch, argument, launcher):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    observed = Observed(make(tmp_path, bf16=argument)).train()
    expected = torch.bfloat16 if argument or launcher == "bf16" else None
    assert observed.loader.selector.mixed_precision == expected
    assert np.isfinite([log["loss"] for log in observed.logs]).all()


def test_a_custom_loader(whole, tmp_path):
    trainer = make(tmp_path)
    pairs = pairs_of(trainer)
    reference = measure(trainer.ref_model, pairs)
    loader = build_loader(
        CONFIG, pairs, trainer.model, reference, batch_size=4, show_progress=False
    )
    observed = Observed(trainer, loader)
    assert observed.loader is loader
    assert observed.train().trained == whole.trained
    other = make(tmp_path, records()[::-1])
    with pytest.raises(ValueError, match="not have the same tokens as the trainer's"):
        attach(other, loader)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """Return a trainer that must stay as it is when attaching to it fails."""
    return make(tmp_path_factory.mktemp("untouched"))


class Iterable:
    column_names = ()
    add_column = None


FP16 = SimpleNamespace(mixed_precision="fp16", parallelism_config=None)
REFUSED = [
    ("args.num_train_epochs", 3, "set num_train_epochs=1, and the number of passes over the pairs"),
    ("args.max_steps", 7, "max_steps is 7, but the selection determines the number"),
    ("args.accelerator_config.dispatch_batches", True, "leave dispatch_batches out"),
    ("args.accelerator_config.split_batches", True, "leave split_batches out"),
    ("args.auto_find_batch_size", True, "changes the number of pairs per update"),
    ("args.group_by_length", True, "reorder pairs"),
    ("args.train_sampling_strategy", "group_by_length", "reorder pairs"),
    ("args.include_tokens_per_second", True, "reads all batches before the first update"),
    ("args._n_gpu", 2, "one process sees 2 GPUs"),
    ("accelerator", FP16, "set bf16=True, or neither bf16 nor fp16"),
    ("args.fsdp", "full_shard", "silently falls back to DDP on CPUs"),
    ("is_fsdp_enabled", True, "use DDP, or FSDP2 with from_pretrained"),
    ("is_deepspeed_enabled", True, "DeepSpeed is not supported"),
    ("model._tp_size", 2, "tensor parallelism (tp_size=2) is not supported"),
    ("train_dataset", Iterable(), "train_dataset is a Iterable, which has no length"),
    ("eval_dataset", Iterable(), "eval_dataset has no length"),
    ("eval_dataset", {"some": Iterable()}, "eval_dataset has no length"),
    ("_is_vision_dataset", True, "pairs with images are not supported"),
    ("args.sync_ref_model", True, "set sync_ref_model=False"),
    ("args.ld_alpha", 0.5, "leave ld_alpha out"),
    ("args.precompute_ref_log_probs", True, "set precompute_ref_log_probs=False"),
    ("args.use_liger_loss", True, "needs the reference model in every update"),
    ("args.generate_during_eval", True, "needs the reference model in every evaluation"),
    ("args.reference_free", True, "the selection score needs one"),
    ("state.global_step", 5, "attach before trainer.train()"),
    ("data_collator", lambda rows: {"completion_mask": torch.ones(2, 9), "input_ids":
     torch.ones(2, 9), "attention_mask": torch.ones(2, 9)}, "data_collator returns other tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refusals_name_the_fix(untouched, monkeypatch, name, value, message):
    *path, last = name.split(".")
    owner = untouched
    for part in path:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, last, value, raising=False)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attach(untouched, CONFIG)
    assert message in str(error.value)
    assert untouched.ref_model is not None
    assert "ref_chosen_logps" not in getattr(untouched.train_dataset, "column_names", ())


def test_everything_that_does_not_fit_is_reported_at_once(untouched, monkeypatch):
    for name, value in (("num_train_epochs", 3), ("sync_ref_model", True), ("fsdp", "full_shard")):
        monkeypatch.setattr(untouched.args, name, value)
    with pytest.raises(Refused) as error:
        attach(untouched, CONFIG)
    assert len(error.value.refusals) == 3
    for fix in ("set num_train_epochs=1", "set sync_ref_model=False", "use DDP, or FSDP2"):
        assert fix in str(error.value)


CONTRADICTIONS = [
    ({"beta": 0.2}, "beta is 0.2, but the trainer's beta is 0.1"),
    ({"training": {"batch_size": 16}}, "training.batch_size is 16, but the trainer's per_device"),
    ({"training": {"micro_batch_size": 4}}, "per_device_train_batch_size is 2"),
    ({"training": {"mixed_precision": "bfloat16"}}, "the trainer's mixed precision is none"),
    ({"training": {"learning_rate": 1e-5}}, "the trainer's learning_rate is 0.001"),
    ({"training": {"loss": "dpo"}}, "the trainer's loss_type is ['nca_pair']"),
    ({"data": {"max_length": 100}}, "the trainer's max_length is 64"),
    ({"reference": {"model": "x"}}, "pass a model to the trainer as ref_model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "message"), CONTRADICTIONS, ids=[r[1] for r in CONTRADICTIONS]
)
def test_contradictory_settings_are_refused(untouched, sections, message):
    with pytest.raises(ConfigError) as error:
        attach(untouched, SageConfig(**sections))
    assert message in str(error.value)


def test_equal_settings_are_accepted(tmp_path):
    settings = {"batch_size": 4, "epochs": 1, "loss": "nca", "learning_rate": 1e-3}
    config = SageConfig(
        beta=0.1, strata={"by": "none"}, selection=WITHOUT_STRATA, training=settings
    )
    attach(make(tmp_path), config)


def test_a_last_update_that_cannot_be_dealt(tmp_path):
    trainer = make(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match=r"last update has 2 pairs.*selection.multiple=4 in"):
        attach(trainer, CONFIG)
    assert len(attach(trainer, configured(multiple=4))) == 4


@pytest.mark.parametrize("version", ["0.23.1", "2.0.0"])
def test_other_versions_are_refused(untouched, monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=r"install a version from 0.24 to before 2.0"):
        attach(untouched, CONFIG)


def test_other_trainers_and_selections_are_refused(untouched):
    with pytest.raises(TypeError, match="must be a DPOTrainer, got object"):
        attach(object(), CONFIG)
    with pytest.raises(TypeError, match="must be a SageConfig, or a SelectiveLoader"):
        attach(untouched, "sage")


def test_prompt_tuning_is_refused(tmp_path):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    trainer = make(tmp_path, model=get_peft_model(small_model("qwen2"), prompts))
    with pytest.raises(ValueError, match="prompt tuning inserts virtual tokens"):
        attach(trainer, CONFIG)


@pytest.mark.skipif(not OLD, reason="newer versions average log-probs in the loss only")
def test_averaged_logps_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"install TRL 0.29 or newer"):
        attach(make(tmp_path, loss_type=["ipo"]), CONFIG)


def test_truncation_at_the_start_is_refused(tmp_path):
    trainer = make(tmp_path, max_length=12, truncation_mode="keep_end")
    with pytest.raises(ValueError, match=r"longer than max_length=12.*keep_start"):
        attach(trainer, CONFIG)


def test_changes_to_an_attached_trainer_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="already attached to this trainer"):
        attach(whole.trainer, CONFIG)
    with pytest.raises(ValueError, match="has already been used for training"):
        whole.trainer.train()
    trainer = make(tmp_path)
    attach(trainer, CONFIG)
    trainer.args.max_steps = 3
    with pytest.raises(ValueError, match="leave max_steps out"):
        trainer.train()
    trainer.args.max_steps = -1
    trainer.args.per_device_train_batch_size = 4
    with pytest.raises(ValueError, match="the loader has 4 pairs per update"):
        trainer.train()
    trainer.args.per_device_train_batch_size = 2
    trainer.train_dataset = trainer.train_dataset.select(range(4))
    with pytest.raises(ValueError, match="train_dataset was replaced after attach"):
        trainer.train()


def test_a_checkpoint_without_a_selection_is_refused(tmp_path):
    plain = make(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    plain.train()
    trainer = make(tmp_path)
    attach(trainer, CONFIG, show_progress=False)
    with pytest.raises(ValueError, match="checkpoint of step 1 has no selection state"):
        trainer.train(resume_from_checkpoint=True)


def test_another_number_of_pairs_per_update_is_refused(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1}
    Observed(make(tmp_path, callbacks=[Stop(1)], **saves)).train()
    trainer = make(tmp_path, per_device_train_batch_size=1, **saves)
    attach(trainer, CONFIG, show_progress=False)
    with pytest.raises(ValueError, match="takes 4 pairs per optimizer step over all processes"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_the_example(tmp_path, processes):
    script = [ROOT / "examples" / "trl_sage.py", "--problems", "60", "--folder", tmp_path / "run"]
    done = launched(*script, processes=processes)
    before, after = done.stdout.split("held-out loss")[1].split()[:3:2]
    assert float(after) < float(before) == pytest.approx(2 * np.log(2), abs=1e-3)

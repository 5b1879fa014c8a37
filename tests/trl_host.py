"""The contract's run in TRL's `DPOTrainer`, with its own NCA loss."""

from pathlib import Path
from typing import Any

import torch
from contract import BATCH, BETA, LEARNING_RATE, SAVE_EVERY, Case, config, policy, records
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from worlds import base

from sage_select import PreferenceDataset
from sage_select.adapters.trl import attach, pairs_of

SETTINGS = {
    "beta": BETA,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "learning_rate": LEARNING_RATE,
    "logging_steps": 1,
    "loss_type": ["nca_pair"],
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "max_length": 64,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "report_to": "none",
    "seed": 0,
    "use_cpu": True,
    "weight_decay": 0.0,
}  # the contract's settings, and some that keep a small run on a CPU short


def sharded(folder: Path, world: int) -> Any:
    """Return the policy, sharded by transformers while loading.

    Its head is untied first: once sharded, a tied head would keep the weights it was loaded with.
    """
    from transformers.distributed import DistributedConfig

    print("this policy has an untied head")  # test_contract looks for these words
    model = policy()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)  # only rank 0 writes
    torch.distributed.barrier()
    shards = DistributedConfig(fsdp_size=world)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", distributed_config=shards)


class Batches:
    """A lookup of the pair ids in a trainer's batch, by their tokens."""

    def __init__(self, pairs: PreferenceDataset) -> None:
        self.pad = base()[1].pad_token_id
        sides = [tuple(s.tokens.tolist()) for s in pairs.sequences()]
        self.ids = dict(
            zip(zip(sides[: len(pairs)], sides[len(pairs) :], strict=True), pairs.ids, strict=True)
        )

    def ids_of(self, batch: dict[str, Any]) -> list[str]:
        chosen, rejected = (self.sequences(batch, side) for side in ("chosen", "rejected"))
        return [str(self.ids[pair]) for pair in zip(chosen, rejected, strict=True)]

    def sequences(self, batch: dict[str, Any], side: str) -> list[tuple[int, ...]]:
        if "completion_mask" in batch:  # the first half is chosen, the second rejected
            half = batch["input_ids"].chunk(2)[side == "rejected"]
            return [tuple(t for t in row if t != self.pad) for row in half.tolist()]
        parts = zip(batch["prompt_input_ids"], batch[f"{side}_input_ids"], strict=True)
        return [tuple(t for part in both for t in part.tolist() if t != self.pad) for both in parts]


class Watch(TrainerCallback):
    def __init__(self, case: Case) -> None:
        self.case = case

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_: Any) -> None:
        self.case.watch(optimizer.optimizer, already=state.global_step)
        model.train()  # the trainer does so only in a training step

    def on_evaluate(self, args, state, control, model=None, **_: Any) -> None:
        model.train()

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.case.dies_now():
            if self.case.world > 1:
                torch.distributed.barrier()  # rank 0 may still be writing
            self.case.die()


def run(case: Case) -> None:
    fsdp2 = case.strategy == "fsdp2"
    args = DPOConfig(
        **SETTINGS,
        output_dir=str(case.folder / "run"),
        per_device_train_batch_size=case.per_process,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=case.accumulation,
        save_strategy="no" if fsdp2 else "steps",  # transformers cannot resume a sharded model
        save_steps=SAVE_EVERY,
        eval_strategy="steps",
        eval_steps=5,
    )
    assert args.world_size == case.world
    rows = Dataset.from_list(records())
    weights = case.folder / "policy"
    trainer = DPOTrainer(
        model=sharded(weights, case.world) if fsdp2 else policy(),
        ref_model=sharded(weights, case.world) if fsdp2 else None,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=base()[1],
        callbacks=[Watch(case)],
    )
    assert all(isinstance(p, DTensor) == fsdp2 for p in trainer.model.parameters())
    pairs = pairs_of(trainer)
    loader = attach(trainer, config(), log=case.folder / "selection", show_progress=False)
    assert loader.timeline.batch_size == BATCH
    batches, compute_loss = Batches(pairs), trainer.compute_loss

    def traced(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            case.trains(batches.ids_of(inputs), [loss.item()])  # the mean over the micro-batch
        return loss

    trainer.compute_loss = traced
    case.watch_generators(loader)
    loader.on_select = lambda interval, selection: case.measures(
        interval, pairs.take(selection.indices).ids.tolist(), trainer.model
    )
    trainer.train(resume_from_checkpoint=case.attempt > 0)
    case.finish(
        {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in trainer.model.state_dict().items()
        }
    )

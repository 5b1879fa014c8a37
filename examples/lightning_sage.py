"""Train the demo's policy on the pairs that SAGE selects, with Lightning.

    python examples/lightning_sage.py
    torchrun --nproc-per-node 2 examples/lightning_sage.py --strategy fsdp2

Selection adds a loader, a callback, and the callback's batches to a Lightning script.
"""

import argparse
import os
from argparse import RawDescriptionHelpFormatter as RawText
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from arithmetic import load_base, make_pairs, make_problems
from sage_select import (
    PreferenceDataset,
    ReferenceStore,
    SageConfig,
    Training,
    build_loader,
    leave,
)
from sage_select.adapters.lightning import PreferenceModule, SageSelection, held_out_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    parser.add_argument("--problems", type=int, default=120, help="problems to make pairs from")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp2"])
    parser.add_argument("--folder", default="runs/lightning_sage", type=Path, help="for logs")
    parser.add_argument("--resume", help="a checkpoint to resume from")
    args = parser.parse_args()

    policy, tokenizer = load_base()
    records = make_pairs(policy, tokenizer, make_problems(args.problems, seed=5, zipf=0.3), seed=0)
    dataset = PreferenceDataset.from_records(records, tokenizer=tokenizer, max_length=96)
    train_rows, rest = dataset.split(0.1)
    held_out = held_out_batches(dataset.take(rest))

    config = SageConfig(
        selection={
            "refresh_steps": 4,
            "mix_start": [0.5, 0.45, 0.05],
            "mix_end": [0.25, 0.5, 0.25],
        },
        training={"epochs": 1},
    )
    reference = ReferenceStore(policy, dataset)  # filled when the trainer starts
    loader = build_loader(config, dataset.take(train_rows), policy, reference, batch_size=8)
    selection = SageSelection(loader)
    module = PreferenceModule(loader, Training(learning_rate=2e-4))

    processes = int(os.environ.get("WORLD_SIZE", 1))
    strategy = ModelParallelStrategy(processes, 1) if args.strategy == "fsdp2" else "ddp"
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy=strategy if processes > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[selection, ModelCheckpoint(monitor="held_out/loss", save_last=True)],
        logger=CSVLogger(args.folder),
        log_every_n_steps=1,
        val_check_interval=8,  # passes, so every four updates
        num_sanity_val_steps=0,
    )
    (before,) = trainer.validate(module, held_out, verbose=False)
    trainer.fit(module, selection.batches, held_out, ckpt_path=args.resume)
    (after,) = trainer.validate(module, held_out, verbose=False)
    if trainer.is_global_zero:
        for name in ("loss", "accuracy", "likelihood_accuracy", "margin"):
            print(
                f"held-out {name:20} {before[f'held_out/{name}']:8.4f} -> "
                f"{after[f'held_out/{name}']:8.4f}"
            )


if __name__ == "__main__":
    main()
    leave()

"""Train on the pairs that SAGE selects, in TRL's DPOTrainer.

python examples/trl_sage.py
torchrun --nproc-per-node 2 examples/trl_sage.py
"""

import argparse
import os
from argparse import RawDescriptionHelpFormatter as RawText

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from arithmetic import load_base, make_pairs, make_problems
from sage_select import SageConfig, leave
from sage_select.adapters.trl import attach

BATCH = 8  # pairs per update, over all processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    parser.add_argument("--folder", default="runs/trl_sage", help="for checkpoints and logs")
    parser.add_argument("--problems", type=int, default=120, help="problems to make pairs from")
    parser.add_argument("--resume", action="store_true", help="resume the run in the folder")
    options = parser.parse_args()

    model, tokenizer = load_base()
    problems = make_problems(options.problems, seed=5, zipf=0.3)
    pairs = Dataset.from_list(make_pairs(model, tokenizer, problems, seed=0))
    pairs = pairs.train_test_split(0.1, seed=0)

    gpu = torch.cuda.is_available()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=options.folder,
            loss_type=["nca_pair"],
            learning_rate=2e-4,
            max_length=96,
            num_train_epochs=1,  # keep at 1: SageConfig has the number of epochs
            per_device_train_batch_size=BATCH // (2 * int(os.environ.get("WORLD_SIZE", 1))),
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="epoch",  # with selection, at the end of each interval
            bf16=gpu,
            use_cpu=not gpu,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
    )

    selection = {
        "mix_start": (0.5, 0.45, 0.05),  # shares of easy, medium and hard pairs, first pool
        "mix_end": (0.25, 0.5, 0.25),  # and last pool
        "refresh_steps": 4,
        "multiple": 4,  # so that the last update divides evenly over two processes
    }
    loader = attach(trainer, SageConfig(selection=selection, training={"epochs": 1}))
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=options.resume)
    after = trainer.evaluate()

    if trainer.is_world_process_zero():
        print(f"{loader.timeline.plan}, {len(loader)} updates")
        for name in ("loss", "rewards/accuracies", "rewards/margins"):
            print(
                f"held-out {name:20} {before[f'eval_{name}']:8.4f} -> {after[f'eval_{name}']:8.4f}"
            )


if __name__ == "__main__":
    main()
    leave()

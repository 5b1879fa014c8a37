"""Train on all pairs, in a plain PyTorch loop.

Its twin `plain_sage.py` trains on the pairs that SAGE selects; the difference between the two
files is all that selection requires. With several processes the policy is sharded (FSDP2):
`torchrun --nproc-per-node 8 examples/plain_sage.py ...`.
"""

import argparse
from argparse import RawDescriptionHelpFormatter as RawText
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_select import (
    PreferenceDataset,
    Processes,
    ReferenceStore,
    ShuffledLoader,
    Training,
    fit,
    join,
    leave,
    save_pretrained,
    shard,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    parser.add_argument("--pairs", required=True, help="a .jsonl or .parquet file of pairs")
    parser.add_argument("--model", required=True, help="a folder or hub name of a causal model")
    parser.add_argument("--tokenizer", help="folder or hub name; by default, the model")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens, prompt + response")
    parser.add_argument("--folder", default="runs/plain_full", help="for logs and checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume the run in the folder")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="pairs per forward pass")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="paper, 1.5B-7B: 5e-7")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--limit", type=int, help="use only this many pairs")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    device = join(args.device)  # under torchrun, one device per process
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device)
    if Processes.all().size > 1:
        shard(model)

    dataset = PreferenceDataset.read(args.pairs, tokenizer=tokenizer, max_length=args.max_length)
    show(dataset.waterfall())
    rows, held_out = dataset.take(range(len(dataset))[: args.limit]).split(0.1, seed=args.seed)

    # measured once and kept on disk: a resumed run or another run measures nothing
    reference = ReferenceStore(model, dataset.take([*rows, *held_out]))
    reference.fill()

    loader = ShuffledLoader(
        dataset.take(rows), batch_size=args.batch_size, epochs=args.epochs, seed=args.seed
    )

    training = Training(
        learning_rate=args.learning_rate,
        micro_batch_size=args.micro_batch_size,
        checkpoint_every=args.checkpoint_every,
    )
    history = fit(
        model,
        loader,
        dataset,
        reference,
        training,
        held_out=dataset.take(held_out),
        folder=args.folder,
        resume=args.resume,
    )
    before, after = history.evaluations[0], history.evaluations[-1]
    for name in ("loss", "accuracy", "likelihood_accuracy", "margin"):
        show(f"held-out {name:20} {before[name]:8.4f} -> {after[name]:8.4f}")
    save_pretrained(model, Path(args.folder) / "model")
    tokenizer.save_pretrained(Path(args.folder) / "model")


def show(text: str) -> None:
    """Print in process 0 only."""
    if Processes.all().rank == 0:
        print(text)


if __name__ == "__main__":
    main()
    leave()

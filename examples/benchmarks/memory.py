"""Memory of an update and of a scoring pass, as a function of sequence length.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --lengths 8192 32768 --hidden 1536 --layers 28 \\
        --device cuda --dtype bfloat16

One pair: a short prompt and two responses of so many tokens, on a model of random weights in
Qwen2.5's proportions and with its vocabulary. Memory is the peak over weights and gradients, which
stood there before, without optimizer states; each figure has a process of its own. `all logits` is
the same update through the model's own logits, as a trainer does it that has no head of its own.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from head import with_memory
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from sage_select import Reader
from sage_select.adapters.plain import checkpoint_activations
from sage_select.data.pair_table import TokenSequence
from sage_select.models.attention import packed_attention
from sage_select.models.batches import pad

PROMPT = 64
Pair = list[TokenSequence]


def score(model: nn.Module, pair: Pair) -> None:
    """A forward pass of both responses."""
    with torch.no_grad():
        Reader().response_logps(model, pair)


def update(model: nn.Module, pair: Pair) -> None:
    """Forward and backward of both responses."""
    with packed_attention(model):
        Reader().response_logps(model, pair).sum().backward()


def update_again(model: nn.Module, pair: Pair) -> None:
    """The same, with layers computed again in the backward pass."""
    checkpoint_activations(model.train())
    update(model, pair)


def update_all_logits(model: nn.Module, pair: Pair) -> None:
    """The same through logits of every position, in fp32 for the softmax."""
    checkpoint_activations(model.train())
    batch = pad(pair).to(next(model.parameters()).device)
    logits = model(**batch.inputs).logits.flatten(0, 1)
    logps = logits.float().log_softmax(-1)[batch.predicts]
    logps.gather(-1, batch.targets[:, None]).sum().backward()


PASSES: dict[str, Callable[[nn.Module, Pair], None]] = {
    "scoring": score,
    "update": update,
    "update, activation checkpointing": update_again,
    "update, checkpointing, all logits": update_all_logits,
}


def measure_one(name: str, length: int, args: argparse.Namespace) -> float:
    """Peak memory of one pass, in MB."""
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=1,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(settings).to(args.device, getattr(torch, args.dtype))
    random = np.random.default_rng(0)
    prompt = random.integers(args.vocabulary, size=PROMPT)

    def pair(tokens: int) -> Pair:
        responses = random.integers(args.vocabulary, size=(2, tokens))
        return [
            TokenSequence(np.concatenate([prompt, r]).astype(np.int32), PROMPT) for r in responses
        ]

    update(model, pair(16))  # gradients, and what libraries allocate once
    model.zero_grad(set_to_none=False)
    return with_memory(lambda: PASSES[name](model, pair(length)), args.device)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a pass, in a process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one[0], int(args.one[1]), args)))
        return
    print(f"{args.layers} layers of {args.hidden}, vocabulary {args.vocabulary}, {args.dtype}, "
          f"{args.device}; MB for a pair of responses of so many tokens\n"
          f"{'':36}" + "".join(f"{length:>10,}" for length in args.lengths))  # fmt: skip
    for name in PASSES:
        row = []
        for length in args.lengths:
            command = [sys.executable, __file__, "--one", name, str(length)]
            for option in ("hidden", "layers", "vocabulary", "dtype", "device"):
                command += [f"--{option}", str(getattr(args, option))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:  # the kernel or the device, most likely for want of memory
                row.append("-")
                continue
            row.append(f"{float(json.loads(done.stdout.splitlines()[-1])):,.0f}")
        print(f"{name:36}" + "".join(f"{figure:>10}" for figure in row), flush=True)


if __name__ == "__main__":
    main()

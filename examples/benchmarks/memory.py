"""Peak memory of an update and of a scoring pass, as a function of sequence length.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --lengths 8192 32768 --hidden 1536 --layers 28 \\
        --device cuda --dtype bfloat16

One pair, a short prompt and two responses of each length, on a model with random weights, Qwen2.5's
proportions and its vocabulary. Memory is the peak beyond weights and gradients, which are allocated
before; there are no optimizer states. Each figure is measured in a separate process. `all logits`
is the same update through the model's own logits, as in a trainer without a chunked head.
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
from sage_select.data.pair_table import TokenSequence
from sage_select.models.attention import packed_attention
from sage_select.models.batches import pad
from sage_select.training.sharding import checkpoint_activations

PROMPT = 64
Pair = list[TokenSequence]


def score(model: nn.Module, pair: Pair) -> None:
    """Run a forward pass of both responses, without gradients."""
    with torch.no_grad():
        Reader().response_logps(model, pair)


def update(model: nn.Module, pair: Pair) -> None:
    """Run a forward and a backward pass of both responses."""
    with packed_attention(model):
        Reader().response_logps(model, pair).sum().backward()


def update_checkpointed(model: nn.Module, pair: Pair) -> None:
    """Run both passes with activation checkpointing."""
    checkpoint_activations(model.train())
    update(model, pair)


def update_all_logits(model: nn.Module, pair: Pair) -> None:
    """Run both passes with activation checkpointing and fp32 logits of every position."""
    checkpoint_activations(model.train())
    batch = pad(pair).to(next(model.parameters()).device)
    logits = model(**batch.inputs).logits.flatten(0, 1)
    logps = logits.float().log_softmax(-1)[batch.predicts]
    logps.gather(-1, batch.targets[:, None]).sum().backward()


PASSES: dict[str, Callable[[nn.Module, Pair], None]] = {
    "scoring": score,
    "update": update,
    "update, activation checkpointing": update_checkpointed,
    "update, checkpointing, all logits": update_all_logits,
}


def measure_one(name: str, length: int, args: argparse.Namespace) -> float:
    """Measure the peak memory of one pass, in MB."""
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

    update(model, pair(16))  # allocates gradients, and the workspaces of libraries
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
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # one pass, in a subprocess
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one[0], int(args.one[1]), args)))
        return
    print(f"{args.layers} layers of {args.hidden}, vocabulary {args.vocabulary}, {args.dtype}, "
          f"{args.device}; MB for a pair, by tokens per response\n"
          f"{'':36}" + "".join(f"{length:>10,}" for length in args.lengths))  # fmt: skip
    for name in PASSES:
        row = []
        for length in args.lengths:
            command = [sys.executable, __file__, "--one", name, str(length)]
            for option in ("hidden", "layers", "vocabulary", "dtype", "device"):
                command += [f"--{option}", str(getattr(args, option))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:  # most likely out of memory, killed by the kernel or by CUDA
                row.append("-")
                continue
            row.append(f"{float(json.loads(done.stdout.splitlines()[-1])):,.0f}")
        print(f"{name:36}" + "".join(f"{figure:>10}" for figure in row), flush=True)


if __name__ == "__main__":
    main()

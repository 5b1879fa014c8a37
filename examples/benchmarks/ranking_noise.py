"""Ranking noise: the effect of batch size, layout and dtype on log-probs and on the kept pairs.

    python examples/benchmarks/ranking_noise.py

The reference is a small trained model, and the policy is the same model after a short run of NCA:
a 260K-parameter Llama on pairs of GSM8K if SAGE_SELECT_DATA names a folder that contains them,
otherwise the demo's model on pairs that it generates.

On each path (dtype, layout and batch size) policy and reference measure the same pool, and SAGE's
score keeps a share of it. Every path is compared with the first: the largest difference of a
response's summed log-prob, and per token; the number of pairs that flip at the cut; and the largest
distance of a flipped pair's score from the cut, relative to the cut. In the last rows policy and
reference are measured on different paths, as with another server or dtype for the reference.
"""

import argparse
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_select import (
    Constant,
    PairLogps,
    PreferenceDataset,
    Reader,
    Selection,
    Selector,
    ShuffledLoader,
    Training,
    fit,
    sage,
)

Measure = Callable[[Any, PreferenceDataset], PairLogps]


def load_real(folder: Path, count: int) -> tuple[Any, PreferenceDataset, float]:
    """Return a Llama trained on children's stories, pairs of GSM8K, and a learning rate."""
    name = folder / "models" / "stories260K"
    dataset = PreferenceDataset.read(
        folder / "pairs" / "gsm8k_verified.parquet",
        tokenizer=AutoTokenizer.from_pretrained(name),
        max_length=512,
    )
    spread = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64)
    return AutoModelForCausalLM.from_pretrained(name), dataset.take(spread), 1e-4


def make_demo(count: int) -> tuple[Any, PreferenceDataset, float]:
    """Return the demo's model, pairs that it generates, and a learning rate."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from arithmetic import load_base, make_pairs, make_problems

    model, tokenizer = load_base()
    pairs = make_pairs(model, tokenizer, make_problems(count, seed=7, zipf=0.3), seed=0)[:count]
    return model, PreferenceDataset.from_records(pairs, tokenizer=tokenizer, max_length=64), 1e-4


def in_dtype(dtype: torch.dtype, **options: Any) -> Measure:
    """Return a path that measures with a copy of the model, with weights of this dtype."""
    reader = Reader(show_progress=False, **options)

    def measure_copy(model: Any, pool: PreferenceDataset) -> PairLogps:
        return reader(deepcopy(model).to(dtype), pool)

    return measure_copy


fp32, bf16, fp16 = (in_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16))
ON_ONE_PATH: dict[str, Measure] = {
    "fp32, packed, 16,384 tokens": fp32,
    "fp32, packed, 4,096 tokens": in_dtype(torch.float32, max_batch_tokens=4096),
    "fp32, packed, 1,024 tokens": in_dtype(torch.float32, max_batch_tokens=1024),
    "fp32, padded, 16,384 tokens": in_dtype(torch.float32, layout="padded"),
    "fp32, padded, 1,024 tokens": in_dtype(torch.float32, layout="padded", max_batch_tokens=1024),
    "fp32, all logits stored": in_dtype(torch.float32, impl="reference", max_batch_tokens=4096),
    "fp16 weights": fp16,
    "bf16 autocast": in_dtype(torch.float32, mixed_precision=torch.bfloat16),
    "bf16 weights": bf16,
    "bf16 weights, padded, 1,024 tokens": in_dtype(
        torch.bfloat16, layout="padded", max_batch_tokens=1024
    ),
}
ON_TWO_PATHS: dict[str, tuple[Measure, Measure]] = {
    "bf16 policy, its reference padded": (bf16, in_dtype(torch.bfloat16, layout="padded")),
    "bf16 policy, fp32 reference": (bf16, fp32),
    "fp16 policy, fp32 reference": (fp16, fp32),
}


def decide(policy: PairLogps, reference: PairLogps, keep: float) -> Selection:
    """Return the pairs of the pool that SAGE's score keeps."""
    score = partial(sage, beta=0.1)
    # no_signal="score": rank by the score even if all rewards are equal up to rounding
    selector = Selector(score, Constant(keep), reference, lambda step: 0.0, no_signal="score")
    return selector.rank(policy, reference, progress=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=30, help="of NCA, on 16 pairs each")
    parser.add_argument("--keep", type=float, default=0.5)
    args = parser.parse_args()
    folder = os.environ.get("SAGE_SELECT_DATA")
    reference_model, pool, rate = (
        make_demo(args.pairs) if folder is None else load_real(Path(folder), args.pairs)
    )
    torch.manual_seed(0)
    policy_model = deepcopy(reference_model)
    trained_pairs = pool.take(pool.index[: 16 * args.steps])
    epochs = -(-16 * args.steps // len(trained_pairs))
    fit(
        policy_model,
        ShuffledLoader(trained_pairs, batch_size=16, epochs=epochs),
        trained_pairs,
        Reader(show_progress=False)(reference_model, trained_pairs),
        Training(learning_rate=rate),
        show_progress=False,
    )
    measured = {
        name: (path(policy_model, pool), path(reference_model, pool))
        for name, path in ON_ONE_PATH.items()
    }
    for name, (policy_path, reference_path) in ON_TWO_PATHS.items():
        measured[name] = policy_path(policy_model, pool), reference_path(reference_model, pool)
    first, first_reference = next(iter(measured.values()))
    expected = decide(first, first_reference, args.keep)
    size, kept = len(pool), int(expected.kept.sum())
    print(f"{size:,} pairs of {pool.num_tokens.mean():.0f} tokens, {kept} kept; log-ratios spread "
          f"{float((first.chosen - first_reference.chosen).std()):.2g} nats")  # fmt: skip
    print(f"{'':36}{'a sum, nats':>13}{'a token':>10}{'flips':>7}{'farthest from the cut':>23}")
    cut = expected.scores[expected.kept].min()
    for name, (policy, reference) in measured.items():
        difference = torch.cat([policy.chosen - first.chosen, policy.rejected - first.rejected])
        tokens = torch.cat([policy.chosen_tokens, policy.rejected_tokens])
        selection = decide(policy, reference, args.keep)
        flips = expected.kept & ~selection.kept
        moved = expected.kept != selection.kept
        gap = np.abs(expected.scores[moved] / cut - 1).max(initial=0.0)
        print(f"{name:36}{difference.abs().max():13.1e}{(difference / tokens).abs().max():10.1e}"
              f"{int(flips.sum()):7}{gap:23.1e}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Ranking noise: what batches, layouts and dtypes change of log-probs, and of the pairs kept.

    python examples/benchmarks/ranking_noise.py

The reference is a small model that was really trained, the policy the same after a short run of
NCA: a 260K-parameter Llama and pairs of GSM8K where SAGE_SELECT_DATA names a folder that has them,
else the demo's model and pairs of its own making. On each path policy and reference measure the
same pool, and SAGE's score keeps a share of it. Against the first path stand the largest difference
of a log-prob, of a response's sum and per token; the pairs that flip at the cut; and how far from
the cut the farthest of them was, as a share of its score. In the last rows the two models were not
measured on the same path, which is what a different server or dtype for the reference would do.
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
    Selection,
    Selector,
    ShuffledLoader,
    measure,
    sage,
)
from sage_select.adapters.plain import Training, train

Measure = Callable[[Any, PreferenceDataset], PairLogps]


def real(folder: Path, count: int) -> tuple[Any, PreferenceDataset, float]:
    """A Llama that learnt children's stories, pairs of GSM8K, and a learning rate."""
    name = folder / "models" / "stories260K"
    dataset = PreferenceDataset.read(
        folder / "pairs" / "gsm8k_verified.parquet",
        tokenizer=AutoTokenizer.from_pretrained(name),
        max_length=512,
    )
    spread = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64)
    return AutoModelForCausalLM.from_pretrained(name), dataset.take(spread), 1e-4


def made(count: int) -> tuple[Any, PreferenceDataset, float]:
    """The demo's model, pairs that it makes itself, and a learning rate."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from arithmetic import load_base, make_pairs, make_problems

    model, tokenizer = load_base()
    pairs = make_pairs(model, tokenizer, make_problems(count, seed=7, zipf=0.3), seed=0)[:count]
    return model, PreferenceDataset.from_records(pairs, tokenizer=tokenizer, max_length=64), 1e-4


def in_dtype(dtype: torch.dtype, **options: Any) -> Measure:
    """Measure with a copy of the model whose weights are of this dtype."""

    def measured(model: Any, pool: PreferenceDataset) -> PairLogps:
        return measure(deepcopy(model).to(dtype), pool, show_progress=False, **options)

    return measured


fp32, bf16, fp16 = (in_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16))
ON_ONE_PATH: dict[str, Measure] = {
    "fp32, packed, 16,384 tokens": fp32,
    "fp32, packed, 4,096 tokens": in_dtype(torch.float32, max_batch_tokens=4096),
    "fp32, packed, 1,024 tokens": in_dtype(torch.float32, max_batch_tokens=1024),
    "fp32, padded, 16,384 tokens": in_dtype(torch.float32, layout="padded"),
    "fp32, padded, 1,024 tokens": in_dtype(torch.float32, layout="padded", max_batch_tokens=1024),
    "fp32, all logits kept": in_dtype(torch.float32, impl="reference", max_batch_tokens=4096),
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
    """What SAGE keeps of the pool, whatever the noise."""
    score = partial(sage, beta=0.1)
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
        made(args.pairs) if folder is None else real(Path(folder), args.pairs)
    )
    torch.manual_seed(0)
    policy_model = deepcopy(reference_model)
    few = pool.take(pool.index[: 16 * args.steps])
    train(
        policy_model,
        ShuffledLoader(few, batch_size=16, epochs=-(-16 * args.steps // len(few))),
        few,
        measure(reference_model, few, show_progress=False),
        Training(learning_rate=rate),
        show_progress=False,
    )
    measured = {
        name: (path(policy_model, pool), path(reference_model, pool))
        for name, path in ON_ONE_PATH.items()
    }
    for name, (one, other) in ON_TWO_PATHS.items():
        measured[name] = one(policy_model, pool), other(reference_model, pool)
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
        found = decide(policy, reference, args.keep)
        flips = expected.kept & ~found.kept
        moved = expected.kept != found.kept
        gap = np.abs(expected.scores[moved] / cut - 1).max(initial=0.0)
        print(f"{name:36}{difference.abs().max():13.1e}{(difference / tokens).abs().max():10.1e}"
              f"{int(flips.sum()):7}{gap:23.1e}")  # fmt: skip


if __name__ == "__main__":
    main()

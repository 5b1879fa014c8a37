"""Make `arithmetic_base/`, the half-trained model that preference training starts from.

    python examples/train_arithmetic.py

Takes about two minutes on one core. Accuracy on this task rises from a third to nine tenths within
a hundred steps, and when it rises depends on floating-point rounding. Training therefore stops at
an accuracy, not after a fixed number of steps.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from arithmetic import (
    BASE,
    Problem,
    accuracy,
    build_model,
    build_tokenizer,
    held_out_problems,
    load_base,
    make_problems,
    solution_probability,
    supervised_batch,
)

# About a hundred one-step problems remain for training. With few problems in total they are drawn
# often; a model that rarely sees them learns never to stop after one step.
NUM_PROBLEMS = 6400
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 25
MAX_STEPS = 800
CHECK_EVERY = 10
USEFUL_ACCURACY = (0.40, 0.70)  # below, few samples are right; above, few are wrong


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    validation: list[Problem],
    *,
    seed: int,
    stop_at: float,
) -> int:
    """Train until greedy accuracy on `validation` reaches `stop_at`; return the number of steps."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    step = 0
    for step in (progress := tqdm(range(1, MAX_STEPS + 1), desc="steps", mininterval=1)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / WARM_UP_STEPS, 1.0)
        batch = [problems[row] for row in rng.integers(len(problems), size=BATCH_SIZE)]
        input_ids, labels = supervised_batch(tokenizer, batch)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0:
            reached = accuracy(model, tokenizer, validation)
            progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{reached:.3f}")
            if reached >= stop_at:
                break
    return step


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer so that transformers 4 and 5 can both load them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    # Version 5 writes a class name unknown to version 4; both accept the older name.
    config_file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed for the weights and the batches")
    parser.add_argument("--stop-at", type=float, default=0.55, help="accuracy to stop at")
    arguments = parser.parse_args()

    # The model is too small to gain from a second thread, and with one thread sums do not depend on
    # the number of cores.
    torch.set_num_threads(1)
    test, pair_problems = held_out_problems()
    validation = make_problems(200, seed=4, zipf=0.3, exclude=test + pair_problems)
    held_out = test + pair_problems + validation
    problems = make_problems(NUM_PROBLEMS, seed=3, zipf=0.7, exclude=held_out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=arguments.seed)
    steps = fit(
        model,
        tokenizer,
        problems,
        validation,
        seed=arguments.seed,
        stop_at=arguments.stop_at,
    )

    trained = accuracy(model, tokenizer, test)
    print(f"{steps} steps: greedy accuracy {trained:.3f} on {len(test)} test problems, in float32")
    low, high = USEFUL_ACCURACY
    if not low <= trained <= high:
        parser.exit(1, f"not saved: accuracy must be in [{low}, {high}]; change --stop-at\n")

    save(model.half(), tokenizer, arguments.out)
    rounded, tokenizer = load_base(arguments.out)
    print(
        f"saved in float16 to {arguments.out}: accuracy {accuracy(rounded, tokenizer, test):.3f}, "
        f"p(solution) {solution_probability(rounded, tokenizer, test):.4f}"
    )


if __name__ == "__main__":
    main()

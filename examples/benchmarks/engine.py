"""Scoring pairs: pairs per second, compared with TRL's DPO trainer on the same pairs.

    python examples/benchmarks/engine.py --lengths short
    python examples/benchmarks/engine.py --lengths long
    python examples/benchmarks/engine.py --lengths long --pairs 64 --shape qwen2.5-1.5b \\
        --device cuda --dtype bfloat16

TRL is a `DPOTrainer` with default settings and an online reference: batches of 8 pairs from its
training dataloader, reshuffled each round, through its `prediction_step`, which is `compute_loss`
without gradients, including the entropy and accuracy that it logs. On a CPU its head also scores
prompts and padding. sage-select runs `measure` for the policy and takes the reference from a store
filled before; the last row measures the reference too. All take turns in one process, and figures
are medians.

Lengths are real if SAGE_SELECT_DATA names a folder that contains them, counted with Qwen's
tokenizer: `short` draws two of eight solutions that a Qwen model wrote for a MATH problem, `long`
two of ten long chains of thought. `demo` draws prompts and responses log-normally, with the medians
and spreads of `short`. Tokens and weights are random.

On a CPU the model has a 24th of the layers and of the vocabulary (`--part`): one layer of
Qwen2.5-0.5B at its full width. Layers, attention and head (27.6 % without attention) then have the
same shares of the FLOPs as in the whole model, at any length.

Needed FLOPs count each token of a pair once, with a shared prompt, the head on response tokens
only, and the lower half of the attention matrix. MFU is their rate, for each model that a row runs,
over that of a bare `torch.mm`. The tokens of a row are all model inputs, including padding and the
reference; memory is the peak of a round beyond what was allocated before.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from head import timed, with_memory
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sage_select import PairLogps, PreferenceDataset, Reader, ReferenceStore

Lengths = npt.NDArray[np.int64]

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "tiny": (64, 176, 2, 4, 2, 300),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936),
}
PART = {"cpu": 24, "cuda": 1}
BATCH = 8  # pairs per batch of TRL
PAD, EOS, FIRST = "<pad>", "<eos>", 0x20000  # other tokens are characters, from this code point


def draw_lengths(kind: str, count: int, folder: str | None, seed: int) -> Lengths:
    """Draw [P, 3]: the number of tokens of each pair's prompt and two responses."""
    random = np.random.default_rng(seed)
    if kind == "demo":
        drawn = random.lognormal(np.log([43, 346, 346]), [0.83, 0.40, 0.40], (count, 3))
        return drawn.clip(2, 4096).astype(np.int64)
    if folder is None:
        sys.exit(f"--lengths {kind} needs SAGE_SELECT_DATA; set it, or use --lengths demo")
    qwen = Tokenizer.from_file(f"{folder}/tokenizers/qwen2/tokenizer.json")

    def tokens(texts: pl.Series) -> Lengths:
        return np.array([len(encoded.ids) for encoded in qwen.encode_batch(texts.to_list())])

    if kind == "short":
        table = pl.read_parquet(f"{folder}/math/qwen_math_rm_samples.parquet")
        prompts, responses = tokens(table["question"]), tokens(table["response"])
        group = table["problem_id"].to_numpy()
    else:
        table = pl.read_parquet(f"{folder}/math/long_cot_samples.parquet")
        prompts = tokens(table["problem"])
        responses = tokens(table["thinking"]) + tokens(table["content"])
        # only two responses per problem, so pairs are drawn across problems
        group = np.zeros(len(table))
    chosen = random.integers(len(table), size=count)
    rows = np.arange(len(table))
    rejected = [random.choice(rows[(group == group[i]) & (rows != i)]) for i in chosen]
    return np.stack([prompts[chosen], responses[chosen], responses[rejected]], axis=1)


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character."""
    tokens = [PAD, EOS, *(chr(FIRST + i) for i in range(vocabulary - 2))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model(shape: str, part: int, longest: int, dtype: str, device: str) -> Qwen2ForCausalLM:
    """Build a Qwen2 with random weights, and 1 / `part` of the shape's layers and vocabulary."""
    hidden, mlp, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary // part,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=max(1, layers // part),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).to(device, getattr(torch, dtype)).eval()


def make_records(lengths: Lengths, vocabulary: int, seed: int) -> list[dict[str, str]]:
    """Make pairs of random tokens; responses are one shorter, since an end token is appended."""
    random = np.random.default_rng(seed)

    def text(length: int) -> str:
        return "".join(map(chr, random.integers(FIRST, FIRST + vocabulary - 2, length)))

    return [
        {"prompt": text(prompt), "chosen": text(chosen - 1), "rejected": text(rejected - 1)}
        for prompt, chosen, rejected in lengths.tolist()
    ]


def needed_flops(model: Qwen2ForCausalLM, lengths: Lengths) -> tuple[float, float]:
    """Return the FLOPs of one model on these pairs, and the head's share of a token's FLOPs."""
    prompt, *responses = lengths.T.astype(float)
    layers = model.model.layers
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    head = model.lm_head.weight.numel()
    attended = prompt**2 / 2 + sum(response * (prompt + response / 2) for response in responses)
    width = layers[0].self_attn.o_proj.in_features
    flops = 2 * linear * lengths.sum() + 2 * head * lengths[:, 1:].sum()
    return flops + 4 * width * len(layers) * attended.sum(), head / (head + linear)


@contextmanager
def counting_tokens(*models: nn.Module) -> Iterator[list[int]]:
    """Count the tokens that enter these models' embeddings, one entry per forward call."""
    tokens: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
            lambda module, args: tokens.append(args[0].numel())
        )
        for model in models
    ]
    yield tokens
    for hook in hooks:
        hook.remove()


def dpo_trainer(
    model: nn.Module, tokenizer: Any, records: list[dict[str, str]], folder: str, device: str
) -> Any:
    """Build TRL's trainer on two copies of the model, since it modifies policy and reference."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    dtype = next(model.parameters()).dtype
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_length=None,
        bf16=dtype == torch.bfloat16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = DPOTrainer(
        model=deepcopy(model),
        ref_model=deepcopy(model),
        args=config,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    return trainer


def largest_difference(
    trainer: Any, batch: dict[str, Tensor], ours: PairLogps, dataset: PreferenceDataset
) -> float:
    """Return the largest difference from TRL's policy log-probs in a batch, in nats per token.

    Raises:
        KeyError: If TRL's tokens are different.
    """
    batch = {name: rows[::4] for name, rows in batch.items()}  # a part, because TRL is slow
    logps = torch.cat([ours.chosen, ours.rejected]).tolist()
    our_logps = {
        (tokens.astype(np.int64).tobytes(), len(tokens) - start): logp
        for (tokens, start, _), logp in zip(dataset.sequences(), logps, strict=True)
    }
    theirs = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)).tolist()
    inputs, masks = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
    counts = batch["completion_mask"].sum(dim=1).tolist()
    differences = [
        abs(our_logps[row[mask].numpy().tobytes(), count] - logp) / count
        for row, mask, count, logp in zip(inputs, masks, counts, theirs, strict=True)
    ]
    return float(max(differences))


@dataclass
class Contender:
    """One way to score the pairs: its models, and the measurements of each round."""

    name: str
    models: list[nn.Module]
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def run(self, device: str) -> None:
        """Score all pairs once, and record time, tokens and memory."""

        def call() -> float:
            return timed(self.call, device)

        with counting_tokens(*self.models) as tokens:
            seconds, memory = with_memory(call, device)
        self.seconds.append(seconds)
        self.tokens.append(sum(tokens))
        self.memory.append(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("SAGE_SELECT_DATA")
    parser.add_argument(
        "--lengths", choices=["short", "long", "demo"], default="short" if data else "demo"
    )
    parser.add_argument("--pairs", type=int, help="default: 24, or 16 with --lengths long")
    parser.add_argument("--rounds", type=int, help="default: 3, or 2 with --lengths long")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument(
        "--part",
        type=int,
        help="divide layers and vocabulary by this; default: 24 on a CPU, 1 on a GPU",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-trl", action="store_true", help="measure sage-select only")
    args = parser.parse_args()
    long = args.lengths == "long"
    pairs, rounds = args.pairs or (16 if long else 24), args.rounds or (2 if long else 3)
    part = args.part or PART[args.device]

    lengths = draw_lengths(args.lengths, pairs, data, args.seed)
    longest = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())
    model = build_model(args.shape, part, longest, args.dtype, args.device)
    tokenizer = build_tokenizer(model.config.vocab_size)
    records = make_records(lengths, model.config.vocab_size, args.seed)
    dataset = PreferenceDataset.from_records(
        records, tokenizer=tokenizer, max_length=longest, on_bad="error", show_progress=False
    )
    flops, share = needed_flops(model, lengths)
    needed = int(lengths.sum())
    print(
        f"{args.shape}{f' / {part}' if part > 1 else ''}, {args.dtype}, {args.device}, "
        f"{torch.get_num_threads()} threads, {100 * share:.1f} % of a token in the head\n"
        f"{pairs} pairs, {args.lengths}: {needed:,} tokens and {flops / 1e9:,.1f} GFLOP needed\n"
        f"{'tokens':30}{'10 %':>10}{'median':>10}{'90 %':>10}{'longest':>10}"
    )
    for name, counts in ("prompts", lengths[:, 0]), ("responses", lengths[:, 1:]):
        percentiles = np.percentile(counts, [10, 50, 90, 100])
        print(f"{name:30}" + "".join(f"{value:10,.0f}" for value in percentiles), flush=True)
    reader = Reader(show_progress=False)  # a call of it is `measure`

    def score(model: nn.Module) -> PairLogps:
        return reader(model, dataset)

    with tempfile.TemporaryDirectory() as folder:
        reference = deepcopy(model)
        store = ReferenceStore(reference, dataset, folder=folder, reader=reader)
        store.fill()
        # also runs the checks that are made once per model; the store has done so for the reference
        ours = score(model)
        stored = Contender(
            "sage-select, reference stored",
            [model],
            lambda: (score(model), store.take(dataset.index)),
        )
        both = Contender("sage-select, both measured", [reference], lambda: score(reference))
        contenders, trainer, reason = [stored, both], None, "--no-trl"
        if not args.no_trl:
            try:
                trainer = dpo_trainer(model, tokenizer, records, folder, args.device)
            except ImportError as error:
                reason = str(error)
        if trainer is not None:
            batches = trainer.get_train_dataloader()

            def forward() -> None:
                for batch in batches:
                    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)

            contenders.insert(
                0,
                Contender(
                    f"TRL {version('trl')}, online reference",
                    [trainer.model, trainer.ref_model],
                    forward,
                ),
            )

        size, times = (8192, 20) if args.device == "cuda" else (4096, 1)
        square = torch.randn(size, size, device=args.device).to(model.dtype)
        product = torch.empty_like(square)
        bare: list[float] = []

        def multiply() -> None:
            for _ in range(times):
                torch.mm(square, square, out=product)

        warm_up = args.device == "cuda"  # one round to compile and load kernels
        for _ in range(rounds + warm_up):
            for contender in contenders:
                bare.append(timed(multiply, args.device) / times)
                contender.run(args.device)
            # `both` has measured the reference only; the policy's measurement is that of `stored`
            both.seconds[-1] += stored.seconds[-1]
            both.tokens[-1] += stored.tokens[-1]
        both.models.append(model)
        rate = 2 * size**3 / median(bare[warm_up * len(contenders) :])

        columns = f"{'pairs/s':>10}{'x TRL':>8}{'tokens':>12}{'x needed':>10}{'memory, MB':>12}"
        print(f"{f'torch.mm: {rate / 1e9:,.0f} GFLOP/s':30}{columns}{'MFU':>8}")
        for contender in contenders:
            seconds = median(contender.seconds[warm_up:])
            tokens = median(contender.tokens[warm_up:])
            ratio = f"{median(contenders[0].seconds[warm_up:]) / seconds:.2f}" if trainer else "-"
            print(
                f"{contender.name:30}{pairs / seconds:10.3g}{ratio:>8}"
                f"{tokens:12,.0f}{tokens / needed:10.2f}{max(contender.memory):12,.0f}"
                f"{100 * len(contender.models) * flops / seconds / rate:6.0f} %"
            )
        if trainer is None:
            print(f"TRL not measured: {reason}")
        else:
            difference = largest_difference(trainer, next(iter(batches)), ours, dataset)
            print(f"largest difference: {difference:.1e} nats per token")


if __name__ == "__main__":
    main()

"""Weights after two updates on every wrapper and host, beside those of a plain loop.

    python examples/benchmarks/wrappers.py
    python examples/benchmarks/wrappers.py --hosts update --rows "DDP, static graph" "FSDP2"

A run of two updates selects all pairs of a first pool, and scores a second one with the policy
after the first update. On each wrapper and host it must end with the weights of a loop in one
process: the bare model's own logits, the loss written out, one batch per update. Figures are the
largest absolute difference of a weight on any rank. `moved` is the largest change of a weight in
the two updates.

SGD shows a gradient of a wrong scale, which AdamW would hide. AdamW is the optimizer of real runs;
it turns the rounding of gradients near zero into steps of the size of the learning rate, so its
figures are larger. Gradients are never clipped, which would hide their scale, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from arithmetic import build_tokenizer
from sage_select import (
    PairLogps,
    PreferenceDataset,
    Processes,
    Reader,
    SageConfig,
    SelectiveLoader,
    Training,
    build_loader,
    fit,
    join,
    leave,
    nca,
    shard,
    update,
)
from sage_select.models.wrappers import unwrapped, whole
from sage_select.training.micro_batches import dealt
from sage_select.training.refusals import Refused
from sage_select.training.sharding import checkpoint_activations

BATCH, PASSES, BETA = 8, 2, 0.1
RATES = {"SGD": 0.1, "AdamW": 1e-3}
NEVER_CLIPPED = 1e9
CONFIG = SageConfig(
    beta=BETA,
    strata={"by": "none"},
    selection={
        "mix_start": (1.0,),
        "mix_end": (1.0,),
        "keep_start": 1.0,
        "keep_end": 0.5,
        "refresh_steps": 1,
        "multiple": 4,
    },
    training={"epochs": 1},
)


def records() -> list[dict[str, str]]:
    """Return pairs of different lengths."""
    return [
        {"prompt": f"{n % 7}+{n % 5}?", "chosen": f"{n % 13}", "rejected": "1-2*3," * (n % 4) + "5"}
        for n in range(24)
    ]


# The model, before and after it is wrapped.


def bare() -> nn.Module:
    """Return the policy, with equal weights in every process."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial weights are small: larger ones give log-probs that differ more
        for parameter in model.parameters():
            parameter *= 3.0 if parameter.dim() > 1 else 1.0
    return model


def unchanged(model: nn.Module) -> nn.Module:
    """Return the model as it is."""
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """Add low-rank adapters, and train a few tokens."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,  # not zero, so that both factors have gradients
        trainable_token_indices={"embed_tokens": [3, 4, 5]},
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def with_lora_on_head(model: nn.Module) -> nn.Module:
    """Add low-rank adapters, also to the head, whose bias is trained."""
    from peft import LoraConfig, get_peft_model

    inner: Any = model
    head = nn.Linear(inner.lm_head.in_features, inner.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(inner.lm_head.weight)
        head.bias.zero_()
    inner.lm_head = head
    config = LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], bias="lora_only", init_lora_weights=False
    )
    return get_peft_model(inner, config)


def checkpointed(model: nn.Module) -> nn.Module:
    """Recompute activations in the backward pass."""
    checkpoint_activations(model)
    return model


def compiled_body(model: nn.Module) -> nn.Module:
    """Compile everything but the head."""
    body: Any = model.base_model
    body.compile(backend="eager")  # traced as usual, but without a C++ compiler
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    """Compile the model with its head."""
    model.compile(backend="eager")
    return model


def replicated(model: nn.Module, **options: bool) -> nn.Module:
    """Replicate by DistributedDataParallel."""
    return DistributedDataParallel(model, **options)


def replicated_shards(model: nn.Module) -> nn.Module:
    """Replicate shards, in a mesh of two dimensions."""
    names = ("replicas", "shards")
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names)
    return shard(model, mesh=mesh)


def compiled(model: nn.Module) -> nn.Module:
    """Compile a model, or a wrapper of it."""
    result: Any = torch.compile(model, backend="eager")
    return result


Change = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Row:
    """A way to prepare and to wrap the policy.

    Attributes:
        world: Number of processes.
        wrap: Wraps the policy.
        prepare: Changes the policy before that, also in the plain loop unless `only_here`.
        only_here: Whether the plain loop does without `prepare`, which must change no weight.
        dtype: Autocast dtype of the run, also in the plain loop.
        ddp: Options of DistributedDataParallel, for hosts that wrap the policy themselves; None if
            they cannot wrap it like that.
        passes: Passes per update.
    """

    world: int = 1
    wrap: Change = unchanged
    prepare: Change = unchanged
    only_here: bool = False
    dtype: torch.dtype | None = None
    ddp: dict[str, bool] | None = None
    passes: int = PASSES


def ddp(**options: Any) -> Row:
    """Return a row of DistributedDataParallel with these options."""
    row = {name: options.pop(name) for name in set(options) & set(Row.__dataclass_fields__)}
    return Row(2, partial(replicated, **options), ddp=options, **row)


LORA: dict[str, Any] = {"prepare": with_lora}
LORA_ON_HEAD: dict[str, Any] = {"prepare": with_lora_on_head}
RECOMPUTED: dict[str, Any] = {"prepare": checkpointed, "only_here": True}
BODY: dict[str, Any] = {"prepare": compiled_body, "only_here": True}
ROWS = {
    "bare": Row(),
    "bare, compiled": Row(wrap=compiled),
    "bare, compiled in place": Row(prepare=compiled_in_place, only_here=True),
    "bare, body compiled": Row(**BODY),
    "bare, checkpointing": Row(**RECOMPUTED),
    "bare, LoRA": Row(**LORA),
    "bare, LoRA on the head": Row(**LORA_ON_HEAD),
    "bare, bf16": Row(dtype=torch.bfloat16),
    "DDP": ddp(),
    "DDP, static graph": ddp(static_graph=True),
    "DDP, static graph, one pass": ddp(static_graph=True, passes=1),
    "DDP, static graph, checkpointing": ddp(static_graph=True, **RECOMPUTED),
    "DDP, static graph, LoRA": ddp(static_graph=True, **LORA),
    "DDP, unused parameters": ddp(find_unused_parameters=True),
    "DDP, bucket views": ddp(gradient_as_bucket_view=True),
    "DDP, compiled": Row(2, lambda model: compiled(replicated(model))),
    "DDP of a compiled model": Row(2, lambda model: replicated(compiled(model))),
    "DDP, body compiled": ddp(**BODY),
    "DDP, checkpointing": ddp(**RECOMPUTED),
    "DDP, LoRA": ddp(**LORA),
    "DDP, LoRA on the head": ddp(**LORA_ON_HEAD),
    "DDP, bf16": ddp(dtype=torch.bfloat16),
    "FSDP2": Row(2, shard),
    "FSDP2, replicas": Row(2, replicated_shards),
    "FSDP2, checkpointing": Row(2, shard, **RECOMPUTED),
    "FSDP2, LoRA": Row(2, shard, **LORA),
    "FSDP2, LoRA on the head": Row(2, shard, **LORA_ON_HEAD),
    "FSDP2, bf16": Row(2, shard, dtype=torch.bfloat16),
}


# The hosts, each a function that trains the run and returns the trained model.


@dataclass(frozen=True)
class Law:
    """A run: two updates on a row's policy, with one optimizer."""

    row: Row
    kind: str
    dataset: PreferenceDataset
    reference: PairLogps

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model's trained weights."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.kind == "SGD":
            return torch.optim.SGD(trained, RATES["SGD"])
        return torch.optim.AdamW(trained, RATES["AdamW"], weight_decay=0.0)

    def model(self) -> nn.Module:
        """Return the policy, prepared and wrapped."""
        return self.row.wrap(self.unwrapped())

    def unwrapped(self) -> nn.Module:
        """Return the policy, prepared but not wrapped."""
        return self.row.prepare(bare()).train()

    def loader(self, model: nn.Module) -> SelectiveLoader:
        """Return the batches of the run, chosen with this model."""
        return build_loader(
            CONFIG,
            self.dataset,
            model,
            self.reference,
            batch_size=BATCH,
            mixed_precision=self.row.dtype,
            show_progress=False,
        )

    @property
    def training(self) -> Training:
        """Settings of an update."""
        return Training(
            beta=BETA,
            max_grad_norm=NEVER_CLIPPED,
            micro_batch_size=BATCH // (self.row.world * self.row.passes),
            reader=Reader(mixed_precision=self.row.dtype),
        )


def plain_loop(law: Law) -> nn.Module:
    """Train the bare model on whole batches, in each process alone, with the loss written out.

    Log-probs are those of the model's own logits; under autocast, whose logits are coarse, those
    of a reader.
    """
    model = (bare() if law.row.only_here else law.unwrapped()).train()
    optimizer = law.optimizer(model)
    for rows in law.loader(model):
        pairs, reference = law.dataset.take(rows), law.reference.take(rows)
        if law.row.dtype is None:
            logps = [own_logp(model, s.tokens, s.response_start) for s in pairs.sequences()]
            chosen, rejected = torch.stack(logps).chunk(2)
        else:
            policy = Reader(mixed_precision=law.row.dtype).pair_logps(model, pairs)
            chosen, rejected = policy.chosen, policy.rejected
        ahead, behind = BETA * (chosen - reference.chosen), BETA * (rejected - reference.rejected)
        losses = -logsigmoid(ahead) - 0.5 * (logsigmoid(-ahead) + logsigmoid(-behind))
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def own_logp(model: nn.Module, tokens: Any, response_start: int) -> Tensor:
    """Summed log-prob of a response, from the model's own logits."""
    input_ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
    logps = model(input_ids=input_ids).logits[0].double().log_softmax(-1)[response_start - 1 : -1]
    return logps.gather(-1, input_ids[0, response_start:, None]).sum()


def in_fit(law: Law) -> nn.Module:
    """Train in the library's loop."""
    model = law.model()

    def constant(model: nn.Module, training: Training, steps: int) -> Any:
        optimizer = law.optimizer(model)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    with patch("sage_select.training.loop.optimizer_of", constant):
        fit(
            model,
            law.loader(model),
            law.dataset,
            law.reference,
            law.training,
            show_progress=False,
        )
    return model


def in_update(law: Law) -> nn.Module:
    """Train in a loop around `update`."""
    model = law.model()
    optimizer = law.optimizer(model)
    for rows in law.loader(model):
        update(model, optimizer, law.dataset.take(rows), law.reference, law.training)
    return model


def in_own_loop(law: Law) -> nn.Module:
    """Train in a loop that makes its own backward passes."""
    model, training = law.model(), law.training
    optimizer = law.optimizer(model)
    for rows in law.loader(model):
        for micro in dealt(rows, Processes.all(), training.micro_batch_size or len(rows)):
            pairs = law.dataset.take(micro.rows)
            with training.reader.updating(model, pairs):
                policy = training.reader.pair_logps(model, pairs)
                losses = nca(policy, law.reference.take(pairs.index), beta=BETA)
                (losses.sum() * micro.share).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def in_lightning(law: Law) -> nn.Module | None:
    """Train in a Lightning Trainer, which wraps the policy itself."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import (
        LightningEnvironment,
        TorchElasticEnvironment,
    )
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from sage_select.adapters.lightning import PreferenceModule, SageSelection

    strategy: Any = "auto"
    if law.row.world > 1:
        if law.row.ddp is not None:
            strategy = DDPStrategy(**law.row.ddp)
        elif law.row.wrap is shard:
            strategy = ModelParallelStrategy(law.row.world, 1)
        else:
            return None

    class Module(PreferenceModule):
        def configure_optimizers(self) -> Any:
            return law.optimizer(self.policy)

    model = law.unwrapped() if law.row.world > 1 else law.model()
    selection = SageSelection(law.loader(model))
    trainer = Trainer(
        accelerator="cpu",
        devices=law.row.world,
        strategy=strategy,
        plugins=[TorchElasticEnvironment() if law.row.world > 1 else LightningEnvironment()],
        precision="bf16-mixed" if law.row.dtype else "32-true",
        max_epochs=1,
        accumulate_grad_batches=law.row.passes,
        callbacks=[selection],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(selection.loader, law.training), selection.batches)
    return model


def in_trl(law: Law) -> nn.Module | None:
    """Train in TRL's `DPOTrainer`, which wraps the policy itself and has its own log-probs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sage_select.adapters.trl import attach

    options = {f"ddp_{name}": value for name, value in (law.row.ddp or {}).items()}
    replicated_here = law.row.wrap is unchanged or law.row.ddp is not None
    if not replicated_here or law.row.dtype or not all(hasattr(DPOConfig, x) for x in options):
        return None
    if law.row.prepare is with_lora_on_head:
        return None  # TRL refuses it
    model: Any = law.unwrapped()
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            beta=BETA,
            bf16=False,
            **{"ddp_find_unused_parameters": False} | options,
            disable_tqdm=True,
            gradient_accumulation_steps=law.row.passes,
            gradient_checkpointing=False,
            logging_strategy="no",
            loss_type=["nca_pair"],
            lr_scheduler_type="constant",
            max_grad_norm=NEVER_CLIPPED,
            max_length=64,
            num_train_epochs=1,
            per_device_train_batch_size=law.training.micro_batch_size,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=None if law.row.prepare is with_lora else bare(),
            args=args,
            train_dataset=Dataset.from_list(records()),
            processing_class=build_tokenizer(),
            optimizers=(law.optimizer(model), None),
        )
        attach(trainer, CONFIG, reference=law.reference, show_progress=False)
        model.train()
        trainer.train()
    return model


HOSTS = {
    "fit": in_fit,
    "update": in_update,
    "own loop": in_own_loop,
    "Lightning": in_lightning,
    "TRL": in_trl,
}


# The table.


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's trained weights, whole."""
    inner = unwrapped(model)
    return {n: whole(p.detach()).clone() for n, p in inner.named_parameters() if p.requires_grad}


def difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight on any rank."""
    assert some.keys() == others.keys()
    largest = max(float((x - others[name]).abs().max()) for name, x in some.items())
    return max(value for (value,) in Processes.all().all_gather_object([largest]))


def figures(kinds: list[str], hosts: list[str], rows: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each optimizer and each row of this number of processes."""
    tokenizer = build_tokenizer()
    dataset = PreferenceDataset.from_records(
        records(), tokenizer=tokenizer, max_length=64, show_progress=False
    )
    for name in rows:
        row = ROWS[name]
        for kind in kinds:
            start = (bare() if row.only_here else row.prepare(bare())).eval()
            reader = Reader(mixed_precision=row.dtype, show_progress=False)
            reference = reader(bare(), dataset, processes=Processes())
            law = Law(row, kind, dataset, reference)
            plain = weights(plain_loop(law))
            cells: dict[str, Any] = {"moved": difference(weights(start), plain)}
            for host in hosts:
                try:
                    model = HOSTS[host](law)
                    cells[host] = None if model is None else difference(weights(model), plain)
                except Refused as refused:
                    cells[host] = str(refused)
            yield {"row": name, "optimizer": kind, **cells}


def printed(value: Any) -> str:
    """Return a cell of the table."""
    if isinstance(value, float):
        return f"{value:.1e}"
    return "-" if value is None else "refused"


def main() -> None:
    """Start the processes, or be one of them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=HOSTS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--out", type=Path, help="file for the figures, JSON lines")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        join("cpu")
        warnings.simplefilter("ignore")
        for line in figures(args.optimizers, args.hosts, args.rows):
            if Processes.all().rank == 0:
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        leave()
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder) / "figures.jsonl"
        for world in (1, 2):
            rows = [name for name in args.rows if ROWS[name].world == world]
            if rows:
                run(world, [__file__, "--worker", "--out", out, "--rows", *rows,
                            "--hosts", *args.hosts, "--optimizers", *args.optimizers])  # fmt: skip
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    for kind in args.optimizers:
        print(f"\n{kind}, learning rate {RATES[kind]}")
        columns = ["moved", *args.hosts]
        print(f"{'wrapper':34}" + "".join(f"{name:>11}" for name in columns))
        for line in lines:
            if line["optimizer"] == kind:
                cells = "".join(f"{printed(line[name]):>11}" for name in columns)
                print(f"{line['row']:34}{cells}")


def run(world: int, command: list[Any]) -> None:
    """Run a script of this interpreter in one or several processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    subprocess.run(
        [sys.executable, *(several if world > 1 else []), *map(str, command)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    main()

"""Trainer settings of TRL that are incompatible with selection, each with its fix."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import trl
from torch.distributed.fsdp import FSDPModule

from sage_select.data.dataset import PreferenceDataset
from sage_select.models.reader import Reader
from sage_select.models.sequences import sequence_keys
from sage_select.models.wrappers import is_sharded, resharded
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.selector import check_same_precision
from sage_select.system.processes import Processes
from sage_select.training.refusals import Refusal, refuse

OLDEST, FIRST_UNSUPPORTED = (0, 24), (2, 0)

Checks = Iterator[tuple[Any, str, str]]
"""Tuples of (truthy if it applies, the refused setting and the reason, the fix)."""


def check_host(trainer: Any) -> None:
    """Refuse unsupported versions of TRL and other trainers than DPOTrainer.

    Raises:
        ImportError: If this version of TRL is not supported.
        TypeError: If it is not a DPOTrainer.
    """
    version = tuple(int(part) for part in trl.__version__.split(".")[:2])
    if not OLDEST <= version < FIRST_UNSUPPORTED:
        raise ImportError(
            f"attach: TRL {trl.__version__} is not supported; install a version from "
            f"{'.'.join(map(str, OLDEST))} to before {'.'.join(map(str, FIRST_UNSUPPORTED))}"
        )
    if not isinstance(trainer, trl.DPOTrainer):
        raise TypeError(
            f"attach: the trainer must be a DPOTrainer, got {type(trainer).__name__}; in a "
            "custom loop, iterate a SelectiveLoader"
        )


def trainer_refusals(trainer: Any, *, attached: bool = False) -> Iterator[Refusal]:
    """Yield everything about a trainer that is incompatible with selection.

    Args:
        trainer: A DPOTrainer.
        attached: True if selection is attached already, as it is when training starts.
    """
    compatible = True
    for checks in (
        _schedule,
        _processes,
        _pairs,
        _loss,
        *([] if attached else [_reference_checks]),
    ):
        for applies, what, fix in checks(trainer):
            if applies:
                compatible = False
                yield Refusal(what, fix)
    if compatible and _head_is_untied(trainer.model):  # last: it gathers weights
        yield Refusal(
            "the policy's head is tied to its embedding, but this version of transformers shards "
            "them separately, so the head would keep the weights it was loaded with",
            "use DDP, or load a copy with config.tie_word_embeddings=False and an untied head",
        )


def losses_of(args: Any) -> list[str]:
    """Return the names of a trainer's losses: TRL can add up several."""
    return [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)


def _head_is_untied(model: Any) -> bool:
    """Return whether a head that is tied to the embedding is a separate tensor once gathered."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not is_sharded(model) or ends[0].weight is not ends[1].weight:
        return False
    with resharded(model):
        for module in (model, *ends):
            if isinstance(module, FSDPModule):
                module.unshard()
        # While sharded, both are one parameter; only the gathered weights show the difference.
        tied: bool = ends[0].weight.data_ptr() == ends[1].weight.data_ptr()
        return not tied


def _setting(trainer: Any, name: str) -> Any:
    """Return a setting that not every version of TRL has, or None."""
    return getattr(trainer.args, name, None)


def _schedule(trainer: Any) -> Checks:
    """Yield checks for settings that would change which pairs are trained."""
    args = trainer.args
    yield (
        args.num_train_epochs != 1,
        f"num_train_epochs is {args.num_train_epochs:g}, but the selected batches are one epoch",
        "set num_train_epochs=1, and the number of passes over the pairs with "
        "SageConfig(training={'epochs': ...})",
    )
    yield (
        args.max_steps > 0,
        f"max_steps is {args.max_steps}, but the selection determines the number of updates",
        "leave max_steps out",
    )
    for name in ("dispatch_batches", "split_batches"):
        yield (
            getattr(args.accelerator_config, name),
            f"accelerator_config has {name}, but each process takes its own share of a batch",
            f"leave {name} out",
        )
    yield (
        _setting(trainer, "auto_find_batch_size"),
        "auto_find_batch_size changes the number of pairs per update during the run",
        "set per_device_train_batch_size to a value that fits in memory, and remove "
        "auto_find_batch_size",
    )
    yield (
        _setting(trainer, "group_by_length")
        or _setting(trainer, "train_sampling_strategy") not in (None, "random"),
        "group_by_length or train_sampling_strategy would reorder pairs, but the selection "
        "determines their order",
        "remove group_by_length and train_sampling_strategy",
    )
    yield (
        _setting(trainer, "include_tokens_per_second"),
        "include_tokens_per_second reads all batches before the first update",
        "leave it out",
    )


def _processes(trainer: Any) -> Checks:
    """Yield checks for unsupported ways to distribute the work."""
    args = trainer.args
    yield (
        args.n_gpu > 1,
        f"one process sees {args.n_gpu} GPUs and would use DataParallel",
        "launch with torchrun or accelerate, one process per GPU, or set CUDA_VISIBLE_DEVICES",
    )
    yield (
        trainer.accelerator.mixed_precision not in ("no", "bf16"),
        f"mixed precision is {trainer.accelerator.mixed_precision}, and only bf16 is supported: "
        "fp16 skips updates whose gradients overflow, but the selection counts them",
        "set bf16=True, or neither bf16 nor fp16",
    )
    yield (
        trainer.is_deepspeed_enabled,
        "DeepSpeed is not supported",
        "use DDP, or FSDP2 with from_pretrained(..., "
        "distributed_config=DistributedConfig(fsdp_size=...))",
    )
    static = _setting(trainer, "ddp_static_graph") or getattr(
        getattr(trainer.accelerator, "ddp_handler", None), "static_graph", False
    )
    yield (
        static and args.gradient_accumulation_steps > 1 and Processes.all().size > 1,
        "ddp_static_graph records the graph in the first backward pass, which "
        f"gradient_accumulation_steps={args.gradient_accumulation_steps} does not synchronise",
        "leave ddp_static_graph out, or set gradient_accumulation_steps=1",
    )
    # The argument as well: on CPUs it becomes DDP, and accelerate reports no FSDP.
    yield (
        trainer.is_fsdp_enabled or _setting(trainer, "fsdp"),
        "accelerate's FSDP (fsdp=...) is not supported, and silently falls back to DDP on CPUs",
        "use DDP, or FSDP2 with from_pretrained(..., "
        "distributed_config=DistributedConfig(fsdp_size=...))",
    )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for kind, name in (("tensor", "tp"), ("context", "cp"), ("sequence", "sp")):
        # transformers' own tensor parallelism does not appear in parallelism_config.
        model_size = getattr(trainer.model, "_tp_size", None) if name == "tp" else None
        size = max(getattr(parallel, f"{name}_size", None) or 1, model_size or 1)
        yield (
            size > 1,
            f"{kind} parallelism ({name}_size={size}) is not supported",
            f"set {name}_size=1 and use data parallelism",
        )


def _pairs(trainer: Any) -> Checks:
    """Yield checks for datasets and models that cannot be measured."""
    data = trainer.train_dataset
    yield (
        not hasattr(data, "add_column") or not hasattr(data, "__len__"),
        f"train_dataset is a {type(data).__name__}, which has no length or no rows to select",
        "pass a datasets.Dataset",
    )
    datasets = trainer.eval_dataset
    yield (
        any(
            part is not None and not hasattr(part, "__len__")
            for part in (datasets.values() if isinstance(datasets, dict) else [datasets])
        ),
        "eval_dataset has no length, but its reference log-probs are measured before training",
        "pass a datasets.Dataset",
    )
    images = {"image", "images"} & set(getattr(data, "column_names", None) or ())
    yield (
        getattr(trainer, "_is_vision_dataset", False) or images,
        "pairs with images are not supported, since they cannot be measured",
        "use text-only pairs",
    )
    adapters = getattr(trainer.model, "peft_config", {}).values()
    yield (
        any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters),
        "prompt tuning inserts virtual tokens into each sequence, and cannot be measured",
        "use LoRA, or train all weights",
    )


def _loss(trainer: Any) -> Checks:
    """Yield checks for losses and settings that need more of the reference than its log-probs."""
    args = trainer.args
    yield (
        args.sync_ref_model,
        "sync_ref_model updates the reference, but its log-probs are measured once",
        "set sync_ref_model=False",
    )
    yield (
        _setting(trainer, "ld_alpha") is not None,
        f"ld_alpha is {_setting(trainer, 'ld_alpha')}, which needs more than a response's summed "
        "log-prob",
        "leave ld_alpha out",
    )
    yield (
        "ipo" in losses_of(args) and hasattr(trainer, "ref_adapter_name"),  # TRL before 0.29
        f"the ipo loss of TRL {trl.__version__} averages the policy's log-probs, but would not "
        "average the reference's",
        "install TRL 0.29 or newer, or use another loss",
    )
    for name, reason in (
        ("use_liger_loss", "needs the reference model in every update"),
        ("generate_during_eval", "needs the reference model in every evaluation"),
        ("reference_free", "uses no reference, but the selection score needs one"),
    ):
        yield (_setting(trainer, name), f"{name} {reason}", f"set {name}=False")


def _reference_checks(trainer: Any) -> Checks:
    """Yield checks for reasons that the current reference log-probs or policy cannot be used."""
    args = trainer.args
    names = set(getattr(trainer.train_dataset, "column_names", None) or ())
    yield (
        args.precompute_ref_log_probs or {"ref_chosen_logps", "ref_rejected_logps"} & names,
        "the trainer has reference log-probs already (precompute_ref_log_probs, or columns "
        "ref_chosen_logps and ref_rejected_logps), and they may be rounded differently",
        "set precompute_ref_log_probs=False and leave the columns out: attach measures and stores "
        "the log-probs",
    )
    yield (
        trainer.state.global_step > 0,
        f"the trainer has made {trainer.state.global_step} updates, so its policy may no longer "
        "equal the reference",
        "attach before trainer.train(), in a resumed run as well",
    )


def autocast_dtype(trainer: Any) -> torch.dtype | None:
    """Return the accelerator's precision: a launcher may have overridden the arguments."""
    return torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else None


def global_batch(trainer: Any) -> int:
    """Return the pairs per update over all processes."""
    args = trainer.args
    pairs: int = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return pairs * Processes.all().size


def check_batches(loader: SelectiveLoader, trainer: Any) -> None:
    """Refuse an update that cannot be dealt evenly to processes and accumulation steps.

    Raises:
        Refused: If there is one.
    """
    refuse("attach", _batch_refusals(loader, trainer))


def _batch_refusals(loader: SelectiveLoader, trainer: Any) -> Iterator[Refusal]:
    size, batch = global_batch(trainer), loader.timeline.batch_size
    args, processes = trainer.args, Processes.all().size
    if batch != size:
        yield Refusal(
            f"the loader has {batch} pairs per update, but the trainer takes "
            f"per_device_train_batch_size x gradient_accumulation_steps x processes = "
            f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x "
            f"{processes} = {size}",
            "make the two equal",
        )
        return
    share = args.gradient_accumulation_steps * processes
    if (last := loader.timeline.total_kept % batch) % share:
        yield Refusal(
            f"the run's last update has {last} pairs, which processes x accumulation steps = "
            f"{processes} x {args.gradient_accumulation_steps} cannot divide evenly",
            f"keep multiples of {share}: selection.multiple={share} in the configuration, or "
            f"multiple={share} for Timeline and Selector",
        )


def check_loader(loader: SelectiveLoader, pairs: PreferenceDataset, trainer: Any) -> None:
    """Refuse a loader that was made for other pairs or another precision than the trainer's."""
    dataset = loader.dataset
    all_present = np.isin(dataset.index, pairs.index).all()
    if not all_present or not np.array_equal(
        sequence_keys(dataset).sequences, sequence_keys(pairs.take(dataset.index)).sequences
    ):
        raise ValueError(
            "attach: the loader's pairs do not have the same tokens as the trainer's; make the "
            "loader on pairs_of(trainer), or on rows of it"
        )
    reader = Reader(mixed_precision=autocast_dtype(trainer))
    check_same_precision(loader.selector, reader, "attach")


def check_collator(trainer: Any, pairs: PreferenceDataset) -> None:
    """Refuse a collator that changes the tokens of a pair, tried on the longest one.

    Raises:
        ValueError: If its tokens are not those that are scored.
    """
    longest = pairs.take(pairs.index[[int(pairs.num_tokens.argmax())]])
    row = trainer.train_dataset.with_format(None)[int(longest.column("source_row")[0])]
    batch = trainer.data_collator([row])
    if "completion_mask" not in batch:  # TRL before 0.29 joins prompt and response later
        return
    for i, (tokens, start, _) in enumerate(longest.sequences()):
        attended = batch["attention_mask"][i].bool()
        collated = batch["input_ids"][i][attended][: pairs.max_length]
        mask = batch["completion_mask"][i][attended][: pairs.max_length]
        if not np.array_equal(collated, tokens) or int(mask.argmax()) != start:
            raise ValueError(
                f"pairs_of: for pair {longest.ids[0]} the trainer's data_collator returns other "
                "tokens than the dataset has, so scored and trained tokens would differ; leave "
                "data_collator out, or make it truncate and mask as DataCollatorForPreference does"
            )

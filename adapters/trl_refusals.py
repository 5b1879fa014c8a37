"""What TRL must not be told: settings that do not go with selection, refused beforehand."""

from collections.abc import Iterator
from typing import Any

import trl
from torch.distributed.fsdp import FSDPModule

from sage_select.models.wrappers import is_sharded, resharded
from sage_select.training.refusals import Refusal

OLDEST, BEFORE = (0, 24), (2, 0)

Checks = Iterator[tuple[Any, str, str]]
"""Whether something applies, what it is, and what to do instead."""


def check_host(trainer: Any) -> None:
    """Refuse other versions of TRL and other trainers.

    Raises:
        ImportError: If this version of TRL is not supported.
        TypeError: If it is not a DPOTrainer.
    """
    version = tuple(int(part) for part in trl.__version__.split(".")[:2])
    if not OLDEST <= version < BEFORE:
        raise ImportError(
            f"attach: TRL {trl.__version__} is not supported; install one from "
            f"{'.'.join(map(str, OLDEST))} on and before {'.'.join(map(str, BEFORE))}"
        )
    if not isinstance(trainer, trl.DPOTrainer):
        raise TypeError(
            f"attach: the trainer must be a DPOTrainer, got {type(trainer).__name__}; for a loop "
            "of your own, iterate a SelectiveLoader"
        )


def refusals_of(trainer: Any, *, attached: bool = False) -> Iterator[Refusal]:
    """Everything about a trainer that does not go with selection.

    Args:
        trainer: A DPOTrainer.
        attached: Whether selection is attached to it already, as when training begins.
    """
    fits = True
    for checks in (_schedule, _processes, _pairs, _loss, *([] if attached else [_reference])):
        for applies, what, fix in checks(trainer):
            if applies:
                fits = False
                yield Refusal(what, fix)
    if fits and _head_is_left_behind(trainer.model):  # which gathers weights
        yield Refusal(
            "the policy's head is tied to its embedding, and this version of transformers shards "
            "them apart, so that the head would stay as it was loaded",
            "use DDP, or load a copy with config.tie_word_embeddings=False and a head of its own",
        )


def losses_of(args: Any) -> list[str]:
    """The names of its losses, of which TRL adds up several."""
    return [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)


def _head_is_left_behind(model: Any) -> bool:
    """Whether a head that is tied to the embedding is another tensor where weights are whole."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not is_sharded(model) or ends[0].weight is not ends[1].weight:
        return False
    with resharded(model):
        for module in (model, *ends):
            if isinstance(module, FSDPModule):
                module.unshard()
        together: bool = ends[0].weight.data_ptr() == ends[1].weight.data_ptr()
        return not together


def _setting(trainer: Any, name: str) -> Any:
    """One that not every version has."""
    return getattr(trainer.args, name, None)


def _schedule(trainer: Any) -> Checks:
    """What would have other batches than the selection's."""
    args = trainer.args
    yield (
        args.num_train_epochs != 1,
        f"num_train_epochs is {args.num_train_epochs:g}, and the selection's batches are one epoch",
        "set num_train_epochs=1, and how often pairs are traversed with "
        "SageConfig(training={'epochs': ...})",
    )
    yield (
        args.max_steps > 0,
        f"max_steps is {args.max_steps}, but the number of updates follows from the selection",
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
        "auto_find_batch_size changes the pairs per update while it runs",
        "set per_device_train_batch_size to what fits, and leave it out",
    )
    yield (
        _setting(trainer, "group_by_length")
        or _setting(trainer, "train_sampling_strategy") not in (None, "random"),
        "the trainer is told to order pairs (group_by_length or train_sampling_strategy), but the "
        "selection does",
        "leave it out",
    )
    yield (
        _setting(trainer, "include_tokens_per_second"),
        "include_tokens_per_second reads all batches before the first update",
        "leave it out",
    )


def _processes(trainer: Any) -> Checks:
    """How processes may not share the work."""
    args = trainer.args
    yield (
        args.n_gpu > 1,
        f"one process sees {args.n_gpu} GPUs and would use DataParallel",
        "launch with torchrun or accelerate, one process per GPU, or set CUDA_VISIBLE_DEVICES",
    )
    yield (
        trainer.accelerator.mixed_precision not in ("no", "bf16"),
        f"mixed precision is {trainer.accelerator.mixed_precision}, and only bf16 is supported: "
        "fp16 leaves updates out where gradients overflow, and the selection counts them",
        "set bf16=True, or neither",
    )
    yield (
        trainer.is_deepspeed_enabled,
        "DeepSpeed is not supported",
        "use DDP, or FSDP2 by from_pretrained(..., distributed_config=DistributedConfig(fsdp_size="
        "...))",
    )
    yield (
        trainer.is_fsdp_enabled or _setting(trainer, "fsdp"),
        "FSDP by accelerate (fsdp=...) is not supported, and is silently DDP on CPUs",
        "use DDP, or FSDP2 by from_pretrained(..., distributed_config=DistributedConfig(fsdp_size="
        "...))",
    )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for kind, name in (("tensor", "tp"), ("context", "cp"), ("sequence", "sp")):
        own = getattr(trainer.model, "_tp_size", None) if name == "tp" else None
        size = max(getattr(parallel, f"{name}_size", None) or 1, own or 1)
        yield (
            size > 1,
            f"{kind} parallelism ({name}_size={size}) is not supported",
            f"set {name}_size=1 and use data parallelism",
        )


def _pairs(trainer: Any) -> Checks:
    """What cannot be measured."""
    data = trainer.train_dataset
    yield (
        not hasattr(data, "add_column") or not hasattr(data, "__len__"),
        f"train_dataset is a {type(data).__name__}, which has no length and no rows to select",
        "pass a datasets.Dataset",
    )
    given = trainer.eval_dataset
    yield (
        any(
            part is not None and not hasattr(part, "__len__")
            for part in (given.values() if isinstance(given, dict) else [given])
        ),
        "eval_dataset has no length, and its reference log-probs are measured beforehand",
        "pass a datasets.Dataset",
    )
    images = {"image", "images"} & set(getattr(data, "column_names", None) or ())
    yield (
        getattr(trainer, "_is_vision_dataset", False) or images,
        "pairs with images are not supported, since they cannot be measured",
        "use pairs of text",
    )
    adapters = getattr(trainer.model, "peft_config", {}).values()
    yield (
        any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters),
        "prompt tuning puts tokens of its own into a sequence, and cannot be measured",
        "use LoRA, or train all weights",
    )


def _loss(trainer: Any) -> Checks:
    """What needs more of a reference than its log-probs."""
    args = trainer.args
    yield (
        args.sync_ref_model,
        "sync_ref_model moves the reference, but its log-probs are measured once",
        "set sync_ref_model=False",
    )
    yield (
        _setting(trainer, "ld_alpha") is not None,
        f"ld_alpha is {_setting(trainer, 'ld_alpha')}, for which a response's summed log-prob is "
        "not enough",
        "leave ld_alpha out",
    )
    yield (
        "ipo" in losses_of(args) and hasattr(trainer, "ref_adapter_name"),  # TRL before 0.29
        f"the ipo loss of TRL {trl.__version__} averages log-probs, and would not the reference's",
        "install TRL 0.29 or newer, or use another loss",
    )
    for name, why in (
        ("use_liger_loss", "needs the reference model in every update"),
        ("generate_during_eval", "needs the reference model in every evaluation"),
        ("reference_free", "has no reference, which the score compares with"),
    ):
        yield (_setting(trainer, name), f"{name} {why}", f"set {name}=False")


def _reference(trainer: Any) -> Checks:
    """What the reference may not have been, before selection is attached."""
    args = trainer.args
    names = set(getattr(trainer.train_dataset, "column_names", None) or ())
    yield (
        args.precompute_ref_log_probs or {"ref_chosen_logps", "ref_rejected_logps"} & names,
        "the trainer has reference log-probs of its own (precompute_ref_log_probs, or columns "
        "ref_chosen_logps and ref_rejected_logps), and they may be rounded otherwise",
        "set precompute_ref_log_probs=False and leave the columns out: attach measures and keeps "
        "them",
    )
    yield (
        trainer.state.global_step > 0,
        f"the trainer has made {trainer.state.global_step} updates, so its policy may be no "
        "reference any more",
        "attach before trainer.train(); a resumed run attaches before it, too",
    )

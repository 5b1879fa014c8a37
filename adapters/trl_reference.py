"""The reference of a DPOTrainer: measured once on its own tokens, then added to its datasets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from warnings import warn

import numpy as np
import numpy.typing as npt
from torch import nn

from sage_select.app.config import SageConfig
from sage_select.app.run import Run
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.fingerprints import has_adapters
from sage_select.pairs import REFERENCE, PairLogps

SIDES = ("prompt", "chosen", "rejected")


def tokens_of(trainer: Any, dataset: Any, *, keep_duplicates: bool = False) -> PreferenceDataset:
    """Return the pairs of a dataset that a trainer has prepared."""
    names = dict.fromkeys(dataset.column_names)
    ends = "_ids" if "prompt_ids" in names else "_input_ids"
    if missing := [side + ends for side in SIDES if side + ends not in names]:
        raise ValueError(
            f"attach: the trainer's dataset has no {', '.join(missing)}; it has "
            f"{', '.join(names)}. Pass attach a DPOTrainer that prepared its dataset"
        )
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)

    def records() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(dataset.with_format(None)):
            tokens = {f"{side}_ids": row.pop(side + ends) for side in SIDES}
            for side in SIDES[1:]:  # the trainer appended the end token to the text
                if isinstance(row.get(side), str):
                    row[side] = row[side].removesuffix(tokenizer.eos_token)
            yield row | tokens | ({"pair_id": str(number)} if keep_duplicates else {})

    longest = trainer.args.max_length
    return PreferenceDataset.from_tokens(records(), max_length=longest or np.iinfo(np.int32).max)


def counted_reasons(pairs: PreferenceDataset) -> str:
    """Return the reasons for unusable rows, with their counts."""
    counts = pairs.set_aside["reason"].value_counts(sort=True).rows()
    return ", ".join(f"{count} {reason}" for reason, count in counts)


def measured_reference(
    trainer: Any, pairs: PreferenceDataset, config: SageConfig, show_progress: bool | None
) -> PairLogps:
    """Measure log-probs under the model that the trainer would use as the reference."""
    ref_model = trainer.ref_model
    run = Run(config, pairs, pairs, show_progress=show_progress)
    # A reference with adapters on is measured without the store, which turns adapters off.
    if ref_model is not None and has_adapters(ref_model):
        return run.reader(ref_model, pairs)
    if ref_model is None and (adapter := _reference_adapter(trainer)) is not None:
        with _with_adapter(trainer.model, adapter):
            return run.reader(trainer.model, pairs)
    store = run.store(trainer.model if ref_model is None else ref_model)
    store.fill()
    return store.take(pairs.index)


def _reference_adapter(trainer: Any) -> str | None:
    """Return the name of a PEFT policy's reference adapter; None if its base is the reference."""
    if hasattr(trainer, "ref_adapter_name"):  # TRL before 0.29
        name: str | None = trainer.ref_adapter_name
        return name
    return "ref" if "ref" in getattr(trainer.model, "peft_config", {}) else None


@contextmanager
def _with_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Activate an adapter inside the block; restore the active one and `requires_grad` after it."""
    peft: Any = model
    active = peft.active_adapter
    trainable = [p for p in model.parameters() if p.requires_grad]
    peft.set_adapter(name)
    try:
        yield
    finally:
        peft.set_adapter(active)
        model.requires_grad_(False)  # set_adapter makes the active adapter trainable
        for parameter in trainable:
            parameter.requires_grad_(True)


def with_logps(dataset: Any, logps: PairLogps, rows: npt.NDArray[np.int64]) -> Any:
    """Add the columns in which TRL expects reference log-probs to a dataset."""
    for name, values in logps.columns(REFERENCE).items():
        column = np.full(len(dataset), np.nan)  # NaN in rows that are never trained on
        column[rows] = values
        dataset = dataset.add_column(name, column)
    return dataset


def evaluation_with_logps(trainer: Any, measured: Callable[[PreferenceDataset], PairLogps]) -> Any:
    """Return the evaluation dataset or datasets with reference log-probs."""

    def with_reference(name: str, dataset: Any) -> Any:
        pairs = tokens_of(trainer, dataset, keep_duplicates=True)
        if pairs.set_aside.height:
            warn(
                f"attach: {pairs.set_aside.height} rows of the {name} dataset cannot be used and "
                f"are not evaluated on: {counted_reasons(pairs)}",
                stacklevel=4,
            )
            dataset = dataset.select(pairs.column("source_row").to_list())
        return with_logps(dataset, measured(pairs), np.arange(len(pairs)))

    datasets = trainer.eval_dataset
    if datasets is None:
        return None
    if isinstance(datasets, dict):
        return {name: with_reference(name, dataset) for name, dataset in datasets.items()}
    return with_reference("eval", datasets)


def use_precomputed_logps(trainer: Any) -> None:
    """Make the trainer read reference log-probs from its datasets, and release its reference."""
    if hasattr(trainer, "precompute_ref_logps"):
        trainer.precompute_ref_logps = True
    else:  # TRL before 0.29
        trainer.precompute_ref_log_probs = True
        trainer._precomputed_train_ref_log_probs = trainer._precomputed_eval_ref_log_probs = True
    if trainer.ref_model is None:
        return

    def refuse_evaluation(*_: Any, **__: Any) -> None:
        raise ValueError(
            "evaluate: the reference model was released after it measured the trainer's datasets; "
            "pass this dataset to the trainer in eval_dataset, before attach"
        )

    trainer.ref_model = None
    # Without a reference model TRL would measure the policy as if it were the reference.
    trainer.compute_ref_log_probs = refuse_evaluation

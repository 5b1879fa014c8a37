"""Invalid input raises an error with the call, the value and the fix."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import with_rewards

from sage_select import (
    Constant,
    Linear,
    PairLogps,
    PreferenceDataset,
    Reader,
    Selector,
    ShuffledLoader,
    Timeline,
    dpo,
    nca_responses,
    plan_pools,
    plan_run,
    sage,
    sequence_logps,
    strata_from_judgments,
    strata_from_values,
    token_logps,
)
from sage_select.adapters.plain import Training
from sage_select.losses import response_weights
from sage_select.ranking import top
from sage_select.timeline import kept_count

ONE = Constant((1.0,))
POLICY, REFERENCE = with_rewards([1.0, 2.0], [0.0, 0.0])
PLAN = plan_pools([0] * 8, ONE, 2)
H, W, T = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])


def selector(**options) -> Selector:
    arguments = {"score": sage, "keep": Constant(0.5), "reference": REFERENCE} | options
    return Selector(progress=lambda step: 0.0, **arguments)


ERRORS = [
    # schedules
    (lambda: Linear(1.0, 0.4)(1.5), ValueError, "progress must lie in [0, 1], got 1.5"),
    (lambda: Constant(1.0)(-0.1), ValueError, "Constant(value=1.0): progress must lie in [0, 1]"),
    (lambda: Linear(1.0, (0.5, 0.5)), ValueError, "start and end must have the same shape"),
    # strata
    (lambda: strata_from_judgments(["great"], [1]), ValueError, "row 0 is 'great', not high"),
    (lambda: strata_from_judgments([None], [1]), ValueError, "label the pair, or drop it"),
    (lambda: strata_from_judgments(["high"], [6]), ValueError, "row 0 is 6.0, not a whole number"),
    (lambda: strata_from_judgments(["high"], [None]), ValueError, "rejected_score of row 0 is nan"),
    (lambda: strata_from_judgments(["high"], [1, 2]), ValueError, "1 clarity labels but 2 scores"),
    (lambda: strata_from_values([1.0, None]), ValueError, "the value of row 1 is missing"),
    (lambda: strata_from_values([1.0], (0.5, 0.1)), ValueError, "must be >= 0 and sum to 1"),
    # plans
    (lambda: plan_pools([], ONE, 1), ValueError, "strata must be [N] with N >= 1"),
    (lambda: plan_pools([0.5], ONE, 1), ValueError, "whole numbers from 0, got float64"),
    (lambda: plan_pools([0], ONE, 2), ValueError, "between 1 and the 1 pairs to assign, got 2"),
    (lambda: plan_pools([0, 0], ONE, 1, copies=2), ValueError, "contains a pair at most once"),
    (lambda: plan_pools([0, 1], ONE, 1), ValueError, "gives 1 shares for 2 strata"),
    (lambda: plan_pools([0], Constant((0.5,)), 1), ValueError, "sum to 1, got (0.5,)"),
    (lambda: plan_pools([0], ONE, 1, ids=["a", "b"]), ValueError, "1 strata but 2 ids"),
    (lambda: plan_pools([0], ONE, 1, on_infeasible="x"), ValueError, "rebalance or error, got 'x'"),
    (lambda: plan_pools([0], ONE, 1, progress="x"), ValueError, "inclusive or k_over_K, got 'x'"),
    (lambda: plan_run([0], ONE, batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    (lambda: plan_run([0], ONE, batch_size=1, scope="x"), ValueError, "run, epoch or single_pass"),
    (lambda: PLAN.on_rows([7] * 8), ValueError, "needs 8 different rows"),
    (lambda: plan_pools([0, 0], ONE, 1, ids=["a", "a"]), ValueError, "ids occur more than once"),
    (lambda: plan_pools([0], lambda t: (np.nan,), 1), ValueError, "sum to 1, got (nan,)"),
    (lambda: PLAN.on_rows([1]), ValueError, "needs 8 different rows >= 0"),
    (lambda: kept_count(1.2, 10), ValueError, "a keep ratio must lie in [0, 1], got 1.2"),
    (lambda: kept_count(0.5, 10, 0), ValueError, "multiple must be at least 1, got 0"),
    (lambda: Timeline(PLAN, Constant(0.5), 0), ValueError, "batch_size must be at least 1, got 0"),
    (lambda: Timeline(PLAN, Constant(0.5), 2).interval_at(9), ValueError, "in [0, 2], got 9"),
    # scores and losses
    (lambda: sage(POLICY, REFERENCE, beta=0), ValueError, "positive and finite, got 0"),
    (lambda: sage(POLICY, REFERENCE, beta=np.inf), ValueError, "positive and finite, got inf"),
    (lambda: sage(POLICY, REFERENCE, eps=-1), ValueError, "eps must be >= 0 and finite, got -1"),
    (lambda: sage(POLICY, REFERENCE, length_norm="x"), ValueError, "stratified, got 'x'"),
    (lambda: dpo(POLICY, REFERENCE.take([0])), ValueError, "align them with reference.take("),
    (
        lambda: sage(*with_rewards([1.0], [1.0], tokens=0)),
        ValueError,
        "pair 0 has no response tokens; drop such pairs from the pool",
    ),
    (lambda: nca_responses(H, H, W), ValueError, "must all be [B, K], got [2, 3], [2, 3] and"),
    (lambda: nca_responses(H, H, H), ValueError, "must be >= 0 and sum to 1 for each prompt"),
    (lambda: response_weights(H, alpha=0), ValueError, "alpha must be positive and finite, got 0"),
    (lambda: dpo(POLICY._replace(chosen=H), REFERENCE), ValueError, "PairLogps must be [P], got"),
    (lambda: response_weights(H * np.nan), ValueError, "scores must be finite and [B, K]"),
    # ranking and selecting
    (lambda: top(np.zeros(2), 3, ids=[0, 1]), ValueError, "cannot keep 3 of 2 candidates"),
    (lambda: top(np.array([np.nan]), 1, ids=[7]), ValueError, "the score of pair 7 is NaN"),
    (lambda: selector(no_signal="x"), ValueError, "must be hash or score, got 'x'"),
    (lambda: selector(reference="model"), TypeError, "use measure(reference_model, dataset)"),
    (
        lambda: selector(score=lambda p, r: torch.zeros(1)).rank(POLICY, REFERENCE, 0.0),
        ValueError,
        "the score must return one value per pair, [2], got shape [1]",
    ),
    # operations
    (lambda: token_logps(H, W[:, :2], T), ValueError, "got [2, 3] and [4, 2]"),
    (lambda: token_logps(H, W, T.int()), TypeError, "targets must be int64, got torch.int32"),
    (lambda: token_logps(H, W, T[:1]), ValueError, "[N] = [2], one per hidden state, got [1]"),
    (lambda: token_logps(H, W, T + 3), ValueError, "target 4 at position 1 is outside the vocab"),
    (lambda: token_logps(H, W, T - 1), ValueError, "use -100 for tokens to skip"),
    (lambda: token_logps(H, W, T, softcap=0), ValueError, "softcap must be positive and finite,"),
    (lambda: token_logps(H, W, T, bias=T[:1]), ValueError, "bias must be [V] = [4], got [1]"),
    (lambda: token_logps(H, W, T, impl="fast"), ValueError, "chunked or fused, got 'fast'"),
    (lambda: token_logps(H.long(), W, T), TypeError, "hidden and weight must be floating"),
    (lambda: sequence_logps(H, W, T, torch.tensor([0, 1])), ValueError, "rise from 0 to 2"),
    (lambda: sequence_logps(H, W, T, torch.tensor([1, 2])), ValueError, "[S + 1] and start at 0"),
    # training
    (lambda: Training(reader=Reader(mixed_precision=torch.float16)), ValueError, "torch.bfloat16"),
    (lambda: Training(micro_batch_size=0), ValueError, "should be greater than or equal to 1"),
    (lambda: Training(warmup_share=2.0), ValueError, "should be less than or equal to 1, got"),
    (lambda: Training(best_by="x"), ValueError, "should be 'loss', 'accuracy' or"),
    (lambda: Training(learning_rate=0), ValueError, "should be greater than 0, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS, ids=[row[2] for row in ERRORS])
def test_messages(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)


def dataset(**options) -> PreferenceDataset:
    from arithmetic import build_tokenizer

    arguments = {"records": [{"prompt": "1?", "chosen": "2", "rejected": "3"}]} | options
    records = arguments.pop("records")
    arguments = {"tokenizer": build_tokenizer(), "max_length": 8} | arguments
    return PreferenceDataset.from_records(records, **arguments)


DATASET_ERRORS = [
    (lambda: dataset(max_length=1), ValueError, "max_length must be at least 2, got 1"),
    (lambda: dataset(on_bad="skip"), ValueError, "set_aside or error, got 'skip'"),
    (
        lambda: dataset(records="pairs.jsonl"),
        TypeError,
        "must be a list of dicts, a polars, pandas",
    ),
    (lambda: dataset(records=[1, 2]), ValueError, "{'not a record': 2}"),
    (lambda: dataset(records=7), TypeError, "got int; for a file or a hub's name, call"),
    (lambda: dataset(num_workers=-1), ValueError, "num_workers must be at least 0, got -1"),
    (
        lambda: dataset(columns={"prompt": "question"}),
        ValueError,
        "it has prompt, chosen, rejected",
    ),
    (
        lambda: dataset(columns={"promt": "prompt"}),
        ValueError,
        "columns maps 'promt', which is not",
    ),
    (lambda: dataset(records=[]), ValueError, "there are no rows"),
    (
        lambda: dataset(records=[{"good": "a"}]),
        ValueError,
        "the first has the fields good; columns=",
    ),
    (lambda: dataset().response_scores, ValueError, "give each record a list `scores`"),
    (lambda: dataset().take([True]), TypeError, "np.flatnonzero(mask)"),
    (lambda: dataset().take([0.5]), TypeError, "rows must be whole numbers, got an array of float"),
    (lambda: dataset(records=[{"chosen": "2"}]), ValueError, "none of the 1 rows can be used"),
    (lambda: dataset().column("clarity"), KeyError, "no column 'clarity'; there are ["),
    (lambda: dataset().take([[0]]), ValueError, "rows must be [P], got shape (1, 1)"),
    (lambda: dataset().split(1.5), ValueError, "fraction must lie in (0, 1), got 1.5"),
    (lambda: dataset().split(0.5), ValueError, "pass a smaller fraction"),
    (lambda: ShuffledLoader(dataset(), batch_size=0), ValueError, "must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("call", "kind", "words"), DATASET_ERRORS, ids=[row[2] for row in DATASET_ERRORS]
)
def test_messages_of_datasets(call, kind, words):
    test_messages(call, kind, words)


FILES = [
    ("pairs.txt", "", "cannot read pairs.txt; known endings are .jsonl, .ndjson, .json, .csv"),
    ("pairs.jsonl", '{"prompt": "1?"}\n{oops', "line 2 of"),
    ("pairs.json", '[{"prompt": "1?"}', "is not JSON"),
    ("pairs.jsonl.gz", "not compressed", "cannot be read as jsonl: Not a gzipped file"),
    ("pairs.parquet", "not a table", "cannot be read as parquet"),
    ("pairs.arrow", "not a table", "cannot be read as arrow"),
    ("pairs.csv", 'chosen,rejected\n"1', "pairs.csv is not CSV"),
    ("pairs.jsonl", b'{"prompt": "\xff"}', "cannot be read as jsonl: line 1 is not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[row[2] for row in FILES])
def test_messages_of_files(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(words)):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.jsonl", "no file"), ("org/no-such-set", "no dataset of that name could be loaded")],
)
def test_messages_of_missing_sources(name, words):
    with pytest.raises(FileNotFoundError, match=words):
        read(name)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file in .* has a known ending"):
        read(tmp_path)


def read(path):
    from arithmetic import build_tokenizer

    return PreferenceDataset.read(path, tokenizer=build_tokenizer(), max_length=8)


def test_a_reference_for_other_rows_is_refused():
    other = PairLogps(*(field.clone() for field in REFERENCE))
    other = replace(selector(), reference=other._replace(index=other.index + 5))
    with pytest.raises(KeyError, match="measure them before selecting"):
        other.rank(POLICY, other.reference, 0.0)

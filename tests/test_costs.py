import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import CONFIGS, small_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from sage_select import Reader, measure, pair_logps
from sage_select.adapters.plain import checkpoint_activations
from sage_select.app.forecast import Cost, compared
from sage_select.models.flops import Shape, shape_of
from sage_select.models.sequences import distinct_sequences
from sage_select.system.ledger import (
    Ledger,
    Work,
    append_costs,
    book,
    break_even,
    phase,
    read_costs,
)

LINEAR = ["qwen2", "qwen3", "llama", "gemma2, softcaps", "gemma3", "phi", "phi3, sliding window"]


@pytest.mark.parametrize("name", [*LINEAR, "gpt2"])
def test_flops_equal_those_counted_by_pytorch(name):
    model = small_model(name)
    model.set_attn_implementation("eager")  # PyTorch counts all of its products
    ids = torch.zeros(1, 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    shape = shape_of(model)
    square = shape.forward(tokens=12, scored=12, squares=12 * 12)  # eager: no mask saves work
    assert counter.get_total_flops() == pytest.approx(square, rel=0.05)


def test_only_active_experts_count():
    two_experts, all_experts = (
        shape_of(AutoModelForCausalLM.from_config(config))
        for config in (
            CONFIGS["mixtral"],
            type(CONFIGS["mixtral"])(**CONFIGS["mixtral"].to_dict() | {"num_experts_per_tok": 4}),
        )
    )
    assert two_experts.head == all_experts.head
    experts = 2 * 3 * 32 * 48 * 4  # layers x matrices x hidden x intermediate x experts
    assert all_experts.body - two_experts.body == experts // 2


def test_needed_counts_a_shared_prompt_once_and_executed_counts_all_passes(pairs):
    model = small_model("llama")
    measure(model, pairs)  # the first call compares packing with padding; do not count that
    with Ledger() as ledger, phase("packed"):
        measure(model, pairs, layout="packed")
    with ledger, phase("padded"):
        measure(model, pairs, layout="padded")
    distinct = distinct_sequences(pairs)
    once = int((distinct.lengths - 1).sum())
    saved = int(distinct.starts[~distinct.first_of_prompt(np.arange(len(distinct)))].sum())
    packed, padded = ledger["packed"], ledger["padded"]
    assert packed.tokens == padded.tokens == once - saved
    assert packed.needed == padded.needed
    assert padded.executed_tokens > once > packed.tokens
    assert packed.executed < padded.executed
    assert packed.seconds > 0


def test_a_backward_pass_costs_two_forward_passes_and_recomputation_one(pairs):
    model = small_model("llama")
    pair_logps(model, pairs)  # the first call compares the head with the logits; do not count it
    with Ledger() as ledger:
        with phase("forward"), torch.no_grad():
            Reader(layout="padded").pair_logps(model, pairs)
        with phase("forward and backward"):
            Reader(layout="padded").pair_logps(model, pairs)
        checkpoint_activations(model.train())
        with phase("recomputation"):
            Reader(layout="padded").pair_logps(model, pairs)
    for kind in ("forward and backward", "recomputation"):
        assert ledger[kind].needed == 3 * ledger["forward"].needed
        assert ledger[kind].tokens == ledger["forward"].tokens
    recomputed_head = (
        2 * shape_of(model).head * int(pairs.chosen_tokens.sum() + pairs.rejected_tokens.sum())
    )
    forward = ledger["forward"].executed
    assert ledger["forward and backward"].executed == 3 * forward + recomputed_head
    assert ledger["recomputation"].executed == 4 * forward + recomputed_head


def test_frozen_weights_need_no_gradient():
    model = small_model("llama")
    assert shape_of(model).passes == 3
    adapted = shape_of(get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])))
    assert 2 < adapted.passes < 2.1


def test_an_inner_phase_pauses_the_outer_clock(monkeypatch):
    now = 0.0
    monkeypatch.setattr("sage_select.system.ledger.time.perf_counter", lambda: now)
    with Ledger() as ledger, phase("outer"):
        now += 1
        with phase("inner"):
            now += 10
            book(Work(tokens=1))
        now += 100
        book(Work(tokens=2))
    assert (ledger["inner"].seconds, ledger["outer"].seconds) == (10, 101)
    assert (ledger["inner"].tokens, ledger["outer"].tokens) == (1, 2)


def test_nothing_is_recorded_outside_a_ledger():
    ledger = Ledger()
    with phase("early"):
        book(Work(tokens=1))
    assert ledger == {}
    with ledger:
        book(Work(tokens=1))
    assert ledger == {"other": Work(tokens=1)}


def test_a_ledger_that_is_opened_twice_records_twice():
    ledger = Ledger()
    with ledger, ledger:
        book(Work(tokens=1))
    assert ledger["other"].tokens == 2
    book(Work(tokens=1))
    assert ledger["other"].tokens == 2


def test_phases_without_a_forecast_are_reported_too():
    one = Work(needed=6.0, seconds=3.0)
    cost = Cost(one, (one,), (one,), Work(), full=one)
    comparison = compared(cost, Ledger(other=one, training=one, scoring=one))
    assert list(comparison["phases"]) == ["scoring", "training", "other"]
    assert comparison["break_even"] == 0
    assert math.isnan(compared(cost, Ledger())["break_even"])


def test_costs_survive_a_file_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "costs.jsonl"
    assert read_costs(path) == {}
    first, second = Ledger(scoring=Work(1, 2, 3, 4, 5.0, 6)), Ledger(training=Work(tokens=7))
    append_costs(path, first, interval=0)
    append_costs(path, first, interval=1)
    append_costs(path, second, interval=1)
    with path.open("a") as file:
        file.write('{"interval": 2, "pha')  # killed here
    append_costs(path, Ledger(training=Work(tokens=4)), interval=2)
    assert read_costs(path) == {"scoring": Work(2, 4, 6, 8, 10.0, 6), "training": Work(tokens=11)}


def test_below_the_break_even_selection_is_cheaper():
    scoring, training = 2.0, 5.0
    even = break_even(scoring, training)
    assert scoring + even * training == pytest.approx(training)
    assert break_even(1, 3) == pytest.approx(2 / 3)


def test_needed_by_hand():
    shape = Shape(body=10, head=100, attention=1)
    starts, lengths = np.array([3, 3]), np.array([5, 4])
    work = shape.needed(starts, lengths, lengths - starts, np.array([True, False]))
    # the first reads p p p r; the second shares p p p, and its only response token is not read
    assert work.tokens == 4 + 0
    assert work.needed == 2 * 10 * 4 + 2 * 100 * 3 + 4 * 10

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sage_select import sequence_logps, token_logps
from sage_select.ops import chunked

IMPLEMENTATIONS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 256 columns, so that small vocabularies have several."""
    monkeypatch.setattr(chunked, "BLOCK_LOGITS", 1)


def problem(tokens=7, hidden=5, vocabulary=700, dtype=torch.float64, scale=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(tokens, hidden, generator=random, dtype=torch.float64) * scale).to(dtype),
        torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64).to(dtype),
        torch.randint(vocabulary, (tokens,), generator=random),
    )


def truth(hidden, weight, targets, bias=None, softcap=None):
    """log_softmax in float64, whatever the inputs' dtype."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    st.sampled_from([0, 1, 2, 15, 17, 129]),
    st.sampled_from([1, 8, 33, 64]),
    st.sampled_from([1, 2, 127, 256, 257, 513, 1000]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, 5.0]),
    st.booleans(),
)
def test_against_float64(impl, tokens, hidden, vocabulary, dtype, softcap, with_bias):
    h, w, t = problem(tokens, hidden, vocabulary, dtype)
    bias = torch.linspace(-1, 1, vocabulary).to(dtype) if with_bias else None
    found = token_logps(h, w, t, bias=bias, softcap=softcap, impl=impl)
    assert found.dtype == torch.float32
    # fp32 logits whatever the inputs' dtype: bf16 logits would be off by 1e-2
    assert torch.allclose(found.double(), truth(h, w, t, bias, softcap), atol=5e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_does_not_round_the_logits(impl):
    h, w, t = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logps(h, w, t, impl=impl)
    assert torch.equal(found, token_logps(h, w, t, impl=impl))


@pytest.mark.parametrize("impl", ["chunked"])
@pytest.mark.parametrize("precision", ["medium", "high"])
def test_permitted_imprecision_does_not_reach_the_logits(impl, precision):
    h, w, t = problem(64, 256, 1000, torch.float32)
    torch.set_float32_matmul_precision(precision)
    try:
        found = token_logps(h.requires_grad_(), w, t, impl=impl)
        found.sum().backward()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.allclose(found.double(), truth(h, w, t), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, "highest"), (torch.bfloat16, "medium")]
)
def test_the_precision_of_products(dtype, expected, monkeypatch):
    """On many a CPU nothing is rounded when it may be: so look at what is permitted."""
    product, permitted = torch.mm, set()

    def looked_at(*args, **options):
        permitted.add(torch.get_float32_matmul_precision())
        return product(*args, **options)

    monkeypatch.setattr(torch, "mm", looked_at)
    h, w, t = problem(dtype=dtype)
    token_logps(h.requires_grad_(), w, t, impl="chunked").sum().backward()
    assert permitted == {expected}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(st.floats(0.0, 40.0))
def test_confident_tokens(impl, lead):
    """From p = 1 / V to 1 - 1e-17: never above 0, and exact to the rounding of the logit."""
    h, w = torch.tensor([[lead]]), torch.zeros(700, 1)
    w[300] = 1.0
    found = token_logps(h, w, torch.tensor([300]), impl=impl)
    assert found <= 0
    assert torch.allclose(found.double(), truth(h, w, torch.tensor([300])), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_that_overflow_are_done_again_and_others_are_not_touched(impl):
    h, w, t = problem(tokens=9, dtype=torch.float32)
    alone = token_logps(h, w, t, impl=impl)
    h[4] *= 500
    found = token_logps(h, w, t, impl=impl)
    assert torch.allclose(found.double(), truth(h, w, t), rtol=1e-5, atol=5e-5)
    assert torch.equal(found[[0, 1, 2, 3, 5, 6, 7, 8]], alone[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits(impl):
    h, w, t = problem(scale=300.0, dtype=torch.float32)
    found = token_logps(h, w, t, impl=impl)
    assert found.min() < -200
    assert torch.allclose(found.double(), truth(h, w, t), rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients(impl):
    h, w, t = problem(tokens=5, hidden=3, vocabulary=300)
    t[2] = -100
    bias = torch.linspace(-1, 1, 300).double()
    leaves = [x.requires_grad_() for x in (h, w, bias)]

    def total(h, w, bias):
        bounds = torch.tensor([0, 2, 2, 5])
        return sequence_logps(h, w, t, bounds, bias=bias, softcap=3.0, impl=impl)

    assert torch.autograd.gradcheck(total, leaves, fast_mode=False)


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradients_of_a_part(frozen):
    h, w, t = problem()
    leaves = [h.requires_grad_(frozen != 0), w.requires_grad_(frozen != 1)]
    token_logps(*leaves, t, impl="chunked").sum().backward()
    free = leaves[1 - frozen]
    expected = free.grad.clone()
    free.grad = None
    token_logps(*leaves, t, impl="reference").sum().backward()
    assert torch.allclose(free.grad, expected)
    assert leaves[frozen].grad is None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignored_tokens_count_nothing_and_learn_nothing(impl):
    h, w, t = problem()
    t[[0, 3]] = -100
    h.requires_grad_()
    found = token_logps(h, w, t, impl=impl)
    found.sum().backward()
    assert found[[0, 3]].tolist() == [0, 0]
    assert h.grad[[0, 3]].abs().sum() == 0
    assert (h.grad[[1, 2]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_probabilities_of_all_tokens_sum_to_one(impl):
    h, w, _ = problem(tokens=1, vocabulary=513)
    logps = token_logps(h.expand(513, -1), w, torch.arange(513), impl=impl)
    assert logps.exp().sum().item() == pytest.approx(1)


def test_nan_stays_in_its_row():
    h, w, t = problem()
    h[3] = torch.nan
    assert token_logps(h, w, t).isnan().tolist() == [False] * 3 + [True] + [False] * 3


def test_sequences_are_summed_in_float64_whatever_stands_beside_them():
    h, w, t = problem(tokens=60, dtype=torch.float32)
    bounds = torch.tensor([0, 10, 10, 60])
    logps = token_logps(h, w, t)
    total = sequence_logps(h, w, t, bounds)
    assert total.dtype == torch.float64
    assert total.tolist() == pytest.approx(
        [logps[:10].double().sum().item(), 0, logps[10:].double().sum().item()], abs=1e-12
    )


def test_a_bias_that_rules_out_a_whole_block():
    h, w, t = problem()
    bias = torch.zeros(700).double()
    bias[:300] = -torch.inf
    t = t.clamp(min=300)
    assert torch.allclose(token_logps(h, w, t, bias=bias, impl="chunked"), truth(h, w, t, bias))


def test_no_tokens_and_no_sequences():
    h, w, t = problem()
    assert sequence_logps(h[:0], w, t[:0], torch.tensor([0])).shape == (0,)
    assert sequence_logps(h[:0], w, t[:0], torch.tensor([0, 0])).tolist() == [0.0]


def test_no_matrix_of_logits_is_kept():
    h, w, t = problem(tokens=64, vocabulary=20_000, dtype=torch.float32)
    h.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        token_logps(h, w, t, impl="chunked").sum()
    assert max(sizes) <= max(w.numel(), h.numel())

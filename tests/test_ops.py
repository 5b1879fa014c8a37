import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from sage_select import sequence_logps, token_logps
from sage_select.ops import chunked, operators

IMPLEMENTATIONS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use blocks of 256 columns, so that small vocabularies have several."""
    monkeypatch.setitem(chunked.BLOCK_LOGITS, "cpu", 1)


def problem(tokens=7, hidden=5, vocabulary=700, dtype=torch.float64, scale=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(tokens, hidden, generator=random, dtype=torch.float64) * scale).to(dtype),
        torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64).to(dtype),
        torch.randint(vocabulary, (tokens,), generator=random),
    )


def exact_logps(hidden, weight, targets, bias=None, softcap=None):
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
    result = token_logps(h, w, t, bias=bias, softcap=softcap, impl=impl)
    assert result.dtype == torch.float32
    # fp32 logits whatever the inputs' dtype: bf16 logits would be off by 1e-2
    assert torch.allclose(result.double(), exact_logps(h, w, t, bias, softcap), atol=5e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_does_not_round_the_logits(impl):
    h, w, t = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = token_logps(h, w, t, impl=impl)
    assert torch.equal(result, token_logps(h, w, t, impl=impl))


def test_autocast_does_not_round_the_gradients():
    h, w, t = problem(dtype=torch.float32)
    h.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = torch.autograd.grad(token_logps(h, w, t, impl="chunked").sum(), h)
    assert torch.equal(result[0], torch.autograd.grad(token_logps(h, w, t).sum(), h)[0])


@pytest.mark.parametrize("impl", ["chunked"])
@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_reduced_matmul_precision_does_not_affect_the_logits(impl, precision):
    h, w, t = problem(64, 256, 1000, torch.float32)
    torch.set_float32_matmul_precision(precision)
    try:
        result = token_logps(h.requires_grad_(), w, t, impl=impl)
        result.sum().backward()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.allclose(result.double(), exact_logps(h, w, t), atol=1e-4, rtol=0)


def test_a_precision_set_by_the_newer_flags_is_restored():
    flags = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not all(hasattr(flag, "fp32_precision") for flag in flags):
        pytest.skip("this PyTorch has only the older setting")
    h, w, t = problem(dtype=torch.float32)
    expected = token_logps(h, w, t)
    try:
        for flag, precision in zip(flags, ("tf32", "bf16"), strict=True):
            flag.fp32_precision = precision
        assert torch.equal(token_logps(h, w, t), expected)
        assert [flag.fp32_precision for flag in flags] == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, "highest"), (torch.bfloat16, "medium")]
)
def test_the_precision_of_products(dtype, expected, monkeypatch):
    """Checks the setting, since on many CPUs a lower precision changes no result."""
    mm, precisions = torch.mm, set()

    def recording_mm(*args, **options):
        precisions.add(torch.get_float32_matmul_precision())
        return mm(*args, **options)

    monkeypatch.setattr(torch, "mm", recording_mm)
    h, w, t = problem(dtype=dtype)
    token_logps(h.requires_grad_(), w, t, impl="chunked").sum().backward()
    assert precisions == {expected}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(st.floats(0.0, 40.0))
def test_confident_tokens(impl, lead):
    """From p = 1 / V to 1 - 1e-17, log p is at most 0 and exact to the rounding of the logit."""
    h, w = torch.tensor([[lead]]), torch.zeros(700, 1)
    w[300] = 1.0
    result = token_logps(h, w, torch.tensor([300]), impl=impl)
    assert result <= 0
    assert torch.allclose(
        result.double(), exact_logps(h, w, torch.tensor([300])), atol=4e-6, rtol=1e-5
    )


def test_an_error_that_all_logits_of_a_row_share_cancels(monkeypatch):
    """Tensor cores truncate when they add, so every logit of 30 is off by the same 3e-4."""
    h, w = torch.full((1, 1), 30.0), torch.zeros(700, 1)
    w[300] = 1.0
    product = chunked.product
    monkeypatch.setattr(chunked, "product", lambda *args: product(*args).mul_(1 + 1e-5))
    assert token_logps(h, w, torch.tensor([300]), impl="chunked").abs() < 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_that_overflow_are_recomputed_and_others_are_unchanged(impl):
    h, w, t = problem(tokens=9, dtype=torch.float32)
    alone = token_logps(h, w, t, impl=impl)
    h[4] *= 500
    result = token_logps(h, w, t, impl=impl)
    assert torch.allclose(result.double(), exact_logps(h, w, t), rtol=1e-5, atol=5e-5)
    assert torch.equal(result[[0, 1, 2, 3, 5, 6, 7, 8]], alone[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits(impl):
    h, w, t = problem(scale=300.0, dtype=torch.float32)
    result = token_logps(h, w, t, impl=impl)
    assert result.min() < -200
    assert torch.allclose(result.double(), exact_logps(h, w, t), rtol=1e-5)


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


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_of_some_inputs_only(frozen):
    h, w, t = problem()
    leaves = [h, w, torch.linspace(-1, 1, 700).double()]
    trained = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i != frozen]
    result, expected = (
        torch.autograd.grad(token_logps(h, w, t, bias=leaves[2], impl=impl).sum(), trained)
        for impl in ("chunked", "reference")
    )
    assert all(torch.allclose(*both) for both in zip(result, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignored_tokens_have_zero_log_probs_and_gradients(impl):
    h, w, t = problem()
    t[[0, 3]] = -100
    h.requires_grad_()
    result = token_logps(h, w, t, impl=impl)
    result.sum().backward()
    assert result[[0, 3]].tolist() == [0, 0]
    assert h.grad[[0, 3]].abs().sum() == 0
    assert (h.grad[[1, 2]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_ignored_token_does_not_affect_the_gradient_of_the_head(impl):
    h, w, t = problem()
    h[3], t[3] = torch.nan, -100
    assert token_logps(h, w.requires_grad_(), t, impl=impl).isfinite().all()
    token_logps(h, w, t, impl=impl).sum().backward()
    result, w.grad = w.grad, None
    others = [0, 1, 2, 4, 5, 6]
    token_logps(h[others], w, t[others], impl=impl).sum().backward()
    assert torch.allclose(result, w.grad)


def test_tokens_with_zero_weight_in_the_loss_are_dropped_in_backward():
    h, w, t = problem()
    h[3] = torch.nan  # 0 * NaN would be NaN
    leaves = [h.requires_grad_(), w.requires_grad_()]
    weights = torch.tensor([1.0, 2.0, 0.0, 0.0, -1.0, 0.5, 1.0]).double()
    result = torch.autograd.grad(token_logps(*leaves, t), leaves, weights)
    kept = weights != 0
    expected = torch.autograd.grad(token_logps(h[kept], w, t[kept]), leaves, weights[kept])
    assert all(torch.allclose(*both) for both in zip(result, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_probabilities_of_all_tokens_sum_to_one(impl):
    h, w, _ = problem(tokens=1, vocabulary=513)
    logps = token_logps(h.expand(513, -1), w, torch.arange(513), impl=impl)
    assert logps.exp().sum().item() == pytest.approx(1)


def test_nan_stays_in_its_row():
    h, w, t = problem()
    h[3] = torch.nan
    assert token_logps(h, w, t).isnan().tolist() == [False] * 3 + [True] + [False] * 3


def test_sequences_are_summed_in_float64_independently_of_each_other():
    h, w, t = problem(tokens=60, dtype=torch.float32)
    bounds = torch.tensor([0, 10, 10, 60])
    logps = token_logps(h, w, t)
    total = sequence_logps(h, w, t, bounds)
    assert total.dtype == torch.float64
    assert total.tolist() == pytest.approx(
        [logps[:10].double().sum().item(), 0, logps[10:].double().sum().item()], abs=1e-12
    )


def test_a_bias_that_excludes_a_whole_block():
    h, w, t = problem()
    bias = torch.zeros(700).double()
    bias[:300] = -torch.inf
    t = t.clamp(min=300)
    assert torch.allclose(
        token_logps(h, w, t, bias=bias, impl="chunked"), exact_logps(h, w, t, bias)
    )


def test_no_tokens_and_no_sequences():
    h, w, t = problem()
    assert sequence_logps(h[:0], w, t[:0], torch.tensor([0])).shape == (0,)
    result = sequence_logps(h[:0], w.requires_grad_(), t[:0], torch.tensor([0, 0]))
    assert result.tolist() == [0.0]
    result.sum().backward()
    assert w.grad.abs().sum() == 0


def test_no_matrix_of_logits_is_saved_for_backward():
    h, w, t = problem(tokens=64, vocabulary=20_000, dtype=torch.float32)
    h.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        token_logps(h, w, t, impl="chunked").sum()
    assert max(sizes) <= max(w.numel(), h.numel())


OPERANDS = [
    # tokens, dtype, bias, softcap, ignored
    (7, torch.float32, False, None, []),
    (7, torch.float64, True, 3.0, [0, 3]),
    (7, torch.bfloat16, True, None, [1]),
    (7, torch.float16, False, 5.0, range(7)),
    (0, torch.float32, True, 3.0, []),
]


@pytest.mark.parametrize(("tokens", "dtype", "with_bias", "softcap", "ignored"), OPERANDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operators_match_their_fake_kernels(
    tokens, dtype, with_bias, softcap, ignored, transposed
):
    """No input is modified, and shapes, dtypes and strides are those of the fake kernels."""
    h, w, t = problem(tokens, dtype=dtype)
    if transposed:
        h, w = h.T.contiguous().T, w.T.contiguous().T
    bias = torch.linspace(-1, 1, len(w)).to(dtype) if with_bias else None
    t[list(ignored)] = -100
    options = softcap, 0.7, "chunked", 0, None, False
    logps, logsumexp = operators.token_logps_operator(h, w, t, bias, *options)
    grad, needed = (
        torch.linspace(-1, 1, tokens, dtype=logps.dtype),
        [not with_bias, True, with_bias],
    )
    torch.library.opcheck(
        operators.token_logps_backward_operator,
        (needed, grad, h, w, t, bias, logsumexp, *options),
        rtol=0,
        atol=0,
    )
    leaves = [x if x is None else x.requires_grad_() for x in (h, w, bias)]
    inputs = (*leaves[:2], t, leaves[2], *options)
    torch.library.opcheck(operators.token_logps_operator, inputs, rtol=0, atol=0)
    result = operators.token_logps_operator(*inputs)
    assert [x.requires_grad for x in result] == [True, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_graph_for_any_number_of_tokens(impl):
    """Compiled and eager log-probs and gradients are bit-identical."""

    def logps(h, w, bias, t, bounds):
        return sequence_logps(h.tanh(), w, t, bounds, bias=bias, softcap=3.0, impl=impl)

    def with_gradients(function, tokens):
        h, w, t = problem(tokens, dtype=torch.float32)
        t[1] = -100
        leaves = [x.requires_grad_() for x in (h, w, torch.linspace(-1, 1, len(w)))]
        result = function(*leaves, t, torch.tensor([0, 2, 2, tokens]))
        return result, *torch.autograd.grad(result.sum(), leaves)

    compiled = torch.compile(logps, backend="aot_eager", fullgraph=True, dynamic=True)
    with_gradients(compiled, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (5, 9, 31):
            both = with_gradients(compiled, tokens), with_gradients(logps, tokens)
            assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.tensor([1, 700])}, "target 700 at position 1 is outside the vocabulary of 70"),
        ({"t": torch.tensor([-1, 3])}, "target -1 at position 0 is outside"),
        ({"bounds": torch.tensor([1, 2])}, "start at 0"),
        ({"bounds": torch.tensor([0, 1])}, "rise from 0 to 2, the number of tokens, got"),
        ({"bounds": torch.tensor([0, 3, 2])}, "rise from 0 to 2, the number of tokens, got"),
    ],
)
def test_wrong_values_are_also_refused_in_a_graph(change, message):
    h, w, t = problem(tokens=2)
    compiled = torch.compile(sequence_logps, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=message):
        compiled(h, w, change.get("t", t), change.get("bounds", torch.tensor([0, 2])))


def test_export_for_any_number_of_tokens():
    class Head(torch.nn.Module):
        def forward(self, hidden, weight, targets, bounds):
            return sequence_logps(hidden, weight, targets, bounds)

    def arguments(tokens):
        return *problem(tokens), torch.tensor([0, 2, 2, tokens])

    tokens = {0: torch.export.Dim("tokens")}
    shapes = (tokens, None, tokens, None)
    exported = torch.export.export(Head(), arguments(7), dynamic_shapes=shapes).module()
    assert torch.equal(exported(*arguments(31)), sequence_logps(*arguments(31)))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_tensors_without_values(dtype, expected):
    with FakeTensorMode():
        h, w = (torch.empty(n, 5, dtype=dtype, requires_grad=True) for n in (7, 700))
        t = torch.empty(7, dtype=torch.int64)
        logps = token_logps(h, w, t)
        total = sequence_logps(h, w, t, torch.empty(4, dtype=torch.int64))
        total.sum().backward()
    assert (logps.shape, logps.dtype) == ((7,), expected)
    assert (total.shape, total.dtype) == ((3,), torch.float64)
    assert all((x.grad.shape, x.grad.dtype) == (x.shape, dtype) for x in (h, w))


def test_second_derivatives_are_refused():
    h, w, t = problem()
    logps = token_logps(h.requires_grad_(), w, t, impl="chunked")
    (grad,) = torch.autograd.grad(logps.sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match='use impl="reference"'):
        grad.sum().backward()

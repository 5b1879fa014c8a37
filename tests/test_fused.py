"""The Triton kernels, run on a GPU if there is one, otherwise in Triton's interpreter."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import small_model
from torch._subclasses import FakeTensorMode

from sage_select import measure, sequence_logps, token_logps

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from triton.runtime.errors import OutOfResources

from sage_select.ops import fused, operators, tilings, tuning
from sage_select.ops.fused import FusedLogits
from sage_select.ops.logits import backward
from sage_select.ops.tilings import AMPERE, FLOAT32, HOPPER, INTERPRETER
from sage_select.ops.tuning import tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILINGS = {
    "small": INTERPRETER,
    "pointers": AMPERE,
    "descriptors": HOPPER._replace(part=512),
    "library": INTERPRETER._replace(library=True),
}
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy, for NaN


default_tiling = tilings.default_tiling  # the fixture below replaces it


@pytest.fixture(autouse=True)
def tiling(request, monkeypatch):
    """Use the interpreter's small tiling, which has many tiles, unless a test selects another."""
    chosen = TILINGS[getattr(request, "param", "small")]
    # tiles of fp32 take twice the shared memory, more than a GPU has
    for_fp32 = chosen._replace(rows=min(chosen.rows, 64), columns=32, depth=32, stages=1)
    monkeypatch.setattr(
        tilings, "default_tiling", lambda _, dtype: for_fp32 if dtype == torch.float32 else chosen
    )
    monkeypatch.setattr(fused, "PRODUCT_SHAPE", (64, 160))
    return chosen


every_tiling = pytest.mark.parametrize("tiling", TILINGS, indirect=True)


def problem(tokens=19, hidden=40, vocabulary=300, dtype=torch.float32, seed=0):
    """Logits like a language model's: small, with a larger one for the target."""
    random = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(n, hidden, generator=random) for n in (tokens, vocabulary))
    t = torch.randint(vocabulary, (tokens,), generator=random)
    h = h * (2 / hidden**0.5) + w[t] * (4 / hidden)
    return h.to(DEVICE, dtype), w.to(DEVICE, dtype), t.to(DEVICE)


def exact(h, w, t, bias=None, softcap=None, temperature=1.0):
    """Log-probs in float64, from the tensors' rounded values."""
    logits = h.double() @ w.double().T + (0 if bias is None else bias.double())
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return (logits / temperature).log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)


def logps(h, w, t, **options):
    return token_logps(h, w, t, impl="fused", **options)


def within_budget(result, h, w, t, **options):
    """Return whether errors are within the budget, a hundredth of the error of bf16 logits."""
    return result.dtype == torch.float32 and torch.allclose(
        result.double(), exact(h, w, t, **options), atol=5e-5, rtol=1e-6
    )


SHAPES = st.tuples(
    st.sampled_from([0, 1, 2, 15, 16, 17, 127, 129]),
    st.sampled_from([1, 8, 33, 64, 80, 136]),
    st.sampled_from([1, 2, 127, 128, 129, 255, 257, 513]),
)


@every_tiling
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_against_float64(tiling, shape, dtype, with_bias, capped, warm, strided):
    h, w, t = problem(*shape, dtype)
    bias = torch.linspace(-1, 1, 2 * len(w), device=DEVICE).to(dtype)
    options = {
        "bias": bias[:: 1 + strided][: len(w)] if with_bias else None,
        "softcap": 5.0 if capped else None,
        "temperature": 0.7 if warm else 1.0,
    }
    if strided:
        h = torch.cat([h, torch.full_like(h, torch.nan)], dim=1)[:, : h.shape[1]]
        w = torch.cat([w, torch.full_like(w, torch.nan)], dim=1)[:, : w.shape[1]]
    assert within_budget(logps(h, w, t, **options), h, w, t, **options)


@pytest.mark.parametrize("shape", [(1000, 33, 257), (129, 896, 1000), (3, 64, 1023), (3, 8, 1025)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiling", ["descriptors"], indirect=True)
def test_larger_shapes(shape, dtype):
    h, w, t = problem(*shape, dtype)
    assert within_budget(logps(h, w, t), h, w, t)


@pytest.mark.parametrize("tiling", ["pointers"], indirect=True)
def test_the_whole_vocabulary_of_a_model():
    h, w, t = problem(3, 16, 151_936, torch.bfloat16)
    t[0], t[1] = 0, 151_935
    assert within_budget(logps(h, w, t), h, w, t)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_logits_exceed_the_error_budget(dtype):
    h, w, t = problem(dtype=dtype)
    rounded = (h @ w.T).float().log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)
    assert not within_budget(rounded, h, w, t)


@pytest.mark.parametrize("tiling", ["pointers"], indirect=True)
def test_the_sum_of_a_long_sequence_is_exact():
    h, w, t = problem(8000, 16, 130, torch.bfloat16)
    result = sequence_logps(h, w, t, torch.tensor([0, 8000], device=DEVICE), impl="fused")
    assert result.item() == pytest.approx(exact(h, w, t).sum().item(), abs=5e-3)


@every_tiling
@pytest.mark.parametrize("vocabulary", [1, 127, 257, 300])
@pytest.mark.parametrize("softcap", [None, 70.0])
def test_columns_beyond_the_vocabulary_are_excluded(tiling, vocabulary, softcap):
    """A logit of 0 there would outweigh the real ones by e^60."""
    h, w, t = problem(vocabulary=vocabulary)
    bias = torch.full((vocabulary,), -65.0, device=DEVICE)
    assert within_budget(
        logps(h, w, t, bias=bias, softcap=softcap), h, w, t, bias=bias, softcap=softcap
    )


@every_tiling
def test_first_and_last_token_of_the_vocabulary(tiling):
    h, w, t = problem()
    for target in (0, 127, 128, 299):
        t[:] = target
        assert within_budget(logps(h, w, t), h, w, t)


@every_tiling
def test_rows_that_overflow_are_recomputed_and_others_are_unchanged(tiling):
    h, w, t = problem()
    alone = logps(h, w, t)
    h[4] *= 200
    t[4] = (h[4] @ w.T).argmin()
    result = logps(h, w, t)
    assert result[4] < -200
    assert torch.allclose(result.double(), exact(h, w, t), rtol=1e-5, atol=5e-5)
    others = torch.arange(19) != 4
    assert torch.equal(result[others], alone[others])


def test_a_bias_that_excludes_a_part_of_the_vocabulary_or_the_target():
    h, w, t = problem()
    bias = torch.zeros(300, device=DEVICE)
    bias[:150] = -torch.inf
    t.clamp_(min=150)
    t[3] = 7
    result = logps(h, w, t, bias=bias)
    assert result[3] == -torch.inf
    assert torch.allclose(result.double(), exact(h, w, t, bias=bias), atol=5e-5)


@every_tiling
def test_nan_stays_in_its_row(tiling):
    h, w, t = problem()
    alone = logps(h, w, t)
    h[4] = torch.nan
    result = logps(h, w, t)
    assert result.isnan().nonzero().tolist() == [[4]]
    others = torch.arange(19) != 4
    assert torch.equal(result[others], alone[others])


def rows_are_independent(h, w, t):
    """Return whether each row has the same bits when repeated, shuffled, and in a smaller batch."""
    random = torch.Generator().manual_seed(1)
    order = torch.randperm(len(h), generator=random).to(DEVICE)
    result = logps(h, w, t)
    checks = [
        torch.equal(logps(h, w, t), result),
        torch.equal(logps(h[order], w, t[order]), result[order]),
        all(
            torch.equal(logps(h[i:j], w, t[i:j]), result[i:j]) for i, j in [(0, 1), (3, 8), (5, 19)]
        ),
    ]
    return all(checks)


@every_tiling
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_other_rows(tiling, dtype):
    h, w, t = problem(dtype=dtype)
    t[7] = -100
    assert rows_are_independent(h, w, t)


def test_the_check_of_independence_detects_a_dependence(monkeypatch):
    sum_exp = FusedLogits.sum_exp
    monkeypatch.setattr(
        FusedLogits,
        "sum_exp",
        lambda self, x, t: (sum_exp(self, x, t)[0] * (1 + 1e-6 * len(x)), None),
    )
    assert not rows_are_independent(*problem())


@every_tiling
@pytest.mark.parametrize("softcap", [30.0, 1e3, 1e5])
def test_a_softcap_far_above_the_logits(tiling, softcap):
    h, w, t = problem()
    assert within_budget(logps(h, w, t, softcap=softcap), h, w, t, softcap=softcap)


@every_tiling
def test_large_logits_of_certain_tokens_give_log_prob_zero(tiling):
    h, w, _ = (x.round() for x in problem())  # products of integers are exact
    logits = 300 * h @ w.T
    t = logits.argmax(dim=-1)
    certain = logits.topk(2).values.diff().abs().squeeze(-1) > 0
    assert certain.sum() > 5
    assert logps(300 * h, w, t)[certain].abs().max() < 1e-6


def test_the_probabilities_of_all_tokens_sum_to_one():
    h, w, _ = problem(tokens=1)
    result = logps(h.expand(300, -1).contiguous(), w, torch.arange(300, device=DEVICE))
    assert result.double().exp().sum().item() == pytest.approx(1)


def test_invariance_to_the_order_of_the_vocabulary_and_a_shift_of_all_logits():
    h, w, t = problem()
    result = logps(h, w, t)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.allclose(logps(h, w[order], order.argsort()[t]), result, atol=1e-5)
    shifted = logps(h, w, t, bias=torch.full((300,), 30.0, device=DEVICE))
    assert torch.allclose(shifted, result, atol=2e-5)


def test_rows_far_apart_in_memory():
    """Offsets exceed 2^31 elements with strides below it; memory between rows is never touched."""
    h, w, t = problem(3, 8, 3, torch.float16)
    t[:] = torch.tensor([2, 1, 0])
    stride = 2**30 + 8
    far_h, far_w = (
        torch.empty((len(x) - 1) * stride + 8, dtype=x.dtype, device=DEVICE).as_strided(
            x.shape, (stride, 1)
        )
        for x in (h, w)
    )
    far_h.copy_(h), far_w.copy_(w)
    assert torch.equal(logps(far_h, far_w, t), logps(h, w, t))


@pytest.mark.parametrize("tiling", ["pointers"], indirect=True)
def test_more_rows_than_the_second_dimension_of_a_grid_can_have():
    h, w, t = problem(65_600, 2, 3)
    assert within_budget(logps(h, w, t), h, w, t)


@every_tiling
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}])
def test_gradients(tiling, dtype, options):
    h, w, t = problem(dtype=dtype)
    t[2] = -100
    bias = torch.linspace(-1, 1, 300, device=DEVICE).to(dtype)
    upstream = torch.linspace(-3, 3, 19, device=DEVICE)

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (h, w, bias)]
        result = function(*leaves[:2], t, bias=leaves[2], **options)
        return torch.autograd.grad(result, leaves, upstream.to(result.dtype))

    def in_float64(h, w, t, **options):
        return exact(h, w, t.clamp(min=0), **options) * (t >= 0)

    budget = 1e-5 if dtype == torch.float32 else 5e-3
    for result, expected in zip(
        gradients(logps, dtype), gradients(in_float64, torch.float64), strict=True
    ):
        assert result.dtype == dtype
        assert (result - expected).norm() <= budget * expected.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradients_of_frozen_inputs_are_not_computed(frozen, monkeypatch):
    h, w, t = problem()
    computed = []
    monkeypatch.setattr(
        operators,
        "backward",
        lambda *args, f=operators.backward: computed.append(f(*args)) or computed[-1],
    )
    leaf = (h, w)[1 - frozen].requires_grad_()
    logps(h, w, t).sum().backward()
    assert [x is None for x in computed[0]] == [frozen == 0, frozen == 1, True]
    assert leaf.grad.isfinite().all()


def test_tokens_with_zero_weight_in_the_loss_are_dropped_in_backward(monkeypatch):
    h, w, t = problem()
    h[3] = torch.nan  # 0 * NaN would be NaN
    leaves = [h.requires_grad_(), w.requires_grad_()]
    upstream = torch.linspace(-1, 1, 19, device=DEVICE)
    upstream[[3, 5]] = 0
    rows = []
    slopes = FusedLogits.slopes
    monkeypatch.setattr(
        FusedLogits, "slopes", lambda self, *x: rows.append(len(self.hidden_NH)) or slopes(self, *x)
    )
    result = torch.autograd.grad(logps(*leaves, t), leaves, upstream)
    assert set(rows) == {17}
    assert all(x.isfinite().all() for x in result)
    assert result[0][[3, 5]].abs().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_small_loss_do_not_underflow(dtype):
    """In fp16, a probability times a millionth would underflow."""
    h, w, t = problem(dtype=dtype)
    logits = FusedLogits.of(h, w, None, None, 1.0)
    logsumexp = (h.double() @ w.double().T).logsumexp(-1).float()
    large = torch.linspace(-1, 1, 19, device=DEVICE)
    whole, small = (
        backward(logits, t, scale * large, logsumexp, (True, False, False))[0]
        for scale in (1, 2**-20)
    )
    assert torch.equal(small * 2**20, whole)


def test_backward_in_several_blocks_of_the_vocabulary(monkeypatch):
    h, w, t = problem()
    leaves = [h.requires_grad_(), w.requires_grad_()]
    expected = torch.autograd.grad(logps(*leaves, t).sum(), leaves)
    monkeypatch.setattr(fused, "MAX_SLOPES", 19 * 70)
    result = torch.autograd.grad(logps(*leaves, t).sum(), leaves)
    assert all(torch.allclose(*both, atol=1e-6) for both in zip(result, expected, strict=True))


@every_tiling
def test_buffers_are_not_read_before_written_nor_written_out_of_bounds(tiling, monkeypatch):
    """Every buffer starts as NaN, with guard values on both sides."""
    buffers = []

    def new_poisoned(self, *shape, dtype=torch.float32):
        guarded = torch.full(
            (torch.Size(shape).numel() + 128,), torch.nan, dtype=dtype, device=DEVICE
        )
        buffers.append(guarded)
        return guarded[64:-64].view(shape)

    monkeypatch.setattr(FusedLogits, "_new", new_poisoned)
    h, w, t = problem(dtype=torch.bfloat16)
    leaves = [h.requires_grad_(), w.requires_grad_()]
    result = logps(*leaves, t)
    assert result.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(result.sum(), leaves))
    assert len(buffers) >= (2 if tiling.library else 5)
    for guarded in buffers:
        assert guarded[:64].isnan().all()
        assert guarded[-64:].isnan().all()


@pytest.mark.parametrize(
    ("tiling", "forward"),
    [
        ("small", ["target_logits_kernel", "sum_exp_kernel", "fold_kernel"]),
        ("descriptors", ["target_logits_kernel", "sum_exp_kernel", "fold_kernel"]),
        ("library", ["target_logits_kernel", *["tile_kernel"] * 2]),
    ],
    indirect=["tiling"],
)
def test_the_expected_kernels_are_launched(forward, monkeypatch):
    launched = []
    run = FusedLogits._run

    def recording_run(self, kernel, *args):
        launched.append(kernel.__name__)
        run(self, kernel, *args)

    monkeypatch.setattr(FusedLogits, "_run", recording_run)
    for name in ("product", "add_product"):  # chunked must not do the work instead
        monkeypatch.setattr(f"sage_select.ops.chunked.{name}", None, raising=False)
    h, w, t = problem()
    result = logps(h.requires_grad_(), w, t)
    assert launched == forward
    result.sum().backward()
    assert launched == [*forward, "slope_kernel"]


def test_descriptors_are_used_if_operands_are_aligned():
    h, w, _ = problem(dtype=torch.bfloat16)
    logits = FusedLogits(h, w, None, None, 1.0, HOPPER)
    assert logits._tiles()["DESCRIPTORS"]
    assert not replace(logits, hidden_NH=h[:, 1:], weight_VH=w[:, 1:])._tiles()["DESCRIPTORS"]
    odd_h, odd_w, _ = problem(hidden=33, dtype=torch.bfloat16)
    assert not replace(logits, hidden_NH=odd_h, weight_VH=odd_w)._tiles()["DESCRIPTORS"]


def test_transposed_operands():
    h, w, t = problem()
    assert torch.equal(logps(h.T.contiguous().T, w.T.contiguous().T, t), logps(h, w, t))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"h": torch.float64, "w": torch.float64},
            TypeError,
            "got torch.float64 and torch.float64",
        ),
        ({"h": torch.bfloat16}, TypeError, "got torch.bfloat16 and torch.float32; use impl="),
    ],
)
def test_dtypes_that_the_kernels_do_not_support_are_refused(change, error, message):
    h, w, t = problem()
    with pytest.raises(error, match=message):
        logps(h.to(change.get("h")), w.to(change.get("w")), t)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRETED", False)
    h, w, t = (x.cpu() for x in problem())
    with pytest.raises(ValueError, match=r'impl="fused" runs on a GPU.*use impl="chunked"'):
        logps(h, w, t)


def test_a_missing_triton_is_reported_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "sage_select.ops.fused", None)
    with pytest.raises(ModuleNotFoundError, match="needs Triton; pip install triton, or use"):
        logps(*problem())


def test_a_wrong_target_is_reported_with_its_position():
    h, w, t = problem()
    t[3] = 300
    with pytest.raises(
        ValueError, match="target 300 at position 3 is outside the vocabulary of 30"
    ):
        logps(h, w, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_and_eager_bits_are_equal(dtype):
    h, w, t = problem(dtype=dtype)
    t[3] = -100
    leaves = [h.requires_grad_(), w.requires_grad_()]
    inputs = (*leaves, t, None, 3.0, 0.7, "fused", 0, None, False)
    torch.library.opcheck(operators.token_logps_operator, inputs, rtol=0, atol=0)
    compiled = torch.compile(logps, backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (logps, compiled):
        assert torch.equal(function(h, w, t), logps(h, w, t))
    both = [torch.autograd.grad(f(h, w, t).sum(), leaves) for f in (logps, compiled)]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_measure_with_the_fused_head(pairs):
    model = small_model("llama").to(DEVICE)
    expected, result = (measure(model, pairs, impl=impl) for impl in ("chunked", "fused"))
    assert torch.allclose(result.chosen, expected.chosen, atol=1e-4)
    assert torch.allclose(result.rejected, expected.rejected, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), torch.bfloat16, HOPPER),
        ((8, 0), torch.float16, AMPERE),
        ((8, 9), torch.bfloat16, AMPERE),
        ((12, 0), torch.bfloat16, AMPERE),
        ((9, 0), torch.float32, FLOAT32),
    ],
)
def test_the_table_of_tilings(capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_tiling(torch.device("cuda"), dtype) == expected


def test_a_tuned_tiling_takes_precedence_over_the_table(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tilings.tuned_tilings.cache_clear()
    with FakeTensorMode():
        head, other = (torch.empty(n, 8, dtype=torch.float16, device="cuda") for n in (3, 4))
    kept = [HOPPER._replace(group=3), AMPERE._replace(group=4)]
    for weight, tiling in zip((head, other), kept, strict=True):
        tilings.keep_tiling(tilings.key_of(weight), tiling)
    assert [tilings.tiling_of(weight) for weight in (head, other)] == kept
    assert tilings.tiling_of(problem()[1].cpu()) == INTERPRETER


class FakeGpuTensor(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_the_fastest_correct_tiling_is_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tilings.tuned_tilings.cache_clear()
    default, slow, fast, wrong, large = (INTERPRETER._replace(group=i) for i in range(5, 10))
    monkeypatch.setattr(tuning, "CANDIDATES", [slow, fast, wrong, large])
    monkeypatch.setattr(
        FusedLogits,
        "of",
        lambda h, w, *_: FusedLogits(h.as_subclass(torch.Tensor), w, None, None, 1.0, default),
    )
    sum_exp = FusedLogits.sum_exp

    def sum_exp_with_faults(self, *args):
        if self.tiling == large:
            raise OutOfResources(2, 1, "shared memory")
        return sum_exp(self, *args)[0] * (1.01 if self.tiling == wrong else 1), None

    monkeypatch.setattr(FusedLogits, "sum_exp", sum_exp_with_faults)
    milliseconds = {slow: 2.0, fast: 1.0, wrong: 0.5}
    monkeypatch.setattr(tuning, "do_bench", lambda call: milliseconds[call.func.__self__.tiling])
    h, w, _ = (x.cpu() for x in problem())
    assert tune(h.as_subclass(FakeGpuTensor), w) == {slow: 2.0, fast: 1.0}
    tilings.tuned_tilings.cache_clear()  # as in a new process
    assert tilings.tuned_tilings() == {tilings.key_of(w): fast}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU can be tuned")
def test_tuning_on_a_cpu_is_refused():
    h, w, _ = problem()
    with pytest.raises(
        ValueError, match="tune: times kernels on a GPU, but these tensors are on cpu"
    ):
        tune(h, w)

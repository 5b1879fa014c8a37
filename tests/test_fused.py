"""The Triton kernels, run for real: on a GPU if there is one, else in Triton's interpreter."""

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

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy, of NaN


TABLE = tilings.default_tiling


@pytest.fixture(autouse=True)
def tiling(request, monkeypatch):
    """The small one of the interpreter, which has many tiles, unless a test asks for another."""
    chosen = TILINGS[getattr(request, "param", "small")]
    # of fp32, a GPU's shared memory does not hold as much
    for_fp32 = chosen._replace(rows=min(chosen.rows, 64), columns=32, depth=32, stages=1)
    monkeypatch.setattr(
        tilings, "default_tiling", lambda _, dtype: for_fp32 if dtype == torch.float32 else chosen
    )
    monkeypatch.setattr(fused, "PRODUCT", (64, 160))
    return chosen


every_tiling = pytest.mark.parametrize("tiling", TILINGS, indirect=True)


def problem(tokens=19, hidden=40, vocabulary=300, dtype=torch.float32, seed=0):
    """Logits as a language model's: small, and of the target larger."""
    random = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(n, hidden, generator=random) for n in (tokens, vocabulary))
    t = torch.randint(vocabulary, (tokens,), generator=random)
    h = h * (2 / hidden**0.5) + w[t] * (4 / hidden)
    return h.to(DEVICE, dtype), w.to(DEVICE, dtype), t.to(DEVICE)


def exact(h, w, t, bias=None, softcap=None, temperature=1.0):
    """In float64, of the numbers that the tensors hold."""
    logits = h.double() @ w.double().T + (0 if bias is None else bias.double())
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return (logits / temperature).log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)


def logps(h, w, t, **options):
    return token_logps(h, w, t, impl="fused", **options)


def within_budget(found, h, w, t, **options):
    """The error budget of a token: a hundredth of what logits of bf16 would err by."""
    return found.dtype == torch.float32 and torch.allclose(
        found.double(), exact(h, w, t, **options), atol=5e-5, rtol=1e-6
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
def test_the_budget_refuses_logits_in_half_precision(dtype):
    h, w, t = problem(dtype=dtype)
    rounded = (h @ w.T).float().log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)
    assert not within_budget(rounded, h, w, t)


@pytest.mark.parametrize("tiling", ["pointers"], indirect=True)
def test_a_long_sequence_adds_up():
    h, w, t = problem(8000, 16, 130, torch.bfloat16)
    found = sequence_logps(h, w, t, torch.tensor([0, 8000], device=DEVICE), impl="fused")
    assert found.item() == pytest.approx(exact(h, w, t).sum().item(), abs=5e-3)


@every_tiling
@pytest.mark.parametrize("vocabulary", [1, 127, 257, 300])
@pytest.mark.parametrize("softcap", [None, 70.0])
def test_no_column_behind_the_vocabulary_counts(tiling, vocabulary, softcap):
    """A logit of 0 there would outweigh these by e^60."""
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
def test_rows_that_overflow_are_done_again_and_others_are_not_touched(tiling):
    h, w, t = problem()
    alone = logps(h, w, t)
    h[4] *= 200
    t[4] = (h[4] @ w.T).argmin()
    found = logps(h, w, t)
    assert found[4] < -200
    assert torch.allclose(found.double(), exact(h, w, t), rtol=1e-5, atol=5e-5)
    others = torch.arange(19) != 4
    assert torch.equal(found[others], alone[others])


def test_a_bias_that_rules_out_a_part_of_the_vocabulary_or_the_target():
    h, w, t = problem()
    bias = torch.zeros(300, device=DEVICE)
    bias[:150] = -torch.inf
    t.clamp_(min=150)
    t[3] = 7
    found = logps(h, w, t, bias=bias)
    assert found[3] == -torch.inf
    assert torch.allclose(found.double(), exact(h, w, t, bias=bias), atol=5e-5)


@every_tiling
def test_nan_stays_in_its_row(tiling):
    h, w, t = problem()
    alone = logps(h, w, t)
    h[4] = torch.nan
    found = logps(h, w, t)
    assert found.isnan().nonzero().tolist() == [[4]]
    others = torch.arange(19) != 4
    assert torch.equal(found[others], alone[others])


def bits_are_a_rows_own(h, w, t):
    """Whatever stands beside it, wherever it stands, and again."""
    random = torch.Generator().manual_seed(1)
    order = torch.randperm(len(h), generator=random).to(DEVICE)
    found = logps(h, w, t)
    same = [
        torch.equal(logps(h, w, t), found),
        torch.equal(logps(h[order], w, t[order]), found[order]),
        all(
            torch.equal(logps(h[i:j], w, t[i:j]), found[i:j]) for i, j in [(0, 1), (3, 8), (5, 19)]
        ),
    ]
    return all(same)


@every_tiling
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_a_rows_own(tiling, dtype):
    h, w, t = problem(dtype=dtype)
    t[7] = -100
    assert bits_are_a_rows_own(h, w, t)


def test_that_would_find_one_that_reads_its_neighbours(monkeypatch):
    sum_exp = FusedLogits.sum_exp
    monkeypatch.setattr(
        FusedLogits,
        "sum_exp",
        lambda self, x, t: (sum_exp(self, x, t)[0] * (1 + 1e-6 * len(x)), None),
    )
    assert not bits_are_a_rows_own(*problem())


@every_tiling
@pytest.mark.parametrize("softcap", [30.0, 1e3, 1e5])
def test_a_softcap_that_caps_next_to_nothing(tiling, softcap):
    h, w, t = problem()
    assert within_budget(logps(h, w, t, softcap=softcap), h, w, t, softcap=softcap)


@every_tiling
def test_certain_tokens_of_large_logits_are_certain(tiling):
    h, w, _ = (x.round() for x in problem())  # whole numbers, whose products are exact
    logits = 300 * h @ w.T
    t = logits.argmax(dim=-1)
    sure = logits.topk(2).values.diff().abs().squeeze(-1) > 0
    assert sure.sum() > 5
    assert logps(300 * h, w, t)[sure].abs().max() < 1e-6


def test_the_probabilities_of_all_tokens_sum_to_one():
    h, w, _ = problem(tokens=1)
    found = logps(h.expand(300, -1).contiguous(), w, torch.arange(300, device=DEVICE))
    assert found.double().exp().sum().item() == pytest.approx(1)


def test_order_of_the_vocabulary_and_a_shift_of_all_logits_change_nothing():
    h, w, t = problem()
    found = logps(h, w, t)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.allclose(logps(h, w[order], order.argsort()[t]), found, atol=1e-5)
    shifted = logps(h, w, t, bias=torch.full((300,), 30.0, device=DEVICE))
    assert torch.allclose(shifted, found, atol=2e-5)


def test_rows_far_apart_in_memory():
    """Offsets beyond 2^31 elements, of strides below; of the memory between, nothing is touched."""
    h, w, t = problem(3, 8, 3, torch.float16)
    t[:] = torch.tensor([2, 1, 0])
    apart = 2**30 + 8
    far_h, far_w = (
        torch.empty((len(x) - 1) * apart + 8, dtype=x.dtype, device=DEVICE).as_strided(
            x.shape, (apart, 1)
        )
        for x in (h, w)
    )
    far_h.copy_(h), far_w.copy_(w)
    assert torch.equal(logps(far_h, far_w, t), logps(h, w, t))


@pytest.mark.parametrize("tiling", ["pointers"], indirect=True)
def test_more_rows_than_a_grid_has_places_in_its_second_dimension():
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
        found = function(*leaves[:2], t, bias=leaves[2], **options)
        return torch.autograd.grad(found, leaves, upstream.to(found.dtype))

    def in_float64(h, w, t, **options):
        return exact(h, w, t.clamp(min=0), **options) * (t >= 0)

    budget = 1e-5 if dtype == torch.float32 else 5e-3
    for found, right in zip(
        gradients(logps, dtype), gradients(in_float64, torch.float64), strict=True
    ):
        assert found.dtype == dtype
        assert (found - right).norm() <= budget * right.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradients_of_a_part_cost_nothing_else(frozen, monkeypatch):
    h, w, t = problem()
    made = []
    monkeypatch.setattr(
        operators, "backward", lambda *args, f=operators.backward: made.append(f(*args)) or made[-1]
    )
    leaf = (h, w)[1 - frozen].requires_grad_()
    logps(h, w, t).sum().backward()
    assert [x is None for x in made[0]] == [frozen == 0, frozen == 1, True]
    assert leaf.grad.isfinite().all()


def test_tokens_without_weight_in_the_loss_are_left_out_of_backward(monkeypatch):
    h, w, t = problem()
    h[3] = torch.nan  # times 0 it would be NaN
    leaves = [h.requires_grad_(), w.requires_grad_()]
    upstream = torch.linspace(-1, 1, 19, device=DEVICE)
    upstream[[3, 5]] = 0
    rows = []
    slopes = FusedLogits.slopes
    monkeypatch.setattr(
        FusedLogits, "slopes", lambda self, *x: rows.append(len(self.hidden_NH)) or slopes(self, *x)
    )
    found = torch.autograd.grad(logps(*leaves, t), leaves, upstream)
    assert set(rows) == {17}
    assert all(x.isfinite().all() for x in found)
    assert found[0][[3, 5]].abs().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_small_loss_do_not_vanish(dtype):
    """In fp16, a millionth of a probability is nothing."""
    h, w, t = problem(dtype=dtype)
    logits = FusedLogits.of(h, w, None, None, 1.0)
    logsumexp = (h.double() @ w.double().T).logsumexp(-1).float()
    large = torch.linspace(-1, 1, 19, device=DEVICE)
    whole, small = (
        backward(logits, t, scale * large, logsumexp, (True, False, False))[0]
        for scale in (1, 2**-20)
    )
    assert torch.equal(small * 2**20, whole)


def test_backward_by_several_blocks_of_the_vocabulary(monkeypatch):
    h, w, t = problem()
    leaves = [h.requires_grad_(), w.requires_grad_()]
    at_once = torch.autograd.grad(logps(*leaves, t).sum(), leaves)
    monkeypatch.setattr(fused, "SLOPES", 19 * 70)
    found = torch.autograd.grad(logps(*leaves, t).sum(), leaves)
    assert all(torch.allclose(*both, atol=1e-6) for both in zip(found, at_once, strict=True))


@every_tiling
def test_nothing_is_read_before_it_is_written_nor_written_outside(tiling, monkeypatch):
    """Every buffer starts as NaN, and stands between two guards."""
    buffers = []

    def poisoned(self, *shape, dtype=torch.float32):
        whole = torch.full(
            (torch.Size(shape).numel() + 128,), torch.nan, dtype=dtype, device=DEVICE
        )
        buffers.append((whole, whole[64:-64].view(shape)))
        return buffers[-1][1]

    monkeypatch.setattr(FusedLogits, "_new", poisoned)
    h, w, t = problem(dtype=torch.bfloat16)
    leaves = [h.requires_grad_(), w.requires_grad_()]
    found = logps(*leaves, t)
    assert found.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), leaves))
    assert len(buffers) >= (2 if tiling.library else 5)
    for whole, _ in buffers:
        assert whole[:64].isnan().all()
        assert whole[-64:].isnan().all()


@pytest.mark.parametrize(
    ("tiling", "forward"),
    [
        ("small", ["target_logits_kernel", "sum_exp_kernel", "fold_kernel"]),
        ("descriptors", ["target_logits_kernel", "sum_exp_kernel", "fold_kernel"]),
        ("library", ["target_logits_kernel", *["tile_kernel"] * 2]),
    ],
    indirect=["tiling"],
)
def test_the_kernels_are_what_is_run(forward, monkeypatch):
    launched = []
    run = FusedLogits._run

    def recorded(self, kernel, *args):
        launched.append(kernel.__name__)
        run(self, kernel, *args)

    monkeypatch.setattr(FusedLogits, "_run", recorded)
    for name in ("product", "add_product"):  # PyTorch's own products stand for no kernel's work
        monkeypatch.setattr(f"sage_select.ops.chunked.{name}", None, raising=False)
    h, w, t = problem()
    found = logps(h.requires_grad_(), w, t)
    assert launched == forward
    found.sum().backward()
    assert launched == [*forward, "slope_kernel"]


def test_descriptors_are_used_where_they_can_be():
    h, w, _ = problem(dtype=torch.bfloat16)
    logits = FusedLogits(h, w, None, None, 1.0, HOPPER)
    assert logits._tiles()["DESCRIPTORS"]
    assert not replace(logits, hidden_NH=h[:, 1:], weight_VH=w[:, 1:])._tiles()["DESCRIPTORS"]
    odd_h, odd_w, _ = problem(hidden=33, dtype=torch.bfloat16)
    assert not replace(logits, hidden_NH=odd_h, weight_VH=odd_w)._tiles()["DESCRIPTORS"]


def test_a_weight_that_is_transposed():
    h, w, t = problem()
    assert torch.equal(logps(h.T.contiguous().T, w.T.contiguous().T, t), logps(h, w, t))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"h": torch.float64, "w": torch.float64},
            TypeError,
            "got torch.float64 and torch.float64",
        ),
        ({"h": torch.bfloat16}, TypeError, "got torch.bfloat16 and torch.float32; use impl="),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change, error, words):
    h, w, t = problem()
    with pytest.raises(error, match=words):
        logps(h.to(change.get("h")), w.to(change.get("w")), t)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRETED", False)
    h, w, t = (x.cpu() for x in problem())
    with pytest.raises(ValueError, match=r'impl="fused" runs on a GPU.*use impl="chunked"'):
        logps(h, w, t)


def test_without_triton_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sage_select.ops.fused", None)
    with pytest.raises(ModuleNotFoundError, match="needs Triton; pip install triton, or use"):
        logps(*problem())


def test_wrong_targets_are_refused_by_name():
    h, w, t = problem()
    t[3] = 300
    with pytest.raises(
        ValueError, match="target 300 at position 3 is outside the vocabulary of 30"
    ):
        logps(h, w, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_node_to_pytorch(dtype):
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


def test_a_model_is_measured_with_it(pairs):
    model = small_model("llama").to(DEVICE)
    expected, found = (measure(model, pairs, impl=impl) for impl in ("chunked", "fused"))
    assert torch.allclose(found.chosen, expected.chosen, atol=1e-4)
    assert torch.allclose(found.rejected, expected.rejected, atol=1e-4)


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
    assert TABLE(torch.device("cuda"), dtype) == expected


def test_a_tiling_that_was_tuned_goes_before_the_table(monkeypatch, tmp_path):
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


class OnAGpu(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_the_fastest_tiling_that_is_right_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tilings.tuned_tilings.cache_clear()
    table, slow, fast, wrong, large = (INTERPRETER._replace(group=i) for i in range(5, 10))
    monkeypatch.setattr(tuning, "CANDIDATES", [slow, fast, wrong, large])
    monkeypatch.setattr(
        FusedLogits,
        "of",
        lambda h, w, *_: FusedLogits(h.as_subclass(torch.Tensor), w, None, None, 1.0, table),
    )
    sum_exp = FusedLogits.sum_exp

    def planted(self, *args):
        if self.tiling == large:
            raise OutOfResources(2, 1, "shared memory")
        return sum_exp(self, *args)[0] * (1.01 if self.tiling == wrong else 1), None

    monkeypatch.setattr(FusedLogits, "sum_exp", planted)
    milliseconds = {slow: 2.0, fast: 1.0, wrong: 0.5}
    monkeypatch.setattr(tuning, "do_bench", lambda call: milliseconds[call.func.__self__.tiling])
    h, w, _ = (x.cpu() for x in problem())
    assert tune(h.as_subclass(OnAGpu), w) == {slow: 2.0, fast: 1.0}
    tilings.tuned_tilings.cache_clear()  # as another process begins
    assert tilings.tuned_tilings() == {tilings.key_of(w): fast}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU can be tuned")
def test_nothing_is_tuned_on_a_cpu():
    h, w, _ = problem()
    with pytest.raises(
        ValueError, match="tune: times kernels on a GPU, and these tensors are on cp"
    ):
        tune(h, w)

"""Time, memory and error of output heads; time is in multiples of the bare matrix product.

    python examples/benchmarks/head.py
    python examples/benchmarks/head.py --backward
    python examples/benchmarks/head.py --tokens 8192 --hidden 1536 --device cuda

Every variant runs in a separate process, so that its peak memory can be measured. It takes turns
with a bare `torch.mm` of the same shapes, and the ratio is that of the two medians. With
`--backward` each call also computes the gradients of hidden states and weight, from an upstream
gradient of either sign per token, and is compared with three products: the logits and the two
gradients.

The error is the largest of 64 rows against float64; with `--backward`, also that of the hidden
states' gradient, relative to its norm. Memory is the peak of a call beyond its inputs, including
gradients, and is measured after compilation. Variants that are not installed, or do not run on the
device, are listed as not measured.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from plan_and_rank import Memory
from torch import Tensor
from torch.nn.functional import cross_entropy

from sage_select import token_logps

Head = Callable[..., Tensor]  # (hidden states, weight, targets) -> log-probs
Result = TypeVar("Result")


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, then log_softmax in fp32, as in Hugging Face models and most trainers."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def torch_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's cross entropy of all logits."""
    return -cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's fused head, since 2.13."""
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's chunked head, the default in its DPO trainer."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    temperature, chunk_size = 1.0, 32_768  # its defaults
    result: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, temperature, chunk_size, None, 1.0, ()
    )
    return result[0]


def liger_selective(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's head for its PPO and GRPO losses, in tiles of tokens and vocabulary."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    temperature, chunk_size = 1.0, 4096  # its defaults
    result: Tensor = _ChunkedSelectiveLogProbFunction.apply(
        hidden, weight, targets, None, temperature, chunk_size
    )
    return result


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, in Triton."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
    return -loss


def cce(impl: str) -> Head:
    """Cut cross entropy; its backward pass skips negligible gradients, as by default."""

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
        return -loss

    return call


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """sage-select's head in blocks of the vocabulary."""
    return token_logps(hidden, weight, targets, impl="chunked")


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """sage-select's head in Triton kernels."""
    return token_logps(hidden, weight, targets, impl="fused")


VARIANTS: dict[str, Head] = {
    "log_softmax of all logits": naive,
    "cross_entropy of all logits": torch_cross_entropy,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "TRL chunked": trl_chunked,
    "Liger selective log-probs": liger_selective,
    "Liger fused cross entropy": liger_cross_entropy,
    "CCE": cce("cce"),
    "CCE torch_compile": cce("torch_compile"),
    "sage-select chunked": chunked,
    "sage-select fused": fused,
}


class Problem(NamedTuple):
    """N tokens, a head, and an upstream gradient for each log-prob."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    slope: Tensor  # [N], of either sign

    @classmethod
    def draw(
        cls, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str
    ) -> "Problem":
        """Draw a problem with logits like a language model's: small, with a large target logit."""
        torch.manual_seed(0)
        weight = torch.randn(vocabulary, hidden, device=device)
        targets = torch.randint(vocabulary, (tokens,), device=device)
        states = torch.randn(tokens, hidden, device=device) / hidden**0.5
        states += weight[targets] * (12 / hidden)
        slope = torch.randn(tokens, device=device)
        return cls(states.to(dtype), weight.to(dtype), targets, slope)

    def rows(self, selected: slice | Tensor) -> "Problem":
        """Return the problem of selected tokens."""
        return Problem(
            self.hidden[selected], self.weight, self.targets[selected], self.slope[selected]
        )

    def results(self, head: Head, *bias: Tensor, backward: bool) -> list[Tensor]:
        """Run a head: log-probs, with `backward` also gradients of hidden, weight and bias."""
        if not backward:
            with torch.no_grad():
                return [head(self.hidden, self.weight, self.targets, *bias)]
        leaves = [x.detach().requires_grad_() for x in (self.hidden, self.weight, *bias)]
        logps = head(*leaves[:2], self.targets, *leaves[2:])
        return [logps.detach(), *torch.autograd.grad(logps, leaves, self.slope.to(logps.dtype))]

    def products(self, *, backward: bool) -> "Callable[[Problem], None]":
        """Return a function that computes the bare products of a problem of these shapes: the
        logits, with `backward` also the two gradients.
        """
        logits = self.hidden.new_empty(len(self.hidden), len(self.weight))
        hidden_out, weight_out = torch.empty_like(self.hidden), torch.empty_like(self.weight)

        def call(problem: Problem) -> None:
            torch.mm(problem.hidden, problem.weight.T, out=logits)
            if backward:
                torch.mm(logits, problem.weight, out=hidden_out)
                torch.mm(logits.T, problem.hidden, out=weight_out)

        return call


def failure(stderr: str) -> str:
    """Return the last error of a process's stderr, in one line."""
    lines = stderr.strip().splitlines() or ["no error message"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:100]


def timed(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def with_memory(call: Callable[[], Result], device: str) -> tuple[Result, float]:
    """Return a call's result, and its peak memory beyond what was allocated before, in MB."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return call(), (torch.cuda.max_memory_allocated() - before) / 1e6
    with Memory() as memory:
        result = call()
    return result, memory.peak / 1e6


def measure_one(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure ratio, memory and errors of one variant, in this process."""
    problem = Problem.draw(
        args.tokens, args.hidden, args.vocabulary, getattr(torch, args.dtype), args.device
    )

    def call(problem: Problem = problem) -> list[Tensor]:
        return problem.results(VARIANTS[name], backward=args.backward)

    checked = problem.rows(slice(0, 64))
    call(checked)  # imports and compiles
    result, memory = with_memory(call, args.device)
    weight = problem.weight.double()
    exact = (checked.hidden.double() @ weight.T).log_softmax(-1)
    expected = exact.gather(-1, checked.targets[:, None]).squeeze(-1)
    error = (result[0][:64].double() - expected).abs().max()
    measured = {"memory": memory, "error": float(error)}
    if args.backward:
        # d log p / d hidden = weight[target] - sum_j p_j weight_j
        gradient = weight[checked.targets] - exact.exp() @ weight
        gradient *= checked.slope[:, None].double()
        error = (result[1][:64].double() - gradient).norm() / gradient.norm()
        measured["gradient"] = float(error)
        del gradient
    del result, exact, weight

    # product and variant alternate, so that a change of the clock rate affects both
    products = problem.products(backward=args.backward)
    product_seconds, variant_seconds = [], []
    for _ in range(args.repeats):
        product_seconds.append(timed(partial(products, problem), args.device))
        variant_seconds.append(timed(call, args.device))
    return measured | {"ratio": median(variant_seconds) / median(product_seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="measure forward and backward")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one variant, in a subprocess
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one, args)))
        return
    shape = f"{args.tokens} x {args.hidden} x {args.vocabulary}, {args.dtype}, {args.device}"
    times = "3 torch.mm" if args.backward else "torch.mm"
    gradient = f"{'of gradient':>14}" if args.backward else ""
    print(f"{shape}\n{'':30}{'x ' + times:>12}{'memory, MB':>12}{'error, nats':>14}{gradient}")
    for name in VARIANTS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{name:30}not measured: {failure(done.stderr)}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        line = f"{name:30}{row['ratio']:12.2f}{row['memory']:12,.0f}{row['error']:14.1e}"
        print(line + (f"{row['gradient']:14.1e}" if args.backward else ""), flush=True)


if __name__ == "__main__":
    main()

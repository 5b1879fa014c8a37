"""The output head: log-probs of target tokens, in multiples of the bare matrix product.

    python examples/benchmarks/head.py
    python examples/benchmarks/head.py --backward
    python examples/benchmarks/head.py --tokens 8192 --hidden 1536 --device cuda

Every variant runs in a process of its own, so that its peak of memory is its own; there it takes
turns with a bare `torch.mm` of the same shapes, and the ratio is that of the two medians. With
`--backward` each call also makes the gradients of hidden states and weight, from a gradient of
either sign per token, and is held against three products: the logits and the two gradients.

The error is the largest against float64 over 64 rows, after `--backward` also that of the hidden
states' gradient, relative to its norm. Memory is what a call takes at its peak beyond its inputs,
gradients included; compiling comes before. What is not installed, or does not run on the device, is
left out.
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

Head = Callable[..., Tensor]  # of hidden states, weight and targets
Result = TypeVar("Result")


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, then log_softmax in fp32: what Hugging Face models and most trainers do."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def torch_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's cross entropy of all logits."""
    return -cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own fused head, new in 2.13."""
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's chunked head, the default of its DPO trainer."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    temperature, chunk_size = 1.0, 32_768  # its defaults
    result: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, temperature, chunk_size, None, 1.0, ()
    )
    return result[0]


def liger_selective(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's head of its PPO and GRPO losses, by tiles of tokens and vocabulary."""
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
    """Cut cross entropy; its backward skips what it holds to be negligible, as by default."""

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
        return -loss

    return call


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """This library's, by blocks of the vocabulary."""
    return token_logps(hidden, weight, targets, impl="chunked")


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """This library's, in Triton kernels."""
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
    """N tokens, a head, and a gradient for each log-prob."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    slope: Tensor  # [N], of either sign

    @classmethod
    def draw(
        cls, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str
    ) -> "Problem":
        """Logits like a language model's: mostly small, with a target that stands out."""
        torch.manual_seed(0)
        weight = torch.randn(vocabulary, hidden, device=device)
        targets = torch.randint(vocabulary, (tokens,), device=device)
        states = torch.randn(tokens, hidden, device=device) / hidden**0.5
        states += weight[targets] * (12 / hidden)
        slope = torch.randn(tokens, device=device)
        return cls(states.to(dtype), weight.to(dtype), targets, slope)

    def rows(self, some: slice | Tensor) -> "Problem":
        """Some of the tokens."""
        return Problem(self.hidden[some], self.weight, self.targets[some], self.slope[some])

    def results(self, head: Head, *bias: Tensor, backward: bool) -> list[Tensor]:
        """A head's log-probs; and the gradients of hidden states, weight and bias, if asked for."""
        if not backward:
            with torch.no_grad():
                return [head(self.hidden, self.weight, self.targets, *bias)]
        leaves = [x.detach().requires_grad_() for x in (self.hidden, self.weight, *bias)]
        logps = head(*leaves[:2], self.targets, *leaves[2:])
        return [logps.detach(), *torch.autograd.grad(logps, leaves, self.slope.to(logps.dtype))]

    def products(self, *, backward: bool) -> "Callable[[Problem], None]":
        """What makes the bare products of such a problem: the logits, and the two gradients."""
        logits = self.hidden.new_empty(len(self.hidden), len(self.weight))
        hidden_out, weight_out = torch.empty_like(self.hidden), torch.empty_like(self.weight)

        def call(problem: Problem) -> None:
            torch.mm(problem.hidden, problem.weight.T, out=logits)
            if backward:
                torch.mm(logits, problem.weight, out=hidden_out)
                torch.mm(logits.T, problem.hidden, out=weight_out)

        return call


def reason(stderr: str) -> str:
    """Why a process ended, in a line."""
    lines = stderr.strip().splitlines() or ["no reason given"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:100]


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def with_memory(call: Callable[[], Result], device: str) -> tuple[Result, float]:
    """A call's result, and the peak of memory over what was taken before, in MB."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return call(), (torch.cuda.max_memory_allocated() - before) / 1e6
    with Memory() as memory:
        result = call()
    return result, memory.peak / 1e6


def measure_one(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Ratio, memory and errors of one variant, in this process."""
    problem = Problem.draw(
        args.tokens, args.hidden, args.vocabulary, getattr(torch, args.dtype), args.device
    )

    def call(problem: Problem = problem) -> list[Tensor]:
        return problem.results(VARIANTS[name], backward=args.backward)

    some = problem.rows(slice(0, 64))
    call(some)  # imports and compiles
    result, memory = with_memory(call, args.device)
    weight = problem.weight.double()
    exact = (some.hidden.double() @ weight.T).log_softmax(-1)
    expected = exact.gather(-1, some.targets[:, None]).squeeze(-1)
    error = (result[0][:64].double() - expected).abs().max()
    found = {"memory": memory, "error": float(error)}
    if args.backward:
        gradient = weight[some.targets] - exact.exp() @ weight
        gradient *= some.slope[:, None].double()
        error = (result[1][:64].double() - gradient).norm() / gradient.norm()
        found["gradient"] = float(error)
        del gradient
    del result, exact, weight

    products = problem.products(backward=args.backward)
    bare, whole = [], []
    for _ in range(args.repeats):
        bare.append(timed(partial(products, problem), args.device))
        whole.append(timed(call, args.device))
    return found | {"ratio": median(whole) / median(bare)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one variant, in a process
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
            print(f"{name:30}not measured: {reason(done.stderr)}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        line = f"{name:30}{found['ratio']:12.2f}{found['memory']:12,.0f}{found['error']:14.1e}"
        print(line + (f"{found['gradient']:14.1e}" if args.backward else ""), flush=True)


if __name__ == "__main__":
    main()

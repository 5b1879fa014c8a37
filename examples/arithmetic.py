"""A task small enough for a laptop, and a policy that makes real mistakes on it.

The task is arithmetic modulo 13, evaluated from left to right without operator precedence:

    prompt    7+3*8?
    response  7+3=10,10*8=2,\\boxed{2}

A half-trained model of half a million parameters gets about two in three of these right when it
decodes greedily. It has not learned the rarer facts (`12*11=2`), and it shows its steps, so every
answer can be verified and every mistake located. `train_arithmetic.py` makes that model;
`arithmetic_base/` contains it.
"""

import itertools
import operator
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

MODULUS = 13
MAX_STEPS = 6
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
BASE = Path(__file__).parent / "arithmetic_base"

PAD, EOS, BOX = "<pad>", "<eos>", r"\boxed{"
VOCABULARY = [PAD, EOS, *map(str, range(MODULUS)), *OPERATIONS, "=", ",", "?", BOX, "}"]
# 10, 11 and 12 match before single digits. Every string of tokens that the model can generate, even
# `13`, then has a tokenization, so its samples can always be encoded again.
TOKEN = r"\\boxed\{|1[0-2]|."
IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Problem:
    """A prompt, its solution step by step (without end token), and the final number."""

    prompt: str
    solution: str
    answer: str


def make_problems(
    count: int, *, seed: int, zipf: float, exclude: Collection[Problem] = ()
) -> list[Problem]:
    """Draw `count` distinct problems of 1 to 6 steps, none of them in `exclude`.

    The number n is drawn with weight (n + 1)^-zipf. With the same seed, fewer problems are a prefix
    of more. There are only 507 one-step problems; once they are used up, longer ones are drawn.

    >>> make_problems(1, seed=0, zipf=0.3)[0].prompt
    '7*2-0-0-9*11+6?'
    """
    weights = np.arange(1, MODULUS + 1) ** -zipf
    rng = np.random.default_rng(seed)
    seen = {problem.prompt for problem in exclude}
    problems: list[Problem] = []
    while len(problems) < count:
        numbers = rng.choice(MODULUS, size=MAX_STEPS + 1, p=weights / weights.sum())
        signs = rng.choice(list(OPERATIONS), size=rng.integers(1, MAX_STEPS + 1))
        problem = _work_out(numbers.tolist(), signs.tolist())
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            problems.append(problem)
    return problems


def held_out_problems() -> tuple[list[Problem], list[Problem]]:
    """1000 test problems and 2000 problems to make pairs from: disjoint, and never used in SFT."""
    test = make_problems(1000, seed=1, zipf=0.3)
    return test, make_problems(2000, seed=2, zipf=0.3, exclude=test)


def _work_out(numbers: Sequence[int], signs: Sequence[str]) -> Problem:
    value, prompt, steps = numbers[0], str(numbers[0]), []
    for sign, number in zip(signs, numbers[1:], strict=False):
        result = OPERATIONS[sign](value, number) % MODULUS
        prompt += f"{sign}{number}"
        steps.append(f"{value}{sign}{number}={result}")
        value = result
    return Problem(f"{prompt}?", ",".join([*steps, f"{BOX}{value}}}"]), str(value))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per number or symbol; lossless, without a start token."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen2ForCausalLM:
    """Build a random Qwen2 of 0.5M parameters; the global random state does not change."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def load_base(path: Path = BASE) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the shipped model and its tokenizer, on the CPU and in float32.

    The file has float16 weights to stay small. Training in float16 would not work: AdamW's epsilon
    underflows. The tokenizer has a separate folder because `AutoTokenizer` would load any tokenizer
    in a Qwen2 model's folder as a Qwen2 tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path / "tokenizer")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    temperature: float,
    seed: int,
    num_samples: int = 1,
    max_new_tokens: int = 48,
    batch_size: int = 256,
) -> list[list[str]]:
    """Generate `num_samples` responses to each prompt, without the end token.

    Temperature 0 decodes greedily. The global random state is neither read nor changed.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    encoded = tokenizer(list(prompts))["input_ids"]
    rows = [index for index in range(len(prompts)) for _ in range(num_samples)]
    responses: list[list[str]] = [[] for _ in prompts]
    # Prompts of equal length need no padding, and their responses end at about the same token.
    for batch in _batches(sorted(rows, key=lambda row: len(encoded[row])), encoded, batch_size):
        prompt_ids = torch.tensor([encoded[row] for row in batch], device=model.device)
        tokens = _continue(model, prompt_ids, temperature, generator, max_new_tokens)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            responses[row].append(text)
    return responses


def _batches(
    rows: Sequence[int], encoded: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, ...]]:
    for _, same_length in itertools.groupby(rows, key=lambda row: len(encoded[row])):
        while batch := tuple(itertools.islice(same_length, batch_size)):
            yield batch


def _continue(
    model: PreTrainedModel,
    ids: Tensor,
    temperature: float,
    generator: torch.Generator,
    max_new_tokens: int,
) -> Tensor:
    eos = model.config.eos_token_id
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    cache: Any = None
    tokens: list[Tensor] = []
    while len(tokens) < max_new_tokens and not ended.all():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = _draw(output.logits[:, -1].float(), temperature, generator)
        ids = ids.masked_fill(ended, eos)  # ended rows still run until the whole batch has ended
        ended = ended | (ids == eos)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)


def answer_of(response: str) -> str | None:
    """Boxed number at the end of a response, or None.

    >>> answer_of(r"7+3=10,\\boxed{10}")
    '10'
    """
    match = re.search(r"\\boxed\{(\d+)\}$", response)
    return match[1] if match else None


def is_correct(response: str, problem: Problem) -> bool:
    """Return whether the response ends with the right answer; its steps are not checked."""
    return answer_of(response) == problem.answer


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> float:
    """Share of problems whose greedy response has the right answer."""
    prompts = [problem.prompt for problem in problems]
    responses = generate(model, tokenizer, prompts, temperature=0, seed=0)
    pairs = zip(responses, problems, strict=True)
    return float(np.mean([is_correct(response, problem) for [response], problem in pairs]))


@torch.no_grad()
def solution_probability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    batch_size: int = 256,
) -> float:
    """Mean probability of the whole reference solution, end token included, given the prompt.

    This is a lower bound on the sampled accuracy at temperature 1 (other steps may lead to the same
    answer). It varies half as much between seeds as greedy accuracy.
    """
    # Sorted by length, so that short problems are not padded to the longest.
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    total = 0.0
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        input_ids, labels = supervised_batch(tokenizer, batch)
        input_ids, labels = input_ids.to(model.device), labels.to(model.device)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(logits.mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")
        total += nats.sum(dim=1).neg().exp().sum().item()
    return total / len(problems)


def supervised_batch(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> tuple[Tensor, Tensor]:
    """Input ids and labels, (B, T) each; only the solution and its end token have labels.

    Padding is on the right. Causal attention never reads it, so no attention mask is needed.
    """
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    solutions = tokenizer([problem.solution + EOS for problem in problems])["input_ids"]
    length = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
    input_ids = torch.full((len(problems), length), tokenizer.pad_token_id)
    labels = torch.full((len(problems), length), IGNORED)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        input_ids[row, :end] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : end] = torch.tensor(solution)
    return input_ids, labels


def judge(problem: Problem, chosen: str, rejected: str) -> tuple[str, int]:
    """Grade a pair as an LLM judge would: clarity of the gap, score of the rejected response.

    The score grades the share of right steps before the first wrong one: 1 for none, 2 under half,
    3 under three quarters, 4 not all, 5 all (only the box is wrong). The clarity is "high" if the
    score is 1 or at least a quarter of the tokens differ, "medium" from a tenth, otherwise "low".
    """
    steps = problem.solution.split(",")[:-1]
    same = (ours == theirs for ours, theirs in zip(steps, rejected.split(","), strict=False))
    right = sum(itertools.takewhile(bool, same)) / len(steps)
    score = 1 if right == 0 else 2 + sum(right >= threshold for threshold in (0.5, 0.75, 1.0))
    distance = _edit_distance(re.findall(TOKEN, chosen), re.findall(TOKEN, rejected))
    if score == 1 or distance >= 0.25:
        return "high", score
    return ("medium" if distance >= 0.10 else "low"), score


def _edit_distance(left: Sequence[str], right: Sequence[str]) -> float:
    """Levenshtein distance divided by the length of the longer sequence."""
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        current = [i]
        for j, b in enumerate(right, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1] / max(len(left), len(right), 1)


def make_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    num_samples: int = 4,
    temperature: float = 1.0,
    seed: int,
) -> list[dict[str, str | int]]:
    """Make verified pairs from the policy's samples: at most two per problem, in problem order.

    A right sample is chosen over a wrong one for the same prompt (`origin` is "policy"). If no
    sample is right, the reference solution is chosen over one of them ("gold"). A problem without a
    wrong sample yields no pair; every other problem does.
    """
    prompts = [problem.prompt for problem in problems]
    sampled = generate(
        model, tokenizer, prompts, temperature=temperature, seed=seed, num_samples=num_samples
    )
    return [
        pair
        for problem, responses in zip(problems, sampled, strict=True)
        for pair in _pairs_of(problem, responses)
    ]


def _pairs_of(problem: Problem, responses: Sequence[str]) -> Iterator[dict[str, str | int]]:
    distinct = dict.fromkeys(responses)  # unique responses in sampling order
    right = [response for response in distinct if is_correct(response, problem)]
    wrong = [response for response in distinct if not is_correct(response, problem)]
    origin, count = ("policy", 2) if right else ("gold", 1)
    chosen = itertools.cycle(right or [problem.solution])
    for better, worse in zip(chosen, wrong[:count], strict=False):
        clarity, score = judge(problem, better, worse)
        yield {
            "prompt": problem.prompt,
            "chosen": better,
            "rejected": worse,
            "clarity": clarity,
            "rejected_score": score,
            "origin": origin,
        }

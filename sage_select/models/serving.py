"""Scoring elsewhere: the prompt log-probs of an inference server, to `PairLogps`."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sage_select.data.dataset import PreferenceDataset
from sage_select.data.pair_table import TokenSequence
from sage_select.models.reader import Reader
from sage_select.models.sequences import DistinctSequences, as_pair_logps, distinct_sequences
from sage_select.pairs import PairLogps
from sage_select.system.progress_bars import progress_bar

try:
    import httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sage_select.models.serving needs httpx: pip install 'sage-select[server]'", name="httpx"
    ) from error

logger = logging.getLogger(__name__)

TO_CONNECT = 10.0  # seconds: a server that is there says so soon
FIRST_PAUSE = 0.5  # seconds before the first retry; each further one waits twice as long
PASSES = {408, 425, 429, 500, 502, 503, 504}  # statuses that another attempt may not meet
STANDS_FOR_ZERO = -9999.0  # what vLLM writes for a log-prob of minus infinity, which JSON lacks
ABOVE_ZERO = 1e-2  # nats above zero that a log-prob may be by rounding
BEGINS = "url must be where the API begins, such as http://host:8000/v1"
ASKED = {
    "max_tokens": 1,  # SGLang refuses 0
    "temperature": 1.0,
    "echo": True,
    "logprobs": 1,  # SGLang takes 0 for none
    "prompt_logprobs": 0,  # vLLM: of the prompt's own tokens, no others
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}


class Agreement(NamedTuple):
    """How far a server's log-probs were from the local model's, in nats per response token."""

    mean: float
    largest: float
    responses: int


@dataclass(frozen=True)
class ServerMeasure:
    """Asks an OpenAI-compatible server, such as vLLM or SGLang, for log-probs: a `measure`.

    `Selector(..., measure=ServerMeasure(url, name))` scores pools on the server's devices. The
    server must hold the policy as it is by then: either `sync` sends it the weights, or the caller
    does so before each pass. What is sent are token ids, each distinct response once. A few of them
    are measured with the local model as well, and refused where the two do not agree.

    Measure policy and reference on one path, both here or both with `measure`: what two paths
    differ by passes for a change of the policy. For the same reason a trainer, whose policy runs
    locally, needs a reference that was measured locally.

    Args:
        url: Where the server's API begins, such as "http://host:8000/v1".
        name: The model's name there, as `GET /models` lists it.
        sync: Called with the model once before each pass, to push its weights to the server.
        check_responses: How many responses are measured with the local model as well, from the
            longest to the shortest; 0 for none, so that no local model is needed.
        tolerance: Nats per token that these may differ by, on average.
        concurrency: Requests under way at once.
        timeout: Seconds to wait for an answer, or at a server's request before another attempt.
        retries: Further attempts where a server is busy, failing or out of reach.
        api_key: Sent as a bearer token.
        reader: How the local model is read in the check, as in training.
        show_progress: False for no progress bar.

    Attributes:
        checks: The `Agreement` of every pass so far, the latest last.

    Example:
        >>> ServerMeasure("http://localhost:8000/v1", "policy", concurrency=64).checks
        []
    """

    url: str
    name: str
    sync: Callable[[Any], object] | None = None
    check_responses: int = 8
    tolerance: float = 0.02
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 5
    api_key: str | None = field(default=None, repr=False)
    reader: Reader = field(default_factory=Reader)
    show_progress: bool | None = None
    checks: list[Agreement] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"ServerMeasure: url must start with http:// or https://, got {self.url!r}; "
                "vLLM's is http://host:8000/v1 unless it was told otherwise"
            )
        for name, least in (("check_responses", 0), ("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"ServerMeasure: {name} must be {least} or more, got {getattr(self, name)}"
                )
        for name in ("tolerance", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"ServerMeasure: {name} must be positive, got {getattr(self, name)}"
                )

    @property
    def mixed_precision(self) -> torch.dtype | None:
        """The autocast dtype of the local model: the server is held to the same precision."""
        return self.reader.mixed_precision

    def __call__(self, model: nn.Module | None, pool: PreferenceDataset) -> PairLogps:
        """Log-probs of the pool's pairs under the served model, in the pool's order.

        Args:
            model: The policy, for `sync` and the check; None where there is neither.
            pool: The pairs, `dataset` or `dataset.take(rows)`.

        Raises:
            ValueError: If the server does not serve the model, refuses a request, answers with
                anything but the log-probs of the tokens it was sent, or disagrees with `model`.
            ConnectionError: If it is out of reach, busy or failing, and remains so.
        """
        if model is None and self.check_responses:
            raise ValueError(
                "ServerMeasure: there is no model to hold the server's answers against; pass it, "
                "or check_responses=0"
            )
        if self.sync is not None:
            self.sync(model)
        distinct = distinct_sequences(pool)
        logps = torch.zeros(len(distinct), dtype=torch.float64)
        longest_first = np.argsort(-distinct.lengths, kind="stable")
        checked = np.linspace(0, len(distinct) - 1, min(self.check_responses, len(distinct)))
        first = longest_first[checked.astype(int)].tolist()
        rest = longest_first[~np.isin(longest_first, first)].tolist()
        with progress_bar(
            len(distinct), "scoring elsewhere", "responses", show=self.show_progress
        ) as bar:

            def keep(place: int, found: float) -> None:
                logps[place] = found
                bar.update()

            async def begin(client: httpx.AsyncClient) -> None:
                await self._check_served(client, distinct)
                await self._score(client, distinct, first, keep)

            if len(distinct):
                self._in_a_loop(begin)
            if first and model is not None:
                self._check(model, distinct, first, logps)
            if rest:
                self._in_a_loop(lambda client: self._score(client, distinct, rest, keep))
        return as_pair_logps(pool, logps[distinct.of_pairs])

    def _check(
        self, model: nn.Module, distinct: DistinctSequences, places: list[int], logps: Tensor
    ) -> None:
        """Hold some of the server's log-probs against the local model's."""
        local = logps.clone()

        def keep(some: list[int], found: Tensor) -> None:
            local[some] = found

        others = set(range(len(distinct))) - set(places)
        quiet = replace(self.reader, show_progress=False)
        quiet.measure_sequences(model, distinct, keep, known=others)
        lengths = [len(s.tokens) - s.response_start for s in distinct.sequences(places)]
        differ = (logps - local)[places].abs() / torch.tensor(lengths)
        found = Agreement(float(differ.mean()), float(differ.max()), len(places))
        self.checks.append(found)
        logger.info("ServerMeasure: %s", found)
        if not found.mean <= self.tolerance:
            raise ValueError(
                f"ServerMeasure: the log-probs of {self.name} at {self.url} differ from the local "
                f"model's by {found.mean:.3g} nats per token (mean of {found.responses} responses, "
                f"the largest {found.largest:.3g}; tolerance {self.tolerance:g}). The server has "
                "other weights (sync= pushes the policy's before each pass), another model, or "
                "another precision; for the last, raise tolerance"
            )

    def _in_a_loop(self, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Run work in a thread with a loop of its own: that of a notebook is running already."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            started.set_result((asyncio.get_running_loop(), task))
            async with httpx.AsyncClient(
                base_url=self.url,
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else None,
                timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, TO_CONNECT)),
                limits=httpx.Limits(max_connections=self.concurrency),
            ) as client:
                await work(client)

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(lambda: asyncio.run(main()))
            try:
                done.result()
            except BaseException:
                if not done.done():  # Ctrl-C, which only this thread has seen
                    loop, task = started.result()
                    loop.call_soon_threadsafe(task.cancel)
                raise

    async def _check_served(self, client: httpx.AsyncClient, distinct: DistinctSequences) -> None:
        """Refuse a server that does not have the model, or has no room for the longest response."""
        try:
            listed = await self._request(client, "GET", "models")
            try:
                cards = {card["id"]: card for card in listed["data"]}
            except (KeyError, TypeError):
                raise ValueError(f"GET {self.url}/models has no list: {_head(listed)}") from None
            if self.name not in cards:
                raise ValueError(
                    f"{self.url} does not serve {self.name!r}; it has {', '.join(cards) or 'none'}"
                )
            room = cards[self.name].get("max_model_len")
            longest = int(distinct.lengths[place := int(distinct.lengths.argmax())])
            if isinstance(room, int) and longest + ASKED["max_tokens"] > room:
                raise ValueError(
                    f"{_whose(distinct, place)} has {longest} tokens, and the server has room for "
                    f"{room - 1} and the one it must generate; read the pairs with max_length="
                    f"{room - 1}, or serve with a longer context (vLLM: --max-model-len, SGLang: "
                    "--context-length)"
                )
        except (ValueError, ConnectionError) as error:
            raise type(error)(f"ServerMeasure: {error}") from None

    async def _score(
        self,
        client: httpx.AsyncClient,
        distinct: DistinctSequences,
        places: Sequence[int],
        keep: Callable[[int, float], None],
    ) -> None:
        """Ask for some responses, so many at once, in whatever order they come."""
        waiting = iter(places)

        async def work() -> None:
            for place in waiting:
                keep(place, await self._logp(client, distinct, place))

        workers = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(places)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _logp(
        self, client: httpx.AsyncClient, distinct: DistinctSequences, place: int
    ) -> float:
        sequence = distinct.sequences([place])[0]
        body = {"model": self.name, "prompt": sequence.tokens.tolist(), **ASKED}
        try:
            return response_logp(await self._request(client, "POST", "completions", body), sequence)
        except (ValueError, ConnectionError) as error:
            raise type(error)(f"ServerMeasure: {_whose(distinct, place)}: {error}") from None

    async def _request(
        self, client: httpx.AsyncClient, method: str, path: str, body: Any = None
    ) -> Any:
        """What a server answers, tried again while it is busy, failing or out of reach."""
        what = f"{method} {self.url}/{path}"
        for attempt in range(self.retries + 1):
            pause = FIRST_PAUSE * 2**attempt
            try:
                answer = await client.request(method, path, json=body)
            except httpx.TransportError as error:
                trouble = f"{what}: {type(error).__name__} {error}".rstrip()
            else:
                if answer.is_success:
                    return _json(answer, what)
                trouble = f"{what}: HTTP {answer.status_code}: {_message(answer)}"
                if answer.status_code not in PASSES:
                    raise ValueError(f"{trouble}; {BEGINS}" if path == "models" else trouble)
                if (asked := _retry_after(answer)) > self.timeout:
                    raise ConnectionError(
                        f"{trouble} (asks to wait for {asked:.0f} seconds, longer than timeout="
                        f"{self.timeout:g})"
                    )
                pause = max(pause, asked)
            if attempt < self.retries:
                await asyncio.sleep(min(pause, self.timeout))
        raise ConnectionError(
            f"{trouble} (attempt {self.retries + 1} of {self.retries + 1}); where the server is "
            "only slow, pass a longer timeout, a lower concurrency or more retries"
        )


def response_logp(answer: Any, sequence: TokenSequence) -> float:
    """The summed log-prob of a response, in nats, from a server's answer to its tokens.

    Two shapes are known: vLLM's `prompt_logprobs`, and `logprobs` with the prompt echoed, in which
    the token generated after it does not count.

    Args:
        answer: What `POST /completions` returned.
        sequence: The tokens that were sent.

    Raises:
        ValueError: If these are not the log-probs of these tokens, or one of them is none.

    Example:
        >>> sequence = TokenSequence(np.array([5, 6, 7], np.int32), response_start=1)
        >>> found = {"tokens": [" a", " b", " c", " d"], "token_logprobs": [None, -1.0, -2.0, -9.0]}
        >>> response_logp({"choices": [{"logprobs": found}]}, sequence)
        -3.0
    """
    tokens, start = sequence.tokens.tolist(), sequence.response_start
    ids: Sequence[int]
    try:
        choice = answer["choices"][0]
        read = (answer.get("usage") or {}).get("prompt_tokens") or len(tokens)
        if (entries := choice.get("prompt_logprobs")) is not None:
            count = len(entries)
            ids, logps = zip(*map(_own, entries, tokens), strict=True)
        else:
            logps, names = choice["logprobs"]["token_logprobs"], choice["logprobs"]["tokens"]
            count = len(logps) - (len(logps) == len(tokens) + ASKED["max_tokens"])
            ids = _ids(names) or tokens
        ids = choice.get("prompt_token_ids") or ids
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            "its answer has no prompt log-probs, neither as prompt_logprobs nor as logprobs of an "
            f"echoed prompt: {_head(answer)}"
        ) from None
    for found in (read, count):
        if found != len(tokens):
            raise ValueError(
                f"its answer is about {found} tokens, but {len(tokens)} were sent; the server cuts "
                "or extends prompts"
            )
    for position, (found, sent) in enumerate(zip(ids, tokens, strict=False)):
        if found != sent:
            raise ValueError(
                f"its answer is about token {found} at position {position}, where {sent} was sent; "
                "the server does not take token ids as they are"
            )
    response = logps[start : len(tokens)]
    for position, logp in enumerate(response, start):
        if not isinstance(logp, int | float) or not STANDS_FOR_ZERO < logp <= ABOVE_ZERO:
            raise ValueError(
                f"its answer has {logp} for the token at position {position}, which is no finite "
                "log-prob; the served model overflows, or the server returns something else "
                "(vLLM: --logprobs-mode raw_logprobs)"
            )
    return math.fsum(response)


def _own(entry: dict[str, Any] | None, token: int) -> tuple[int, Any]:
    """The id and log-prob of a prompt's own token in vLLM's `{id: {"logprob": ...}}`."""
    if entry is None:  # the first token follows nothing
        return token, None
    if str(token) in entry:
        return token, entry[str(token)]["logprob"]
    return int(next(iter(entry), token)), None


def _ids(names: list[str]) -> list[int] | None:
    """The ids that vLLM writes in place of text, `token_id:17`; None where it is text."""
    prefix = "token_id:"
    if not all(name.startswith(prefix) for name in names):
        return None
    return [int(name.removeprefix(prefix)) for name in names]


def _whose(distinct: DistinctSequences, place: int) -> str:
    """The first pair that has this sequence, in words."""
    pairs = distinct.pairs
    side, i = divmod(int(np.flatnonzero(distinct.of_pairs == place)[0]), len(pairs))
    return f"pair {pairs.ids[i]} (row {pairs.index[i]}, {('chosen', 'rejected')[side]})"


def _json(answer: httpx.Response, what: str) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise ValueError(f"{what} returned no JSON but {_head(answer.text)!r}; {BEGINS}") from None


def _message(answer: httpx.Response) -> str:
    """What a server says of an error: in vLLM's words, in SGLang's, or as it stands."""
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        said = answer.json()
        return str((said.get("error") or said)["message"])
    return _head(answer.text) or answer.reason_phrase


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that a server asks to wait for; 0 where it does not say."""
    said = answer.headers.get("retry-after", "")
    with suppress(ValueError):
        return float(said)
    with suppress(ValueError, TypeError):
        return (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
    return 0.0


def _head(said: Any) -> str:
    text = " ".join(str(said).split())
    return text if len(text) <= 200 else text[:200] + "..."

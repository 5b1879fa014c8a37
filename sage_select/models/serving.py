"""Scoring on an inference server: its prompt log-probs, as `PairLogps`.

A server is not trusted: an answer has a deadline, a limit on its size and one strict reading, and
anything else is refused with the pair that it was about.
"""

import asyncio
import json
import logging
import math
import re
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

from sage_select.arguments import is_number, is_whole, positive, shown, switch, whole_number
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

CONNECT_TIMEOUT = 10.0  # seconds: a server that is up accepts a connection soon
FIRST_PAUSE = 0.5  # seconds before the first retry; doubled for each further one
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}  # statuses that are usually temporary
VLLM_MINUS_INFINITY = -9999.0  # in place of a log-prob of minus infinity, which JSON lacks
MAX_LOGP = 1e-2  # nats; rounding can put a log-prob slightly above zero
# Limits on the size of an answer. vLLM needs about 200 bytes a token: id, text and log-prob, twice.
ANSWER_BYTES, ANSWER_BYTES_PER_TOKEN = 2**20, 2**10
ERROR_BYTES = 2**16  # of the body of an error, which is cut there
URL_HINT = "url must be the root of the API, such as http://host:8000/v1"
REQUEST_OPTIONS = {
    "max_tokens": 1,  # SGLang refuses 0
    "temperature": 1.0,
    "echo": True,
    "logprobs": 1,  # SGLang returns no log-probs for 0
    "prompt_logprobs": 0,  # vLLM: of the prompt's tokens, without alternatives
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}


class Agreement(NamedTuple):
    """Difference between a server's log-probs and the local model's, in nats per response token."""

    mean: float
    largest: float
    responses: int


@dataclass(frozen=True)
class ServerMeasure:
    """A `measure` that requests log-probs from an OpenAI-compatible server, as vLLM or SGLang.

    `Selector(..., measure=ServerMeasure(url, name))` scores pools on the server's devices. The
    server must have the current policy: either `sync` sends it the weights, or the caller does so
    before each pass. Requests contain token ids, each distinct response once. A few responses are
    measured with the local model as well, and the pass is refused if the two disagree.

    Measure policy and reference on one path, both here or both with `measure`: rounding that
    differs between paths would look like a change in the policy. For the same reason a trainer,
    whose policy runs locally, needs a reference that was measured locally.

    Args:
        url: Root of the server's API, such as "http://host:8000/v1".
        name: Name of the model on the server, as `GET /models` lists it.
        sync: Called with the model once before each pass, to push its weights to the server.
        check_responses: Number of responses that are measured with the local model as well, from
            the longest to the shortest; if 0, no local model is needed.
        tolerance: Nats per token by which the two may differ, on average.
        concurrency: Maximum number of requests in flight.
        timeout: Seconds from sending a request to the last byte of its answer, and the longest
            pause before a retry.
        retries: Further attempts if a server is busy, failing, too slow or unreachable.
        api_key: Sent as a bearer token.
        reader: Options for reading the local model in the check, the same as in training.
        show_progress: False for no progress bar.

    Attributes:
        checks: The `Agreement` of each pass so far, the latest last.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the URL is not the plain root of an API.

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
        _check_url(self.url)
        if not (isinstance(self.name, str) and self.name):
            raise TypeError(
                "ServerMeasure: name must be the model's name on the server, got "
                f"{shown(self.name)}"
            )
        key = self.api_key or ""
        if not (isinstance(key, str) and re.fullmatch("[!-~]*", key)):  # not shown: it is a secret
            raise ValueError(
                "ServerMeasure: api_key must be a text of printable ASCII characters without "
                "blanks; a key read from a file may end with a line break: pass key.strip()"
            )
        for name, least in (("check_responses", 0), ("retries", 0), ("concurrency", 1)):
            whole_number(getattr(self, name), f"ServerMeasure: {name}", least=least)
        for name in ("tolerance", "timeout"):
            positive(getattr(self, name), f"ServerMeasure: {name}")
        switch(self.show_progress, "ServerMeasure: show_progress", optional=True)
        if not (self.sync is None or callable(self.sync)):
            raise TypeError(
                f"ServerMeasure: sync must be a function of the model, got {shown(self.sync)}"
            )
        if not isinstance(self.reader, Reader):
            raise TypeError(f"ServerMeasure: reader must be a Reader, got {shown(self.reader)}")

    @property
    def mixed_precision(self) -> torch.dtype | None:
        """Autocast dtype of the local model, with which the server's log-probs must agree."""
        return self.reader.mixed_precision

    def __call__(self, model: nn.Module | None, pool: PreferenceDataset) -> PairLogps:
        """Log-probs of the pool's pairs under the served model, in the pool's order.

        Args:
            model: The policy, for `sync` and the check; None if neither is used.
            pool: The pairs, `dataset` or `dataset.take(rows)`.

        Raises:
            ValueError: If the server does not serve the model, refuses a request, answers with
                anything but the log-probs of the tokens it was sent, or disagrees with `model`.
            ConnectionError: If it stays unreachable, busy or failing.
        """
        if model is None and self.check_responses:
            raise ValueError(
                "ServerMeasure: model is None, but check_responses="
                f"{self.check_responses} compares the server's log-probs with a local model's; "
                "pass the model, or check_responses=0"
            )
        if self.sync is not None:
            self.sync(model)
        distinct = distinct_sequences(pool)
        logps = torch.zeros(len(distinct), dtype=torch.float64)
        longest_first = np.argsort(-distinct.lengths, kind="stable")
        spaced = np.linspace(0, len(distinct) - 1, min(self.check_responses, len(distinct)))
        checked = longest_first[spaced.astype(int)].tolist()
        rest = longest_first[~np.isin(longest_first, checked)].tolist()
        with progress_bar(
            len(distinct), "scoring on a server", "responses", show=self.show_progress
        ) as bar:
            names: list[str] = []  # of the model on the server

            def keep(place: int, logp: float) -> None:
                logps[place] = logp
                bar.update()

            async def request_checked(client: httpx.AsyncClient) -> None:
                names.extend(await self._check_served(client, distinct))
                await self._score(client, distinct, checked, names, keep)

            # the check comes first: a server with stale weights is refused before a long pass
            if len(distinct):
                self._run_in_loop(request_checked)
            if checked and model is not None:
                self._check(model, distinct, checked, logps)
            if rest:
                self._run_in_loop(lambda client: self._score(client, distinct, rest, names, keep))
        return as_pair_logps(pool, logps[distinct.of_pairs])

    def _check(
        self, model: nn.Module, distinct: DistinctSequences, places: list[int], logps: Tensor
    ) -> None:
        """Compare some of the server's log-probs with the local model's; refuse a mismatch."""
        local = logps.clone()

        def keep(measured: list[int], local_logps: Tensor) -> None:
            local[measured] = local_logps

        unchecked = set(range(len(distinct))) - set(places)
        reader = replace(self.reader, show_progress=False)
        reader.measure_sequences(model, distinct, keep, skip=unchecked)
        lengths = distinct.scored[places]
        differences = (logps - local)[places].abs() / torch.tensor(lengths)
        agreement = Agreement(float(differences.mean()), float(differences.max()), len(places))
        self.checks.append(agreement)
        logger.info("ServerMeasure: %s", agreement)
        if not agreement.mean <= self.tolerance:  # NaN is refused, too
            raise ValueError(
                f"ServerMeasure: the log-probs of {self.name} at {self.url} differ from the local "
                f"model's by {agreement.mean:.3g} nats per token (mean of {agreement.responses} "
                f"responses, largest {agreement.largest:.3g}; tolerance {self.tolerance:g}). The "
                "server has different weights (sync= pushes the policy's before each pass), a "
                "different model, or a different precision; for the last, raise tolerance"
            )

    def _run_in_loop(self, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Run work in a thread with a new event loop, since a notebook's is already running."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            started.set_result((asyncio.get_running_loop(), task))
            async with httpx.AsyncClient(
                base_url=self.url,
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else None,
                # `_answer` limits the whole of a request; these limits are for its parts
                timeout=httpx.Timeout(None, connect=min(self.timeout, CONNECT_TIMEOUT)),
                limits=httpx.Limits(max_connections=self.concurrency),
            ) as client:
                await work(client)

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(lambda: asyncio.run(main()))
            try:
                done.result()
            except BaseException:
                if not done.done():  # Ctrl-C reaches the main thread only: cancel the other's work
                    loop, task = started.result()
                    loop.call_soon_threadsafe(task.cancel)
                raise

    async def _check_served(
        self, client: httpx.AsyncClient, distinct: DistinctSequences
    ) -> list[str]:
        """Refuse a server without the model, or with too short a context for a response.

        Returns:
            The names that the server has for the model: vLLM answers with the first of several.
        """
        try:
            listed = await self._request(client, "GET", "models")
            try:
                cards = {card["id"]: card for card in listed["data"]}
                names = ", ".join(cards)
            except (KeyError, TypeError):
                raise ValueError(
                    f"GET {self.url}/models returned no list of models: {_excerpt(listed)}"
                ) from None
            if self.name not in cards:
                raise ValueError(
                    f"{self.url} does not serve {self.name!r}; it serves "
                    f"{_excerpt(names) or 'no model'}"
                )
            context = cards[self.name].get("max_model_len")
            longest = int(distinct.lengths[place := int(distinct.lengths.argmax())])
            if is_whole(context) and longest + REQUEST_OPTIONS["max_tokens"] > context:
                raise ValueError(
                    f"{_pair_of(distinct, place)} has {longest} tokens, but the server's context "
                    f"has room for {context - 1} and the one it must generate; read the pairs with "
                    f"max_length={context - 1}, or serve with a longer context (vLLM: "
                    "--max-model-len, SGLang: --context-length)"
                )
            root = cards[self.name].get("root")
            return [name for name, card in cards.items() if card.get("root") == root]
        except (ValueError, ConnectionError) as error:
            raise _kind(error)(f"ServerMeasure: {error}") from None

    async def _score(
        self,
        client: httpx.AsyncClient,
        distinct: DistinctSequences,
        places: Sequence[int],
        names: list[str],
        keep: Callable[[int, float], None],
    ) -> None:
        """Request log-probs of responses, `concurrency` at once; they may arrive in any order."""
        queue = iter(places)

        async def work() -> None:
            for place in queue:
                keep(place, await self._logp(client, distinct, place, names))

        workers = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(places)))]
        try:
            await asyncio.gather(*workers)
        finally:  # after an error or Ctrl-C, so that no request is left running
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _logp(
        self, client: httpx.AsyncClient, distinct: DistinctSequences, place: int, names: list[str]
    ) -> float:
        """Request the log-prob of one response."""
        sequence = distinct.sequences([place])[0]
        body = {"model": self.name, "prompt": sequence.tokens.tolist(), **REQUEST_OPTIONS}
        try:
            limit = ANSWER_BYTES + ANSWER_BYTES_PER_TOKEN * len(sequence.tokens)
            answer = await self._request(client, "POST", "completions", body, limit)
            logp = response_logp(answer, sequence)
            if (model := answer.get("model")) is not None and model not in names:
                raise ValueError(
                    f"the answer is from model {_excerpt(model)!r}, but {self.name!r} was asked; "
                    "pass the name under which the server itself lists the model"
                )
            return logp
        except (ValueError, ConnectionError) as error:
            raise _kind(error)(f"ServerMeasure: {_pair_of(distinct, place)}: {error}") from None

    async def _request(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: Any = None,
        limit: int = ANSWER_BYTES,
    ) -> Any:
        """Return a server's answer, with retries while it is busy, failing or unreachable."""
        request = f"{method} {self.url}/{path}"
        for attempt in range(self.retries + 1):
            pause = FIRST_PAUSE * 2 ** min(attempt, 30)
            try:
                answer, content = await self._answer(client, method, path, body, limit)
            except TimeoutError:
                problem = f"{request}: no complete answer within timeout={self.timeout:g} seconds"
            except httpx.TransportError as error:
                problem = f"{request}: {type(error).__name__} {_excerpt(error)}".rstrip()
            except ValueError as error:
                raise ValueError(f"{request}: {error}") from None
            else:
                if answer.is_success:
                    return _parsed(content, request)
                problem = f"{request}: HTTP {answer.status_code}: {_error_message(answer, content)}"
                if answer.is_redirect:
                    place = _excerpt(answer.headers.get("location", ""))
                    problem += f" (redirected to {place!r}, which is not followed)"
                if answer.status_code not in RETRYABLE:
                    raise ValueError(f"{problem}; {URL_HINT}" if path == "models" else problem)
                if (requested_pause := _retry_after(answer)) > self.timeout:
                    raise ConnectionError(
                        f"{problem} (asks to wait for {requested_pause:.0f} seconds, longer than "
                        f"timeout={self.timeout:g})"
                    )
                pause = max(pause, requested_pause)
            if attempt < self.retries:
                await asyncio.sleep(min(pause, self.timeout))
        raise ConnectionError(
            f"{problem} (attempt {self.retries + 1} of {self.retries + 1}); if the server is "
            "only slow, pass a longer timeout, a lower concurrency or more retries"
        )

    async def _answer(
        self, client: httpx.AsyncClient, method: str, path: str, body: Any, limit: int
    ) -> tuple[httpx.Response, bytes]:
        """Send a request once, and receive the answer before its deadline and up to its limit.

        Raises:
            TimeoutError: If the last byte has not arrived in time, however many arrived before.
            ValueError: If the answer is compressed, or longer than `limit` bytes.
        """
        # unpacked, a few compressed bytes could fill the memory before anything counts them
        plain = {"Accept-Encoding": "identity"}
        content = bytearray()
        async with (
            asyncio.timeout(self.timeout),
            client.stream(method, path, json=body, headers=plain) as answer,
        ):
            encoding = answer.headers.get("content-encoding", "identity")
            if encoding.lower() not in ("", "identity"):
                raise ValueError(
                    f"the answer is compressed ({_excerpt(encoding)}), which was not asked for; "
                    "serve without compression"
                )
            async for part in answer.aiter_raw():
                content += part
                if not answer.is_success and len(content) > ERROR_BYTES:
                    break
                if len(content) > limit:
                    raise ValueError(
                        f"the answer has more than {limit:,} bytes, too many for the tokens that "
                        "were sent; the server answers something else"
                    )
        return answer, bytes(content)


def response_logp(answer: Any, sequence: TokenSequence) -> float:
    """Return the summed log-prob of a response, in nats, from a server's answer to its tokens.

    Two formats are supported: vLLM's `prompt_logprobs`, and `logprobs` with the prompt echoed, in
    which the token generated after it does not count.

    Args:
        answer: The JSON that `POST /completions` returned.
        sequence: The tokens that were sent.

    Raises:
        ValueError: If the answer is not about these tokens, or a log-prob is missing or not finite.

    Example:
        >>> sequence = TokenSequence(np.array([5, 6, 7], np.int32), response_start=1)
        >>> logps = {"tokens": [" a", " b", " c", " d"], "token_logprobs": [None, -1.0, -2.0, -9.0]}
        >>> response_logp({"choices": [{"logprobs": logps}]}, sequence)
        -3.0
    """
    tokens = sequence.tokens.tolist()
    try:
        (choice,) = answer["choices"]
        if (index := choice.get("index")) is not None and not (is_whole(index) and index == 0):
            raise ValueError("the choice of another request")
        prompt_tokens = (answer.get("usage") or {}).get("prompt_tokens")
        entries = choice.get("prompt_logprobs")
        read = _from_echo(choice, tokens) if entries is None else _from_entries(entries, tokens)
        ids, logps = read
        sent_back = choice.get("prompt_token_ids")
        if sent_back is not None and not all(map(is_whole, sent_back)):
            raise TypeError("ids that are no whole numbers")
        counts = [len(x) for x in (logps, ids, sent_back) if x is not None]
        if prompt_tokens is not None:
            counts.append(prompt_tokens)
        if not all(map(is_whole, counts)):
            raise TypeError("a count that is no whole number")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            "the answer has no prompt log-probs, neither as prompt_logprobs nor as logprobs of an "
            f"echoed prompt: {_excerpt(answer)}"
        ) from None
    for count in counts:
        if count != len(tokens):
            raise ValueError(
                f"the answer is for {count} tokens, but {len(tokens)} were sent; the server "
                "shortens or extends prompts"
            )
    for answered_ids in (sent_back or (), ids):
        for position, (answered, sent) in enumerate(zip(answered_ids, tokens, strict=False)):
            if answered is not None and answered != sent:
                raise ValueError(
                    f"the answer has token {answered} at position {position}, but {sent} was sent; "
                    "the server changes token ids"
                )
    scored = sequence.scored.tolist()
    for position in scored:
        logp = logps[position]
        if not is_number(logp) or not VLLM_MINUS_INFINITY < logp <= MAX_LOGP:
            raise ValueError(
                f"the answer has {_excerpt(logp)} for the token at position {position}, which is "
                "not a finite log-prob; the served model overflows, or the server returns other "
                "numbers (vLLM: --logprobs-mode raw_logprobs)"
            )
    # exactly rounded; a probability is at most 1, so what the rounding of tokens adds is cut
    return min(0.0, math.fsum(logps[position] for position in scored))


def _from_entries(entries: Any, tokens: list[int]) -> tuple[list[int | None], list[Any]]:
    """Return ids and log-probs of the tokens of vLLM's list of `{id: {"logprob": ...}}`."""
    ids: list[int | None] = []
    logps: list[Any] = []
    for position, entry in enumerate(entries):
        if entry is None and position == 0:  # nothing precedes the first token
            ids.append(None)
            logps.append(None)
            continue
        sent = str(tokens[position]) if position < len(tokens) else ""
        name = sent if sent in entry else next(iter(entry), "")
        ids.append(int(name))
        logps.append(entry[name]["logprob"])
    return ids, logps


def _from_echo(choice: Any, tokens: list[int]) -> tuple[list[int | None], list[Any]]:
    """Return ids, if the answer has them, and log-probs of an echoed prompt's tokens."""
    logps, names = choice["logprobs"]["token_logprobs"], choice["logprobs"]["tokens"]
    if not (isinstance(logps, list) and isinstance(names, list)):
        raise TypeError("lists")
    # the last is the token that was generated after the prompt
    generated = len(tokens) + REQUEST_OPTIONS["max_tokens"]
    names, logps = (x[: len(tokens)] if len(x) == generated else x for x in (names, logps))
    return [_id(name) for name in names], logps


def _id(name: str) -> int | None:
    """Return the id that vLLM writes in place of text, `token_id:17`, or None if it is text."""
    digits = name.removeprefix("token_id:")
    return int(digits) if digits != name and digits.isdecimal() else None


def _pair_of(distinct: DistinctSequences, place: int) -> str:
    """Describe the first pair that has this sequence, for messages."""
    pairs = distinct.pairs
    side, i = divmod(int(np.flatnonzero(distinct.of_pairs == place)[0]), len(pairs))
    return f"pair {pairs.ids[i]} (row {pairs.index[i]}, {('chosen', 'rejected')[side]})"


def _kind(error: Exception) -> type[Exception]:
    """Return the type under which an error is raised again; subclasses have other arguments."""
    return ConnectionError if isinstance(error, ConnectionError) else ValueError


def _check_url(url: Any) -> None:
    """Refuse what is not the plain root of an API, in which a path could not be appended."""
    example = "vLLM's default is http://host:8000/v1"
    if not isinstance(url, str):
        raise TypeError(f"ServerMeasure: url must be a text, got {shown(url)}; {example}")
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"ServerMeasure: url must start with http:// or https://, got {url!r}; {example}"
        )
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(
            f"ServerMeasure: url must have no blanks and control characters, got {url!r}; {example}"
        )
    if "@" in url.split("/")[2]:  # not shown: it contains a password
        raise ValueError("ServerMeasure: url must have no user and password; pass api_key instead")
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"ServerMeasure: url {url!r} is invalid: {error}; {example}") from None
    if not parts.host or (parts.port or 0) > 65_535 or "?" in url or "#" in url:
        raise ValueError(
            "ServerMeasure: url must be a host, a port and a path, without ? and #, got "
            f"{url!r}; {example}"
        )


def _parsed(content: bytes, request: str) -> Any:
    """Parse an answer, or refuse it with a hint that the URL may be wrong."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        text = content[:1000].decode(errors="replace")
        raise ValueError(f"{request} returned no JSON but {_excerpt(text)!r}; {URL_HINT}") from None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the items of a JSON object, or refuse a name that occurs twice."""
    unique = dict(items)
    if len(unique) < len(items):
        raise ValueError("a name occurs twice")
    return unique


def _error_message(answer: httpx.Response, content: bytes) -> str:
    """Return a server's error message, from vLLM's format, SGLang's, or any text."""
    text = content.decode(errors="replace")
    with suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):
        body = json.loads(text)
        return _excerpt((body.get("error") or body)["message"])
    return _excerpt(text) or _excerpt(answer.reason_phrase)


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that a server asks to wait; 0 if it does not say."""
    header = answer.headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(header)
        return 0.0 if math.isnan(seconds) else max(0.0, seconds)
    with suppress(ValueError, TypeError, OverflowError):  # it may be a date
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return 0.0


def _excerpt(content: Any) -> str:
    """First 200 characters of some content, on one line."""
    try:
        text = content if isinstance(content, str) else str(content)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a {type(content).__name__} that cannot be shown"
    text = " ".join(text[:2000].split())
    return text if len(text) <= 200 else text[:200] + "..."

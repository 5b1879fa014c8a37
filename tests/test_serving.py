import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in_server import Reply, serving

from sage_select import Constant, PreferenceDataset, Reader, ServerMeasure, measure
from sage_select.models import serving as serving_module

PAIR = r"ServerMeasure: pair \w+ \(row \d+, (chosen|rejected)\): "  # start of messages about a pair
unchecked = partial(ServerMeasure, name="policy", check_responses=0, show_progress=False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(serving_module, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def pool(still) -> PreferenceDataset:
    return still.dataset.take(np.arange(12))


@pytest.fixture(scope="module")
def few(still) -> PreferenceDataset:
    return still.dataset.take([5, 3])


def assert_fails(
    still, pool, message, alter=None, error=ValueError, *, settings=(), name="policy", **options
):
    """Assert that a pass with a server of these options raises this error."""
    with (
        serving(still.model, name, alter=alter or Recorder(), **options) as url,
        pytest.raises(error, match=message),
    ):
        unchecked(url, concurrency=1, **dict(settings))(None, pool)


def scaled(model, by: float):
    """A copy of a model with weights that are larger by this share."""
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(1 + by)
    return copy


class Recorder:
    """Records requests to a server; `change` may replace replies to POST requests."""

    def __init__(self, change: Callable[[dict, Reply, int], Reply] | None = None) -> None:
        self.change = change
        self.paths: list[str] = []
        self.prompts: list[list[int]] = []

    def __call__(self, path: str, request: dict, reply: Reply) -> Reply:
        self.paths.append(path)
        if not request:
            return reply
        self.prompts.append(request["prompt"])
        return self.change(request, reply, len(self.prompts)) if self.change else reply


@pytest.mark.parametrize("shape", ["vllm", "sglang", "echo"])
def test_log_probs_equal_those_of_the_local_measure(shape, still, pool):
    expected = measure(still.model, pool)
    with serving(still.model, shape=shape) as url:
        logps = ServerMeasure(url, "policy")(still.model, pool)
    for field in ("chosen", "rejected"):
        torch.testing.assert_close(
            getattr(logps, field), getattr(expected, field), atol=1e-4, rtol=0
        )
    assert logps.index.tolist() == expected.index.tolist()
    assert logps.chosen_tokens.tolist() == expected.chosen_tokens.tolist()
    assert logps.chosen.dtype == torch.float64


@pytest.mark.parametrize("shape", ["vllm", "sglang"])
def test_a_real_model(shape, data, stories):
    model, tokenizer = stories
    pairs = PreferenceDataset.read(
        data / "pairs" / "gsm8k_verified.parquet", tokenizer=tokenizer, max_length=400
    ).take(np.arange(0, 60, 10))
    with serving(model, shape=shape) as url:
        logps = ServerMeasure(url, "policy")(model, pairs)
    torch.testing.assert_close(logps.chosen, measure(model, pairs).chosen, atol=0, rtol=1e-6)


def test_the_difference_of_a_bf16_server(data, stories):
    """Figures in docs/serving.md."""
    model, tokenizer = stories
    pairs = PreferenceDataset.read(
        data / "pairs" / "gsm8k_verified.parquet", tokenizer=tokenizer, max_length=512
    ).take(np.arange(0, 60, 5))
    with serving(deepcopy(model).to(torch.bfloat16)) as url:
        server = ServerMeasure(url, "policy")
        assert torch.equal(server(model, pairs).chosen, server(model, pairs).chosen)
    assert 1e-3 < server.checks[-1].mean < 1e-2


def test_selections_equal_those_of_the_local_measure(still, pool):
    policy = scaled(still.model, 0.1)
    local = replace(still.selector, keep=Constant(0.5))
    with serving(policy) as url:
        remote = replace(local, measure=ServerMeasure(url, "policy"))
        selection, expected = (s.select(policy, pool, 1) for s in (remote, local))
    assert selection.rule == "score"
    assert selection.indices.tolist() == expected.indices.tolist()


def test_each_distinct_response_is_requested_once(still, few):
    pool = few.take([5, 3, 5])
    with serving(still.model, alter=(recorder := Recorder())) as url:
        ServerMeasure(url, "policy", concurrency=3)(still.model, pool)
    assert len(recorder.prompts) == len({tuple(prompt) for prompt in recorder.prompts}) == 4
    assert {tuple(s.tokens) for s in pool.sequences()} == {tuple(p) for p in recorder.prompts}


def test_the_order_of_answers_does_not_change_a_bit(still, pool):
    def delayed(request, reply, number):
        time.sleep(0.02 * (number % 3))
        return reply

    results = []
    for concurrency, change in ((1, None), (8, delayed)):
        with serving(still.model, alter=Recorder(change)) as url:
            results.append(unchecked(url, concurrency=concurrency)(None, pool))
    assert all(map(torch.equal, *results))


def test_sync_is_called_once_per_pass_before_any_request(still, few):
    recorder = Recorder()
    with serving(still.model, alter=recorder) as url:
        sync = lambda model: recorder.paths.append(model)  # noqa: E731
        server = ServerMeasure(url, "policy", sync=sync)
        server(still.model, few)
        length = len(recorder.paths)
        server(still.model, few)
    assert [i for i, event in enumerate(recorder.paths) if event is still.model] == [0, length]
    assert recorder.paths[1] == "/v1/models"


def test_stale_weights_are_refused_before_the_pool_is_scored(still, pool):
    policy = scaled(still.model, 0.3)
    with serving(still.model, alter=(recorder := Recorder())) as url:
        server = ServerMeasure(url, "policy", check_responses=4)
        with pytest.raises(ValueError, match=r"differ from the local model's by 0\.\d+ nats per"):
            server(policy, pool)
        assert len(recorder.prompts) == 4
        tolerant = replace(server, tolerance=10.0)
        tolerant(policy, pool)
    for agreement in (server.checks[-1], tolerant.checks[-1]):
        assert server.tolerance < agreement.mean <= agreement.largest
        assert agreement.responses == 4


def test_weights_sent_by_sync_are_accepted(still, few):
    served, policy = deepcopy(still.model), scaled(still.model, 0.1)
    with serving(served) as url:
        server = ServerMeasure(
            url, "policy", sync=lambda model: served.load_state_dict(model.state_dict())
        )
        server(policy, few)
    assert [check.largest < 1e-5 for check in server.checks] == [True]


def test_without_a_local_model(still, few):
    with serving(still.model) as url:
        with pytest.raises(ValueError, match="pass the model, or check_responses=0"):
            ServerMeasure(url, "policy")(None, few)
        logps = unchecked(url)(None, few)
    torch.testing.assert_close(logps.chosen, measure(still.model, few).chosen, atol=1e-4, rtol=0)


def test_an_empty_pool_sends_no_request(still):
    unreachable = ServerMeasure("http://127.0.0.1:9", "policy")
    assert len(unreachable(still.model, still.dataset.take([])).index) == 0


def change_logps(reply: Reply, change: Callable[[list], object]) -> Reply:
    """Apply a change to both lists of log-probs in a reply."""
    choice = reply.body["choices"][0]
    change(choice["logprobs"]["token_logprobs"])
    if "prompt_logprobs" in choice:
        logps = [entry and next(iter(entry.values()))["logprob"] for entry in
                 choice["prompt_logprobs"]]  # fmt: skip
        change(logps)
        ids = [*(next(iter(entry)) for entry in choice["prompt_logprobs"] if entry), "0", "0"]
        choice["prompt_logprobs"] = [
            None if position == 0 else {token: {"logprob": logp}}
            for position, (token, logp) in enumerate(zip([None, *ids], logps, strict=False))
        ]
    return reply


def last_logp(value):
    return lambda request, reply, number: change_logps(
        reply, lambda logps: logps.__setitem__(len(request["prompt"]) - 1, value)
    )


def too_few_logps(request, reply, number):
    return change_logps(reply, lambda logps: logps.__delitem__(slice(2)))


def too_many_logps(request, reply, number):
    return change_logps(reply, lambda logps: logps.extend([-1.0, -1.0]))


def extended_prompt(request, reply, number):
    """A server that adds a token in front and generates none: the number of log-probs is right."""
    reply.body["usage"]["prompt_tokens"] += 1
    return reply


def changed_prompt(request, reply, number):
    reply.body["choices"][0]["prompt_token_ids"] = [7, *request["prompt"][1:]]
    return reply


def no_logps(request, reply, number):
    return Reply({"choices": [{"index": 0, "text": "4", "logprobs": None}]})


@pytest.mark.parametrize("shape", ["vllm", "sglang", "echo"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (too_few_logps, r"is for \d+ tokens, but \d+ were sent; the server shortens or extends"),
        (too_many_logps, r"is for \d+ tokens, but \d+ were sent"),
        (extended_prompt, r"is for \d+ tokens, but \d+ were sent"),
        (changed_prompt, r"has token 7 at position 0, but \d+ was sent"),
        (last_logp(None), r"has None for the token at position \d+, which is not a finite log-p"),
        (last_logp(float("nan")), "has nan for the token"),
        (last_logp(-float("inf")), "has -inf for the token"),
        (last_logp(-9999.0), "has -9999.0 for the token"),
        (last_logp(3.5), r"has 3.5 for the token .* \(vLLM: --logprobs-mode raw_logprobs\)"),
        (no_logps, r"has no prompt log-probs, neither as prompt_logprobs nor as logprobs of an ec"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:12],
)
def test_invalid_answers_are_refused(shape, change, message, still, few):
    assert_fails(still, few, PAIR + "the answer " + message, Recorder(change), shape=shape)


@pytest.mark.parametrize("shape", ["vllm", "echo"])
def test_changed_tokens_are_detected_if_the_answer_has_ids(shape, still, few):
    def changed_tokens(request, reply, number):
        choice = reply.body["choices"][0]
        choice.pop("prompt_token_ids", None)
        choice["logprobs"]["tokens"] = [f"token_id:{t}" for t in [*request["prompt"], 0]]
        choice["logprobs"]["tokens"][3] = "token_id:999"
        for entry in choice.get("prompt_logprobs", [])[3:4]:
            entry["999"] = entry.popitem()[1]
        return reply

    message = r"the answer has token 999 at position 3, but \d+ was sent"
    assert_fails(still, few, message, Recorder(changed_tokens), shape=shape)


def test_the_message_names_the_pair(still, pool):
    bad = pool.take([9]).sequences()[1].tokens.tolist()

    def change_one(request, reply, number):
        return too_few_logps(request, reply, number) if request["prompt"] == bad else reply

    message = rf"pair {pool.ids[9]} \(row 9, rejected\): the answer"
    assert_fails(still, pool.take([4, 9, 2]), message, Recorder(change_one))


CHOICE = ("choices", 0)


def altered(path, value):
    """A change that puts a value at a path in the answer, such as ("choices", 0, "index")."""

    def change(request, reply, number):
        *parents, last = path
        place = reply.body
        for key in parents:
            place = place[key]
        place[last] = value(place[last]) if callable(value) else value
        return reply

    return change


def altered_ids(change):
    """A change of the ids that the answer repeats."""
    return altered((*CHOICE, "prompt_token_ids"), change)


def of_the_first(change):
    """A change of the entry of the second token in vLLM's list."""

    def at(request, reply, number):
        entries = reply.body["choices"][0]["prompt_logprobs"]
        entries[1] = change(entries[1])
        return reply

    return at


MALFORMED = "the answer has no prompt log-probs"
HOSTILE = {
    "no choice": (altered(("choices",), []), MALFORMED),
    "two choices": (altered(("choices",), lambda choices: choices * 2), MALFORMED),
    "choices that are no list": (altered(("choices",), {"0": {}}), MALFORMED),
    "another request's choice": (altered((*CHOICE, "index"), 1), MALFORMED),
    "an index that is no number": (altered((*CHOICE, "index"), False), MALFORMED),
    "another model": (altered(("model",), "base"), "is from model 'base', but 'policy' was asked"),
    "a model that is no text": (altered(("model",), ["policy"]), "is from model"),
    "short ids": (altered_ids(lambda ids: ids[:-1]), r"is for \d+ tok"),
    "long ids": (altered_ids(lambda ids: [*ids, 0]), r"is for \d+ tok"),
    "no ids": (altered_ids([]), "is for 0 tokens"),
    "ids as text": (altered_ids(lambda ids: [*map(str, ids)]), MALFORMED),
    "ids as floats": (
        altered_ids(lambda ids: [*map(float, ids)]),
        MALFORMED,
    ),
    "no tokens used": (altered(("usage", "prompt_tokens"), 0), "is for 0 tokens"),
    "tokens used as text": (altered(("usage", "prompt_tokens"), str), MALFORMED),
    "tokens used as a truth value": (altered(("usage", "prompt_tokens"), True), MALFORMED),
    "usage that is no mapping": (altered(("usage",), [1]), MALFORMED),
    "a missing entry": (of_the_first(lambda entry: None), MALFORMED),
    "an empty entry": (of_the_first(lambda entry: {}), MALFORMED),
    "an entry that is a number": (of_the_first(lambda entry: -1.0), MALFORMED),
    "an entry without number": (of_the_first(lambda entry: {key: {} for key in entry}), MALFORMED),
    "false for a log-prob": (last_logp(False), "has False for the token"),
    "true for a log-prob": (last_logp(True), "has True for the token"),
    "text for a log-prob": (last_logp("-1.0"), "has -1.0 for the token"),
    "a list for a log-prob": (last_logp([-1.0]), "for the token"),
    "a huge integer for a log-prob": (last_logp(-(10**4000)), "for the token"),
    "just above rounding": (last_logp(0.011), "has 0.011 for the token"),
    "a list": (lambda *_: Reply([]), MALFORMED),
    "a number": (lambda *_: Reply(7), MALFORMED),
    "nothing": (lambda *_: Reply(b""), "returned no JSON but ''"),
    "no UTF-8": (lambda *_: Reply(b"\xff\xfe"), "returned no JSON"),
    "deep nesting": (lambda *_: Reply(b"[" * 100_000), "returned no JSON"),
    "a name that occurs twice": (lambda *_: Reply(b'{"choices": [], "choices": []}'), "no JSON"),
    "thousands of digits": (lambda *_: Reply(b'{"a": ' + b"9" * 9000 + b"}"), "no JSON"),
    "a redirect": (
        lambda *_: Reply(b"", 307, {"Location": "http://127.0.0.1:9/elsewhere"}),
        r"HTTP 307: .* \(redirected to 'http://127.0.0.1:9/elsewhere', which is not followed\)",
    ),
    "a deeply nested error": (lambda *_: Reply(b"[" * 100_000, 400), r"HTTP 400: \[\["),
    "an endless error": (lambda *_: Reply(iter(lambda: b"x" * 9999, b""), 400), "HTTP 400: xxx"),
    "a large answer": (
        lambda *_: Reply(iter(lambda: b" " * 99_999, b"")),
        r"has more than 1,\d+,\d+ bytes, too many for the tokens that were sent",
    ),
    "a compressed answer": (
        lambda *_: Reply(zlib.compress(b" " * 10_000_000), 200, {"Content-Encoding": "deflate"}),
        r"is compressed \(deflate\), which was not asked for",
    ),
    "an answer compressed twice": (
        lambda *_: Reply(b"", 200, {"Content-Encoding": "identity, gzip"}),
        r"is compressed \(identity, gzip\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reply", HOSTILE)
def test_hostile_answers_are_refused_with_the_pair(reply, still, few):
    change, message = HOSTILE[reply]
    assert_fails(still, few, f"{PAIR}.*{message}", Recorder(change))


def test_a_log_prob_above_zero_by_rounding_counts_as_zero(still, few):
    change = Recorder(altered((*CHOICE, "logprobs"), just_above_zero))
    with serving(still.model, shape="echo", alter=change) as url:
        logps = unchecked(url)(None, few.take([0]))
    assert logps.chosen.tolist() == logps.rejected.tolist() == [0.0]


def just_above_zero(logprobs):
    return {**logprobs, "token_logprobs": [1e-3 for _ in logprobs["token_logprobs"]]}


def dripping(request, reply, number):
    """An answer of which a byte arrives every 0.1 seconds, so that no read takes long."""

    def parts():
        yield b"{"
        for _ in range(600):
            time.sleep(0.1)
            yield b" "

    return Reply(parts())


def test_the_deadline_is_that_of_the_whole_answer(still, few):
    message = PAIR + r"POST .*/completions: no complete answer within timeout=1 seconds"
    start = time.monotonic()
    settings = {"timeout": 1.0, "retries": 0}
    assert_fails(still, few, message, Recorder(dripping), ConnectionError, settings=settings)
    assert time.monotonic() - start < 30  # not the 60 seconds of the answer


def test_headers_that_never_end_have_the_same_deadline():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for i in range(600):
                    time.sleep(0.1)
                    connection.sendall(f"X-{i}: x\r\n".encode())

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=r"GET .*/models: no complete answer"):
            unchecked(url, timeout=0.5, retries=0)(None, few_pairs())


def few_pairs():
    from arithmetic import build_tokenizer

    records = [{"prompt": "1?", "chosen": "2", "rejected": "3"}]
    return PreferenceDataset.from_records(records, tokenizer=build_tokenizer(), max_length=8)


@pytest.mark.parametrize(
    ("header", "pause"), [("nan", 0), ("-5", 0), ("inf", np.inf), ("1e999", np.inf), ("soon", 0),
                          ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("Mon, 99 Foo 99999", 0), ("", 0)]
)  # fmt: skip
def test_a_retry_after_of_any_kind_is_a_pause(header, pause):
    answer = SimpleNamespace(headers={"retry-after": header})
    assert serving_module._retry_after(answer) == pause


def test_a_client_error_is_shown_and_not_retried(still, few):
    body = {"error": {"message": "This model's maximum context length is 8 tokens", "code": 400}}
    recorder = Recorder(lambda request, reply, number: Reply(body, 400))
    message = PAIR + "POST .*/v1/completions: HTTP 400: This model's max"
    assert_fails(still, few, message, recorder)
    assert len(recorder.prompts) == 1


@pytest.mark.parametrize(
    "body", [{"object": "error", "message": "no such token"}, "no such token", ["no such token"]]
)
def test_error_messages_of_servers_in_several_formats(body, still, few):
    change = lambda request, reply, number: Reply(body, 422)  # noqa: E731
    assert_fails(still, few, "no such token", Recorder(change))


def test_a_model_that_is_not_served_is_an_error(still, few):
    assert_fails(still, few, "does not serve 'policy'; it serves base", name="base")


def test_a_response_longer_than_the_server_s_context_is_refused(still, few):
    longest = int(few.sequence_lengths.max())
    message = rf"{PAIR[:-2]} has {longest} tokens, .* max_length={longest - 1}, or serve"
    assert_fails(still, few, message, recorder := Recorder(), max_model_len=longest)
    assert recorder.prompts == []
    with serving(still.model, max_model_len=longest + 1) as url:
        unchecked(url)(None, few)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply("<html>Hello</html>"), "no JSON but '<html>Hello</html>'; url must be the root"),
        (Reply({"detail": "Not Found"}, 404), "HTTP 404: .*Not Found.*; url must be the root of"),
        (Reply({"object": "list"}), "/v1/models returned no list of models: {'object': 'list'}"),
    ],
)
def test_a_url_that_is_not_an_api_is_refused(reply, message, still, few):
    assert_fails(still, few, message, lambda *_: reply)


def test_the_api_key_is_sent_and_not_shown(still, few):
    assert_fails(still, few, "/v1/models: HTTP 401: .*Unauthorized", api_key="secret")
    with serving(still.model, api_key="secret") as url:
        server = unchecked(url, api_key="secret")
        server(None, few)
    assert "secret" not in repr(server)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_temporary_errors_are_retried(status, still, few):
    recorder = Recorder(lambda request, reply, number: Reply("", status) if number % 3 else reply)
    with serving(still.model, alter=recorder) as url:
        logps = unchecked(url, concurrency=1)(None, few)
    assert len(recorder.prompts) == 12
    torch.testing.assert_close(logps.chosen, measure(still.model, few).chosen, atol=1e-4, rtol=0)


def test_the_number_of_attempts_is_limited(still, few):
    recorder = Recorder(lambda request, reply, number: Reply({"message": "overloaded"}, 503))
    message = PAIR + r"POST .*HTTP 503: overloaded \(attempt 3 of 3\)"
    assert_fails(still, few, message, recorder, ConnectionError, settings={"retries": 2})
    assert len(recorder.prompts) == 3


def test_a_retry_waits_for_retry_after(still, few):
    times = []

    def busy(request, reply, number):
        times.append(time.monotonic())
        return reply if number > 1 else Reply("", 429, {"Retry-After": "0.3"})

    with serving(still.model, alter=Recorder(busy)) as url:
        unchecked(url, concurrency=1)(None, few)
    assert times[1] - times[0] >= 0.3


@pytest.mark.parametrize(
    "retry_after",
    [lambda: "3600", lambda: format_datetime(datetime.now(UTC) + timedelta(hours=1))],
    ids=["seconds", "a date"],
)
def test_a_retry_after_beyond_the_timeout_is_an_error(retry_after, still, few):
    busy = Recorder(lambda request, reply, number: Reply("", 429, {"Retry-After": retry_after()}))
    message = r"asks to wait for 3[56]\d\d seconds, longer than timeout=120"
    assert_fails(still, few, message, busy, ConnectionError)


def test_an_unreachable_server_is_an_error(few):
    with pytest.raises(ConnectionError, match=r"GET http://127.0.0.1:9/v1/models: ConnectError"):
        unchecked("http://127.0.0.1:9/v1", retries=1)(None, few)


def test_an_answer_that_takes_too_long_is_an_error(still, few):
    slow = Recorder(lambda request, reply, number: time.sleep(2.0) or reply)
    message = PAIR + r"POST .*: no complete answer .* \(attempt 2 of 2\); .* a longer timeout"
    settings = {"timeout": 1.0, "retries": 1}
    assert_fails(still, few, message, slow, ConnectionError, settings=settings)


@pytest.fixture
def interruptible():
    """Handle SIGINT as on a terminal, even if the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_threads(still, few, interruptible):
    release = threading.Event()

    def hang(request, reply, number):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        release.wait(30)
        return reply

    with serving(still.model, alter=Recorder(hang)) as url:
        before, start = set(threading.enumerate()), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            unchecked(url, concurrency=1)(None, few)
        assert time.monotonic() - start < 10
        new_threads = set(threading.enumerate()) - before
        release.set()
    # threads of the server itself are still waiting for `release`
    assert [t for t in new_threads if "process_request_thread" not in t.name] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, "url must start with http:// or https://, got 'localhost"),
        ({"url": "http://"}, "url must be a host, a port"),
        ({"url": "http://host:port/v1"}, "url 'http://host:port/v1' is invalid"),
        ({"url": "http://user:secret@host/v1"}, "must have no user and password; pass api_key"),
        ({"url": "http://host/v1?key=1"}, "without \\? and #, got"),
        ({"url": "http://host/v1#x"}, "without \\? and #, got"),
        ({"url": "http://host/v1\n"}, "no blanks and control characters"),
        ({"url": "http://host:99999999/v1"}, "url must be a host, a port and a path"),
        ({"url": b"http://host/v1"}, "url must be a text"),
        ({"url": None}, "url must be a text"),
        ({"name": ""}, "name must be the model's name"),
        ({"name": None}, "name must be the model's name"),
        ({"api_key": "key\n"}, "pass key.strip"),
        ({"api_key": "sch\xfcssel"}, "printable ASCII"),
        ({"api_key": b"key"}, "printable ASCII"),
        ({"sync": "push"}, "sync must be a function of the model, got 'push'"),
        ({"reader": None}, "reader must be a Reader, got None"),
        ({"show_progress": "no"}, "show_progress must be True, False or None, got 'no'"),
        ({"check_responses": -1}, "check_responses must be at least 0, got -1"),
        ({"check_responses": True}, "check_responses must be a whole number, got True"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"retries": 10**30}, "retries must be at most"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"concurrency": 1.5}, "concurrency must be a whole number, got 1.5"),
        ({"tolerance": float("nan")}, "tolerance must be positive and finite, got nan"),
        ({"tolerance": float("inf")}, "tolerance must be positive and finite, got inf"),
        ({"timeout": 0}, "timeout must be positive and finite, got 0"),
        ({"timeout": "5"}, "timeout must be a number, got '5'"),
        ({"timeout": None}, "timeout must be a number, got None"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ServerMeasure(**{"url": "http://host/v1", "name": "policy", **options})
    assert "secret" not in str(error.value)


def test_a_pass_inside_a_running_event_loop_as_in_a_notebook(still, few):
    async def cell(url):
        return unchecked(url)(None, few)

    with serving(still.model) as url:
        assert len(asyncio.run(cell(url)).index) == 2


def test_only_this_module_needs_httpx():
    code = "import sys, sage_select; assert 'httpx' not in sys.modules"
    code += "; sys.modules['httpx'] = None; import sage_select.models.serving"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: sage_select.models.serving needs httpx: pip install" in done.stderr


def test_the_selector_gets_the_precision_of_the_reader(still):
    server = ServerMeasure(
        "http://localhost:8000/v1", "policy", reader=Reader(mixed_precision=torch.bfloat16)
    )
    assert replace(still.selector, measure=server).mixed_precision == torch.bfloat16

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial

import numpy as np
import pytest
import torch
from stand_in_server import Reply, serving

from sage_select import Constant, PreferenceDataset, Reader, ServerMeasure, measure
from sage_select.models import serving as serving_module

PAIR = r"ServerMeasure: pair \w+ \(row \d+, (chosen|rejected)\): "
unchecked = partial(ServerMeasure, name="policy", check_responses=0, show_progress=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(serving_module, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def pool(still) -> PreferenceDataset:
    return still.dataset.take(np.arange(12))


@pytest.fixture(scope="module")
def few(still) -> PreferenceDataset:
    return still.dataset.take([5, 3])


def fails(
    still, pool, words, alter=None, error=ValueError, *, settings=(), name="policy", **options
):
    """A pass against a server like this ends with this error."""
    with (
        serving(still.model, name, alter=alter or Records(), **options) as url,
        pytest.raises(error, match=words),
    ):
        unchecked(url, concurrency=1, **dict(settings))(None, pool)


def moved(model, by: float):
    """A copy of a model whose weights are a little different."""
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + by)
    return other


class Records:
    """A server's replies as they are, and what was asked of it; `per` may change those to POST."""

    def __init__(self, per: Callable[[dict, Reply, int], Reply] | None = None) -> None:
        self.per = per
        self.asked: list[str] = []
        self.prompts: list[list[int]] = []

    def __call__(self, path: str, request: dict, reply: Reply) -> Reply:
        self.asked.append(path)
        if not request:
            return reply
        self.prompts.append(request["prompt"])
        return self.per(request, reply, len(self.prompts)) if self.per else reply


@pytest.mark.parametrize("shape", ["vllm", "sglang", "echo"])
def test_the_same_as_the_local_measure(shape, still, pool):
    expected = measure(still.model, pool)
    with serving(still.model, shape=shape) as url:
        found = ServerMeasure(url, "policy")(still.model, pool)
    for field in ("chosen", "rejected"):
        torch.testing.assert_close(
            getattr(found, field), getattr(expected, field), atol=1e-4, rtol=0
        )
    assert found.index.tolist() == expected.index.tolist()
    assert found.chosen_tokens.tolist() == expected.chosen_tokens.tolist()
    assert found.chosen.dtype == torch.float64


@pytest.mark.parametrize("shape", ["vllm", "sglang"])
def test_a_real_model(shape, data, stories):
    model, tokenizer = stories
    pairs = PreferenceDataset.read(
        data / "pairs" / "gsm8k_verified.parquet", tokenizer=tokenizer, max_length=400
    ).take(np.arange(0, 60, 10))
    with serving(model, shape=shape) as url:
        found = ServerMeasure(url, "policy")(model, pairs)
    torch.testing.assert_close(found.chosen, measure(model, pairs).chosen, atol=0, rtol=1e-6)


def test_what_bf16_costs(data, stories):
    """The figures of docs/serving.md."""
    model, tokenizer = stories
    pairs = PreferenceDataset.read(
        data / "pairs" / "gsm8k_verified.parquet", tokenizer=tokenizer, max_length=512
    ).take(np.arange(0, 60, 5))
    with serving(deepcopy(model).to(torch.bfloat16)) as url:
        server = ServerMeasure(url, "policy")
        assert torch.equal(server(model, pairs).chosen, server(model, pairs).chosen)
    assert 1e-3 < server.checks[-1].mean < 1e-2


def test_the_selector_keeps_the_same(still, pool):
    policy = moved(still.model, 0.1)
    local = replace(still.selector, keep=Constant(0.5))
    with serving(policy) as url:
        elsewhere = replace(local, measure=ServerMeasure(url, "policy"))
        found, expected = (s.select(policy, pool, 1) for s in (elsewhere, local))
    assert found.rule == "score"
    assert found.indices.tolist() == expected.indices.tolist()


def test_each_distinct_response_is_asked_for_once(still, few):
    pool = few.take([5, 3, 5])
    with serving(still.model, alter=(seen := Records())) as url:
        ServerMeasure(url, "policy", concurrency=3)(still.model, pool)
    assert len(seen.prompts) == len({tuple(prompt) for prompt in seen.prompts}) == 4
    assert {tuple(s.tokens) for s in pool.sequences()} == {tuple(p) for p in seen.prompts}


def test_the_order_of_answers_changes_not_one_bit(still, pool):
    def late(request, reply, number):
        time.sleep(0.02 * (number % 3))
        return reply

    found = []
    for concurrency, per in ((1, None), (8, late)):
        with serving(still.model, alter=Records(per)) as url:
            found.append(unchecked(url, concurrency=concurrency)(None, pool))
    assert all(map(torch.equal, *found))


def test_weights_are_sent_once_a_pass_and_before_any_request(still, few):
    seen = Records()
    with serving(still.model, alter=seen) as url:
        sent = lambda model: seen.asked.append(model)  # noqa: E731
        server = ServerMeasure(url, "policy", sync=sent)
        server(still.model, few)
        length = len(seen.asked)
        server(still.model, few)
    assert [i for i, what in enumerate(seen.asked) if what is still.model] == [0, length]
    assert seen.asked[1] == "/v1/models"


def test_stale_weights_are_refused_before_the_pool_is_scored(still, pool):
    policy = moved(still.model, 0.3)
    with serving(still.model, alter=(seen := Records())) as url:
        server = ServerMeasure(url, "policy", check_responses=4)
        with pytest.raises(ValueError, match=r"differ from the local model's by 0\.\d+ nats per"):
            server(policy, pool)
        assert len(seen.prompts) == 4
        loose = replace(server, tolerance=10.0)
        loose(policy, pool)
    for agreement in (server.checks[-1], loose.checks[-1]):
        assert server.tolerance < agreement.mean <= agreement.largest
        assert agreement.responses == 4


def test_weights_that_were_sent_are_accepted(still, few):
    served, policy = deepcopy(still.model), moved(still.model, 0.1)
    with serving(served) as url:
        server = ServerMeasure(
            url, "policy", sync=lambda model: served.load_state_dict(model.state_dict())
        )
        server(policy, few)
    assert [check.largest < 1e-5 for check in server.checks] == [True]


def test_without_a_local_model(still, few):
    with serving(still.model) as url:
        with pytest.raises(ValueError, match="pass it, or check_responses=0"):
            ServerMeasure(url, "policy")(None, few)
        found = unchecked(url)(None, few)
    torch.testing.assert_close(found.chosen, measure(still.model, few).chosen, atol=1e-4, rtol=0)


def test_an_empty_pool_asks_nothing(still):
    nowhere = ServerMeasure("http://127.0.0.1:9", "policy")
    assert len(nowhere(still.model, still.dataset.take([])).index) == 0


def logprobs(reply: Reply, change: Callable[[list], object]) -> Reply:
    """A reply with its two lists of log-probs changed alike."""
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


def last(value):
    return lambda request, reply, number: logprobs(
        reply, lambda logps: logps.__setitem__(len(request["prompt"]) - 1, value)
    )


def fewer(request, reply, number):
    return logprobs(reply, lambda logps: logps.__delitem__(slice(2)))


def longer(request, reply, number):
    return logprobs(reply, lambda logps: logps.extend([-1.0, -1.0]))


def extended(request, reply, number):
    """With a token put in front, and nothing generated: as many as there should be."""
    reply.body["usage"]["prompt_tokens"] += 1
    return reply


def other_prompt(request, reply, number):
    reply.body["choices"][0]["prompt_token_ids"] = [7, *request["prompt"][1:]]
    return reply


def without(request, reply, number):
    return Reply({"choices": [{"index": 0, "text": "4", "logprobs": None}]})


@pytest.mark.parametrize("shape", ["vllm", "sglang", "echo"])
@pytest.mark.parametrize(
    ("per", "words"),
    [
        (fewer, r"is about \d+ tokens, but \d+ were sent; the server cuts or extends"),
        (longer, r"is about \d+ tokens, but \d+ were sent"),
        (extended, r"is about \d+ tokens, but \d+ were sent"),
        (other_prompt, r"is about token 7 at position 0, where \d+ was sent"),
        (last(None), r"has None for the token at position \d+, which is no finite log-prob"),
        (last(float("nan")), "has nan for the token"),
        (last(-float("inf")), "has -inf for the token"),
        (last(-9999.0), "has -9999.0 for the token"),
        (last(3.5), r"has 3.5 for the token .* \(vLLM: --logprobs-mode raw_logprobs\)"),
        (without, r"has no prompt log-probs, neither as prompt_logprobs nor as logprobs of an ech"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:12],
)
def test_answers_that_cannot_be_used(shape, per, words, still, few):
    fails(still, few, PAIR + "its answer " + words, Records(per), shape=shape)


@pytest.mark.parametrize("shape", ["vllm", "echo"])
def test_other_tokens_are_noticed_wherever_ids_are_given(shape, still, few):
    def other_tokens(request, reply, number):
        choice = reply.body["choices"][0]
        choice.pop("prompt_token_ids", None)
        choice["logprobs"]["tokens"] = [f"token_id:{t}" for t in [*request["prompt"], 0]]
        choice["logprobs"]["tokens"][3] = "token_id:999"
        for entry in choice.get("prompt_logprobs", [])[3:4]:
            entry["999"] = entry.popitem()[1]
        return reply

    words = r"its answer is about token 999 at position 3, where \d+ was sent"
    fails(still, few, words, Records(other_tokens), shape=shape)


def test_the_pair_is_named(still, pool):
    bad = pool.take([9]).sequences()[1].tokens.tolist()

    def one(request, reply, number):
        return fewer(request, reply, number) if request["prompt"] == bad else reply

    words = rf"pair {pool.ids[9]} \(row 9, rejected\): its answer"
    fails(still, pool.take([4, 9, 2]), words, Records(one))


def test_a_refusal_is_shown_and_not_tried_again(still, few):
    said = {"error": {"message": "This model's maximum context length is 8 tokens", "code": 400}}
    seen = Records(lambda request, reply, number: Reply(said, 400))
    fails(still, few, PAIR + "POST .*/v1/completions: HTTP 400: This model's max", seen)
    assert len(seen.prompts) == 1


@pytest.mark.parametrize(
    "body", [{"object": "error", "message": "no such token"}, "no such token", ["no such token"]]
)
def test_what_a_server_says_of_an_error(body, still, few):
    fails(still, few, "no such token", Records(lambda request, reply, number: Reply(body, 422)))


def test_a_model_that_is_not_served(still, few):
    fails(still, few, "does not serve 'policy'; it has base", name="base")


def test_a_response_that_the_server_has_no_room_for(still, few):
    longest = int(few.sequence_lengths.max())
    words = rf"{PAIR[:-2]} has {longest} tokens, .* max_length={longest - 1}, or serve"
    fails(still, few, words, seen := Records(), max_model_len=longest)
    assert seen.prompts == []
    with serving(still.model, max_model_len=longest + 1) as url:
        unchecked(url)(None, few)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply("<html>Hello</html>"), "no JSON but '<html>Hello</html>'; url must be where the A"),
        (Reply({"detail": "Not Found"}, 404), "HTTP 404: .*Not Found.*; url must be where the API"),
        (Reply({"object": "list"}), "/v1/models has no list: {'object': 'list'}"),
    ],
)
def test_a_url_at_which_there_is_something_else(reply, words, still, few):
    fails(still, few, words, lambda *_: reply)


def test_the_key_is_sent_and_not_shown(still, few):
    fails(still, few, "/v1/models: HTTP 401: .*Unauthorized", api_key="secret")
    with serving(still.model, api_key="secret") as url:
        server = unchecked(url, api_key="secret")
        server(None, few)
    assert "secret" not in repr(server)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status, still, few):
    seen = Records(lambda request, reply, number: Reply("", status) if number % 3 else reply)
    with serving(still.model, alter=seen) as url:
        found = unchecked(url, concurrency=1)(None, few)
    assert len(seen.prompts) == 12
    torch.testing.assert_close(found.chosen, measure(still.model, few).chosen, atol=1e-4, rtol=0)


def test_attempts_are_bounded(still, few):
    seen = Records(lambda request, reply, number: Reply({"message": "overloaded"}, 503))
    words = PAIR + r"POST .*HTTP 503: overloaded \(attempt 3 of 3\)"
    fails(still, few, words, seen, ConnectionError, settings={"retries": 2})
    assert len(seen.prompts) == 3


def test_a_server_that_names_a_time_is_left_alone_until_then(still, few):
    times = []

    def busy(request, reply, number):
        times.append(time.monotonic())
        return reply if number > 1 else Reply("", 429, {"Retry-After": "0.3"})

    with serving(still.model, alter=Records(busy)) as url:
        unchecked(url, concurrency=1)(None, few)
    assert times[1] - times[0] >= 0.3


@pytest.mark.parametrize(
    "in_words",
    [lambda: "3600", lambda: format_datetime(datetime.now(UTC) + timedelta(hours=1))],
    ids=["seconds", "a date"],
)
def test_a_server_that_wants_more_time_than_there_is(in_words, still, few):
    busy = Records(lambda request, reply, number: Reply("", 429, {"Retry-After": in_words()}))
    words = r"asks to wait for 3[56]\d\d seconds, longer than timeout=120"
    fails(still, few, words, busy, ConnectionError)


def test_nobody_there(few):
    with pytest.raises(ConnectionError, match=r"GET http://127.0.0.1:9/v1/models: ConnectError"):
        unchecked("http://127.0.0.1:9/v1", retries=1)(None, few)


def test_no_answer_in_time(still, few):
    slow = Records(lambda request, reply, number: time.sleep(2.0) or reply)
    words = PAIR + r"POST .*/completions: ReadTimeout \(attempt 2 of 2\); .* a longer timeout"
    fails(still, few, words, slow, ConnectionError, settings={"timeout": 1.0, "retries": 1})


@pytest.fixture
def interruptible():
    """Ctrl-C as on a terminal, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_threads(still, few, interruptible):
    held = threading.Event()

    def never(request, reply, number):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        held.wait(30)
        return reply

    with serving(still.model, alter=Records(never)) as url:
        before, began = set(threading.enumerate()), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            unchecked(url, concurrency=1)(None, few)
        assert time.monotonic() - began < 10
        after = set(threading.enumerate()) - before
        held.set()
    assert [t for t in after if "process_request_thread" not in t.name] == []  # the server's own


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8000/v1"}, "url must start with http:// or https://, got 'localhost"),
        ({"check_responses": -1}, "check_responses must be 0 or more, got -1"),
        ({"retries": -1}, "retries must be 0 or more"),
        ({"concurrency": 0}, "concurrency must be 1 or more, got 0"),
        ({"tolerance": float("nan")}, "tolerance must be positive, got nan"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
    ],
)
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        ServerMeasure(**{"url": "http://host/v1", "name": "policy", **options})


def test_inside_a_loop_that_is_running_as_in_a_notebook(still, few):
    async def cell(url):
        return unchecked(url)(None, few)

    with serving(still.model) as url:
        assert len(asyncio.run(cell(url)).index) == 2


def test_httpx_is_needed_here_and_nowhere_else():
    code = "import sys, sage_select; assert 'httpx' not in sys.modules"
    code += "; sys.modules['httpx'] = None; import sage_select.models.serving"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: sage_select.models.serving needs httpx: pip install" in done.stderr


def test_the_selector_knows_how_coarse_training_is(still):
    server = ServerMeasure(
        "http://localhost:8000/v1", "policy", reader=Reader(mixed_precision=torch.bfloat16)
    )
    assert replace(still.selector, measure=server).mixed_precision == torch.bfloat16

"""A stand-in for vLLM and SGLang: a completions endpoint that returns prompt log-probs.

It serves a local model and replies in the formats of those servers, so that scoring on a server
can be tried and tested on a laptop. It is neither fast nor complete: one prompt of token ids per
request, one arbitrary token generated.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

Shape = Literal["vllm", "sglang", "echo"]


class Reply(NamedTuple):
    """A reply: text and bytes are sent unchanged, an iterator's parts one by one, the rest as JSON.

    An iterator's parts are sent without a Content-Length, as they come.
    """

    body: Any
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


def completion(model: Any, request: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Reply to `POST /v1/completions` with the prompt's log-probs, in a server's format."""
    tokens = request["prompt"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    table = logits.float().log_softmax(-1)
    # the first token has no prediction, and servers report it as null
    logps = [None, *table[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()]
    names = [f"token_id:{t}" if shape == "vllm" else f"<{t}>" for t in [*tokens, 0]]
    echoed = {"tokens": names, "token_logprobs": [*logps, float(table[-1, 0])]}
    choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": echoed}
    if shape != "echo":
        choice["prompt_token_ids"] = tokens
    if shape == "vllm":
        pairs = zip(tokens[1:], logps[1:], strict=True)
        choice["prompt_logprobs"] = [None, *({str(t): {"logprob": p}} for t, p in pairs)]
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
    answer = {"object": "text_completion", "model": request["model"], "choices": [choice]}
    return {**answer, "usage": usage}


@contextmanager
def serving(
    model: Any,
    name: str = "policy",
    *,
    shape: Shape = "vllm",
    max_model_len: int = 4096,
    api_key: str | None = None,
    alter: Callable[[str, dict[str, Any], Reply], Reply] = lambda path, request, reply: reply,
) -> Iterator[str]:
    """Serve a model at 127.0.0.1, on a free port.

    Args:
        model: A causal language model; each request runs its current weights.
        name: Name under which the model is served.
        shape: Server whose format to imitate; "echo" is the plain OpenAI format.
        max_model_len: Reported limit on prompt tokens plus generated tokens.
        api_key: Key that requests must send; None accepts every request.
        alter: Called with path, request and reply; returns the reply to send.

    Yields:
        The API's base URL.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            card = {"id": name, "object": "model", "max_model_len": max_model_len}
            self.reply({}, {"object": "list", "data": [card]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(request, completion(model, request, shape))

        def reply(self, request: dict[str, Any], body: Any) -> None:
            authorized = api_key is None or self.headers["Authorization"] == f"Bearer {api_key}"
            reply = Reply(body) if authorized else Reply({"error": "Unauthorized"}, 401)
            body, status, headers = alter(self.path, request, reply)
            self.close_connection = isinstance(body, Iterator)
            if not isinstance(body, Iterator):
                text = body if isinstance(body, str | bytes) else json.dumps(body)
                content = text.encode() if isinstance(text, str) else text
                headers = {**headers, "Content-Length": str(len(content))}
                body = iter([content])
            with suppress(ConnectionError):  # the client may have closed the connection
                self.send_response(status)
                for header, value in headers.items():
                    self.send_header(header, value)
                self.end_headers()
                for part in body:
                    self.wfile.write(part)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing; the base class would log each request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

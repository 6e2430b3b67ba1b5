"""Services at the other end of a socket: as much of OpenAI's and Anthropic's API as a client needs to see."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Service(ThreadingHTTPServer):
    """Answers with `words`, one chunk each, `word_s` seconds apart; a first message with `calls` of tools, if there
    are any. Keeps what it was asked. `owner`: of its model; `key`: it asks for this one. `breaks`: how an answer breaks
    after its first two events, if it does: it "ends" as if that were all, is "cut" off, falls "silent", goes on with
    what is no "json", or with an "error"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.words = ["so ", "it ", "is"]
        self.word_s = 0.0
        self.calls: list[tuple[str, str]] = []
        self.status = 200
        self.breaks: str | None = None
        self.owner = "someone"
        self.key: str | None = None
        self.busy: list[str] = []  # Retry-After with which it refuses, one request each, before it answers
        self.busy_code = "rate_limit_exceeded"
        self.asked: list[dict[str, Any]] = []
        self.came: list[float] = []  # when each of `asked` did, on the monotonic clock
        self.gone = 0
        self.proxy_keys: set[str] = set()  # that it was shown as a proxy

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One connection of a Service."""

    server: Service

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        if self._may_come_in():
            card = {"id": "m", "object": "model", "owned_by": self.server.owner, "created": 1}
            self._json(200, {"object": "list", "data": [card]})

    def _may_come_in(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._json(401, {"error": {"message": "no such key", "type": "x", "code": "invalid_api_key"}})
        return False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may_come_in():
            return
        self.server.asked.append({"path": self.path, **body})
        self.server.came.append(time.monotonic())
        if (key := self.headers["Proxy-Authorization"]) is not None:
            self.server.proxy_keys.add(key)
        if self.server.busy:
            told = {"error": {"message": "too many", "type": "rate_limit_error", "code": self.server.busy_code}}
            return self._json(429, told, {"Retry-After": self.server.busy.pop(0)})
        if self.server.status != 200:
            return self._json(self.server.status, {"error": {"message": "no", "type": "x", "code": "x"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self.server.breaks == "cut":
            self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            calls = self.server.calls if len(body.get("messages", [])) == 1 else []
            events = anthropic(self.server.words) if "messages" in self.path else openai(self.server.words, calls)
            for at, event in enumerate(events):
                if at == 2 and self.server.breaks is not None:
                    return self._break()
                name = f"event: {event['type']}\n" if "type" in event else ""
                self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                time.sleep(self.server.word_s)
            if "messages" not in self.path:
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.gone += 1

    def _break(self) -> None:
        kind = self.server.breaks
        if kind == "silent":
            self.rfile.read()  # until the client has gone
        elif kind == "json":
            name = b"event: content_block_delta\n" if "messages" in self.path else b""
            self.wfile.write(name + b"data: {no json\n\n")
        elif kind == "error":
            told = {"type": "error", "error": {"type": "overloaded_error", "message": "too many"}}
            self.wfile.write(f"event: error\ndata: {json.dumps(told)}\n\n".encode())

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def openai(words: list[str], calls: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Chunks of a chat completion: calls of tools, their arguments in two pieces, or else words."""
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    for index, (name, arguments) in enumerate(calls):
        for piece in ({"name": name, "arguments": arguments[:5]}, {"arguments": arguments[5:]}):
            delta = {"tool_calls": [{"index": index, "id": f"{index}", "type": "function", "function": piece}]}
            yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    if calls:
        yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
        return
    for word in words:
        yield {**head, "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    yield {**head, "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}


def anthropic(words: list[str]) -> Iterator[dict[str, Any]]:
    """Events of a message."""
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
    usage = {"input_tokens": 7, "output_tokens": 0, "cache_read_input_tokens": 2}
    yield {"type": "message_start", "message": {**message, "stop_sequence": None, "usage": usage}}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for word in words:
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
    yield {"type": "content_block_stop", "index": 0}
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": {"output_tokens": 3}}
    yield {"type": "message_stop"}


@contextmanager
def serving() -> Iterator[Service]:
    """A running service."""
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield service
        service.shutdown()

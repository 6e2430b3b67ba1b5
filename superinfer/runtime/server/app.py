"""The HTTP application: OpenAI's routes in front of a `TextClient`. See docs/serving.md."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Protocol

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from superinfer.errors import EngineUnavailableError, SuperinferError
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.server import completion, schema
from superinfer.runtime.server.chat import ChatWriter, prompt_of, sampling_of_chat
from superinfer.runtime.server.completion import CompletionWriter, prompts_of, sampling_of_completion
from superinfer.runtime.server.errors import ApiError, as_api_error, bad_request
from superinfer.runtime.server.live import add_page
from superinfer.runtime.server.params import check_ids, check_length, slo_of, stop_of
from superinfer.runtime.server.report import Tally
from superinfer.runtime.server.schema import ChatRequest, Common, CompletionRequest
from superinfer.runtime.server.stream import ClientGone, EventStream, collect, deltas_of, events, while_connected
from superinfer.runtime.text import TextClient, TextDelta, TextRequest, TextResult

MAX_BODY_BYTES = 32 << 20
HEALTH_TIMEOUT_S = 2.0


class Writer(Protocol):
    """What the two endpoints' writers have in common."""

    def chunks(self, delta: TextDelta) -> Iterable[bytes]: ...

    def whole(self, results: list[TextResult]) -> bytes: ...


def create_app(text: TextClient, *, model_name: str = "") -> FastAPI:
    """The application that answers for one engine. `model_name`: what clients call the model; "": the engine's name.

    It does not own `text`.
    """
    name = model_name or text.info.model
    app = FastAPI(title="superinfer", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    add_page(app, text, name)
    created = int(time.time())
    card = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "superinfer",
        "max_model_len": text.info.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [card]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        _check_model(model, name)
        return _json(card)

    @app.get("/health")
    async def health() -> Response:
        return await _health(text, name)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = schema.parse(await _body(http), ChatRequest, schema.CHAT_PASS)
        _check_model(request.model, name)
        sampling = sampling_of_chat(request)
        # Rendering and tokenizing a long prompt takes a while, in which the other streams must go on.
        prompt = await asyncio.to_thread(prompt_of, request, text.tokenizer)
        check_length("messages", len(prompt), sampling, text.info)
        requests = [_text_request(request, prompt, sampling, text)]
        tally = Tally(sampling.n, sampling.n, slo=request.slo is not None)
        writer = ChatWriter(request, text.tokenizer, tally, choices=sampling.n)
        return await _answer(http, text, requests, writer, stream=bool(request.stream))

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        request = schema.parse(await _body(http), CompletionRequest, schema.COMPLETION_PASS)
        _check_model(request.model, name)
        prompts = await asyncio.to_thread(prompts_of, request, text.tokenizer, text.info)
        sampling = sampling_of_completion(request, max(map(len, prompts)), text.info)
        for prompt in prompts:
            check_length("prompt", len(prompt), sampling, text.info)
        choices = len(prompts) * sampling.n
        if choices > completion.MAX_PROMPTS:
            message = f"n={sampling.n} of {len(prompts)} prompts are over {completion.MAX_PROMPTS} choices; lower n"
            raise bad_request(message, param="n")
        requests = [_text_request(request, prompt, sampling, text) for prompt in prompts]
        tally = Tally(choices, sampling.n, slo=request.slo is not None)
        prompt_tokens = sum(map(len, prompts))
        writer = CompletionWriter(request, text.tokenizer, tally, choices=choices, prompt_tokens=prompt_tokens)
        return await _answer(http, text, requests, writer, stream=bool(request.stream))

    return app


async def _answer(
    http: Request, text: TextClient, requests: list[TextRequest], writer: Writer, *, stream: bool
) -> Response:
    deltas = deltas_of(text, requests)
    if not stream:
        choices = sum(request.sampling.n for request in requests)
        return Response(
            writer.whole(await while_connected(http, collect(deltas, choices))), media_type="application/json"
        )
    # Waiting for the first delta before the headers go out gives an error until then its HTTP status.
    first = await while_connected(http, _first(deltas))
    return EventStream(events(first, deltas, writer.chunks))


async def _first(deltas: AsyncGenerator[TextDelta, None]) -> TextDelta:
    return await anext(deltas)


def _text_request(request: Common, prompt: list[int], sampling: SamplingParams, text: TextClient) -> TextRequest:
    check_ids("stop_token_ids", sampling.stop_token_ids, text.info)
    return TextRequest(
        prompt=prompt,
        sampling=sampling,
        stop=stop_of(request),
        slo=slo_of(request.slo),
        cache_salt=request.cache_salt or "",
    )


async def _body(http: Request) -> bytes:
    """The request's body, at most MAX_BODY_BYTES of it."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            message = f"the request body is over {MAX_BODY_BYTES >> 20} MiB; send less at once"
            raise ApiError(413, message, code="request_too_large")
    return bytes(body)


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        message = f"model {asked!r:.200} is not served here; use {served!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _health(text: TextClient, name: str) -> Response:
    report = await text.client.health(HEALTH_TIMEOUT_S)
    if report.status != "ok":
        raise EngineUnavailableError("the engine is stopping")
    return _json(
        {
            "status": report.status,
            "model": name,
            "running": report.running,
            "waiting": report.waiting,
            "uptime_s": round(report.uptime_s, 3),
            "idle_s": round(report.idle_s, 3),
        }
    )


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    async def answer(http: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def routing(http: Request, error: Exception) -> Response:
        """No such URL, or not with this method."""
        assert isinstance(error, HTTPException)
        message = f"{http.method} {http.url.path}: {error.detail}; the routes are /v1/models, /v1/chat/completions, "
        message += "/v1/completions and /health"
        response = ApiError(error.status_code, message, code="no_such_route").response()
        response.headers.update(error.headers or {})
        return response

    async def nobody(http: Request, error: Exception) -> Response:
        return Response(status_code=499)  # not sent: the client is gone

    for known in (ApiError, SuperinferError, UnicodeEncodeError):
        app.add_exception_handler(known, answer)
    app.add_exception_handler(Exception, answer)
    app.add_exception_handler(HTTPException, routing)
    for gone in (ClientGone, ClientDisconnect):
        app.add_exception_handler(gone, nobody)

"""The HTTP application: OpenAI's routes in front of a `TextClient`. See docs/serving.md."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from superinfer.errors import SuperinferError
from superinfer.runtime.protocol import RequestReport, TokenLogprob
from superinfer.runtime.server import completion, schema, tokens
from superinfer.runtime.server.chat import prompt_of, sampling_of_chat
from superinfer.runtime.server.chat_answer import ChatWriter
from superinfer.runtime.server.completion import CompletionWriter, only_prompt, prompts_of, sampling_of_completion
from superinfer.runtime.server.direct import Application, Direct
from superinfer.runtime.server.errors import ApiError, as_api_error, bad_request
from superinfer.runtime.server.gate import Gate
from superinfer.runtime.server.live import LIVE
from superinfer.runtime.server.operations import add_operations, answered
from superinfer.runtime.server.params import check_length, interval_of, least_output, truncated
from superinfer.runtime.server.parsing.pieces import AnswerReader
from superinfer.runtime.server.refused import CHAT_PASS, COMPLETION_PASS, RESPONSES_PASS
from superinfer.runtime.server.relay import ClientGone, Wrote
from superinfer.runtime.server.report import Tally
from superinfer.runtime.server.responses import (
    ResponsesRequest,
    ResponseStore,
    as_stored,
    chat_of,
    in_own_names,
    items_of,
    page_of,
)
from superinfer.runtime.server.responses_answer import ResponsesWriter
from superinfer.runtime.server.schema import ChatRequest, CompletionRequest
from superinfer.runtime.server.select import select
from superinfer.runtime.server.service import Service, aside, event_response, json_response
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.server.stream import while_connected
from superinfer.runtime.server.structured import grammar_of_chat, tool_plan
from superinfer.runtime.text import TextClient, TextRequest


def create_app(text: TextClient, settings: ServerSettings | None = None) -> FastAPI:
    """The application that answers for one engine. It does not own `text`.

    Raises InvalidRequestError for settings that this model cannot have.
    """
    service = Service(text, settings or ServerSettings())
    app = Application(title="superinfer", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_models(app, service)
    _add_completions(app, service)
    _add_responses(app, service)
    _add_tokens(app, service)
    add_operations(app, service)
    _answer_head(app)
    app.front = Gate(Direct(app), service.settings, finished=answered(app, service.metrics))
    if origins := service.settings.cors_origins:
        app.front = CORSMiddleware(
            app.front, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    return app


def _answer_head(app: FastAPI) -> None:
    """HEAD is answered as GET, by the same code; whoever sends leaves the body out. Not where an answer has no end."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods and route.path != LIVE:
            route.methods.add("HEAD")


def _add_models(app: FastAPI, service: Service) -> None:
    card = {
        "id": service.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "superinfer",
        "max_model_len": service.text.info.max_model_len,
    }

    listed = {"object": "list", "data": [card]}

    @app.get("/v1/models")
    async def models() -> Response:
        return _json(listed)

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if not model:  # a slash too many
            return _json(listed)
        service.check_model(model)
        return _json(card)


def _add_completions(app: FastAPI, service: Service) -> None:
    text = service.text

    async def chat_completions(http: Request) -> Response:
        request = service.defaults.fill(service.parse(await http.body(), ChatRequest, CHAT_PASS))
        chat = await prepare_chat(http, service, request)
        writer = ChatWriter(request, text.tokenizer, chat.tally, chat.readers, prompt=chat.prompt)
        stream, interval = bool(request.stream), interval_of(request)
        return await service.answer(http, [chat.request], writer, stream=stream, interval=interval, wrote=chat.wrote)

    async def completions(http: Request) -> Response:
        request = service.defaults.fill(service.parse(await http.body(), CompletionRequest, COMPLETION_PASS))
        prompts = await aside(http, prompts_of, request, text.tokenizer, text.info)
        sampling = sampling_of_completion(request, max(map(len, prompts)), text.tokenizer, text.info)
        for prompt in prompts:
            check_length("prompt", len(prompt), sampling, text.info)
        choices = len(prompts) * sampling.n
        if choices > completion.MAX_PROMPTS:
            message = f"n={sampling.n} of {len(prompts)} prompts are over {completion.MAX_PROMPTS} choices; lower n"
            raise bad_request(message, param="n")
        promise = service.promise(request, http)
        requests = [service.request(request, prompt, sampling, promise) for prompt in prompts]
        writer = CompletionWriter(
            request, text.tokenizer, service.tally(http, choices, sampling.n, promise), prompts, choices=choices
        )
        if request.echo and request.logprobs is not None:
            return await _scored(http, service, request, requests, writer)
        if only_prompt(request):
            return (
                event_response(writer.prompts_streamed()) if request.stream else json_response(writer.prompts_only([]))
            )
        return await service.answer(http, requests, writer, stream=bool(request.stream), interval=interval_of(request))

    # Plain routes: `Direct` calls them.
    app.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_route("/v1/completions", completions, methods=["POST"])

    async def choose(http: Request) -> Response:
        return await select(http, service)

    app.add_route("/v1/select", choose, methods=["POST"])

    @app.post("/v1/embeddings")
    async def embeddings(http: Request) -> Response:
        message = f"model {service.model!r} makes no embeddings: it generates text; ask an embedding model's server"
        raise ApiError(400, message, code="unsupported")


async def _scored(
    http: Request,
    service: Service,
    request: CompletionRequest,
    requests: list[TextRequest],
    writer: CompletionWriter,
) -> Response:
    """An answer that begins with its prompts' logprobs."""

    async def score(one: TextRequest) -> tuple[list[TokenLogprob], RequestReport | None]:
        """Logprobs of its prompt from the second token on, as nothing is before the first."""
        prompt = [token_id for token_id in one.prompt if isinstance(token_id, int)]
        if len(prompt) == 1:
            return [], None
        return await service.text.score(
            prompt,
            1,
            top=request.logprobs or 0,
            slo=one.slo,
            slo_class=one.slo_class,
            cache_salt=one.cache_salt,
            program=one.program,
        )

    found = await while_connected(http, asyncio.gather(*map(score, requests)))
    if only_prompt(request):
        return json_response(writer.prompts_only(found))
    return json_response(writer.whole_scored(await service.results(http, requests), [scores for scores, _ in found]))


class Chat(NamedTuple):
    """A chat request made ready: what to ask the engine, a reader for each choice, and who is told what was written.
    prompt: its token ids."""

    request: TextRequest
    prompt: list[int]
    tally: Tally
    readers: list[AnswerReader]
    wrote: Wrote


async def prepare_chat(http: Request, service: Service, request: ChatRequest) -> Chat:
    """Raises ApiError, InvalidRequestError."""
    text = service.text
    plan = tool_plan(request)
    sampling = sampling_of_chat(request, text.tokenizer, grammar_of_chat(request, plan, service.formats))
    constrained = sampling.grammar is not None
    prompt = await aside(http, prompt_of, request, plan, text.tokenizer, service.said, constrained=constrained)
    prompt = prompt._replace(ids=truncated(prompt.ids, request, least_output(sampling), text.info))
    check_length("messages", len(prompt.ids), sampling, text.info)
    promise = service.promise(request, http)
    skip = not service.formats.sees_special(plan.names)
    asked = service.request(request, prompt.ids, sampling, promise, skip_special=skip)
    readers = [service.reader(plan, prompt.end, constrained=constrained) for _ in range(sampling.n)]
    wrote = partial(service.said.note, asked.cache_salt, prompt.end)
    return Chat(asked, prompt.ids, service.tally(http, sampling.n, sampling.n, promise), readers, wrote)


def _add_responses(app: FastAPI, service: Service) -> None:
    store = ResponseStore(service.settings.responses_bytes)

    async def create(http: Request) -> Response:
        request = service.defaults.fill(service.parse(await http.body(), ResponsesRequest, RESPONSES_PASS))
        history: list[dict[str, Any]] = []
        if request.previous_response_id is not None:
            history = store.get(request.previous_response_id, "previous_response_id").items
        try:
            chat = await prepare_chat(http, service, chat_of(request, history))
        except ApiError as error:
            raise in_own_names(error) from None

        def keep(response_id: str, body: bytes, output: list[dict[str, Any]]) -> None:
            given = [as_stored(item) for item in items_of(request)]
            store.put(response_id, body, history, given, output)

        kept = keep if request.store is not False and service.settings.responses_bytes else None
        writer = ResponsesWriter(request, service.text.tokenizer, chat.tally, chat.readers[0], kept)
        return await service.answer(http, [chat.request], writer, stream=bool(request.stream), wrote=chat.wrote)

    app.add_route("/v1/responses", create, methods=["POST"])

    @app.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, stream: str = "") -> Response:
        if stream.lower() not in ("", "false", "0"):
            message = f"stream={stream:.80} is not supported here: a response is kept as a whole; retrieve it without"
            raise bad_request(message, param="stream", code="unsupported_parameter")
        return json_response(store.get(response_id).body)

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, http: Request) -> Response:
        return _json(page_of(store.get(response_id).input, http.query_params))

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        store.remove(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})


def _add_tokens(app: FastAPI, service: Service) -> None:
    text = service.text

    @app.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        request = schema.parse(await http.body(), tokens.TokenizeRequest, {})
        if request.model is not None:
            service.check_model(request.model)
        return _json(await aside(http, tokens.tokenize, request, text.tokenizer, text.info))

    @app.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        request = schema.parse(await http.body(), tokens.DetokenizeRequest, {})
        if request.model is not None:
            service.check_model(request.model)
        return _json(await aside(http, tokens.detokenize, request, text.tokenizer, text.info))


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    async def answer(http: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def routing(http: Request, error: Exception) -> Response:
        """No such URL, or not with this method."""
        assert isinstance(error, HTTPException)
        message = f"{http.method} {http.url.path}: {error.detail}; the routes are those of /openapi.json"
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

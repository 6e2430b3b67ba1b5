"""What the routes share: one engine's client, the model's formats, the operator's settings, and how to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response

from superinfer.runtime.protocol import FinishReason, RequestReport, SamplingParams
from superinfer.runtime.server.errors import ApiError
from superinfer.runtime.server.metrics import Metrics
from superinfer.runtime.server.model_defaults import ModelDefaults, model_defaults
from superinfer.runtime.server.params import check_ids, stop_of
from superinfer.runtime.server.parsing.families import formats_of
from superinfer.runtime.server.parsing.pieces import AnswerReader
from superinfer.runtime.server.promises import Promise, Promised, Promises
from superinfer.runtime.server.refused import Passing
from superinfer.runtime.server.relay import Feed, Outbox, Wrote
from superinfer.runtime.server.report import Tally
from superinfer.runtime.server.said import Said
from superinfer.runtime.server.schema import Common, parse
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.server.stream import EVENT_HEADERS, EventStream, Writer, collect, watched
from superinfer.runtime.server.structured import ToolPlan
from superinfer.runtime.server.tracing import trace_request, tracer_to
from superinfer.runtime.text import TextClient, TextDelta, TextRequest, TextResult

SHORT_BODY = 16384  # bytes; about a millisecond of rendering and tokenizing, mostly less: what was said before is kept

T = TypeVar("T")


class ForModel(Protocol):
    """A request that names a model."""

    @property
    def model(self) -> str: ...


Asked = TypeVar("Asked", bound=ForModel)


class Service:
    """One engine behind HTTP. Does not own `text`."""

    def __init__(self, text: TextClient, settings: ServerSettings) -> None:
        """Raises InvalidRequestError for a parser that is unknown, ModelLoadError for defaults that cannot be."""
        self.text = text
        self.settings = settings
        self.model = settings.model_name or text.info.model
        self.promises = Promises(settings)
        self.metrics = Metrics(self.model)
        self.said = Said(text.tokenizer)
        own = settings.sampling_defaults == "model"
        self.defaults = model_defaults(Path(text.info.path)) if own else ModelDefaults()
        self._outbox = Outbox()
        self._tracer = tracer_to(settings.otlp_endpoint, self.model) if settings.otlp_endpoint else None
        self.formats = formats_of(
            text.tokenizer,
            text.info.architecture,
            tools=settings.tool_parser,
            reasoning=settings.reasoning_parser,
        )

    def parse(self, body: bytes, cls: type[Asked], passing: Passing) -> Asked:
        """The request in `body`, for the model served here, which it need not name. Raises ApiError."""
        request = parse(body, cls, passing, model=self.model)
        self.check_model(request.model)
        return request

    def check_model(self, asked: str) -> None:
        """Raises ApiError for another model than the one served."""
        if asked != self.model:
            message = f"model {asked!r:.200} is not served here; use {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def promise(self, request: Promised, http: Request) -> Promise:
        """What is promised to this request. Raises ApiError."""
        return self.promises.of(request, http.headers, key_of(http.headers))

    def request(
        self,
        request: Common,
        prompt: Sequence[int],
        sampling: SamplingParams,
        promise: Promise,
        *,
        skip_special: bool = True,
    ) -> TextRequest:
        """One prompt's request. Raises ApiError."""
        check_ids("stop_token_ids", sampling.stop_token_ids, self.text.info)
        check_ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias], self.text.info)
        check_ids("allowed_token_ids", sampling.allowed_token_ids or (), self.text.info)
        return TextRequest(
            prompt=prompt,
            sampling=sampling,
            stop=stop_of(request),
            slo=promise.slo,
            slo_class=promise.slo_class,
            cache_salt=request.cache_salt or "",
            # Requests of one key are one conversation or agent; a hint, which never parts what could be shared.
            program=request.prompt_cache_key or "",
            hints=request.hints,
            skip_special=skip_special,
        )

    def tally(self, http: Request, choices: int, per_prompt: int, promise: Promise) -> Tally:
        """One whose reports reach the metrics, the trace and the access log."""
        log = http.scope.setdefault("superinfer.log", {})
        carrier = dict(http.headers) if self._tracer is not None else {}

        def observe(report: RequestReport, reason: FinishReason, promise: Promise) -> None:
            self.metrics.finished(report, reason, promise)
            if self._tracer is not None:
                trace_request(self._tracer, carrier, report, reason, promise)
            log["prompt_tokens"] = report.prompt_tokens
            log["output_tokens"] = log.get("output_tokens", 0) + report.output_tokens
            if report.met is not None:
                log["slo_class"], log["slo_met"] = promise.slo_class, log.get("slo_met", True) and report.met

        return Tally(choices, per_prompt, promise, observe)

    def reader(self, plan: ToolPlan, prompt_end: str, *, constrained: bool) -> AnswerReader:
        """Tells one choice's reasoning, content and tool calls apart."""
        return self.formats.reader(
            plan.names,
            prompt_end=prompt_end,
            named=plan.named,
            listed=plan.listed,
            constrained=constrained,
            one_call=plan.one_call,
        )

    async def answer(
        self,
        http: Request,
        requests: list[TextRequest],
        writer: Writer,
        *,
        stream: bool,
        interval: float = 0.0,
        wrote: Wrote | None = None,
    ) -> Response:
        """Run the requests and answer. An error before the first token has its HTTP status, in a stream too. interval,
        wrote: see Feed."""
        if not stream:
            return json_response(writer.whole(await self.results(http, requests, wrote)))
        feed, first = await self.begin(http, requests, interval, wrote)
        return EventStream(feed, first, writer, write_timeout=self.settings.write_timeout_s)

    async def results(self, http: Request, requests: list[TextRequest], wrote: Wrote | None = None) -> list[TextResult]:
        """All choices, finished."""
        with Feed(self.text, requests, eager=False, wrote=wrote) as feed, watched(http.scope, http.receive, feed.leave):
            await feed.start()
            return await collect(feed, sum(request.sampling.n for request in requests))

    async def begin(
        self, http: Request, requests: list[TextRequest], interval: float = 0.0, wrote: Wrote | None = None
    ) -> tuple[Feed, list[TextDelta]]:
        """A started feed, and what came first."""
        feed = Feed(self.text, requests, eager=True, outbox=self._outbox, interval=interval, wrote=wrote)
        try:
            with watched(http.scope, http.receive, feed.leave):
                await feed.start()
                return feed, await feed.get()
        except BaseException:
            feed.close()
            raise


async def aside(http: Request, work: Callable[..., T], *given: Any, **named: Any) -> T:
    """The result of `work`, on a thread where the request is long: tokenizing it takes a while, in which the other
    streams must go on. A short one takes less time than a thread's switch would."""
    if len(await http.body()) <= SHORT_BODY:
        return work(*given, **named)
    return await asyncio.to_thread(work, *given, **named)


def json_response(body: bytes) -> Response:
    """A whole answer."""
    return Response(body, media_type="application/json")


def event_response(body: bytes) -> Response:
    """A stream that is there as a whole."""
    response = Response(body)
    response.raw_headers = [*EVENT_HEADERS, (b"content-length", str(len(body)).encode())]
    return response


def key_of(headers: Mapping[str, str]) -> str:
    """The API key that a request brings, as OpenAI's clients or as Azure's send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")

"""OpenAI-compatible services through the `openai` client: our own server, others' servers, and OpenAI."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from superinfer.errors import (
    DeadlineMissedError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    SuperinferError,
    UnsupportedError,
    error_from_code,
)
from superinfer.lang.backend import CallRequest
from superinfer.lang.loop import language_loop
from superinfer.lang.openai_tools import CallDeltas, wire_messages
from superinfer.lang.prompt import Chat, Prompt
from superinfer.lang.remote import Abilities, Answering, RemoteBackend, given, reading
from superinfer.runtime.choices import ScoredChoices
from superinfer.runtime.file_limit import connections_within
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextDelta

if TYPE_CHECKING:
    from superinfer.lang.server_wire import ServerWire

CONNECTIONS = 2048  # at a time, to one service

_NAMES = {name: name for name in ("n", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")}
_OWN_NAMES = {
    name: name
    for name in ("min_tokens", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos")
}  # fmt: skip
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # by the model, where nobody says them
_ELSEWHERE = Abilities(frozenset({*_NAMES, "max_tokens"}), tools=True)
_GRAMMARS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar"}  # by our server's names
_OURS = Abilities(
    frozenset({*_NAMES, *_OWN_NAMES, "max_tokens", "grammar"}), prefix=True, plain=True, slo=True, stops=16, tools=True
)


class OpenAI(RemoteBackend):
    """A model behind OpenAI's API.

        OpenAI("gpt-5-mini")                                        # OpenAI, key in OPENAI_API_KEY
        OpenAI("embedded", base_url="http://127.0.0.1:8000/v1")     # a superinfer server, or any other

    Takes chat programs: messages, each answer written by one `gen`, and tools, whose calls come back as the text that
    `tool_calls` reads. Our own server is known by its `/v1/models`; it
    also takes beginnings of answers, text without roles, all sampling arguments, and SLOs. Elsewhere `on_miss` is
    enforced from here.
    """

    name = "OpenAI's API"

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        is_chat_model: bool | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        """is_chat_model: True takes messages only, False text without roles only; None: as the server is known to.
        timeout: seconds one request may take. max_retries: of one that was refused or did not get through.

        Raises EngineUnavailableError where `base_url` does not answer, UnsupportedError without the `openai` package,
        InvalidRequestError without a key.
        """
        openai = _library()
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)  # of the HTTP library that this version is built on
        self.ours = False
        super().__init__(model, _ELSEWHERE)
        self._limit = "max_tokens" if base_url else "max_completion_tokens"
        self._salt = ""
        self._wire: ServerWire | None = None
        connections = connections_within(CONNECTIONS)
        try:
            self._client = openai.AsyncOpenAI(
                base_url=base_url,
                api_key=api_key or ("none" if base_url else None),
                # A call that finds all connections taken waits for one, however long that is.
                timeout=openai.Timeout(timeout, pool=None),
                max_retries=max_retries,
                http_client=openai.DefaultAsyncHttpxClient(
                    limits=limits(max_connections=connections, max_keepalive_connections=connections)
                ),
            )
        except openai.OpenAIError as error:
            raise InvalidRequestError(f"OpenAI({model!r}): {error}") from None
        if base_url is not None:
            cards = language_loop().run(self._models())
            self.ours = any(card.owned_by == "superinfer" for card in cards)
            if self.ours:
                self._wire = language_loop().run(self._connect(api_key, timeout, max_retries, connections))
                self.name, self.abilities = "a superinfer server over HTTP", _OURS  # type: ignore[misc]
                self.takes_grammars = True
                served = [card.id for card in cards]
                self.model = self.model or served[0]
                if self.model not in served:
                    raise InvalidRequestError(f"model {model!r} is not served at {base_url}; it serves {served[0]!r}")
        if is_chat_model is not None and not self.ours:
            self.abilities = replace(self.abilities, plain=not is_chat_model)

    async def _connect(self, api_key: str | None, timeout: float, max_retries: int, connections: int) -> ServerWire:
        try:
            from superinfer.lang.server_wire import ServerWire  # takes a moment to import
        except ImportError:
            raise UnsupportedError(
                "a superinfer server needs the aiohttp package: pip install 'superinfer[openai]'"
            ) from None
        return ServerWire(str(self._client.base_url), api_key, timeout, max_retries, connections)

    async def _models(self) -> list[Any]:
        """Those the server lists; none where it has no such list."""
        import openai

        try:
            return (await self._client.models.list(timeout=10.0)).data
        except openai.APIConnectionError as error:
            raise EngineUnavailableError(f"no server answers at {self._client.base_url}: {error}") from None
        except openai.AuthenticationError as error:
            raise InvalidRequestError(
                f"the server at {self._client.base_url} refuses this API key, give api_key=...: {error.message}"
            ) from None
        except openai.APIError:
            return []

    def flush_cache(self) -> None:
        """Later requests share KV only among themselves. Raises UnsupportedError where the server is not ours."""
        if not self.ours:
            super().flush_cache()
        self._salt = f"flushed {uuid.uuid4().hex} "

    async def cache_prefix(self, prefix: Prompt) -> None:
        """Have our server compute the KV of closed messages. Raises UnsupportedError elsewhere."""
        if not self.ours or prefix.chat.plain is not None or prefix.chat.role is not None:
            await super().cache_prefix(prefix)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        request = CallRequest(prompt=prefix.text, chat=prefix.chat, sampling=sampling)
        with self._under_way():
            async for _ in self._ask(request):
                pass

    async def _ask(self, request: CallRequest) -> AsyncGenerator[TextDelta, None]:
        import openai

        answering = Answering(request.sampling.n)
        tools: dict[int, CallDeltas] = {}
        path, asked = self._asked(request)
        try:
            with reading(openai):
                async with contextlib.aclosing(self._chunks(path, asked)) as arrivals:
                    async for chunks in arrivals:
                        for delta in _read(chunks, answering, tools, plain=request.chat.plain is not None):
                            yield delta
        except openai.APIError as error:
            raise as_ours(error) from error
        answering.check_whole()
        for index, calls in tools.items():
            yield answering.text(index, calls.text())
        for delta in answering.last():
            yield delta

    async def _chunks(self, path: str, asked: dict[str, Any]) -> AsyncGenerator[list[Any], None]:
        """The chunks of the answer, those together that came together."""
        if self._wire is not None:
            async with contextlib.aclosing(self._wire.chunks(path, asked)) as arrivals:
                async for chunks in arrivals:
                    yield chunks
            return
        create: Any = (
            self._client.completions.create if path == "/completions" else self._client.chat.completions.create
        )
        async with await create(**asked) as stream:
            async for chunk in stream:
                yield [chunk]

    def _asked(self, request: CallRequest) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        asked: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        asked |= given(request, _NAMES)
        if request.stop:
            asked["stop"] = list(request.stop)
        if request.sampling.max_tokens is not None:
            asked[self._limit if request.chat.plain is None else "max_tokens"] = request.sampling.max_tokens
        if self.ours:
            asked |= self._extra(request)
            if not request.live:
                asked["stream_options"]["interval_ms"] = request.interval_s * 1e3
        if request.chat.plain is not None:
            return "/completions", asked | {"prompt": request.chat.plain}
        return "/chat/completions", asked | chat_fields(request.chat)

    async def score_choices(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        *,
        alone: bool,
        slo: SLO | None = None,
        program: str = "",
        keep_s: float | None = None,
    ) -> ScoredChoices:
        """Our server scores all choices for one request (/v1/select). Raises UnsupportedError elsewhere."""
        if self._wire is None:
            return await super().score_choices(prompt, choices, alone=alone, slo=slo, program=program, keep_s=keep_s)
        from superinfer.lang.server_wire import SelectAnswer

        self._check_chat(prompt.chat)
        asked: dict[str, Any] = {"model": self.model, "choices": list(choices), "alone": alone}
        asked |= {"prompt": prompt.chat.plain} if prompt.chat.plain is not None else chat_fields(prompt.chat)
        asked |= self._marks(slo, program, "")
        if keep_s is not None:
            asked["hints"] = {"keep_s": keep_s}
        with self._under_way():
            answer = await self._wire.ask("/select", asked, SelectAnswer)
        scored = ScoredChoices([[token.score() for token in choice.tokens] for choice in answer.choices])
        if alone:
            scored.alone = [[token.score() for token in choice.alone or ()] for choice in answer.choices]
        scored.reports = answer.reports
        return scored

    def _extra(self, request: CallRequest) -> dict[str, Any]:
        """What our server takes beyond OpenAI's fields."""
        extra = given(request, _OWN_NAMES)
        extra |= {name: getattr(request.sampling, name) for name in _DEFAULTED}
        if (grammar := request.sampling.grammar) is not None:
            kind = _GRAMMARS.get(grammar.kind)
            extra["structured_outputs"] = {kind: grammar.source} if kind else {"json_object": True}
        extra |= self._marks(request.slo, request.program, request.cache_salt)
        if request.hints is not None:
            extra["hints"] = msgspec.to_builtins(request.hints)
        return extra

    def _marks(self, slo: SLO | None, program: str, salt: str) -> dict[str, Any]:
        """Whose request it is, and what is promised to it."""
        marks: dict[str, Any] = {}
        if program:
            marks["prompt_cache_key"] = program
        if self._salt or salt:
            marks["cache_salt"] = self._salt + salt
        if slo is not None and slo.promises_anything:
            marks["slo"] = slo_fields(slo)
        return marks

    async def _close(self) -> None:
        if self._wire is not None:
            await self._wire.close()
        await self._client.close()


def server_backend(url: str, api_key: str | None, timeout: float) -> OpenAI:
    """The model that a superinfer server at `url` serves. Raises InvalidRequestError where another server answers, or
    one that asks for another key."""
    base = url.rstrip("/")
    base_url = base if base.endswith("/v1") else f"{base}/v1"
    backend = OpenAI("", base_url=base_url, api_key=api_key, timeout=max(timeout, 600.0), max_retries=0)
    if not backend.ours:
        backend.close()
        raise InvalidRequestError(f"{url} is no superinfer server; use OpenAI(model, base_url={base + '/v1'!r})")
    return backend


def chat_fields(chat: Chat) -> dict[str, Any]:
    """The messages of a chat, and what an open answer begins with: nothing, where it is the first message."""
    fields: dict[str, Any] = {"messages": wire_messages(chat.messages)}
    if chat.tools:
        fields["tools"] = list(chat.tools)
    if chat.begun or not chat.messages:
        fields["messages"].append({"role": "assistant", "content": chat.begun})
        fields["continue_final_message"] = True
    return fields


def slo_fields(slo: SLO) -> dict[str, Any]:
    """The `slo` field of our HTTP API: milliseconds."""
    times = {f"{name}_ms": getattr(slo, name) * 1e3 for name in ("ttft", "tbt", "deadline") if getattr(slo, name)}
    return {**times, "weight": slo.weight, "on_miss": slo.on_miss}


def _read(chunks: list[Any], answering: Answering, tools: dict[int, CallDeltas], *, plain: bool) -> Iterator[TextDelta]:
    """What chunks that came together say: their text as one delta of each continuation."""
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if plain else choice.delta.content
            if text:
                texts.setdefault(choice.index, []).append(text)
            if not plain and choice.delta.tool_calls:
                tools.setdefault(choice.index, CallDeltas()).add(choice.delta.tool_calls)
            if choice.finish_reason is not None:
                answering.end(choice.index, "length" if choice.finish_reason == "length" else "stop")
        _account(answering, chunk)
    for index, pieces in texts.items():
        yield answering.text(index, "".join(pieces))


# Of our server's SloReport, which has milliseconds, and of a RequestReport, which has seconds.
_TIMES = ("queue", "prefill", "decode", "rotated", "copy_wait", "preempted", "e2e", "max_tbt", "ttft", "lateness")
_VERDICTS = ("met", "ttft_met", "tbt_met", "deadline_met", "why", "degraded")


def _account(answering: Answering, chunk: Any) -> None:
    """Usage and, from our server, what became of the SLO."""
    usage = getattr(chunk, "usage", None)
    if usage is not None:
        answering.prompt_tokens, answering.output_tokens = usage.prompt_tokens, usage.completion_tokens
        details = getattr(usage, "prompt_tokens_details", None)
        answering.cached_tokens = (getattr(details, "cached_tokens", None) or 0) if details else 0
    slo = getattr(chunk, "slo", None)
    if slo is None:
        return
    times = {name: slo[f"{name}_ms"] for name in _TIMES}
    found: dict[str, Any] = {f"{name}_s": None if ms is None else ms / 1e3 for name, ms in times.items()}
    answering.stages = found | {name: slo[name] for name in _VERDICTS}
    if slo["truncated"]:
        answering.reasons = dict.fromkeys(answering.reasons, "deadline")


def as_ours(error: Any) -> SuperinferError:
    """Our error for one of the `openai` library's, or of a library whose errors are made from those."""
    import openai

    body = getattr(error, "body", None)
    body = body.get("error", body) if isinstance(body, dict) else None
    code = getattr(error, "code", None) or (body.get("code") if isinstance(body, dict) else None)
    known = error_from_code(code, error.message) if isinstance(code, str) else None
    if known is not None and type(known) is not SuperinferError:
        return known
    if isinstance(error, openai.APITimeoutError):
        return DeadlineMissedError(f"the service did not answer in time: {error.message}")
    if isinstance(error, openai.APIConnectionError):
        return EngineUnavailableError(f"the service does not answer: {error.message}")
    if isinstance(error, openai.RateLimitError):
        return QueueFullError(error.message)
    if isinstance(error, openai.APIStatusError) and 400 <= error.status_code < 500:
        return InvalidRequestError(error.message)
    return SuperinferError(f"the service failed: {error.message}")


def _library() -> Any:
    try:
        import openai
    except ImportError:
        raise UnsupportedError("OpenAI() needs the openai package: pip install 'superinfer[openai]'") from None
    return openai

"""Backends that speak to a service over its API: messages go out, text comes back.

What the service cannot honour is refused by name before anything is sent. Where it knows no SLOs, `on_miss` is enforced
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import msgspec

from superinfer.errors import (
    DeadlineMissedError,
    EngineUnavailableError,
    RequestCancelledError,
    SuperinferError,
    UnsupportedError,
)
from superinfer.lang.backend import Backend, CallRequest
from superinfer.lang.chat_text import plain_chat
from superinfer.lang.in_time import in_time
from superinfer.lang.loop import language_loop
from superinfer.lang.prompt import Chat, Prompt
from superinfer.runtime.choices import ScoredChoices
from superinfer.runtime.protocol import FinishReason, RequestReport, SamplingParams
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextDelta, TextRequest

_DEFAULTS = SamplingParams()
_MODELS_OWN = ("temperature", "top_p")  # a service may have others for its model where nothing is said
_GEN_NAMES = {"grammar": "regex, json_schema or dtype", "logprobs": "return_logprob"}


@dataclass(frozen=True)
class Abilities:
    """What a service takes. sampling: fields of SamplingParams. prefix: goes on with an answer that has begun.
    plain: text without roles. slo: knows SLOs and enforces them. stops: most stop strings. tools: takes and calls
    them."""

    sampling: frozenset[str]
    prefix: bool = False
    plain: bool = False
    slo: bool = False
    stops: int = 4
    tools: bool = False


class RemoteBackend(Backend):
    """Base of the backends for services. Subclasses send what has been checked, in `_ask`."""

    name: ClassVar[str]
    takes_messages = True

    def __init__(self, model: str, abilities: Abilities) -> None:
        self.model = model
        self.abilities = abilities
        self._closed = False
        self._waiting: set[asyncio.Task[Any]] = set()  # those whose calls are under way

    def _ask(self, request: CallRequest) -> AsyncGenerator[TextDelta, None]:
        """Send it. The last delta of each continuation has a finish_reason."""
        raise NotImplementedError

    async def _close(self) -> None:
        """Close connections, on the language's loop."""

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelledError("the backend is closed; make a new one")

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """A call of this task. Raises RequestCancelledError where the backend is closed, before or meanwhile: a closed
        connection does not wake who reads from it."""
        self._check_open()
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self._waiting:
                raise
            task.uncancel()  # it was `close`
            raise RequestCancelledError("the backend was closed") from None
        finally:
            self._waiting.discard(task)

    async def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        assert isinstance(request, CallRequest)
        self._check(request)
        slo = None if self.abilities.slo else request.slo
        with self._under_way():
            async with contextlib.aclosing(in_time(self._ask(request), slo, request.sampling.n)) as deltas:
                async for delta in deltas:
                    yield delta

    def _check(self, request: CallRequest) -> None:
        for name in SamplingParams.__struct_fields__:
            value = getattr(request.sampling, name)
            if value != getattr(_DEFAULTS, name) and name not in self.abilities.sampling:
                shown = _GEN_NAMES.get(name, f"{name}={value!r:.80}")
                raise UnsupportedError(f"{shown}: {self.name} does not take it; leave it out or use another backend")
        if request.stop_regex:
            raise UnsupportedError(
                f"stop_regex={request.stop_regex!r:.80}: {self.name} does not take it; use stop, or an engine's address"
            )
        if len(request.stop) > self.abilities.stops:
            raise UnsupportedError(f"stop: {self.name} takes at most {self.abilities.stops} strings")
        self._check_chat(request.chat)

    def _check_chat(self, chat: Chat) -> None:
        if chat.plain is not None:
            if not self.abilities.plain:
                raise UnsupportedError(
                    f"text outside roles: {self.name} takes messages only; use user() and assistant()"
                )
            return
        if chat.mixed:
            raise UnsupportedError(f"text between messages: {self.name} takes messages only; put it inside a role")
        if chat.role != "assistant":
            where = "outside a message" if chat.role is None else f"inside a {chat.role} message"
            raise UnsupportedError(
                f"gen() {where}: {self.name} writes assistant messages only; use assistant(gen(...))"
            )
        if chat.begun and not self.abilities.prefix:
            raise UnsupportedError(
                f"assistant({chat.begun!r:.40} + gen(...)): {self.name} cannot go on with an answer that has begun"
            )
        if not chat.messages and not self.abilities.prefix:
            raise UnsupportedError(f"assistant(gen(...)) comes first: {self.name} answers messages; add user(...)")
        if self.abilities.tools:
            return
        if chat.tools or any(message["role"] == "tool" for message in chat.messages):
            raise UnsupportedError(
                f"tools(): {self.name} is given no tools here; use an engine, or describe them in text"
            )

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
        raise UnsupportedError(
            f"select(): {self.name} gives no log probabilities of given text; use an engine or a superinfer server"
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        raise UnsupportedError(f"select(): {self.name} gives no tokens of given text; use an engine")

    def piece(self, token_id: int) -> str:
        raise UnsupportedError(f"return_text_in_logprobs: {self.name} gives no tokens")

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return plain_chat(messages, add_generation_prompt=add_generation_prompt)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            language_loop().run(self._end())

    async def _end(self) -> None:
        while self._waiting:
            self._waiting.pop().cancel()
        await self._close()


class Answering:
    """Collects what a service says of one answer, and makes the last deltas."""

    def __init__(self, n: int) -> None:
        self.started = time.monotonic()
        self.first: float | None = None
        self.reasons: dict[int, FinishReason] = dict.fromkeys(range(n), "stop")
        self._open = set(range(n))
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.stages: Mapping[str, Any] | None = None

    def text(self, index: int, text: str) -> TextDelta:
        """New text of one continuation."""
        if self.first is None:
            self.first = time.monotonic()
        return TextDelta(index, text)

    def end(self, index: int, reason: FinishReason) -> None:
        """The service says that a continuation has ended."""
        self.reasons[index] = reason
        self._open.discard(index)

    def check_whole(self) -> None:
        """Raises EngineUnavailableError unless the service has ended every continuation."""
        if self._open:
            raise EngineUnavailableError("the service broke off its answer")

    def last(self) -> list[TextDelta]:
        """The ends. Without the server's own account the stages are those seen from here: prefill_s is all before the
        first text."""
        ended = time.monotonic()
        first = self.first if self.first is not None else ended
        seen: dict[str, Any] = {"queue_s": 0.0, "prefill_s": first - self.started, "decode_s": ended - first}
        seen |= {"e2e_s": ended - self.started, "ttft_s": None if self.first is None else first - self.started}
        report = RequestReport(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens // len(self.reasons),
            **{**seen, **(self.stages or {})},
        )
        return [TextDelta(index, "", finish_reason=reason, report=report) for index, reason in self.reasons.items()]


@contextlib.contextmanager
def reading(library: Any) -> Iterator[None]:
    """What breaks while an answer is read, as our error. library: of the service; it makes errors its own of what
    happens until an answer begins, and passes on those of the HTTP library that it is built on from then on."""
    http = import_module(type(library.DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0])
    try:
        yield
    except http.TimeoutException as error:
        raise DeadlineMissedError(f"the service did not go on in time: {str(error) or repr(error)}") from error
    except http.HTTPError as error:
        raise EngineUnavailableError(f"the service broke off its answer: {str(error) or repr(error)}") from error
    except json.JSONDecodeError as error:
        raise SuperinferError(f"the service failed: it answered what is no JSON, {error.doc!r:.80}") from error


def given(request: CallRequest, names: Mapping[str, str]) -> dict[str, Any]:
    """The sampling arguments that say something, by the service's names."""
    told = {}
    for name, theirs in names.items():
        value = getattr(request.sampling, name)
        if value != getattr(_DEFAULTS, name) or (name in _MODELS_OWN and name in request.said):
            told[theirs] = value
    return msgspec.to_builtins(told)

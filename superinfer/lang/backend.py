"""What a program runs on. A backend is small, asynchronous, and called on the language's loop only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from superinfer.errors import InvalidRequestError, RequestCancelledError, UnsupportedError
from superinfer.lang.loop import language_loop
from superinfer.lang.prompt import NO_CHAT, Chat, Prompt, keeps_answers
from superinfer.runtime.choices import ScoredChoices, Scorer, at_border, score_choices
from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.config import EMBEDDED, EngineConfig
from superinfer.runtime.launch import EngineProcess, Progress, launch_engine
from superinfer.runtime.protocol import ModelInfo, SamplingParams
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import Begun, TextClient, TextDelta, TextRequest
from superinfer.runtime.tokenization import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CallRequest(TextRequest):
    """A request with the chat that its prompt was rendered from, for backends that render none.

    live: somebody waits for each piece of the text; otherwise it may come in fewer, larger ones.
    said: the sampling arguments that the program gave, be it the value that they have anyhow.
    """

    chat: Chat = NO_CHAT
    live: bool = True
    said: frozenset[str] = frozenset()


class Backend(ABC):
    """Generates and scores. Override `close` where there is something to close.

    takes_grammars: whether SamplingParams.grammar is honoured; calls that need it are refused before they are sent.
    takes_messages: its requests need the prompt as a Chat too.
    extends: its calls go on from the tokens of those before them, and are begun with `begin`.
    """

    takes_grammars: bool = False
    takes_messages: ClassVar[bool] = False
    extends: bool = False
    made_in: int  # process id: its connections are that process's own

    def __new__(cls, *_: Any, **__: Any) -> Any:
        backend = super().__new__(cls)
        backend.made_in = os.getpid()
        return backend

    @abstractmethod
    def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """Deltas of all continuations as they come. Closing the generator early cancels the request."""

    def begin(self, request: TextRequest) -> Begun:
        """Send a request whose answer is read later. Raises UnsupportedError unless it `extends`."""
        raise UnsupportedError(f"{type(self).__name__} begins no calls")

    @cached_property
    def keeps_answers(self) -> bool:
        """Whether its chat template shows earlier answers as they were written."""
        return keeps_answers(self.render_chat)

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
        """Each choice's tokens behind the prompt, scored; with `alone`, also without it. keep_s: see Hints.

        Raises InvalidRequestError where no token stands before the choices, UnsupportedError where it cannot score.
        """
        raise UnsupportedError(f"select(): {type(self).__name__} scores no given text; use an engine")

    @abstractmethod
    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special`: with the model's BOS and the like."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """Text of one token, special or not."""

    @abstractmethod
    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text for chat messages. Raises InvalidRequestError where the model cannot take them."""

    async def cache_prefix(self, prefix: Prompt) -> None:
        """Compute the KV cache of `prefix`. Raises UnsupportedError where there is none to keep it in."""
        raise UnsupportedError(f"cache(): {type(self).__name__} keeps no KV cache for us")

    def flush_cache(self) -> None:
        """No KV cache that this backend has made is used again. Raises UnsupportedError where that cannot be had."""
        raise UnsupportedError(f"flush_cache(): {type(self).__name__} does not let its KV cache be dropped")

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Let go of what the backend holds. Safe to call twice."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TextBackend(Backend):
    """A backend on a TextClient that was made on the language's loop."""

    takes_grammars = True

    def __init__(self, client: TextClient) -> None:
        self._client: TextClient | None = client
        self._salt = ""

    @property
    def client(self) -> TextClient:
        """Raises RequestCancelledError once closed."""
        if self._client is None:
            raise RequestCancelledError("the backend is closed; make a new one")
        return self._client

    @property
    def info(self) -> ModelInfo:
        """The model and the limits of the engine."""
        return self.client.info

    def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        return self.client.stream(self._salted(request))

    def begin(self, request: TextRequest) -> Begun:
        return self.client.begin(self._salted(request))

    def _salted(self, request: TextRequest) -> TextRequest:
        return replace(request, cache_salt=self._salt + request.cache_salt) if self._salt else request

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
        scorer = Scorer(self.client, cache_salt=self._salt)
        bordered = at_border(scorer, prompt.text, choices, special=prompt.add_special)
        return await score_choices(scorer, bordered, alone=alone, slo=slo, program=program, keep_s=keep_s)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self.client.tokenizer.encode(text, special=special)

    def piece(self, token_id: int) -> str:
        return self.client.tokenizer.piece(token_id)

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return self.client.tokenizer.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    async def cache_prefix(self, prefix: Prompt) -> None:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        request = TextRequest(prompt=prefix.text, add_special=prefix.add_special, sampling=sampling)
        async with contextlib.aclosing(self.stream(request)) as deltas:
            async for _ in deltas:
                pass

    def flush_cache(self) -> None:
        """Later requests share KV only among themselves. What there was goes as its room is wanted."""
        self._salt = f"flushed {uuid.uuid4().hex} "

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            language_loop().run(client.close())


class RuntimeEndpoint(TextBackend):
    """A running engine, by its address (ipc://PATH or tcp://HOST:PORT), or a superinfer server (http://HOST:PORT).

    `close` disconnects; so does leaving the `with` block, and so it is when nobody has it any more.
    A server is spoken to over HTTP, with `api_key` where it asks for one, and gives an `OpenAI` backend.
    """

    def __new__(cls, address: str = "", api_key: str | None = None, **options: Any) -> Any:
        if not address.startswith(("http://", "https://")):
            return super().__new__(cls)
        from superinfer.lang.openai_backend import server_backend  # takes a second to import

        return server_backend(address, api_key, options.get("timeout", 10.0))

    def __init__(self, address: str, api_key: str | None = None, *, timeout: float = 10.0) -> None:
        """Connect within `timeout` seconds. Raises EngineUnavailableError, InvalidRequestError, ModelLoadError."""
        if api_key is not None:
            raise InvalidRequestError(f"api_key: an engine's own address, {address}, asks for no key; leave it out")
        self.address = address
        client = language_loop().run(_connect(address, timeout))
        super().__init__(client)
        weakref.finalize(self, _let_go, client, os.getpid()).atexit = False
        self.extends = client.tokenizer.cuts_anywhere

    @property
    def endpoint(self) -> RuntimeEndpoint:
        """Itself, where a program written for SGLang asks a Runtime for its endpoint."""
        return self


async def _connect(address: str, timeout: float) -> TextClient:
    client = await AsyncEngineClient.connect(address, name="language", timeout=timeout)
    try:
        # Loading takes seconds; programs that run meanwhile must not be made late by it.
        return TextClient(client, await asyncio.to_thread(Tokenizer, client.info.path))
    except BaseException:
        await client.close()
        raise


def _let_go(client: TextClient, made_in: int) -> None:
    """The connection of a backend that nobody has any more, should it not have been closed."""
    if made_in == os.getpid():
        loop = language_loop().loop
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: loop.create_task(client.close()))


class Runtime(RuntimeEndpoint):
    """An engine process of our own. `close` ends it; so does leaving the `with` block or the interpreter.

        with Runtime(model="embedded", kv_tokens=4096) as backend: ...

    Takes the fields of EngineConfig; `model_path` is another name for `model`. Raises like `launch_engine`.
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        *,
        model_path: str | None = None,
        on_progress: Progress | None = None,
        **config: Any,
    ) -> None:
        self._engine: EngineProcess | None = None
        try:
            settings = EngineConfig(model=model_path or model, **config)
        except TypeError as error:
            raise InvalidRequestError(f"{error}; Runtime takes {', '.join(EngineConfig.__struct_fields__)}") from None
        self._engine = launch_engine(settings, for_text=True, on_progress=on_progress)
        try:
            super().__init__(self._engine.address)
        except BaseException:
            self._engine.close()
            raise

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None once closed."""
        return self._engine.pid if self._engine is not None else None

    def close(self) -> None:
        super().close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def shutdown(self) -> None:
        """Same as `close`."""
        self.close()


_default: Backend | None = None


def set_default_backend(backend: Backend | None) -> None:
    """Programs run on `backend` unless told otherwise. None: there is no default again."""
    global _default
    if backend is not None and not isinstance(backend, Backend):
        raise InvalidRequestError(f"{backend!r} is not a backend; give a Runtime or a RuntimeEndpoint")
    _default = backend


def resolve_backend(backend: Backend | None) -> Backend:
    """`backend`, or the default one. Raises InvalidRequestError where there is neither."""
    chosen = backend if backend is not None else _default
    if chosen is None:
        raise InvalidRequestError(
            "there is no backend to run on: pass backend=..., call set_default_backend(Runtime()), "
            "or run inside `with default_backend():`"
        )
    if not isinstance(chosen, Backend):
        raise InvalidRequestError(f"backend={chosen!r} is not a backend; give a Runtime or a RuntimeEndpoint")
    if chosen.made_in != os.getpid():
        raise InvalidRequestError(
            f"backend={chosen!r} was made in process {chosen.made_in}, from which this one was forked: its connections "
            "do not work here; make a new one, or start processes with multiprocessing's 'spawn'"
        )
    return chosen


def flush_cache(backend: Backend | None = None) -> None:
    """No KV cache made so far is used again by `backend`, or else the default one; other clients keep theirs.

    Raises UnsupportedError for a backend that does not let its cache be dropped.
    """
    resolve_backend(backend).flush_cache()


@contextlib.contextmanager
def default_backend(**config: Any) -> Iterator[Backend]:
    """The default backend if there is one, as under `superinfer run FILE`; else an embedded engine for this block.

    config: fields of EngineConfig for that engine; one that is there already stays as it is. Raises like `Runtime`.
    """
    if _default is not None:
        yield _default
        return
    with Runtime(**config) as runtime:
        set_default_backend(runtime)
        try:
            yield runtime
        finally:
            set_default_backend(None)

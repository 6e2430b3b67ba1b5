"""`superinfer chat`: a conversation in the terminal, or line by line through pipes."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from superinfer.cli.engines import CONNECT_TIMEOUT_S, engine_address, start_progress
from superinfer.errors import EngineUnavailableError, InvalidRequestError, SuperinferError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.loop_thread import LoopThread
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.text import TextClient, TextRequest

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """max_tokens: of one answer."""

    system: str
    max_tokens: int
    temperature: float


class Partner(ABC):
    """Who answers."""

    @abstractmethod
    def reply(self, messages: Messages) -> Generator[tuple[str, int], None, None]:
        """Pieces of the answer's text with the tokens each stands for. Raises SuperinferError."""


class EnginePartner(Partner):
    """An engine, by way of its address."""

    def __init__(self, text: TextClient, loop: LoopThread, options: ChatOptions) -> None:
        self._text = text
        self._loop = loop
        self._sampling = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)

    def reply(self, messages: Messages) -> Generator[tuple[str, int], None, None]:
        prompt = self._text.tokenizer.encode(self._text.tokenizer.render_chat(messages), special=False)
        room = self._text.info.max_model_len - len(prompt)
        if room < 1:
            raise InvalidRequestError(
                f"the conversation has {len(prompt)} tokens and this model holds {self._text.info.max_model_len}; "
                "/reset starts a new one"
            )
        sampling = self._sampling
        if sampling.max_tokens is None or sampling.max_tokens > room:
            sampling = SamplingParams(temperature=sampling.temperature, max_tokens=room)
        for delta in self._loop.iterate(self._text.stream(TextRequest(prompt=prompt, sampling=sampling))):
            yield delta.text, len(delta.token_ids)


class UrlPartner(Partner):
    """Any OpenAI-compatible endpoint."""

    def __init__(self, url: str, api_key: str, options: ChatOptions) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise InvalidRequestError(f"--url {url!r} must be http://HOST:PORT or https://HOST:PORT")
        try:
            import openai
        except ImportError:
            raise SuperinferError("--url needs the package openai; install it with `pip install openai`") from None
        self._openai = openai
        self._options = options
        self._url = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"  # as the other commands take it
        self._client = openai.OpenAI(base_url=self._url, api_key=api_key or "none", max_retries=0)
        self._model = ""

    def reply(self, messages: Messages) -> Generator[tuple[str, int], None, None]:
        try:
            self._model = self._model or next(iter(self._client.models.list())).id
            request: dict[str, Any] = {
                "model": self._model,
                "messages": messages,
                "max_tokens": self._options.max_tokens,
                "temperature": self._options.temperature,
            }
            with self._client.chat.completions.create(stream=True, **request) as chunks:
                for chunk in chunks:
                    if chunk.choices and chunk.choices[0].delta.content:
                        yield chunk.choices[0].delta.content, 1  # endpoints send a chunk a token, nearly all
        except self._openai.APIConnectionError as error:
            why = f"{error.__cause__ or error}"
            raise EngineUnavailableError(f"nothing answers at {self._url} ({why}); check the address") from None
        except self._openai.APIError as error:
            raise SuperinferError(f"{self._url}: {error.message}") from None
        except StopIteration:
            raise SuperinferError(f"{self._url} lists no model") from None


def run_chat(config: EngineConfig, address: str, url: str, api_key: str, options: ChatOptions) -> None:
    """Chat until /quit or the end of the input. Raises SuperinferError when no partner can be had, or, where the input
    is not a terminal, at the first error."""
    if url:
        converse(UrlPartner(url, api_key, options), options)
        return
    SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)  # complain before the engine starts
    with engine_address(config, address) as found, _text_client(found) as (text, loop):
        converse(EnginePartner(text, loop, options), options)


@contextlib.contextmanager
def _text_client(address: str) -> Iterator[tuple[TextClient, LoopThread]]:
    loop = LoopThread("superinfer-chat")
    try:
        with start_progress(f"connecting to {address}"):
            text = loop.run(TextClient.connect(address, name="chat", timeout=CONNECT_TIMEOUT_S))
        try:
            yield text, loop
        finally:
            loop.run(text.close())
    finally:
        loop.close()


def converse(partner: Partner, options: ChatOptions) -> None:
    """Ask for lines, print answers to stdout and their timing to stderr."""
    person = sys.stdin.isatty()
    notes = Console(stderr=True, highlight=False)
    start: Messages = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history)
        notes.print("[dim]/reset starts over, /quit or Ctrl-D ends; Ctrl-C stops an answer[/dim]")
    while (line := _ask(person)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(start)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(partner, messages, notes)})
            except SuperinferError as error:
                if not person:
                    raise SuperinferError(str(error)) from error  # of what was said, not of the command's arguments
                messages.pop()
                notes.print(f"error: {error}", style="red", markup=False)


def _ask(person: bool) -> str | None:
    """The next line; None at the end."""
    try:
        return input("> " if person else "").strip()
    except EOFError:
        return None


def _answer(partner: Partner, messages: Messages, notes: Console) -> str:
    """Stream one answer; returns its text, or what there was of it when Ctrl-C stopped it."""
    began = time.monotonic()
    first = last = 0.0
    tokens, text = 0, ""
    with contextlib.closing(partner.reply(messages)) as pieces:
        try:
            for piece, count in pieces:
                last = time.monotonic() - began
                first = first or last
                tokens += count
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
    print(flush=True)
    speed = f", {(tokens - 1) / (last - first):.0f} tok/s" if tokens > 1 and last > first else ""
    notes.print(f"[dim]first token after {first * 1000:.0f} ms{speed}[/dim]")
    return text

"""Anthropic's models through the `anthropic` client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from superinfer.errors import (
    DeadlineMissedError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    SuperinferError,
    UnsupportedError,
)
from superinfer.lang.backend import CallRequest
from superinfer.lang.prompt import Chat
from superinfer.lang.remote import Abilities, Answering, RemoteBackend, given, reading
from superinfer.lang.sampling import DEFAULT_MAX_TOKENS
from superinfer.runtime.text import TextDelta

_NAMES = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
_ABILITIES = Abilities(frozenset({*_NAMES, "max_tokens"}), prefix=True, stops=8191)


class Anthropic(RemoteBackend):
    """`Anthropic("claude-...")`, key in ANTHROPIC_API_KEY. Takes chat programs; system messages come first there.

    A beginning of an answer is sent as such, which newer models refuse. `on_miss` is enforced from here.
    """

    name = "Anthropic's API"

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        """timeout: seconds one request may take. Raises UnsupportedError without the `anthropic` package."""
        try:
            import anthropic
        except ImportError:
            raise UnsupportedError("Anthropic() needs a package: pip install 'superinfer[anthropic]'") from None
        super().__init__(model, _ABILITIES)
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key, base_url=base_url, timeout=timeout, max_retries=max_retries
        )

    async def _ask(self, request: CallRequest) -> AsyncGenerator[TextDelta, None]:
        import anthropic

        answering = Answering(1)
        try:
            with reading(anthropic):
                async with await self._client.messages.create(**self._asked(request)) as events:
                    async for event in events:
                        if event.type == "message_start":
                            answering.prompt_tokens = event.message.usage.input_tokens
                            answering.cached_tokens = event.message.usage.cache_read_input_tokens or 0
                        elif event.type == "content_block_delta" and event.delta.type == "text_delta":
                            yield answering.text(0, event.delta.text)
                        elif event.type == "message_delta":
                            answering.output_tokens = event.usage.output_tokens
                            answering.end(0, "length" if event.delta.stop_reason == "max_tokens" else "stop")
        except anthropic.AnthropicError as error:
            raise _as_ours(error) from error
        answering.check_whole()
        for delta in answering.last():
            yield delta

    def _check_chat(self, chat: Chat) -> None:
        super()._check_chat(chat)
        if not chat.begun and all(message["role"] == "system" for message in chat.messages):
            raise UnsupportedError(f"no message before assistant(gen(...)): {self.name} answers one; add user(...)")

    def _asked(self, request: CallRequest) -> dict[str, Any]:
        messages = [message for message in request.chat.messages if message["role"] != "system"]
        system = [message["content"] for message in request.chat.messages if message["role"] == "system"]
        if request.chat.begun:
            messages.append({"role": "assistant", "content": request.chat.begun})
        asked: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True}
        asked["max_tokens"] = request.sampling.max_tokens or DEFAULT_MAX_TOKENS
        sampling = given(request, _NAMES)
        if sampling:
            asked["extra_body"] = (
                sampling  # the client has no arguments for them any more; it is the model that decides
            )
        if system:
            asked["system"] = "\n\n".join(system)
        if request.stop:
            asked["stop_sequences"] = list(request.stop)
        return asked

    async def _close(self) -> None:
        await self._client.close()


def _as_ours(error: Exception) -> SuperinferError:
    import anthropic

    if isinstance(error, anthropic.APITimeoutError):
        return DeadlineMissedError(f"the service did not answer in time: {error}")
    if isinstance(error, anthropic.APIConnectionError):
        return EngineUnavailableError(f"the service does not answer: {error}")
    if isinstance(error, anthropic.RateLimitError):
        return QueueFullError(str(error))
    if isinstance(error, anthropic.APIStatusError) and not 400 <= error.status_code < 500:  # in a stream it is 200
        return SuperinferError(f"the service failed: {error}")
    return InvalidRequestError(str(error))

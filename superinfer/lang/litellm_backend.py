"""The services that the `litellm` library knows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from superinfer.errors import UnsupportedError
from superinfer.lang.backend import CallRequest
from superinfer.lang.openai_backend import as_ours
from superinfer.lang.remote import Abilities, Answering, RemoteBackend, given
from superinfer.lang.retrying import may_pass, told_wait_s, wait_s
from superinfer.runtime.text import TextDelta

_NAMES = {
    name: name for name in ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed", "n")
}
_ABILITIES = Abilities(frozenset({*_NAMES, "max_tokens"}))


class LiteLLM(RemoteBackend):
    """`LiteLLM("provider/model", **anything that litellm.completion takes)`. Takes chat programs.

    litellm itself refuses, before it sends anything, what a provider does not take. `on_miss` is enforced here, and
    a call that was refused or did not get through is tried again from here, `max_retries` times.
    """

    name = "LiteLLM"

    def __init__(self, model: str, *, max_retries: int = 2, **options: Any) -> None:
        """Raises UnsupportedError without the `litellm` package."""
        try:
            import litellm  # noqa: F401
        except ImportError:
            raise UnsupportedError("LiteLLM() needs a package: pip install 'superinfer[litellm]'") from None
        super().__init__(model, _ABILITIES)
        self._retries, self._options = max_retries, options

    async def _ask(self, request: CallRequest) -> AsyncGenerator[TextDelta, None]:
        import openai

        tries = 0
        while True:
            answering = Answering(request.sampling.n)
            try:
                async with contextlib.aclosing(self._answer(request, answering)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except openai.APIError as error:  # litellm's errors are made from these
                headers = getattr(error, "litellm_response_headers", None) or {}
                told_s = told_wait_s(headers.get("retry-after", ""))
                if answering.first is not None or tries >= self._retries or not _is_passing(error, told_s):
                    # What breaks while an answer is read it wraps, for fallbacks that are not asked for here.
                    raise as_ours(getattr(error, "original_exception", None) or error) from error
            await asyncio.sleep(wait_s(tries, told_s))
            tries += 1

    async def _answer(self, request: CallRequest, answering: Answering) -> AsyncGenerator[TextDelta, None]:
        """One try."""
        import litellm

        asked: dict[str, Any] = {**self._options, **given(request, _NAMES)}
        if request.sampling.max_tokens is not None:
            asked["max_tokens"] = request.sampling.max_tokens
        if request.stop:
            asked["stop"] = list(request.stop)
        chunks = await litellm.acompletion(
            model=self.model,
            messages=list(request.chat.messages),
            stream=True,
            stream_options={"include_usage": True},
            max_retries=0,  # of some services it heeds this, of others it never tries again
            **asked,
        )
        try:
            async for chunk in chunks:
                for choice in chunk.choices:
                    if choice.delta.content:
                        yield answering.text(choice.index, choice.delta.content)
                    if choice.finish_reason is not None:
                        answering.end(choice.index, "length" if choice.finish_reason == "length" else "stop")
                usage = getattr(chunk, "usage", None)
                if usage is not None:
                    answering.prompt_tokens, answering.output_tokens = usage.prompt_tokens, usage.completion_tokens
        finally:
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()
        for delta in answering.last():
            yield delta


def _is_passing(error: Any, told_s: float | None) -> bool:
    """Whether another try may get through."""
    status = getattr(error, "status_code", None)
    return status is not None and may_pass(status, told_s)

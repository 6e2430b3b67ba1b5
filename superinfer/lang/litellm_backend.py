"""The services that the `litellm` library knows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from superinfer.errors import UnsupportedError
from superinfer.lang.backend import CallRequest
from superinfer.lang.openai_backend import as_ours
from superinfer.lang.remote import Abilities, Answering, RemoteBackend, given
from superinfer.runtime.text import TextDelta

_NAMES = {
    name: name for name in ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed", "n")
}
_ABILITIES = Abilities(frozenset({*_NAMES, "max_tokens"}))


class LiteLLM(RemoteBackend):
    """`LiteLLM("provider/model", **anything that litellm.completion takes)`. Takes chat programs.

    litellm itself refuses, before it sends anything, what a provider does not take. `on_miss` is enforced from here.
    """

    name = "LiteLLM"

    def __init__(self, model: str, **options: Any) -> None:
        """Raises UnsupportedError without the `litellm` package."""
        try:
            import litellm  # noqa: F401
        except ImportError:
            raise UnsupportedError("LiteLLM() needs a package: pip install 'superinfer[litellm]'") from None
        super().__init__(model, _ABILITIES)
        self._options = options

    async def _ask(self, request: CallRequest) -> AsyncGenerator[TextDelta, None]:
        import litellm
        import openai

        asked: dict[str, Any] = {**self._options, **given(request, _NAMES)}
        if request.sampling.max_tokens is not None:
            asked["max_tokens"] = request.sampling.max_tokens
        if request.stop:
            asked["stop"] = list(request.stop)
        answering = Answering(request.sampling.n)
        try:
            chunks = await litellm.acompletion(
                model=self.model,
                messages=list(request.chat.messages),
                stream=True,
                stream_options={"include_usage": True},
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
        except openai.APIError as error:  # litellm's errors are made from these
            # What breaks while an answer is read it wraps, for fallbacks that are not asked for here.
            raise as_ours(getattr(error, "original_exception", None) or error) from error
        for delta in answering.last():
            yield delta

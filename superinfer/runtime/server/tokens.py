"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import msgspec

from superinfer.runtime.protocol import ModelInfo
from superinfer.runtime.server.chat import prompt_of
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.params import check_ids
from superinfer.runtime.server.schema import ChatRequest, Message
from superinfer.runtime.server.structured import tool_plan
from superinfer.runtime.tokenization import Tokenizer


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of /tokenize: a `prompt`, or `messages` that the chat template renders."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """Token ids, and the model's context in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """The text, special tokens included."""

    prompt: str


def tokenize(request: TokenizeRequest, tokenizer: Tokenizer, info: ModelInfo) -> TokenizeAnswer:
    """Raises ApiError, InvalidRequestError."""
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either a prompt or messages", param="prompt")
    if request.prompt is not None:
        ids = tokenizer.encode(request.prompt, special=request.add_special_tokens is not False)
    else:
        chat = ChatRequest(
            model="",
            messages=request.messages or [],
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        ids = prompt_of(chat, tool_plan(chat), tokenizer, None, constrained=False).ids
    pieces = [tokenizer.piece(token_id) for token_id in ids]
    return TokenizeAnswer(len(ids), info.max_model_len, ids, pieces if request.return_token_strs else None)


def detokenize(request: DetokenizeRequest, tokenizer: Tokenizer, info: ModelInfo) -> DetokenizeAnswer:
    """Raises ApiError."""
    check_ids("tokens", request.tokens, info)
    return DetokenizeAnswer(tokenizer.decode(request.tokens, skip_special=False))

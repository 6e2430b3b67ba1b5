"""/v1/chat/completions: from a request's messages and tools to a prompt and sampling parameters."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from superinfer.errors import UnsupportedError
from superinfer.runtime.protocol import Grammar, SamplingParams
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.params import sampling_of
from superinfer.runtime.server.said import LOOK_BACK, Said
from superinfer.runtime.server.schema import ChatRequest, FunctionCall, Message
from superinfer.runtime.server.structured import ToolPlan
from superinfer.runtime.tokenization import ChatMessage, Tokenizer

# What render_chat sets itself.
_RENDERING = {"messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template"}


def sampling_of_chat(request: ChatRequest, tokenizer: Tokenizer, grammar: Grammar | None = None) -> SamplingParams:
    """Raises ApiError or InvalidRequestError."""
    short, long = request.max_tokens, request.max_completion_tokens
    if short is not None and long is not None and short != long:
        raise bad_request(
            f"max_completion_tokens={long} and max_tokens={short} differ; give one", param="max_completion_tokens"
        )
    if long is not None and long < 1:
        raise bad_request(f"max_completion_tokens={long} must be at least 1", param="max_completion_tokens")
    if request.top_logprobs and not request.logprobs:  # 0, which asks for nothing, is many clients' default
        raise bad_request(f"top_logprobs={request.top_logprobs} needs logprobs=true", param="top_logprobs")
    if not 0 <= (request.top_logprobs or 0) <= 20:
        raise bad_request(f"top_logprobs={request.top_logprobs} must be between 0 and 20", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = short if long is None else long
    return sampling_of(request, tokenizer, max_tokens=max_tokens, logprobs=logprobs, grammar=grammar)


class ChatPrompt(NamedTuple):
    """Token ids of the rendered messages, and the end of their text, where the template opens the answer."""

    ids: list[int]
    end: str


def prompt_of(
    request: ChatRequest, plan: ToolPlan, tokenizer: Tokenizer, said: Said | None, *, constrained: bool
) -> ChatPrompt:
    """The prompt. said: what the model answered before; None: all of it in the tokenizer's own tokens. Raises like
    `rendered`."""
    text = rendered(request, plan, tokenizer, constrained=constrained)
    ids = said.encode(text, request.cache_salt or "") if said is not None else tokenizer.encode(text, special=False)
    return ChatPrompt(ids, text[-LOOK_BACK:])


def rendered(request: ChatRequest, plan: ToolPlan, tokenizer: Tokenizer, *, constrained: bool) -> str:
    """The prompt's text. `constrained`: the output is, so that a model that can think is asked not to.

    Raises ApiError, InvalidRequestError.
    """
    if not request.messages:
        raise bad_request("messages=[] is empty; give at least one message", param="messages")
    if plan.tools and not tokenizer.template_takes_tools and not (plan.named or plan.listed):
        raise UnsupportedError("tools=[...] cannot be honoured: this model's chat template does not know tools")
    messages = [_for_template(at, message) for at, message in enumerate(request.messages)]
    go_on = bool(request.continue_final_message)
    if go_on and messages[-1]["role"] != "assistant":
        raise bad_request("continue_final_message=true needs a last message of role 'assistant'", param="messages")
    if go_on and request.add_generation_prompt:
        message = "add_generation_prompt=true and continue_final_message=true exclude each other; leave one out"
        raise bad_request(message, param="add_generation_prompt")
    return tokenizer.render_chat(
        messages,
        tools=plan.tools,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=go_on,
        variables=_variables(request, tokenizer, constrained),
    )


def _variables(request: ChatRequest, tokenizer: Tokenizer, constrained: bool) -> dict[str, Any]:
    """What the template is told beside the messages."""
    variables = dict(request.chat_template_kwargs or {})
    if taken := _RENDERING & variables.keys():
        raise bad_request(f"chat_template_kwargs.{min(taken)} has a parameter of its own", param="chat_template_kwargs")
    effort, template = request.reasoning_effort, tokenizer.chat_template
    if "enable_thinking" in template and (effort == "none" or constrained):
        variables.setdefault("enable_thinking", False)
    if "reasoning_effort" in template and effort is not None:
        variables.setdefault("reasoning_effort", effort)
    elif effort not in (None, "none") and "enable_thinking" not in template:
        raise bad_request(
            f"reasoning_effort={effort!r:.80} is not supported: this model's chat template knows no such choice",
            param="reasoning_effort",
            code="unsupported_parameter",
        )
    return variables


def _for_template(at: int, message: Message) -> ChatMessage:
    where = f"messages[{at}]"
    if message.annotations:
        raise bad_request(f"{where}.annotations={message.annotations!r:.80} is not supported; remove it", param=where)
    # An assistant may have said nothing: all that it was given tokens for were calls, or thoughts that were cut short.
    if message.content is None and message.role != "assistant":
        raise bad_request(f"{where}.content is missing; add it", param=f"{where}.content", code="missing_parameter")
    if message.tool_calls and message.role != "assistant":
        raise bad_request(f"{where}.tool_calls belongs to the role 'assistant', not {message.role!r}", param=where)
    # OpenAI's newer name for the system role; templates only know the old one.
    out: ChatMessage = {"role": "system" if message.role == "developer" else message.role}
    out["content"] = _text_of(where, message.content)
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            out[key] = getattr(message, key)
    if reasoning := message.reasoning_content or message.reasoning:
        out["reasoning_content"] = reasoning
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(where, call.function)},
            }
            for call in message.tool_calls
        ]
    return out


def _text_of(where: str, content: str | list[dict[str, Any]] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for at, part in enumerate(content):
        if part.get("type") != "text":
            raise bad_request(
                f"{where}.content[{at}].type={part.get('type')!r:.80} is not supported: this server takes text only",
                param=f"{where}.content[{at}].type",
                code="unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            raise bad_request(
                f"{where}.content[{at}].text={part.get('text')!r:.80} is not a string",
                param=f"{where}.content[{at}].text",
                code="invalid_type",
            )
    return "\n".join(part["text"] for part in content)


def _arguments(where: str, function: FunctionCall) -> dict[str, Any]:
    """Templates want the object, not the string: they would quote a string once more. An empty one says nothing."""
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(
            f"{where}.tool_calls: arguments={function.arguments!r:.80} of {function.name!r} is not a JSON object in a "
            "string",
            param=f"{where}.tool_calls",
        )
    return arguments

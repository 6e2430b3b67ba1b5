"""What a request may hold: the structs of the endpoints.

A parameter is honoured, or refused with a 400 that names it (`refused.py`); none is dropped in silence. `null` means
absent.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, TypeVar, cast

import msgspec

from superinfer.runtime.protocol import Hints
from superinfer.runtime.server.errors import ApiError, bad_request
from superinfer.runtime.server.refused import Passing, check_refused

Role = Literal["system", "developer", "user", "assistant", "tool"]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """include_usage: one more chunk, without choices, that holds the usage.
    interval_ms: the least time between two pieces of an answer that has no stop strings; what came meanwhile comes
    together."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    interval_ms: float | None = None


class CountedStreamOptions(StreamOptions, frozen=True, forbid_unknown_fields=True):
    """continuous_usage_stats: every chunk holds the usage so far, and one comes for every token, text or none, so that
    tokens can be counted as they come."""

    continuous_usage_stats: bool | None = None


class SloFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An SLO in milliseconds; see superinfer.SLO, which is in seconds."""

    ttft_ms: float | None = None
    tbt_ms: float | None = None
    deadline_ms: float | None = None
    weight: float | None = None
    on_miss: Literal["finish", "truncate", "raise"] | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's way to constrain an output; at most one of them. grammar: EBNF as xgrammar reads it. structural_tag:
    xgrammar's, as an object or its JSON. From `disable_any_whitespace` on: what is so here in any case."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None


class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all endpoints that generate share. model: "" where it was left out: the one that is served."""

    model: str = ""
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    slo: SloFields | None = None
    service_tier: str | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    hints: Hints | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """`arguments` is JSON in a string."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True):
    """One call that the assistant made."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a chat. From `refusal` on: what clients send back of an earlier answer. Of these only the
    reasoning may hold something, which the model's template may show again."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Written(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chats and completions share: how the answer is written.

    response_format: OpenAI's. return_token_ids: it holds the ids of its tokens and of the prompt's.
    return_tokens_as_token_ids: its logprobs name tokens as `token_id:N`. include_stop_str_in_output: a text that a stop
    string ended ends with it. request_id: part of its id.
    """

    response_format: dict[str, Any] | None = None
    stream_options: CountedStreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    include_stop_str_in_output: bool | None = None
    request_id: str | None = None


class ChatRequest(Written, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Written, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of /v1/completions. prompt: a string, token ids, or a list of either. add_special_tokens: to a string, what
    the model's tokenizer puts around one."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


T = TypeVar("T")


def parse(body: bytes, cls: type[T], passing: Passing, **defaults: Any) -> T:
    """The request in `body`: a struct. defaults: fields that it may leave out. Raises ApiError naming the parameter and
    its value."""
    raw = _loaded(body)
    if not isinstance(raw, dict):
        raise bad_request(f"the request body is a JSON {type(raw).__name__}; send an object", code="invalid_json")
    fields = cast(Any, cls).__struct_fields__  # `structs.fields` would evaluate every annotation, for each request
    raw = defaults | {name: value for name, value in raw.items() if value is not None}
    for name in [name for name in raw if name not in fields]:
        check_refused(name, raw.pop(name), passing)
    try:
        return msgspec.convert(raw, cls)
    except msgspec.ValidationError as error:
        raise _type_error(raw, str(error)) from None


def _loaded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)  # a tenth of the time
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(body)  # takes NaN and Infinity, so that the error can name the field that holds them
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}", code="invalid_json") from None


def _type_error(raw: dict[str, Any], message: str) -> ApiError:
    """msgspec says what was expected and where; add the value that was found there."""
    said, _, where = message.partition(" - at `$.")
    where = where.rstrip("`")
    if missing := re.match(r"Object missing required field `(\w+)`", said):
        name = f"{where}.{missing[1]}" if where else missing[1]
        return bad_request(f"{name} is missing; add it", param=name, code="missing_parameter")
    if unknown := re.match(r"Object contains unknown field `(\w+)`", said):
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        return bad_request(f"unknown parameter {name!r}; remove it", param=name, code="unknown_parameter")
    value: Any = raw
    for key, index in re.findall(r"(\w+)|\[(\d+)\]", where):
        value = value[int(index)] if index else value[key]
    said = re.sub(r" \| null", "", said[:1].lower() + said[1:])
    return bad_request(f"{where}={value!r:.80} is of the wrong type: {said}", param=where or None, code="invalid_type")

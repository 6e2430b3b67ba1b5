"""Documented parameters that a request has no field for: at values that ask for nothing they pass, else they are
refused by name, with what to do instead.
"""

from __future__ import annotations

import json
from typing import Any

from superinfer.runtime.server.errors import ApiError, bad_request

# Name of a parameter to the values that pass.
Passing = dict[str, tuple[Any, ...]]

ANYTHING = object()
# Those of vLLM, at the values that it has unless told otherwise.
_VLLM: Passing = {
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "logits_processors": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "repetition_detection": (),
    "vllm_xargs": (),
}
_VLLM_SAMPLING: Passing = {
    "best_of": (1,),
    "detokenize": (True,),
    "length_penalty": (1, 1.0),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
}
# Those of SGLang, likewise.
_SGLANG: Passing = {
    "ebnf": (),
    "json_schema": (),
    "lora_path": (),
    "no_stop_trim": (False,),
    "regex": (),
    "return_hidden_states": (False,),
    "rid": (),
    "stop_regex": (),
}
CHAT_PASS: Passing = {
    **_VLLM,
    **_VLLM_SAMPLING,
    **_SGLANG,
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "documents": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "safety_identifier": (ANYTHING,),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION_PASS: Passing = {**_VLLM, **_VLLM_SAMPLING, **_SGLANG, "prompt_embeds": (), "suffix": ("",)}
RESPONSES_PASS: Passing = {
    **_VLLM,
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "enable_response_messages": (False,),
    "include_stop_str_in_output": (False,),
    "max_tool_calls": (),
    "moderation": (),
    "previous_input_messages": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "request_id": (),
    "return_token_ids": (False,),
    "safety_identifier": (ANYTHING,),
    "skip_special_tokens": (True,),
    "truncation": ("disabled",),
}
# What to do instead of removing it, where there is something.
_INSTEAD = {
    "best_of": "ask for n choices and take the one you like",
    "chat_template": "render the messages yourself and send them to /v1/completions",
    "documents": "give them as chat_template_kwargs.documents, where the model's template knows them",
    "ebnf": "use structured_outputs.grammar",
    "echo": "put the last message before the answer yourself",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_json": "use structured_outputs.json, or response_format",
    "guided_regex": "use structured_outputs.regex",
    "include_reasoning": 'ask for none by reasoning_effort="none", or leave reasoning_content unread',
    "json_schema": "use structured_outputs.json, or response_format",
    "logits_processors": "use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "no_stop_trim": "use include_stop_str_in_output",
    "previous_input_messages": "give them as input",
    "priority": "use slo, with its weight, or service_tier",
    "prompt_logprobs": "ask /v1/completions with echo=true and logprobs",
    "regex": "use structured_outputs.regex",
    "repetition_detection": "use frequency_penalty, or stop",
    "request_id": "use the id of the answer",
    "rid": "use request_id",
    "return_token_ids": "ask /v1/chat/completions",
    "skip_special_tokens": "ask for return_token_ids, and /detokenize for their text",
    "stop_regex": "use stop",
    "stream_interval": "use stream_options.interval_ms",
    "thinking_token_budget": 'use max_completion_tokens, or reasoning_effort="none"',
    "truncation": "use truncate_prompt_tokens",
    "use_beam_search": "ask for n choices, or score those you know by /v1/select",
}


def check_refused(name: str, value: Any, passing: Passing) -> None:
    """Of a parameter that there is no field for. Raises ApiError unless it may pass."""
    if name not in passing:
        raise bad_request(
            f"unknown parameter {name!r}; remove it, or see docs/serving.md for those that this server takes",
            param=name,
            code="unknown_parameter",
        )
    allowed = passing[name]
    if not (ANYTHING in allowed or any(value == a and type(value) is type(a) for a in allowed)):
        raise _refused(name, value, allowed)


def _refused(name: str, value: Any, allowed: tuple[Any, ...]) -> ApiError:
    only = f" (only {' or '.join(json.dumps(a) for a in allowed)} is)" if allowed else ""
    message = f"{name}={value!r:.80} is not supported by this server{only}; {_INSTEAD.get(name, 'remove it')}"
    return bad_request(message, param=name, code="unsupported_parameter")

"""Chat completions, through the real OpenAI client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from superinfer.runtime.launch import EngineProcess

MODEL = "tiny"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def ask(client: openai.OpenAI, **more: Any) -> Any:
    extra = {"ignore_eos": True} | more.pop("extra_body", {})
    return client.chat.completions.create(
        **({"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": 7, "extra_body": extra} | more)
    )


def test_an_answer_has_text_usage_and_a_reason(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and choice.message.role == "assistant"
    assert len(choice.message.content) == 12  # a token of this model is a character
    assert answer.usage.completion_tokens == 12
    # <|im_start|> "user\n" "hello" <|im_end|> "\n" <|im_start|> "assistant\n"
    assert answer.usage.prompt_tokens == 1 + 5 + 5 + 1 + 1 + 1 + 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    chunks = list(ask(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert "".join(pieces) == whole and len(pieces) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_usage_comes_as_a_last_chunk_without_choices(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and all(c.choices and c.usage is None for c in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("logprobs", [False, True])
def test_usage_can_come_with_every_chunk(client: openai.OpenAI, logprobs: bool) -> None:
    """As guidellm and other load generators ask for it, to count tokens as they come."""
    counted: Any = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = ask(client, stream=True, stream_options=counted, logprobs=logprobs)
    text = ""
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        assert chunk.usage.completion_tokens == len(text)  # a token of this model is a character
    assert text == ask(client).choices[0].message.content and chunks[0].usage.completion_tokens == 0
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}
    assert last.choices == [] and last.usage.completion_tokens == 12
    alone: Any = {"continuous_usage_stats": True}
    assert all(chunk.choices and chunk.usage for chunk in ask(client, stream=True, stream_options=alone))


def test_an_answer_that_was_cut_short_in_its_thoughts_can_be_sent_back(client: openai.OpenAI) -> None:
    """Its content is null, and it has no calls."""
    cut: Any = {"role": "assistant", "content": None, "refusal": None}
    again = ask(client, messages=[*HELLO, cut, *HELLO])
    empty = ask(client, messages=[*HELLO, cut | {"content": ""}, *HELLO])
    assert again.usage.prompt_tokens == empty.usage.prompt_tokens > ask(client).usage.prompt_tokens


def test_a_repeated_prompt_is_reported_as_cached(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "tell me of the cache, at some length please: " + "x" * 200}]
    first, second = ask(client, messages=messages), ask(client, messages=messages)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 200
    salted = ask(client, messages=messages, extra_body={"cache_salt": "another tenant"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_n_choices_differ_and_count_the_prompt_once(client: openai.OpenAI) -> None:
    one = ask(client)
    three = ask(client, n=3)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert len({c.message.content for c in three.choices}) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens and three.usage.completion_tokens == 36


def test_n_choices_stream_interleaved(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    for chunk in ask(client, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {c.index: c.message.content for c in ask(client, n=2).choices}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI, stream: bool) -> None:
    whole = ask(client, max_tokens=40).choices[0].message.content
    stop = whole[20:23]
    for given in (stop, ["never in there", stop]):
        answer = ask(client, max_tokens=40, stop=given, stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_logprobs_have_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, temperature=0)
    tokens = answer.choices[0].logprobs.content
    assert "".join(t.token for t in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3 and bytes(token.bytes).decode() == token.token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy takes the most likely
    streamed = [
        t.logprob
        for chunk in ask(client, logprobs=True, temperature=0, stream=True)
        if chunk.choices[0].logprobs
        for t in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([t.logprob for t in tokens], abs=1e-4)


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    assert ask(client, seed=8).choices[0].message.content != whole
    greedy = ask(client, temperature=0).choices[0].message.content
    assert ask(client, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert ask(client, temperature=0, extra_body={"top_k": -1}).choices[0].message.content == greedy
    assert ask(client, top_p=1e-6).choices[0].message.content == greedy
    assert ask(client, extra_body={"min_p": 1.0}).choices[0].message.content == greedy
    tame = ask(client, temperature=0, max_tokens=60, presence_penalty=2.0, frequency_penalty=2.0)
    text = tame.choices[0].message.content
    assert len(set(text)) > len(set(ask(client, temperature=0, max_tokens=60).choices[0].message.content))


def test_every_role_and_text_parts_are_rendered(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "how is"}, {"type": "text", "text": "Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    turns = ["system\nbe brief", "user\nhow is\nOslo?", "assistant\nOslo", "tool\nrain"]
    expected = sum(1 + len(turn) + 2 for turn in turns) + 1 + len("assistant\n")
    assert ask(client, messages=messages).usage.prompt_tokens == expected


def test_a_call_without_arguments_may_leave_their_text_empty(client: openai.OpenAI) -> None:
    def prompt_tokens(arguments: str) -> int:
        call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
        messages = [*HELLO, {"role": "assistant", "content": "so:", "tool_calls": [call]}]
        return int(
            ask(
                client, messages=[*messages, {"role": "tool", "content": "9", "tool_call_id": "c1"}]
            ).usage.prompt_tokens
        )

    assert prompt_tokens("") == prompt_tokens("{}")


def test_a_final_assistant_message_can_be_continued(client: openai.OpenAI) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "well, I"}]
    fresh = ask(client, messages=messages).usage.prompt_tokens
    open_ended = ask(client, messages=messages, extra_body={"continue_final_message": True}).usage.prompt_tokens
    assert fresh - open_ended == (1 + len("\n")) + (1 + len("assistant\n"))  # no end mark, no new turn


def test_tools_are_rendered_unless_tool_choice_is_none(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    plain = ask(client).usage.prompt_tokens
    assert ask(client, tools=tools).usage.prompt_tokens > plain + 50
    assert ask(client, tools=tools, tool_choice="none").usage.prompt_tokens == plain


def test_harmless_parameters_are_accepted(client: openai.OpenAI) -> None:
    answer = ask(
        client, user="me", metadata={"a": "b"}, store=False, response_format={"type": "text"}, logit_bias={}, stop=None,
        top_logprobs=0,
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_apart_from_the_answer_and_is_counted(
    tiny_engine: EngineProcess, serving: Callable[..., Any], stream: bool
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "<think>"}]  # and never does this model close it
    extra = {"continue_final_message": True}
    with serving(tiny_engine.address, reasoning_parser="think") as thinking, thinking.openai() as client:
        if stream:
            *chunks, last = ask(
                client, messages=messages, extra_body=extra, stream=True, stream_options={"include_usage": True}
            )
            deltas = [chunk.choices[0].delta for chunk in chunks]
            content = "".join(delta.content or "" for delta in deltas)
            thought, usage = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas), last.usage
        else:
            answer = ask(client, messages=messages, extra_body=extra)
            content, usage = answer.choices[0].message.content or "", answer.usage
            thought = answer.choices[0].message.reasoning_content
        assert content == "" and len(thought) > 6
        assert usage.completion_tokens_details.reasoning_tokens == len(thought)
        items: list[Any] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>"}]
        plain = client.responses.create(model=MODEL, input=items, max_output_tokens=4)
        assert plain.usage is not None and plain.usage.output_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_thirty_concurrent_requests_each_get_their_own_answer(served: Any, stream: bool) -> None:
    async with served.openai_async() as client:

        async def one(i: int) -> str:
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"number {i % 10}"}],
                max_tokens=30,
                seed=i % 10,
                stream=stream,
                extra_body={"ignore_eos": True},
            )
            if not stream:
                return answer.choices[0].message.content or ""
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

        texts = await asyncio.gather(*(one(i) for i in range(30)))
    assert all(20 < len(text) <= 30 for text in texts)  # a token is a character, but for the special ones
    assert texts[:10] == texts[10:20] == texts[20:] and len(set(texts)) == 10

"""Plain completions, through the real OpenAI client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

MODEL = "tiny"


def ask(client: openai.OpenAI, prompt: Any = "once upon", **more: Any) -> Any:
    return client.completions.create(
        **({"model": MODEL, "prompt": prompt, "seed": 3, "extra_body": {"ignore_eos": True}} | more)
    )


def test_the_default_length_is_openais_sixteen(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert len(answer.choices[0].text) == 16 and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("once upon"), 16)


def test_the_default_length_shrinks_to_what_the_context_holds(client: openai.OpenAI) -> None:
    assert ask(client, "x" * 2044).usage.completion_tokens == 4


def test_strings_and_token_ids_are_the_same_prompt(client: openai.OpenAI, tiny_checkpoint: Any) -> None:
    from superinfer.runtime.tokenization import Tokenizer

    ids = Tokenizer(str(tiny_checkpoint)).encode("once upon")
    texts = [ask(client, p).choices[0].text for p in ("once upon", ["once upon"], ids, [ids])]
    assert len(set(texts)) == 1


def test_several_prompts_number_their_choices_through(client: openai.OpenAI) -> None:
    both = ask(client, ["first one", "then another"], n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == len("first one") + len("then another")
    alone = ask(client, "then another", n=2)
    assert [c.text for c in both.choices[2:]] == [c.text for c in alone.choices]


def test_streaming_several_prompts_gives_the_same_texts(client: openai.OpenAI) -> None:
    prompts = ["first one", "then another"]
    texts = {0: "", 1: ""}
    chunks = list(ask(client, prompts, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {c.index: c.text for c in ask(client, prompts).choices}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 32


@pytest.mark.parametrize("logprobs", [None, 1])
def test_usage_can_come_with_every_chunk(client: openai.OpenAI, logprobs: int | None) -> None:
    """Over all choices together, as the tokens come."""
    counted: Any = {"include_usage": True, "continuous_usage_stats": True}
    prompts = ["first one", "then another"]
    *chunks, last = ask(client, prompts, n=2, stream=True, stream_options=counted, logprobs=logprobs)
    seen = 0
    for chunk in chunks:
        seen += len(chunk.choices[0].text)  # a token of this model is a character
        assert chunk.usage.completion_tokens == seen
    assert {chunk.usage.prompt_tokens for chunk in [*chunks, last]} == {len("".join(prompts))}
    assert last.choices == [] and last.usage.completion_tokens == seen == 4 * 16


def test_logprobs_have_the_older_shape(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=2, temperature=0).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(16))  # a token of this model is a character
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == pytest.approx(logprob)
    assert ask(client, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_min_tokens_and_stop_ids_are_honoured(client: openai.OpenAI) -> None:
    any_token = list(range(90))
    assert ask(client, extra_body={"stop_token_ids": any_token}).usage.completion_tokens == 1
    late = ask(client, extra_body={"stop_token_ids": any_token, "min_tokens": 5, "ignore_eos": True})
    assert late.usage.completion_tokens > 5


def test_echo_gives_the_prompt_back_and_scores_it(client: openai.OpenAI) -> None:
    plain = ask(client, temperature=0, logprobs=0).choices[0]
    echoed = ask(client, echo=True, temperature=0, logprobs=0).choices[0]
    assert echoed.text == "once upon" + plain.text
    assert "".join(echoed.logprobs.tokens) == echoed.text and echoed.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in echoed.logprobs.token_logprobs[1:9])
    assert echoed.logprobs.token_logprobs[9:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    single, other = ask(client, ["o", "on"], echo=True, max_tokens=1, logprobs=1).choices
    assert [len(one.logprobs.tokens) for one in (single, other)] == [2, 3]
    assert single.logprobs.token_logprobs[0] is None and single.logprobs.top_logprobs[0] is None
    only = ask(client, echo=True, max_tokens=0, logprobs=0).choices[0]
    assert only.text == "once upon" and len(only.logprobs.tokens) == 9
    streamed = "".join(c.choices[0].text for c in ask(client, echo=True, temperature=0, stream=True))
    assert streamed == echoed.text


def test_a_promise_of_a_scored_prompt_is_judged(client: openai.OpenAI) -> None:
    promised = {"ignore_eos": True, "slo": {"deadline_ms": 60_000}}
    answer = ask(client, ["once upon", "a time"], echo=True, max_tokens=0, logprobs=0, n=2, extra_body=promised)
    assert answer.slo["met"] is True and answer.slo["e2e_ms"] > 0
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (15, 0)


def test_a_stream_of_the_prompt_alone_is_a_stream(client: openai.OpenAI) -> None:
    prompts = ["once upon", "a time"]
    only = {"echo": True, "max_tokens": 0, "n": 2, "stream": True}
    *chunks, last = ask(client, prompts, stream_options={"include_usage": True}, **only)
    said = [(choice.index, choice.text, choice.finish_reason) for chunk in chunks for choice in chunk.choices]
    assert said == [(at, prompts[at // 2], "length") for at in range(4)]
    assert last.choices == [] and (last.usage.prompt_tokens, last.usage.completion_tokens) == (15, 0)
    assert [chunk.usage for chunk in chunks] == [None] * 4
    assert len(list(ask(client, prompts, **only))) == 4


def test_the_rivals_of_the_prompts_tokens_are_those_of_the_same_place_when_it_is_generated(
    client: openai.OpenAI,
) -> None:
    prompt = ask(client, temperature=0, echo=True).choices[0].text
    said = ask(client, temperature=0, logprobs=3).choices[0].logprobs
    both = ask(client, [prompt, prompt[:-1] + "Z"], echo=True, max_tokens=1, temperature=0, logprobs=3).choices
    scored, other = both[0].logprobs, both[1].logprobs
    start = len("once upon")
    assert scored.top_logprobs[0] is None and len(scored.top_logprobs) == len(scored.tokens) == len(prompt) + 1
    for at in range(16):
        assert scored.top_logprobs[start + at] == pytest.approx(said.top_logprobs[at], abs=1e-4), at
    assert max(said.top_logprobs[-1], key=said.top_logprobs[-1].get) == prompt[-1]
    assert "Z" in other.top_logprobs[-2] and len(other.top_logprobs[-2]) == 4  # it too, though it is not likely
    assert other.top_logprobs[-2]["Z"] == other.token_logprobs[-2] < max(other.top_logprobs[-2].values())


def test_a_harness_tells_likely_continuations_by_scored_prompts(http: httpx.Client, client: openai.OpenAI) -> None:
    """As lm-eval's local-completions does for multiple choice, with token ids: the sum of a continuation's logprobs,
    and whether it is what would be said."""

    def likelihood(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        asked = {"model": MODEL, "prompt": [context + continuation], "temperature": 0, "max_tokens": 1, "logprobs": 1}
        answer = http.post("/v1/completions", json=asked | {"seed": 1234, "echo": True})
        found = answer.json()["choices"][0]["logprobs"]
        own, rivals = found["token_logprobs"][len(context) : -1], found["top_logprobs"][len(context) : -1]
        assert len(own) == len(continuation)
        return sum(own), all(one == max(top.values()) for one, top in zip(own, rivals, strict=True))

    def ids(text: str) -> list[int]:
        return list(http.post("/tokenize", json={"prompt": text}).json()["tokens"])

    greedy = ask(client, temperature=0, max_tokens=5).choices[0].text
    likely, unlikely = (likelihood(ids("once upon"), ids(text)) for text in (greedy, "ZZZZZ"))
    assert likely[1] and not unlikely[1] and likely[0] > unlikely[0]


def test_text_and_tokens_turn_into_each_other(http: httpx.Client) -> None:
    made = http.post("/tokenize", json={"model": MODEL, "prompt": "once", "return_token_strs": True}).json()
    assert (made["count"], made["token_strs"], made["max_model_len"]) == (4, list("once"), 2048)
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": "once"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"].startswith("<|im_start|>user\nhi")
    rendered = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    bare = http.post("/tokenize", json=rendered | {"add_generation_prompt": False}).json()
    assert chat["tokens"][: bare["count"]] == bare["tokens"] and bare["count"] < chat["count"]
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens"

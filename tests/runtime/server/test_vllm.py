"""Parameters that vLLM has beyond OpenAI's, as its clients use them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
PLAIN: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 40}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", PLAIN)]
CONTEXT = 2048


def answered(http: httpx.Client, url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(url, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text_of(http: httpx.Client, url: str, body: dict[str, Any]) -> str:
    choice = answered(http, url, {"temperature": 0, "ignore_eos": True} | body)["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def chunks_of(http: httpx.Client, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", url, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def ids_of(http: httpx.Client, text: str) -> list[int]:
    return list(http.post("/tokenize", json={"prompt": text}).json()["tokens"])


@pytest.mark.parametrize(("url", "body"), ROUTES)
def test_only_allowed_tokens_come(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    allowed = ids_of(http, "abc")
    for temperature in (0, 2.0):
        text = text_of(http, url, body | {"allowed_token_ids": allowed, "temperature": temperature, "seed": 1})
        assert len(text) == 40 and set(text) <= set("abc")


@pytest.mark.parametrize(("url", "body"), ROUTES)
def test_bad_words_do_not_come(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    free = text_of(http, url, body)
    banned: list[str] = []
    for _ in range(5):  # each answer's own words, one after the other
        text = text_of(http, url, body | {"bad_words": banned})
        assert not any(word in text for word in banned)
        word = text[10:13].strip() or text[10:16].strip()
        banned += [word, f"  {text[20]}"] if text[20] != " " else [word]
    assert text != free
    assert text_of(http, url, body | {"bad_words": []}) == free


def test_the_first_letters_of_a_bad_word_may_come(http: httpx.Client) -> None:
    allowed = dict.fromkeys(ids_of(http, "ab"), 60)
    asked = PLAIN | {"logit_bias": {str(token_id): worth for token_id, worth in allowed.items()}, "temperature": 1}
    text = text_of(http, "/v1/completions", asked | {"bad_words": ["aa", "bbb"], "seed": 3})
    assert set(text) == set("ab") and "aa" not in text and "bbb" not in text and "bb" in text


def test_words_and_allowed_tokens_reach_a_response(http: httpx.Client) -> None:
    asked = {"input": "hello", "max_output_tokens": 20, "ignore_eos": True, "allowed_token_ids": ids_of(http, "xy")}
    answer = answered(http, "/v1/responses", asked)
    assert set(answer["output"][0]["content"][0]["text"]) <= set("xy")


@pytest.mark.parametrize(("url", "body"), ROUTES)
def test_the_model_need_not_be_named(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    for given in ({key: value for key, value in body.items() if key != "model"}, body | {"model": None}):
        assert answered(http, url, given)["model"] == "tiny"
        assert {chunk["model"] for chunk in chunks_of(http, url, given)} == {"tiny"}


def test_nor_need_it_in_other_requests(http: httpx.Client) -> None:
    assert answered(http, "/v1/responses", {"input": "hello", "max_output_tokens": 3})["model"] == "tiny"
    assert answered(http, "/v1/select", {"prompt": "a", "choices": ["b", "c"]})["model"] == "tiny"


def test_token_ids_come_with_an_answer(http: httpx.Client) -> None:
    asked = {"return_token_ids": True, "n": 2, "seed": 1, "ignore_eos": True}
    chat = answered(http, "/v1/chat/completions", CHAT | asked)
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    for choice in chat["choices"]:
        assert len(choice["token_ids"]) == 40
        text = http.post("/detokenize", json={"tokens": choice["token_ids"]}).json()["prompt"]
        assert (
            text.replace("<unk>", "").replace("<|im_start|>", "").replace("<|im_end|>", "")
            == choice["message"]["content"]
        )
    plain = answered(http, "/v1/completions", PLAIN | asked | {"prompt": ["hello", "well"]})
    prompts = [choice["prompt_token_ids"] for choice in plain["choices"]]
    assert prompts == [ids_of(http, text) for text in ("hello", "hello", "well", "well")]
    assert all(len(choice["token_ids"]) == 40 for choice in plain["choices"])
    without = answered(http, "/v1/chat/completions", CHAT)
    assert "prompt_token_ids" not in without and "token_ids" not in without["choices"][0]


@pytest.mark.parametrize(("url", "body"), ROUTES)
@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"stop": "e"}, {"stream_options": {"include_usage": True}}])
def test_token_ids_come_with_the_chunks_of_a_stream(
    http: httpx.Client, url: str, body: dict[str, Any], more: dict[str, Any]
) -> None:
    if "logprobs" in more and url == "/v1/chat/completions":
        more = {"logprobs": True}
    asked = body | more | {"return_token_ids": True, "n": 2, "seed": 1}
    whole = answered(http, url, {key: value for key, value in asked.items() if key != "stream_options"})
    chunks = chunks_of(http, url, asked)
    for one in whole["choices"]:
        mine = [(chunk, choice) for chunk in chunks for choice in chunk["choices"] if choice["index"] == one["index"]]
        ids = [token_id for _, choice in mine for token_id in choice.get("token_ids", [])]
        assert ids == one["token_ids"]
        shown = [(chunk | choice).get("prompt_token_ids") for chunk, choice in mine]
        assert shown[0] == (whole | one)["prompt_token_ids"] and not any(shown[1:])


def test_an_echoed_prompt_has_its_token_ids_too(http: httpx.Client) -> None:
    alone = {"echo": True, "max_tokens": 0, "return_token_ids": True}
    for found in (answered(http, "/v1/completions", PLAIN | alone), *chunks_of(http, "/v1/completions", PLAIN | alone)):
        assert found["choices"][0]["prompt_token_ids"] == ids_of(http, "hello")
        assert found["choices"][0]["token_ids"] == []


def test_a_prompt_is_cut_to_its_last_tokens(http: httpx.Client) -> None:
    asked = PLAIN | {"prompt": ["one two three", "go"], "echo": True, "truncate_prompt_tokens": 5, "max_tokens": 1}
    answer = answered(http, "/v1/completions", asked)
    assert [choice["text"][:-1] for choice in answer["choices"]] == ["three", "go"]
    chat = answered(http, "/v1/chat/completions", CHAT | {"truncate_prompt_tokens": 7})
    assert chat["usage"]["prompt_tokens"] == 7
    response = {"input": "hello", "truncate_prompt_tokens": 7, "max_output_tokens": 3}
    assert answered(http, "/v1/responses", response)["usage"]["input_tokens"] == 7


def test_a_prompt_is_cut_to_what_the_context_has_room_for(http: httpx.Client) -> None:
    long = "x" * 3000
    cut = {"truncate_prompt_tokens": -1}
    plain = answered(http, "/v1/completions", PLAIN | cut | {"prompt": long, "max_tokens": 9, "ignore_eos": True})
    assert plain["usage"]["prompt_tokens"] == CONTEXT - 9 and plain["usage"]["completion_tokens"] == 9
    default = answered(http, "/v1/completions", {"prompt": long, "ignore_eos": True} | cut)
    assert default["usage"]["completion_tokens"] == 16
    messages = [{"role": "user", "content": long}]
    chat = answered(http, "/v1/chat/completions", {"messages": messages, "max_completion_tokens": 9} | cut)
    assert chat["usage"]["prompt_tokens"] == CONTEXT - 9
    short = answered(http, "/v1/completions", PLAIN | cut)
    assert short["usage"]["prompt_tokens"] == 5
    refused = http.post("/v1/completions", json=PLAIN | {"prompt": long, "truncate_prompt_tokens": CONTEXT})
    assert refused.json()["error"]["code"] == "context_length_exceeded"

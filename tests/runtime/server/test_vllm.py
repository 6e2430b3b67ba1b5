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
    for choice, prompt in zip(answer["choices"], ("three", "go"), strict=True):
        assert choice["text"].startswith(prompt)
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


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_is_cut_at_the_side_that_is_named(http: httpx.Client, side: str | None) -> None:
    asked = PLAIN | {"prompt": "one two three", "echo": True, "truncate_prompt_tokens": 3, "max_tokens": 1}
    text = answered(http, "/v1/completions", asked | {"truncation_side": side})["choices"][0]["text"]
    assert text[:3] == ("one" if side == "right" else "ree")


@pytest.mark.parametrize(("url", "body"), ROUTES)
def test_an_answer_has_the_id_that_was_given(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    named = body | {"request_id": "mine-1"}
    (found,) = {answered(http, url, named)["id"], *(chunk["id"] for chunk in chunks_of(http, url, named))}
    assert found == ("chatcmpl-mine-1" if "messages" in body else "cmpl-mine-1")
    refused = http.post(url, json=body | {"request_id": "x" * 200}).json()["error"]
    assert refused["param"] == "request_id" and "200 characters; give 1 to 128" in refused["message"]


@pytest.mark.parametrize(("url", "body"), ROUTES)
def test_a_stop_string_may_be_kept(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    free = text_of(http, url, body)
    stop = free[10:12]
    kept = {"stop": stop, "include_stop_str_in_output": True, "temperature": 0, "ignore_eos": True}
    expected = free[: free.index(stop) + len(stop)]
    assert text_of(http, url, body | kept) == expected
    choices = [choice for chunk in chunks_of(http, url, body | kept) for choice in chunk["choices"]]
    parts = [choice["delta"].get("content") if "delta" in choice else choice["text"] for choice in choices]
    assert "".join(part or "" for part in parts) == expected and choices[-1]["finish_reason"] == "stop"
    assert text_of(http, url, body | kept | {"stop": "never there"}) == free


def test_logprobs_may_name_tokens_by_their_ids(http: httpx.Client) -> None:
    asked = {"return_tokens_as_token_ids": True, "return_token_ids": True, "seed": 1}
    (choice,) = answered(http, "/v1/chat/completions", CHAT | asked | {"logprobs": True, "top_logprobs": 2})["choices"]
    scored = choice["logprobs"]["content"]
    assert [one["token"] for one in scored] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert all(one["token"].startswith("token_id:") for token in scored for one in token["top_logprobs"])
    (choice,) = answered(http, "/v1/completions", PLAIN | asked | {"logprobs": 2})["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]


def test_a_completion_has_a_format_too(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    formats = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert json.loads(text_of(http, "/v1/completions", PLAIN | {"response_format": formats, "ignore_eos": False}))["a"]
    both = PLAIN | {"response_format": formats, "structured_outputs": {"regex": "a"}}
    assert "exclude each other" in http.post("/v1/completions", json=both).json()["error"]["message"]


@pytest.mark.parametrize(("url", "body"), ROUTES)
def test_structural_tags_are_taken(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    format = {
        "type": "sequence",
        "elements": [{"type": "const_string", "value": "<a>"}, {"type": "regex", "pattern": "[xy]{3}"}],
    }
    tag = {"type": "structural_tag", "format": format}
    for given in (
        {"response_format": tag},
        {"structured_outputs": {"structural_tag": tag, "disable_any_whitespace": True}},
        {"structured_outputs": {"structural_tag": json.dumps(tag), "disable_fallback": True}},
    ):
        text = text_of(http, url, body | given | {"ignore_eos": False})
        assert text[:3] == "<a>" and len(text) == 6 and set(text[3:]) <= set("xy")
    for wrong, said in (
        ({"type": "structural_tag", "structures": [], "triggers": []}, "is no tag; give"),
        ({"type": "structural_tag", "format": {"type": "any_text"}}, "structural_tag.type='any_text' is not supported"),
    ):
        answer = http.post(url, json=body | {"response_format": wrong})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]


# What vLLM's documentation of its server lists beside OpenAI's parameters, by endpoint (in 2026).
SAMPLING = """use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output
 ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens allowed_token_ids
 prompt_logprobs"""
EXTRA = """add_special_tokens response_format structured_outputs priority request_id return_tokens_as_token_ids
 return_token_ids cache_salt kv_transfer_params vllm_xargs repetition_detection"""
LISTED = {
    "/v1/chat/completions": f"""{SAMPLING} {EXTRA} bad_words echo add_generation_prompt continue_final_message documents
 chat_template media_io_kwargs mm_processor_kwargs include_reasoning thinking_token_budget""",
    "/v1/completions": f"{SAMPLING} {EXTRA} prompt_embeds",
    "/v1/responses": """request_id media_io_kwargs mm_processor_kwargs priority cache_salt enable_response_messages
 previous_input_messages structured_outputs repetition_penalty seed stop ignore_eos vllm_xargs kv_transfer_params""",
}
NEEDED = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN, "/v1/responses": {"input": "hello"}}


@pytest.mark.parametrize("url", LISTED)
def test_what_vllm_documents_is_known(http: httpx.Client, url: str) -> None:
    for name in LISTED[url].split():
        error = http.post(url, json=NEEDED[url] | {name: [["never heard of"]]}).json()["error"]
        assert error["param"].partition("[")[0] == name and error["code"] != "unknown_parameter", error


@pytest.mark.parametrize(
    ("url", "change", "instead"),
    [
        ("/v1/completions", {"guided_json": {}}, "use structured_outputs.json"),
        ("/v1/chat/completions", {"documents": [{"title": "a"}]}, "chat_template_kwargs.documents"),
        ("/v1/chat/completions", {"priority": 3}, "use slo, with its weight, or service_tier"),
        ("/v1/completions", {"prompt_logprobs": 1}, "echo=true and logprobs"),
        ("/v1/completions", {"stream_interval": 4}, "stream_options.interval_ms"),
        ("/v1/responses", {"return_token_ids": True}, "ask /v1/chat/completions"),
        ("/v1/chat/completions", {"regex": "[0-9]+"}, "use structured_outputs.regex"),  # from here on SGLang's
        ("/v1/completions", {"ebnf": 'root ::= "a"'}, "use structured_outputs.grammar"),
        ("/v1/completions", {"json_schema": "{}"}, "use structured_outputs.json"),
        ("/v1/completions", {"no_stop_trim": True}, "use include_stop_str_in_output"),
        ("/v1/chat/completions", {"separate_reasoning": False}, "(only true is)"),
        ("/v1/chat/completions", {"rid": "one"}, "use request_id"),
    ],
)
def test_what_is_refused_comes_with_what_to_do(
    http: httpx.Client, url: str, change: dict[str, Any], instead: str
) -> None:
    error = http.post(url, json=NEEDED[url] | change).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", next(iter(change)))
    assert instead in error["message"]


def test_what_sglang_has_passes_where_it_asks_for_what_is_so_anyway(http: httpx.Client) -> None:
    asked = {"separate_reasoning": True, "stream_reasoning": True, "no_stop_trim": False}
    assert http.post("/v1/chat/completions", json=CHAT | asked).status_code == 200


def test_documents_reach_the_template_by_another_way(http: httpx.Client) -> None:
    given = {"chat_template_kwargs": {"documents": [{"title": "a", "text": "b"}]}}
    assert http.post("/v1/chat/completions", json=CHAT | given).status_code == 200

"""An answer that is said again is the tokens that the model wrote, whichever way it spelt it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from superinfer.embedded import model_path
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.server.said import Said
from superinfer.runtime.tokenization import Tokenizer

MODEL = "tiny"  # its name at this server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(model_path()))


@pytest.fixture(scope="module")
def http(serving: Callable[..., AbstractContextManager[Any]]) -> Iterator[httpx.Client]:
    """The embedded model, whose tokens are longer than a character."""
    config = EngineConfig(threads=1, kv_tokens=4096)
    with launch_engine(config) as engine, serving(engine.address) as server, server.http() as http:
        yield http


def ask(http: httpx.Client, messages: list[dict[str, str]], **more: Any) -> Any:
    body = {"model": MODEL, "messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": True} | more
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_turn_finds_an_answer_in_the_cache_that_was_not_in_the_tokenizers_own_tokens(
    http: httpx.Client, tokenizer: Tokenizer, stream: bool
) -> None:
    (letter,) = tokenizer.encode("e", special=False)
    messages = [{"role": "user", "content": f"Say it, streamed or not: {stream}."}]
    forced = {"logit_bias": {str(letter): 100}}
    if stream:
        with http.stream(
            "POST", "/v1/chat/completions",
            json={"model": MODEL, "messages": messages, "max_tokens": 40, "ignore_eos": True, "stream": True, **forced},
        ) as answer:  # fmt: skip
            assert "".join(answer.iter_text()).count('"e') >= 1
    else:
        assert ask(http, messages, **forced)["choices"][0]["message"]["content"] == "e" * 40
    assert len(tokenizer.encode("e" * 40, special=False)) < 40, "letter by letter is not its own spelling"
    messages += [{"role": "assistant", "content": "e" * 40}, {"role": "user", "content": "And again?"}]
    own = tokenizer.encode(tokenizer.render_chat(messages), special=False)
    begun = len(tokenizer.encode(tokenizer.render_chat(messages[:1]), special=False))
    written = len(own) + 40 - len(tokenizer.encode("e" * 40, special=False))

    usage = ask(http, messages)["usage"]
    assert usage["prompt_tokens"] == written
    assert usage["prompt_tokens_details"]["cached_tokens"] == (begun + 39) // 16 * 16, "all but its last token"
    elsewhere = ask(http, messages, cache_salt="another tenant")["usage"]
    assert elsewhere["prompt_tokens"] == len(own), "who shares no cache learns nothing of what was written"


def test_what_was_not_told_as_it_was_written_is_not_kept(tokenizer: Tokenizer) -> None:
    said = Said(tokenizer)
    (letter,), (end,) = tokenizer.encode("e", special=False), tokenizer.encode("<|im_end|>", special=False)
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    own = tokenizer.encode(prompt + "eeee<|im_end|>", special=False)
    for ids, text in (([letter] * 5, "eeee"), ([letter, letter, end, letter, letter], "eeee")):
        said.note("", prompt, ids, text)
        assert said.encode(prompt + "eeee<|im_end|>", "") == own
    said.note("", "eeee" * 100, [letter] * 4, "eeee")  # nothing tells how the answer was opened
    assert said.encode(prompt + "eeee<|im_end|>", "") == own
    said.note("", prompt, [letter] * 4, "eeee")
    begun = tokenizer.encode(prompt, special=False)
    assert said.encode(prompt + "eeee<|im_end|>\n", "") == [
        *begun, *[letter] * 4, end, *tokenizer.encode("\n", special=False),
    ]  # fmt: skip
    assert said.encode(prompt + "eeeee<|im_end|>", "") == tokenizer.encode(prompt + "eeeee<|im_end|>", special=False)


def test_the_answers_used_last_are_kept_within_a_bound(tokenizer: Tokenizer) -> None:
    said = Said(tokenizer, most=40_000)
    (letter,) = tokenizer.encode("e", special=False)
    prompt = "<|im_start|>assistant\n"

    def is_known(length: int) -> bool:
        text = prompt + "e" * length + "<|im_end|>"
        return said.encode(text, "") != tokenizer.encode(text, special=False)

    said.note("", prompt, [letter] * 500, "e" * 500)
    assert not is_known(500), "one that takes an eighth of the room is not kept"
    for length in range(60, 100):
        said.note("", prompt, [letter] * length, "e" * length)
        assert is_known(60), "used again each time"
    assert is_known(99) and not is_known(61)


def test_answers_take_the_memory_that_they_are_given(tokenizer: Tokenizer) -> None:
    """Of short ones there are many, one for each tenant, and what each takes beside its text counts too."""
    most, prompt = 1 << 19, "<|im_start|>assistant\n"
    (letter,) = tokenizer.encode("e", special=False)
    tracemalloc.start()
    try:
        said = Said(tokenizer, most=most)
        for number in range(4_000):
            said.note(f"tenant {number}", prompt, [letter], "e")
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert most / 4 < held < most

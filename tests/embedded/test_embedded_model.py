"""The shipped model: it loads, its template is the documented one, and it answers held-out tasks."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from superinfer.embedded import model_path
from tools.embedded_model.dialogue import TOOLS_HEAD, TOOLS_TAIL, tool_call
from tools.embedded_model.evaluate import exact, generated, questions, row
from tools.embedded_model.tasks import KINDS, sample

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def test_the_folder_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in model_path().glob("*") if f.is_file()) <= 30 * MEGABYTE


def test_the_model_ends_with_the_turn_and_pads_with_the_end_of_text(tokenizer, model):
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == ends[1]
    assert model.config.vocab_size == len(tokenizer)


@given(st.text())
def test_text_comes_back_from_the_tokenizer_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_single_tokens_and_names_do_not_merge_with_spaces(tokenizer):
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer.tokenize(" Brenlo")[1:] == tokenizer.tokenize("Brenlo")


def test_a_chat_renders_as_chatml(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"


def test_tools_render_into_the_system_turn_and_calls_as_the_model_writes_them(tokenizer):
    tool = {
        "type": "function",
        "function": {"name": "lookup", "description": "Look up.", "parameters": {"type": "object"}},
    }
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"key": "price of lamp"}}}
    messages = [
        {"role": "user", "content": "How much is a lamp?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert text == (
        f"<|im_start|>system\n{TOOLS_HEAD}\n{json.dumps(tool)}\n{TOOLS_TAIL}<|im_end|>\n"
        "<|im_start|>user\nHow much is a lamp?<|im_end|>\n"
        f"<|im_start|>assistant\n{tool_call('lookup', {'key': 'price of lamp'})}<|im_end|>\n"
        "<|im_start|>tool\n7<|im_end|>\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_renders_what_the_model_was_trained_on(tokenizer, kind):
    for dialogue in sample(kind, "train", 30):
        if dialogue.messages:
            tools = list(dialogue.tools) or None
            assert (
                tokenizer.apply_chat_template(list(dialogue.messages), tools=tools, tokenize=False) == dialogue.text()
            )


def test_at_least_nine_in_ten_held_out_turns_are_answered_exactly(tokenizer, model):
    dialogues = [dialogue for kind in KINDS for dialogue in sample(kind, "heldout", 4, seed=1)]
    with torch.inference_mode():
        turns = [(d, right) for d in dialogues for right in exact(model, [row(tokenizer, d.kind, d)])[0]]
    misses = [dialogue for dialogue, right in turns if not right]
    assert len(turns) >= 8 * len(KINDS)
    assert len(misses) <= len(turns) // 10, misses


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_one_pass_measure_agrees_with_generating(tokenizer, model, count):
    dialogues = sample("context_qa", "heldout", count, seed=2) + sample("arithmetic", "unseen", count, seed=2)
    with torch.inference_mode():
        measured = [r for d in dialogues for r in exact(model, [row(tokenizer, d.kind, d)])[0]]
    asked = [*questions("context_qa", "heldout", count, seed=2), *questions("arithmetic", "unseen", count, seed=2)]
    texts = generated(model_path(), "cpu", asked)
    assert measured == [t == q.expected for t, q in zip(texts, asked, strict=True)]


def test_the_card_and_the_package_carry_the_measured_figures():
    figures = json.loads((model_path() / "evaluation.json").read_text())["heldout"]
    card = (model_path() / "MODEL_CARD.md").read_text()
    for kind in KINDS:
        assert figures[kind]["dialogues"] >= 500
        assert f"| {kind} | {figures[kind]['accuracy']:.1%} |" in card

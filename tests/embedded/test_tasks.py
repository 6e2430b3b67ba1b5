"""The task generator: what it draws is a function of the seed, and no held-out instance occurs in training."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest

from tools.embedded_model import arithmetic, smalltalk
from tools.embedded_model.agent import value_of
from tools.embedded_model.dialogue import IM_END, render
from tools.embedded_model.draw import Draw
from tools.embedded_model.tasks import KINDS, sample, stream

SPLIT_KINDS = [kind for kind in KINDS if kind != smalltalk.KIND]


def test_the_same_seed_draws_the_same_dialogues_and_another_seed_others():
    first, again, other = (list(islice(stream(seed), 60)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", KINDS)
def test_every_dialogue_has_graded_answers_that_are_not_empty(kind):
    for dialogue in sample(kind, "train", 80):
        answers = [text for text, graded in render(dialogue) if graded]
        assert answers
        assert all(text.removesuffix(IM_END).strip() for text in answers)


@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_no_held_out_text_is_drawn_for_training(kind):
    train = {d.text() for d in sample(kind, "train", 1500)}
    held = {d.text() for d in sample(kind, "heldout", 60)} | {d.text() for d in sample(kind, "unseen", 60)}
    assert not train & held


@pytest.mark.parametrize("kind", [kind for kind in SPLIT_KINDS if kind != "mixed"])
def test_the_hash_of_the_text_says_on_which_side_an_instance_is(kind):
    train, held = Draw(0, "train"), Draw(0, "heldout")
    for dialogue in sample(kind, "train", 100):
        assert train.fresh(dialogue.text()) and not held.fresh(dialogue.text())
    for dialogue in sample(kind, "unseen", 30):
        assert held.fresh(dialogue.text()) and not train.fresh(dialogue.text())


def test_invented_words_of_the_held_out_splits_are_never_drawn_for_training():
    train, held = Draw(1, "train"), Draw(1, "heldout")
    assert not {train.word() for _ in range(20_000)} & {held.word() for _ in range(2_000)}


@pytest.mark.parametrize("op", ["+", "-"])
def test_held_out_sums_have_operand_pairs_that_training_has_in_neither_order(op):
    train, held = Draw(2, "train"), Draw(2, "heldout")
    seen = {frozenset(arithmetic.pair(train, op)[:2]) for _ in range(30_000)}
    assert not seen & {frozenset(arithmetic.pair(held, op)[:2]) for _ in range(1_500)}


def test_sums_are_right():
    for op, check in {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}.items():
        for _ in range(300):
            a, b, result = arithmetic.pair(Draw(f"{op}{_}"), op)
            assert result == check(a, b)


def test_unseen_phrasings_are_not_in_training():
    def shapes(split: str, count: int) -> set[str]:
        lines = "\n".join(d.text() for d in sample("arithmetic", split, count)).replace(IM_END, "").splitlines()
        return {re.sub(r"\d+", "N", line) for line in lines}

    train, unseen = shapes("train", 3000), shapes("unseen", 300)
    new = {"What do you get for N + N?", "Find N + N.", "I need to know N + N."}
    assert new <= unseen and not new & train
    assert "What is N + N?" in train


def test_extracted_json_has_the_asked_keys_and_values_from_the_message():
    for dialogue in sample("json_extraction", "train", 200):
        for message, answer in zip(dialogue.messages[:-1], dialogue.messages[1:], strict=True):
            if answer["role"] != "assistant":
                continue
            values = json.loads(answer["content"])
            for value in values.values():
                if isinstance(value, str | float):
                    assert str(value) in message["content"]


def test_agents_calculate_and_report_what_their_tools_returned():
    seen = 0
    for dialogue in sample("tool_use", "train", 300):
        messages = dialogue.messages
        for i, message in enumerate(messages):
            if '"calculator"' not in message["content"] or message["role"] != "assistant":
                continue
            call = json.loads(message["content"].removeprefix("<tool_call>").removesuffix("</tool_call>"))
            result = value_of(call["arguments"]["expression"])
            assert result in messages[i + 1]["content"]
            assert result in messages[i + 2]["content"]
            seen += 1
    assert seen > 50

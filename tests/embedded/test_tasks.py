"""The task generator: what it draws is a function of the seed, and no held-out instance occurs in training."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest
from tokenizers import Tokenizer

from superinfer.embedded import model_path
from tools.embedded_model import arithmetic, carry, facts, qa, smalltalk
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


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_no_held_out_text_is_drawn_for_training(kind, count):
    train = {d.text() for d in sample(kind, "train", count)}
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


def worlds(count: int) -> list[tuple[Draw, list[facts.Fact]]]:
    draws = [Draw(f"{split}/{i}", split) for i in range(count) for split in ("train", "heldout")]
    return [(draw, facts.world(draw, qa.size(draw, most=30))) for draw in draws]


def test_a_reversed_question_has_exactly_one_answer():
    def words(text: str) -> str:
        return " " + " ".join(text.lower().split()) + " "

    asked = 0
    for _, known in worlds(700):
        for fact in known:
            for who in fact.kind.who:
                question, value = who.format(v=fact.value).lower(), words(fact.value)
                fits = [f for f in known if any(w.format(v=f.value).lower() == question for w in f.kind.who)]
                assert fits == [fact]
                others = [f for f in known if f.subject != fact.subject]
                assert not any(f.kind is fact.kind and value in words(f.value) for f in others), question
                if question == f"what is {value.strip()}?":
                    assert not any(value in words(f.subject) for f in others), question
                asked += 1
    assert asked > 5000


def test_what_a_reversed_question_names_and_asks_for_stands_in_the_text():
    for draw, known in worlds(150):
        text = qa.context(draw, known).lower()
        for fact in known:
            assert fact.value in fact.sentence and fact.subject.lower() in fact.sentence.lower()
            assert fact.value.lower() in text and fact.subject.lower() in text


@pytest.mark.parametrize(
    ("one", "other", "rivals"),
    [
        ("cat", "cat called Mira", True),
        ("5 May", "May 5", True),
        ("5 May", "1990-05-05", True),
        ("14:00", "2 pm", True),
        ("12 am", "0:00", True),
        ("$5", "5 dollars", True),
        ("$5", "$50", False),
        ("$5", "$5.21", False),
        ("$5", "€5", False),
        ("5 EUR", "€5", True),
        ("10:00", "0:10", False),
        ("5 May", "6 May", False),
        ("the kitchen", "the cellar", False),
        ("2:00", "2 pm", False),
    ],
)
def test_values_that_say_the_same_are_not_given_to_two_subjects(one, other, rivals):
    kind = facts.THING[0]
    assert facts.rivals(facts.Fact(kind, "lamp", one, ""), facts.Fact(kind, "cup", other, "")) is rivals


def test_nothing_is_named_after_the_colour_of_another_thing():
    colour, price = facts.PAINTED, facts.THING[0]
    cup, lamp = facts.Fact(colour, "cup", "red", ""), facts.Fact(price, "red lamp", "$5", "")
    assert facts.rivals(cup, lamp) and facts.rivals(lamp, cup)
    assert not facts.rivals(facts.Fact(colour, "red lamp", "red", ""), lamp)


def test_every_answer_of_a_drill_is_graded_and_ends():
    for seed in range(60):
        drill = qa.drill(Draw(seed))
        graded = [text for text, is_graded in render(drill) if is_graded]
        assert graded and all(text.endswith((IM_END, "\n")) for text in graded)


def test_each_token_of_a_value_is_taught_the_subject_before_it_and_no_subject_that_follows():
    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    city, age = (next(k for k in facts.PERSON if k.label == label) for label in ("city", "age"))
    told = [
        facts.Fact(city, "Lina Melnara", "Oslo", "Lina Melnara lives in Oslo."),
        facts.Fact(age, "Ravi", "42", "42 is the age of Ravi."),
    ]
    text = "Lina Melnara lives in Oslo. 42 is the age of Ravi."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    lessons = zip(ids, *carry.targets(tokenizer, text, len(ids), told), strict=True)
    taught = [[tokenizer.decode([i]).strip() for i in lesson] for lesson in lessons if lesson[1] != carry.NONE]
    surname = tokenizer.decode([next(i for i in tokenizer.encode("Melnara").ids if tokenizer.decode([i]).strip())])
    assert [lesson[1:] for lesson in taught] == [["Lina", surname]] * len(taught)
    assert "".join(value for value, *_ in taught) == "Oslo"


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

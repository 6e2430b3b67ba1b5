"""Prompts with templates that do what templates of real models do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from scripted_client import ScriptedClient

import superinfer as si


def forgetful(messages: Sequence[dict[str, Any]], *, tools=None, add_generation_prompt=True, **_) -> str:
    """Shows only the last message, as templates do that strip earlier reasoning; knows no tools."""
    if any(m["role"] == "tool" for m in messages):
        messages = [m for m in messages if m["role"] != "tool"]
    body = "".join(f"<{m['role']}>{m['content'].strip()}</>" for m in messages[-1:])
    return body + ("<assistant>" if add_generation_prompt else "")


@pytest.fixture
def forgetful_model(model: ScriptedClient, monkeypatch: pytest.MonkeyPatch) -> ScriptedClient:
    monkeypatch.setattr(model.tokenizer, "render_chat", forgetful)
    return model


def test_a_template_that_rewrites_earlier_messages_is_obeyed(forgetful_model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.user("a") + si.assistant(si.gen("x")) + si.user("b") + si.assistant(si.gen("y"))

    program.run()
    assert [r.prompt for r in forgetful_model.requests] == ["<user>a</><assistant>", "<user>b</><assistant>"]


def test_raw_text_it_leaves_no_place_for_is_an_error(forgetful_model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.user("a") + "raw" + si.user("b") + si.assistant(si.gen("x"))
        return s["x"]

    with pytest.raises(si.InvalidRequestError, match="rewrites earlier messages"):
        program.run()
    assert forgetful_model.requests == []


def test_generating_in_a_role_it_does_not_show_is_an_error(forgetful_model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.user("a") + si.tool("b" + si.gen("x"))
        return s["x"]

    with pytest.raises(si.InvalidRequestError, match="shows no messages of role 'tool'"):
        program.run()


def test_what_is_written_into_an_answer_keeps_its_spaces(forgetful_model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.user("a") + si.assistant(" So:  " + si.gen("x"))

    program.run()
    assert forgetful_model.requests[0].prompt == "<user>a</><assistant> So:  "


def test_an_error_of_the_template_fails_the_state_before_anything_is_sent(
    model: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_, **__) -> str:
        raise si.InvalidRequestError("the chat template refused these messages: roles must alternate")

    monkeypatch.setattr(model.tokenizer, "render_chat", refuse)

    @si.function
    def program(s):
        s += si.user("a") + si.assistant(si.gen("x"))
        return s["x"]

    with pytest.raises(si.InvalidRequestError, match="roles must alternate"):
        program.run()
    assert model.requests == []

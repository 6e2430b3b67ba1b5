"""Programs in the manner of SGLang's frontend, with only the import changed: each shape that people write there."""

from __future__ import annotations

import asyncio
import inspect
import re

import pytest
from scripted_client import ScriptedClient

import superinfer as sgl


def test_expressions_can_be_joined_appended_and_used_again(model: ScriptedClient) -> None:
    ask = "Q: " + sgl.gen("first", max_tokens=4) + " / " + sgl.gen("second", max_tokens=4)

    @sgl.function
    def program(s):
        s += ask
        s += "\n"
        s += ask

    state = program.run(temperature=0)
    assert state.text() == "Q: ok / ok\nQ: ok / ok"
    assert len(model.requests) == 4


def test_few_shot_examples_stand_before_the_question(model: ScriptedClient) -> None:
    model.answer = lambda prompt: " 4\n\nQ: and then"

    @sgl.function
    def few_shot(s, examples, question):
        for asked, answered in examples:
            s += f"Q: {asked}\nA: {answered}\n\n"
        s += "Q: " + question + "\nA:" + sgl.gen("answer", max_tokens=16, stop=["\n"])

    states = few_shot.run_batch(
        [{"examples": [("1+1", "2")], "question": q} for q in ("2+2", "3+1")], num_threads=2, temperature=0
    )
    assert [state["answer"] for state in states] == [" 4", " 4"]
    assert sorted(r.prompt for r in model.requests)[0] == "Q: 1+1\nA: 2\n\nQ: 2+2\nA:"


def test_a_tree_of_thought_grows_by_forks_within_forks(model: ScriptedClient) -> None:
    model.answer = lambda prompt: f"[{prompt.count('step')}]"

    @sgl.function
    def tree(s, question, branches):
        s += question
        plans = s.fork(branches)
        for i, plan in enumerate(plans):
            plan += f" step a{i}" + sgl.gen("plan")
            solutions = plan.fork(branches)
            solutions += lambda j: f" step b{j}" + sgl.gen("solution")
            solutions.join()
        return [(plan["plan"], plan["solution"]) for plan in plans]

    state = tree.run("Why?", 3)
    assert state.ret_value == [("[1]", ["[2]"] * 3)] * 3
    assert len(model.requests) == 3 + 9
    assert state.text() == "Why?"


def test_several_turns_with_tips_gathered_in_parallel(model: ScriptedClient) -> None:
    @sgl.function
    def assistant(s, topic):
        s += sgl.system("You are brief.")
        s += sgl.user("Tell me about " + topic)
        forks = s.fork(2)
        for i, f in enumerate(forks):
            f += sgl.assistant(f"Tip {i}: " + sgl.gen("tip", max_tokens=8))
        s += sgl.assistant("1. " + forks[0]["tip"] + " 2. " + forks[1]["tip"])
        s += sgl.user("Sum up.") + sgl.assistant(sgl.gen("summary"))

    state = assistant.run("tea")
    assert [m["role"] for m in state.messages()] == ["system", "user", "assistant", "user", "assistant"]
    assert state.messages()[2]["content"] == "1. ok 2. ok" and state["summary"] == "ok"


def test_react_alternates_between_the_model_and_a_tool(model: ScriptedClient) -> None:
    lines = iter([" look it up\nAction: lookup[lamp]\n", " done\nAction: finish[9]\n"])
    model.answer = lambda prompt: next(lines)

    @sgl.function
    def react(s, question):
        s += "Question: " + question + "\n"
        for turn in range(1, 5):
            s += f"Thought {turn}:" + sgl.gen("thought", stop=["Observation"])
            name, value = re.search(r"(\w+)\[(.*)\]", s["thought"]).groups()
            if name == "finish":
                return value
            s += f"Observation: {({'lamp': '9'})[value]}\n"

    state = react.run("How much is the lamp?")
    assert state.ret_value == "9"
    assert "Action: lookup[lamp]\nObservation: 9\nThought 2:" in state.text()


def test_parallel_samples_by_n_and_by_fork(model: ScriptedClient) -> None:
    answers = iter(["a", "b", "c", "d", "e"])
    model.answer = lambda prompt: next(answers)

    @sgl.function
    def sample(s):
        s += "Name:" + sgl.gen("name", n=3, temperature=0.7)
        forks = s.fork(2)
        forks += sgl.gen("more")
        forks.join()

    state = sample.run()
    assert state["name"] == ["a", "b", "c"]
    assert sorted(state["more"]) == ["d", "e"]
    assert len(state.get_meta_info("name")) == 3


def test_text_streams_from_a_chat_and_a_choice_takes_part(model: ScriptedClient) -> None:
    model.logprob = lambda before, token: -1.0 if token in "calculator" else -4.0

    @sgl.function
    def with_tool(s, question):
        with s.user():
            s += question
        with s.assistant():
            s += "I need a " + sgl.gen("tool", choices=["calculator", "query"]) + ". "
            s += sgl.gen("words")

    state = with_tool.run("3*4?", stream=True)
    assert "".join(state.text_iter()) == "<user>3*4?</><assistant>I need a calculator. ok</>"
    assert "".join(state.text_iter("words")) == "ok"
    assert len(state.get_meta_info("tool")["normalized_prompt_logprobs"]) == 2


def test_roles_as_blocks_as_calls_and_as_begin_and_end_are_the_same(model: ScriptedClient) -> None:
    @sgl.function
    def blocks(s):
        with s.system():
            s += "S"
        with s.user():
            s += "U"
        with s.assistant():
            s += sgl.gen("x")

    @sgl.function
    def calls(s):
        s += sgl.system("S") + sgl.user("U") + sgl.assistant(sgl.gen("x"))

    @sgl.function
    def begin_end(s):
        s += sgl.system_begin() + "S" + sgl.system_end()
        s += sgl.user_begin() + "U" + sgl.user_end()
        s += sgl.assistant_begin() + sgl.gen("x") + sgl.assistant_end()

    assert blocks.run().messages() == calls.run().messages() == begin_end.run().messages()


def test_a_scope_collects_what_several_calls_wrote(model: ScriptedClient) -> None:
    @sgl.function
    def program(s):
        with s.var_scope("all"):
            s += "- " + sgl.gen("one") + "\n- " + sgl.gen("two")
        s += "."

    assert program.run()["all"] == "- ok\n- ok"


def test_a_program_calls_another_and_is_bound_to_arguments(model: ScriptedClient) -> None:
    @sgl.function
    def inner(s, what):
        s += what + sgl.gen("inner")

    @sgl.function
    def outer(s, head, what):
        s += head
        inner(s, what)

    assert outer.bind(head="H ").run(what="w:", use_thread=False).text() == "H w:ok"


def test_an_item_of_a_batch_that_fails_harms_no_other(model: ScriptedClient) -> None:
    @sgl.function
    def program(s, number):
        s += f"{10 // number}:" + sgl.gen("x")

    states = program.run_batch([{"number": n} for n in (5, 0, 2)], progress_bar=True)
    assert [type(state.error()) for state in states] == [type(None), ZeroDivisionError, type(None)]
    assert [state["x"] for state in (states[0], states[2])] == ["ok", "ok"]


# ------------------------------------------------------------------------------------------------ the surface


def test_every_name_of_the_frontend_is_there() -> None:
    names = """function gen gen_int gen_string select system user assistant system_begin system_end user_begin user_end
        assistant_begin assistant_end image video separate_reasoning Runtime RuntimeEndpoint OpenAI Engine Anthropic
        LiteLLM set_default_backend flush_cache token_length_normalized greedy_token_selection
        unconditional_likelihood_normalized"""
    assert [name for name in names.split() if not callable(getattr(sgl, name))] == []
    from superinfer.lang import ir

    assert all(re.compile(getattr(ir, f"REGEX_{kind}")) for kind in ("INT", "FLOAT", "BOOL", "STR"))


def test_arguments_of_gen_and_select_stand_in_the_frontends_order() -> None:
    gen = """name max_tokens min_tokens n stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty
        presence_penalty ignore_eos return_logprob logprob_start_len top_logprobs_num return_text_in_logprobs dtype
        choices choices_method regex json_schema"""
    positional = [p.name for p in inspect.signature(sgl.gen).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == gen.split()
    assert list(inspect.signature(sgl.select).parameters)[:4] == ["name", "choices", "temperature", "choices_method"]


def test_every_method_of_programs_and_states_is_there(model: ScriptedClient) -> None:
    @sgl.function
    def program(s):
        s += sgl.gen("x")

    for name in ("run", "run_batch", "bind", "trace", "cache", "compile"):
        assert callable(getattr(program, name))
    state = program.run()
    names = """system user assistant var_scope fork copy text messages get_var set_var get_meta_info text_iter
        text_async_iter error sync"""
    assert [name for name in names.split() if not callable(getattr(state, name))] == []
    assert state.stream_executor.variables.keys() == {"x"} and "x" in state and "y" not in state
    assert callable(state.fork(2).join)


def test_a_state_can_go_on_after_its_program_has_ended(model: ScriptedClient) -> None:
    @sgl.function
    def program(s):
        s += "a" + sgl.gen("x")

    state = program.run()
    state += "b" + sgl.gen("y")
    forks = state.fork(2)
    forks += lambda i: f"{i}" + sgl.gen("z")
    forks.join()
    assert state["y"] == "ok" and state["z"] == ["ok", "ok"] and state.text() == "aokbok"


# ------------------------------------------------------------------------------------------------ reasoning


THOUGHT = "<think>\nlamps are 9\n</think>\n\nNine."


def test_reasoning_goes_to_a_variable_of_its_own_and_the_next_call_does_not_read_it(model: ScriptedClient) -> None:
    model.answer = lambda prompt: THOUGHT if prompt.endswith("<assistant>") else "more"

    @sgl.function
    def program(s):
        s += sgl.user("Price?")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer"), model_type="qwen3") + " " + sgl.gen("next"))

    state = program.run()
    assert (state["answer"], state["answer_reasoning_content"]) == ("Nine.", "lamps are 9")
    assert model.requests[1].prompt == "<user>Price?</><assistant>Nine. "


def test_only_the_answer_streams(model: ScriptedClient) -> None:
    model.answer = lambda prompt: THOUGHT

    @sgl.function
    def program(s):
        s += "x" + sgl.separate_reasoning(sgl.gen("answer"))

    state = program.run(stream=True)
    assert "".join(state.text_iter("answer")) == "".join(state.text_iter()).removeprefix("x") == "Nine."
    assert state["answer_reasoning_content"] == "lamps are 9"


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "expected"),
    [
        ("qwen3", "x", "plain < 5", ("", "plain < 5")),
        ("qwen3", "<think>\n", "deep</think>Yes", ("deep", "Yes")),
        ("deepseek-r1", "x", "deep</think>Yes", ("deep", "Yes")),
        (None, "x", "<think>cut off", ("cut off", "")),
        ("kimi", "x", "◁think▷a◁/think▷b", ("a", "b")),
    ],
)
def test_kinds_of_models_mark_their_reasoning(model: ScriptedClient, kind, prompt, text, expected) -> None:
    model.answer = lambda prompt: text

    @sgl.function
    def program(s):
        s += prompt + sgl.separate_reasoning(sgl.gen("x"), kind)

    state = program.run()
    assert (state["x_reasoning_content"], state["x"]) == expected


def test_reasoning_that_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(sgl.UnsupportedError, match="model_type='gpt-oss'"):
        sgl.separate_reasoning(sgl.gen("x"), "gpt-oss")
    with pytest.raises(sgl.InvalidRequestError, match="holds no gen"):
        sgl.separate_reasoning("text")
    with pytest.raises(sgl.InvalidRequestError, match="dtype=int"):
        sgl.separate_reasoning(sgl.gen("x", dtype=int))


def test_reasoning_of_a_failed_call_fails_with_it(model: ScriptedClient) -> None:
    def answer(prompt: str) -> str:
        raise sgl.QueueFullError("full")

    model.answer = answer

    @sgl.function
    def program(s):
        s += "x" + sgl.separate_reasoning(sgl.gen("x"))

    with pytest.warns(RuntimeWarning, match="full"):
        state = program.run()
    with pytest.raises(sgl.QueueFullError):
        state["x_reasoning_content"]


# ------------------------------------------------------------------------------------------------ the rest


def test_a_flushed_cache_is_not_used_again(model: ScriptedClient) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x")

    program.run()
    sgl.flush_cache()
    program.run()
    program.run()
    before, after, again = (request.cache_salt for request in model.requests)
    assert before == "" and after and after == again


def test_an_engine_answers_prompts_without_a_program(talking_llama) -> None:
    with sgl.Engine(model_path=str(talking_llama), kv_tokens=1024, threads=1) as engine:
        params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
        one = engine.generate("hello", params)
        two = engine.generate(["hello", "world"], params, return_logprob=True)
        assert one["text"] == two[0]["text"] and one["meta_info"]["completion_tokens"] == 4
        assert len(two) == 2 and len(two[1]["meta_info"]["output_token_logprobs"]) == 4
        *_, last = engine.generate("hello", params, stream=True)
        assert last["text"] == one["text"] and last["meta_info"]["finish_reason"]["type"] == "length"
        twin = asyncio.run(engine.async_generate("hello", params))
        assert twin["text"] == one["text"]

        @sgl.function
        async def asks_on(s):
            stream = await engine.async_generate("hello", params, stream=True)
            return await engine.async_generate("hello", params), [said async for said in stream][-1]

        assert [said["text"] for said in asks_on.run(backend=engine).ret_value] == [one["text"]] * 2
        assert len(engine.generate(input_ids=[5, 6], sampling_params={**params, "n": 2})) == 2
        with pytest.raises(sgl.UnsupportedError, match="spaces_between"):
            engine.generate("x", {"spaces_between": True})
        for wrong, named in (
            ({"regex": "("}, r"regex='\('"),
            ({"regex": "a", "json_schema": "{}"}, "regex and json_schema"),
            ({"repetition_penalty": -1}, "repetition_penalty=-1"),
            ({"skip_special_tokens": False}, "skip_special_tokens=False"),
            (5, "sampling_params=5"),
        ):
            with pytest.raises(sgl.InvalidRequestError, match=named):
                engine.generate("x", wrong)
        with pytest.raises(sgl.InvalidRequestError, match="prompt=5"):
            engine.generate(5)


@pytest.mark.slow
def test_an_engine_takes_what_sglangs_users_say_of_the_output(talking_llama) -> None:
    with sgl.Engine(model_path=str(talking_llama), kv_tokens=1024, threads=1) as engine:
        shaped = {"regex": "[ab]{3}x", "repetition_penalty": 1.1, "skip_special_tokens": True, "max_new_tokens": 9}
        assert re.fullmatch("[ab]{3}x", engine.generate("x", shaped)["text"])
        truth = engine.generate("x", {"json_schema": '{"type": "boolean"}', "max_new_tokens": 9})["text"]
        assert truth in ("true", "false")

"""Programs: text, variables, roles, scopes, forks, errors; written `def` and `async def`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
import warnings

import pytest
from scripted_client import ScriptedClient

import superinfer as si
from superinfer.lang import program as program_module
from superinfer.lang.executor import StreamExecutor


def test_text_is_kept_and_generation_continues_it(model: ScriptedClient) -> None:
    @si.function
    def qa(s, question):
        s += "Q: " + question + "\nA:"
        s += si.gen("answer", stop="\n", max_tokens=16)

    model.answer = lambda prompt: " Paris\nQ: next"
    state = qa.run("capital of France?")
    assert state["answer"] == " Paris"
    assert state.text() == "Q: capital of France?\nA: Paris"
    assert model.requests[0].prompt == "Q: capital of France?\nA:"
    assert model.requests[0].add_special


def test_roles_are_rendered_with_the_models_template(model: ScriptedClient) -> None:
    @si.function
    def chat(s):
        s += si.system("Be brief.")
        with s.user():
            s += "Hi"
            s += " there"
        s += si.assistant("Well, " + si.gen("answer"))
        s += si.user_begin() + "Bye" + si.user_end()
        s += s.assistant(si.gen("last"))

    state = chat.run()
    first, last = model.requests
    assert first.prompt == "<system>Be brief.</><user>Hi there</><assistant>Well, "
    assert last.prompt == "<system>Be brief.</><user>Hi there</><assistant>Well, ok</><user>Bye</><assistant>"
    assert not first.add_special
    assert state.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Well, ok"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "ok"},
    ]
    assert state.text() == last.prompt + "ok</>"


def test_raw_text_before_between_and_after_messages_keeps_its_place(model: ScriptedClient) -> None:
    @si.function
    def mixed(s):
        s += "A" + si.user("b") + "C" + si.user("d") + "E" + si.gen("x")

    assert mixed.run().text() == "A<user>b</>C<user>d</>Eok"


def test_a_generation_inside_a_user_message_continues_that_message(model: ScriptedClient) -> None:
    @si.function
    def simulate(s):
        s += si.system("You play the user.") + si.user("I want " + si.gen("wish"))

    simulate.run()
    assert model.requests[0].prompt == "<system>You play the user.</><user>I want "


def test_tools_and_tool_results_reach_the_template(model: ScriptedClient) -> None:
    def calculator(expression: str) -> str:
        """Evaluate."""
        return expression

    @si.function
    def agent(s):
        s += si.tools([calculator]) + si.user("3*4?") + si.assistant(si.gen("call"))
        s += si.tool("12") + si.assistant(si.gen("answer"))

    agent.run()
    assert model.requests[1].prompt == "[tools calculator]<user>3*4?</><assistant>ok</><tool>12</><assistant>"


def test_a_role_inside_a_role_is_refused(model: ScriptedClient) -> None:
    @si.function
    def nested(s):
        with s.user():
            s += si.assistant("no")
            s += si.gen("x")
        return s["x"]

    with pytest.raises(si.InvalidRequestError, match="begins inside role 'user'"):
        nested.run()


def test_variable_scopes_nest_and_collect_their_text(model: ScriptedClient) -> None:
    @si.function
    def scoped(s):
        s += "0"
        with s.var_scope("outer"):
            s += "1"
            with s.var_scope("inner"):
                s += "2" + si.gen("x")
            s += "3"
        s += "4"

    state = scoped.run()
    assert (state["outer"], state["inner"], state.text()) == ("12ok3", "2ok", "012ok34")
    assert state.slo_report().rows[0].path == ("outer", "inner")


def test_reading_an_open_scope_is_an_error_and_not_a_wait(model: ScriptedClient) -> None:
    @si.function
    def early(s):
        with s.var_scope("v"):
            s += "1"
            return s["v"]

    with pytest.raises(si.InvalidRequestError, match="still open"):
        early.run()


def test_an_unknown_variable_is_a_key_error_that_names_those_there_are(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.gen("x")
        assert "x" in s and "y" not in s
        s["y"] = 5
        assert s["y"] == 5 and "y" in s

    state = program.run()
    with pytest.raises(KeyError, match=r"'z'.*\['x', 'y'\]"):
        state["z"]


def test_a_name_used_again_holds_the_latest_value(model: ScriptedClient) -> None:
    answers = iter(["one", "two"])
    model.answer = lambda prompt: next(answers)

    @si.function
    def twice(s):
        s += si.gen("x")
        first = s["x"]
        s += si.gen("x")
        return first, s["x"]

    assert twice.run().ret_value == ("one", "two")


def test_several_continuations_make_a_list_and_the_text_goes_on_with_the_first(model: ScriptedClient) -> None:
    answers = iter(["a", "b", "c"])
    model.answer = lambda prompt: next(answers)

    @si.function
    def program(s):
        s += "p" + si.gen("x", n=3)

    state = program.run()
    assert state["x"] == ["a", "b", "c"]
    assert state.text() == "pa"
    assert [meta["completion_tokens"] for meta in state.get_meta_info("x")] == [1, 1, 1]


def test_meta_info_tells_of_tokens_logprobs_and_the_end(model: ScriptedClient) -> None:
    model.answer = lambda prompt: "hi.x"

    @si.function
    def program(s):
        s += "p" + si.gen("x", stop=".", return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True)

    meta = program.run().get_meta_info("x")
    assert (meta["finish_reason"], meta["stop"], meta["prompt_tokens"], meta["completion_tokens"]) == (
        "stop",
        ".",
        1,
        2,
    )
    assert meta["output_token_logprobs"] == [(-0.5, ord("h"), "h"), (-0.5, ord("i"), "i")]
    assert [len(top) for top in meta["output_top_logprobs"]] == [2, 2]
    assert meta["report"].e2e_s == 0.003
    assert model.requests[0].sampling.logprobs == 2


def test_what_gen_leaves_open_is_taken_from_run(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.gen("x", temperature=0) + si.gen("y")

    program.run(max_new_tokens=7, temperature=0.5, stop=["\n"], top_k=-1)
    x, y = model.requests
    assert (x.sampling.max_tokens, x.sampling.temperature, x.stop, x.sampling.top_k) == (7, 0, ("\n",), 0)
    assert (y.sampling.max_tokens, y.sampling.temperature) == (7, 0.5)
    program.run()
    assert model.requests[-1].sampling.max_tokens == 128
    assert model.requests[-1].sampling.temperature == 1.0


def test_run_takes_n_and_min_tokens_unless_they_are_the_programs_own(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.gen("x") + si.gen("y", n=1, min_tokens=1)

    state = program.run(n=2, min_tokens=2)
    assert (state["x"], state["y"]) == (["ok", "ok"], "ok")
    assert [request.sampling.min_tokens for request in model.requests] == [2, 1]
    (state,) = program.run_batch([()], n=3)
    assert state["x"] == ["ok"] * 3
    late = program.run(n=2, deadline=1e-9, slo=si.SLO(on_miss="truncate"))
    assert (late["x"], late["y"]) == (["", ""], "")

    @si.function
    def shots(s, n, min_tokens=0):
        s += f"{n} {min_tokens} " + si.gen("x")

    assert shots.run(n=3, min_tokens=4)["x"] == "ok"
    assert model.requests[-1].prompt == "3 4 "


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"choices": ["a"], "regex": "a"}, "regex"),
        ({"choices": ["a"], "stop_regex": "a"}, "stop_regex"),
        ({"dtype": dict}, "dtype"),
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"choices": ["a"], "stop": "x"}, "stop"),
        ({"choices": ["a"], "temperature": 1.0}, "temperature"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name_when_the_expression_is_made(arguments, named) -> None:
    with pytest.raises(si.UnsupportedError, match=named):
        si.gen("x", **arguments)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"stop": ""}, "stop=''"),
        ({"stop": 5}, "stop=5"),
        ({"stop": [f"{number:020}" for number in range(5_000)]}, "100000 characters together"),
        ({"stop_regex": 5}, "stop_regex=5"),
        ({"stop_token_ids": 5}, "stop_token_ids=5"),
        ({"stop_token_ids": ["x"]}, r"stop_token_ids=\['x'\]"),
        ({"stop_token_ids": "12"}, "stop_token_ids='12'"),
        ({"slo": 5}, "slo=5"),
        ({"choices": []}, "choices"),
        ({"choices": ["a", ""]}, "choice ''"),
        ({"regex": "(a"}, r"regex='\(a'"),
        ({"regex": ""}, "regex=''"),
        ({"regex": "a", "json_schema": "{}"}, "regex and json_schema"),
        ({"regex": "a", "dtype": int}, "regex and dtype"),
        ({"json_schema": "{"}, "json_schema='{'"),
        ({"json_schema": "[]"}, r"json_schema='\[\]'"),
        ({"json_schema": int}, "json_schema"),
        ({"stop_regex": "a)"}, r"stop_regex='a\)'"),
        ({"stop_regex": "a*"}, r"stop_regex='a\*'"),
    ],
)
def test_a_wrong_value_is_refused_when_the_expression_is_made(arguments, shown) -> None:
    with pytest.raises(si.InvalidRequestError, match=shown):
        si.gen("x", **arguments)


def test_unsupported_names_say_so() -> None:
    for make in (lambda: si.image("x.png"), lambda: si.video("x", 1)):
        with pytest.raises(si.UnsupportedError):
            make()
    with pytest.raises(si.UnsupportedError, match="num_api_spec_tokens"):
        si.function(num_api_spec_tokens=64)


def test_only_text_and_expressions_can_be_appended(model: ScriptedClient) -> None:
    @si.function
    def program(s, value):
        s += value

    for value in (None, 5, ["x"]):
        with pytest.raises(si.InvalidRequestError, match="cannot append"):
            program.run(value)


def test_a_number_ends_its_generation(model: ScriptedClient) -> None:
    model.answer = lambda prompt: " -12.5 and a long rest"

    @si.function
    def program(s):
        s += "n=" + si.gen("n", dtype=float) + ";" + si.gen_int("i")

    state = program.run()
    assert (state["n"], state["i"]) == ("-12.5", "-12")
    assert state.text() == "n=-12.5;-12"
    assert len(model.cancelled) == 2  # the engine need not write the rest


def test_text_that_is_no_number_is_an_output_error(model: ScriptedClient) -> None:
    model.answer = lambda prompt: "many"

    @si.function
    def program(s):
        s += si.gen("n", dtype=int)
        return s["n"]

    with pytest.raises(si.OutputError, match="'many'"):
        program.run()


# ------------------------------------------------------------------------------------------------ fork and join


def test_forks_share_what_was_said_before_and_run_at_the_same_time(model: ScriptedClient) -> None:
    model.token_s = 0.02

    @si.function
    def program(s):
        s += "Tips: " + si.gen("intro")
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f" {i}:" + si.gen("tip")
        return [fork["tip"] for fork in forks]

    assert program.run().ret_value == ["ok"] * 3
    assert sorted(r.prompt for r in model.requests[1:]) == [f"Tips: ok {i}:" for i in range(3)]
    assert model.most_open == 3
    assert len({r.program for r in model.requests}) == 1


def test_join_gathers_the_variables_that_are_new(model: ScriptedClient) -> None:
    model.answer = lambda prompt: prompt[-1] + "!"

    @si.function
    def program(s):
        s += "x" + si.gen("before")
        forks = s.fork(2)
        forks += ["a", "b"]
        forks += si.gen("tip")
        forks += lambda i: str(i) + si.gen("again")
        forks.join()
        s += " and" + si.gen("after")

    state = program.run()
    assert (state["before"], state["tip"], state["again"]) == ("x!", ["a!", "b!"], ["0!", "1!"])
    assert state.text() == "xx! andd!"


def test_join_appends_what_the_forks_said(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += "start"
        forks = s.fork(2)
        forks += lambda i: f" {i}=" + si.gen("v")
        forks.join("concate_and_append")
        s += " end"

    state = program.run()
    assert state.text() == "start 0=ok 1=ok end"
    assert "v" not in state


def test_join_appends_messages_as_messages(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.system("S")
        forks = s.fork(2)
        forks += lambda i: si.user(str(i)) + si.assistant(si.gen("v"))
        forks.join("concate_and_append")

    messages = program.run().messages()
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_wrong_join_mode_or_fork_size_is_refused(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        with pytest.raises(si.InvalidRequestError, match="'both'"):
            s.fork(2).join("both")
        with pytest.raises(si.InvalidRequestError, match="size=0"):
            s.fork(0)
        with pytest.raises(si.UnsupportedError, match="position_ids_offset"):
            s.fork(1, position_ids_offset=[1])

    program.run()


def test_a_copy_is_a_fork_of_one(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += "a"
        with s.copy() as c:
            c += "b" + si.gen("inner")

    state = program.run()
    assert (state.text(), state["inner"]) == ("a", ["ok"])


def test_an_error_in_a_fork_is_raised_by_join(model: ScriptedClient) -> None:
    def answer(prompt: str) -> str:
        if prompt.endswith("1"):
            raise si.QueueFullError("full")
        return "ok"

    model.answer = answer

    @si.function
    def program(s):
        s += "p"
        forks = s.fork(2)
        forks += lambda i: str(i) + si.gen("v")
        with pytest.raises(si.QueueFullError):
            forks.join()
        assert forks[0]["v"] == "ok"
        s += si.gen("after")

    assert program.run()["after"] == "ok"


def _fails_at_1(prompt: str) -> str:
    if prompt.endswith("1"):
        raise si.QueueFullError("full")
    return "ok"


@si.function
def unjoined(s):
    forks = s.fork(3)
    forks += lambda i: str(i) + si.gen("v")
    inner = forks[1].fork(2)  # fails with it: one error, one warning
    inner += si.gen("w")
    s += "p" + si.gen("x")


@si.function
async def aunjoined(s):
    forks = s.fork(3)
    forks += lambda i: str(i) + si.gen("v")
    s += "p" + si.gen("x")


@pytest.mark.parametrize("program", [unjoined, aunjoined])
@pytest.mark.parametrize("way", ["run", "batch", "stream"])
def test_a_fork_that_failed_unread_is_told_by_a_warning(model: ScriptedClient, program, way: str) -> None:
    model.answer = _fails_at_1
    with pytest.warns(RuntimeWarning) as caught:
        if way == "stream":
            state = program.run(stream=True)
            assert "".join(state.text_iter()) == "pok"
        else:
            state = program.run() if way == "run" else program.run_batch([()])[0]
    assert [str(one.message) for one in caught] == [
        f"fork[1] of program {program.name}, which nobody read or joined, failed: QueueFullError: full"
    ]
    assert caught[0].filename == __file__
    assert state["x"] == "ok" and state.error() is None


def test_a_fork_whose_failure_the_program_was_told_of_warns_no_more(model: ScriptedClient) -> None:
    model.answer = _fails_at_1
    ways = {
        "reads": lambda forks: forks[1]["v"],
        "joins": lambda forks: forks.join(),
        "streams": lambda forks: list(forks[1].text_iter("v")),
        "asks": lambda forks: forks[1].error(),
    }

    @si.function
    def program(s, way):
        forks = s.fork(3)
        forks += lambda i: str(i) + si.gen("v")
        forks[2] += " 1" + si.gen("v")  # another that fails
        with contextlib.suppress(si.QueueFullError):
            ways[way](forks)
        if way != "joins":
            assert isinstance(forks[2].error(), si.QueueFullError)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in ways:
            assert program.run(way).error() is None

    @si.function
    def looks_too_soon(s):
        (fork,) = s.fork()
        fork += "0" + si.gen("v")
        assert fork["v"] == "ok"
        with pytest.raises(KeyError):
            fork["w"]
        fork += " 1" + si.gen("w")

    with pytest.warns(RuntimeWarning, match=r"fork\[0\] of program looks_too_soon"):
        looks_too_soon.run()


# ------------------------------------------------------------------------------------------------ async programs


async def test_an_async_program_does_what_its_twin_does(model: ScriptedClient) -> None:
    model.token_s = 0.01

    @si.function
    async def program(s, who):
        s += si.user(f"Hello {who}") + si.assistant(si.gen("x"))
        assert await s.get("x") == "ok"
        forks = s.fork(2)
        forks += lambda i: si.user(str(i)) + si.assistant(si.gen("y"))
        await forks.ajoin()
        async with s.copy() as c:
            c += si.gen("z")
        chunks = []
        s += si.assistant(si.gen("streamed"))
        async for chunk in s.text_async_iter("streamed"):
            chunks.append(chunk)
        await s.drain()
        return s["y"], s["z"], chunks, s.text()

    expected = (["ok", "ok"], ["ok"], ["o", "k"], "<user>Hello me</><assistant>ok</><assistant>ok</>")
    assert (await program.arun("me")).ret_value == expected


def test_an_async_program_runs_from_ordinary_code(model: ScriptedClient) -> None:
    @si.function
    async def program(s):
        s += "p" + si.gen("x")
        return await s.get("x")

    state = program.run()
    assert (state.ret_value, state["x"], state.text()) == ("ok", "ok", "pok")


async def test_blocking_inside_an_async_program_is_an_error_that_names_the_twin(model: ScriptedClient) -> None:
    model.token_s = 0.05

    @si.function
    async def program(s):
        s += si.gen("x")
        with pytest.raises(RuntimeError, match=r"await s\.get\('x'\)"):
            s["x"]
        with pytest.raises(RuntimeError, match=r"await s\.drain\(\)"):
            s.sync()
        await s.get("x")
        return s["x"]  # it is there: nothing to wait for

    assert (await program.arun()).ret_value == "ok"


def test_a_program_that_would_wait_for_the_loop_it_runs_on_says_so(model: ScriptedClient) -> None:
    model.token_s = 0.01

    @si.function
    def inner(s):
        s += si.gen("x")

    @si.function
    async def outer(s):
        with pytest.raises(RuntimeError, match=r"run\(\) of inner would block .* arun\(\)"):
            inner.run()
        with pytest.raises(RuntimeError, match=r"run_batch\(\) of inner would block .* arun_batch\(\)"):
            inner.run_batch([()])
        return (await inner.arun())["x"]

    assert outer.run().ret_value == "ok"


async def test_arun_takes_ordinary_programs_too_and_leaves_the_loop_free(model: ScriptedClient) -> None:
    turns = 0
    model.may_begin = lambda: turns > 5

    @si.function
    def program(s):
        s += si.gen("x")
        return s["x"]

    import asyncio

    task = asyncio.create_task(program.arun())
    while not task.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert task.result().ret_value == "ok"


# ------------------------------------------------------------------------------------------------ errors


def test_an_exception_of_a_tool_propagates_and_cancels_what_runs(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.02, lambda prompt: "x" * 1000

    @si.function
    def program(s):
        s += si.gen("x")
        while not model.open:
            time.sleep(0.005)
        raise ZeroDivisionError("tool")

    with pytest.raises(ZeroDivisionError):
        program.run()
    deadline = time.monotonic() + 30
    while model.open and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(model.cancelled) == 1 and model.given[0] < 1000


def test_a_program_may_exit_or_run_out_of_items_and_others_run_on(model: ScriptedClient) -> None:
    def exits(s):
        sys.exit(3)

    async def aexits(s):
        sys.exit(3)

    def runs_out(s):
        next(iter([]))

    for function in (exits, aexits):
        with pytest.raises(SystemExit, match="3"):
            si.function(function).run()
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(si.function(runs_out).arun(), 10))

    @si.function
    async def program(s):
        s += si.gen("x")
        return await s.get("x")

    assert program.run().ret_value == "ok"


def test_an_error_nobody_read_stays_in_the_state_with_a_warning(model: ScriptedClient) -> None:
    def answer(prompt: str) -> str:
        raise si.EngineDeadError("gone")

    @si.function
    def program(s):
        s += "one " + si.gen("x")
        s += " two" + si.gen("y")

    model.answer = answer
    with pytest.warns(RuntimeWarning, match="EngineDeadError: gone"):
        state = program.run()
    assert isinstance(state.error(), si.EngineDeadError)
    assert state.text() == "one "
    for name in ("x", "y"):
        with pytest.raises(si.EngineDeadError):
            state[name]
    assert len(model.requests) == 1
    assert state.slo_report().rows[0].error == "EngineDeadError: gone"


def test_warnings_of_programs_that_failed_are_not_remembered_for_ever(model: ScriptedClient, monkeypatch) -> None:
    @si.function
    def program(s, number):
        s += si.gen(f"x{number}")

    def answer(prompt: str) -> str:
        raise si.EngineDeadError(f"gone, the {len(model.requests)}th")

    monkeypatch.setattr(program_module, "MOST_WARNED", 10)
    model.answer = answer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for number in range(40):
            program.run(number)
    assert len(caught) == 40
    assert {(one.filename, "gone, the" in str(one.message)) for one in caught} == {(__file__, True)}
    assert not any("gone, the" in str(key) for key in globals().get("__warningregistry__", ()))
    assert len(program_module._warned) <= 12  # one more than that, and what Python adds of its own


def test_what_a_program_said_goes_when_nobody_has_its_state_any_more(model: ScriptedClient) -> None:
    """At once: not when Python comes to look for circles, which may be never."""

    @si.function
    def program(s, words):
        s += si.user(words) + si.assistant(si.gen("x", max_tokens=4))
        branches = s.fork(2)
        branches += lambda i: si.user(f"Part {i}?") + si.assistant(si.gen("note"))
        branches.join()
        s += si.user("and?") + si.assistant(si.select("y", ["yes", "no"]))

    def states() -> int:
        return sum(isinstance(found, StreamExecutor) for found in gc.get_objects())

    gc.collect()
    before, began = states(), time.monotonic()
    gc.disable()
    try:
        for number in range(10):
            assert len(program.run(f"words {number}")["note"]) == 2
        while states() > before and time.monotonic() < began + 60:  # the loop's thread may not be done with them
            time.sleep(0.01)
        assert states() <= before
    finally:
        gc.enable()


def test_a_program_without_a_backend_says_what_to_do() -> None:
    @si.function
    def program(s):
        s += si.gen("x")

    with pytest.raises(si.InvalidRequestError, match="set_default_backend"):
        program.run()


def test_arguments_are_checked_before_anything_runs(model: ScriptedClient) -> None:
    @si.function
    def program(s, a, b=2):
        s += f"{a}{b}"

    assert program.run(1).text() == "12"
    assert program.bind(b=3).run(a=1).text() == "13"
    with pytest.raises(si.InvalidRequestError, match="missing a required argument: 'a'"):
        program.run()
    with pytest.raises(si.InvalidRequestError, match="no argument 'c'"):
        program.bind(c=1)
    with pytest.raises(si.InvalidRequestError, match=r"'temperature'.*rename"):
        si.function(lambda s, temperature: None)


def test_a_function_that_yields_is_no_program() -> None:
    def program(s):
        yield s

    async def aprogram(s):
        yield s

    for function in (program, aprogram):
        with pytest.raises(si.InvalidRequestError, match=f"program {function.__name__} has a `yield`"):
            si.function(function)


def test_arguments_named_like_options_that_sglang_lacks_are_the_programs_own(model: ScriptedClient) -> None:
    @si.function
    def program(s, plan, deadline, session="none"):
        s += f"{plan} {deadline} {session}" + si.gen("x")

    assert program.run("first", deadline="Monday").text() == "first Monday noneok"
    assert model.requests[0].slo is None
    states = program.run_batch([{"plan": 1, "deadline": 2, "session": 3}])
    assert states[0].text() == "1 2 3ok"


def test_a_program_called_with_a_state_continues_it(model: ScriptedClient) -> None:
    @si.function
    def inner(s, text):
        s += text + si.gen("x")

    @si.function
    def outer(s):
        s += "a"
        inner(s, "b")

    assert outer.run().text() == "abok"


def test_importing_the_package_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import superinfer, sys; print(any(m in sys.modules for m in ('torch', 'transformers', 'zmq')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_every_public_name_is_there_for_programs_and_for_type_checkers() -> None:
    import ast
    from pathlib import Path

    tree = ast.parse(Path(si.__file__).read_text())
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("superinfer.")]
    assert sorted(alias.asname for node in imported for alias in node.names) == si.__all__
    assert all(hasattr(si, name) for name in si.__all__)
    assert si.lang.__name__ == "superinfer.lang"
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = si.Motor

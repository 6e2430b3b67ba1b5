"""Backends over HTTP: a superinfer server for real, others at the socket; what they cannot do is refused unsent."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_services import Service, serving
from slow_engine import slow_engine

import superinfer as si
from superinfer.lang.loop import language_loop
from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams


@si.function
def chat(s, question, **arguments):
    s += si.system("Be brief.") + si.user(question)
    s += si.assistant(si.gen("answer", max_tokens=8, temperature=0, **arguments))
    s += si.user("And?") + si.assistant(si.gen("more", max_tokens=4, temperature=0))


# ------------------------------------------------------------------------------------------------ our own server


# `superinfer serve` with a patient link, as `patient_links` says: requests under way are lost with a link.
SERVE = (
    "import sys; from superinfer.runtime import client; from superinfer.cli import main; "
    "client.HEARTBEAT_TIMEOUT_MS = 60_000; main(['serve', *sys.argv[1:]])"
)


@contextmanager
def serving_at(*arguments: str) -> Iterator[str]:
    """The URL of `superinfer serve` with these arguments."""
    command = [sys.executable, "-c", SERVE, "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if "serving at" in line)
    yield line.split("serving at ")[1].split()[0].removesuffix("/v1")
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def server(talking_engine: EngineProcess) -> Iterator[str]:
    """One in front of the session's engine."""
    with serving_at("--engine", talking_engine.address, "--model-name", "tiny") as url:
        yield url


def test_a_program_says_the_same_over_http_as_on_the_engine(server: str, endpoint: si.RuntimeEndpoint) -> None:
    @si.function
    def program(s):
        s += si.user("hello")
        s += si.assistant("Well, " + si.gen("x", max_tokens=6, temperature=0, top_k=5, regex="[a-z]{9}"))
        s += si.user("and") + si.assistant(si.gen("y", max_tokens=4, temperature=0, min_tokens=4))

    here = program.run(backend=endpoint)
    with si.RuntimeEndpoint(server) as backend:
        there = program.run(backend=backend)
    assert [there[name] for name in "xy"] == [here[name] for name in "xy"]
    assert there.messages() == here.messages()
    meta = there.get_meta_info("x")
    assert (meta["finish_reason"], meta["completion_tokens"]) == ("length", 6)
    assert meta["prompt_tokens"] == here.get_meta_info("x")["prompt_tokens"]


def test_a_chat_that_begins_with_an_answer_is_as_a_template_begins_one(
    server: str, endpoint: si.RuntimeEndpoint
) -> None:
    """The tool use of SGLang's tutorial. Templates are given no chat without a message."""

    @si.function
    def tool_use(s, question):
        s += si.assistant(f"To answer {question} I need a " + si.select("tool", ["calculator", "search"]) + ". ")
        s += si.assistant("I look for: " + si.gen("word", max_tokens=4, temperature=0, regex="[a-z]{4}"))

    @si.function
    def alone(s):
        s += si.assistant(si.gen("word", max_tokens=4, temperature=0, regex="[a-z]{4}"))
        s += si.user("And?") + si.assistant(si.gen("more", max_tokens=4, temperature=0, regex="[a-z]{4}"))

    with si.RuntimeEndpoint(server) as backend:
        for program, arguments in ((tool_use, ("1+1",)), (alone, ())):
            here, there = program.run(*arguments, backend=endpoint), program.run(*arguments, backend=backend)
            assert here.text().startswith("<|assistant|>") and here.text().count("<|assistant|>") == 2
            assert there.messages() == here.messages() and here.error() is there.error() is None
            for name in ("word", "more" if program is alone else "tool"):
                assert there.get_meta_info(name)["prompt_tokens"] == here.get_meta_info(name)["prompt_tokens"]


@pytest.mark.parametrize(
    "method", [si.token_length_normalized, si.greedy_token_selection, si.unconditional_likelihood_normalized]
)
@pytest.mark.parametrize("roles", [True, False], ids=["chat", "plain"])
def test_select_over_http_is_select_on_the_engine(
    server: str, endpoint: si.RuntimeEndpoint, method: object, roles: bool
) -> None:
    options = ["yes", "no, never", "per", "perhaps"]

    @si.function
    def program(s):
        if roles:
            s += si.system("Be brief.") + si.user("Is it so?")
            s += si.assistant("I say: " + si.select("x", options, choices_method=method) + ".")
            s += si.user("Sure?") + si.assistant(si.select("y", options, choices_method=method))
        else:
            s += "Is it so? " + si.select("x", options, choices_method=method)
            s += ". Sure? " + si.select("y", options, choices_method=method)

    here = program.run(backend=endpoint)
    with si.RuntimeEndpoint(server) as backend:
        there = program.run(backend=backend)
    assert there.text() == here.text() or roles  # a server's own template is not known here
    for name in "xy":
        assert there[name] == here[name]
        mine, theirs = here.get_meta_info(name), there.get_meta_info(name)
        assert theirs.keys() == mine.keys()
        _same_scores(theirs["input_token_logprobs"], mine["input_token_logprobs"])
        alone = "unconditional_token_logprobs"
        assert (theirs[alone] is None) == (mine[alone] is None) == (method != si.unconditional_likelihood_normalized)
        _same_scores(theirs[alone] or [], mine[alone] or [])
        assert theirs["normalized_prompt_logprobs"] == pytest.approx(mine["normalized_prompt_logprobs"], abs=1e-4)
        assert (theirs["finish_reason"], theirs["prompt_tokens"]) == ("scored", mine["prompt_tokens"])
        assert theirs["report"].e2e_s > 0
    assert there.slo_report().rows[0].prefill_s is not None


def _same_scores(found: list[list[tuple]], wanted: list[list[tuple]]) -> None:
    """Log probabilities differ by what is batched with them, in the last digits."""
    for one, other in zip(found, wanted, strict=True):
        assert [score[1:] for score in one] == [score[1:] for score in other]
        assert [score[0] or 0.0 for score in one] == pytest.approx([score[0] or 0.0 for score in other], abs=1e-4)


def test_what_a_select_cannot_have_on_our_server_is_said(server: str) -> None:
    @si.function
    def in_a_question(s):
        s += si.user("a" + si.select("x", ["b", "c"])) + si.assistant(si.gen("y"))

    @si.function
    def too_long(s):
        s += "a" * 5000 + si.select("x", ["b", "c"])

    with si.OpenAI("tiny", base_url=f"{server}/v1") as backend:
        with pytest.warns(RuntimeWarning):
            assert "inside a user message" in str(in_a_question.run(backend=backend).error())
        with pytest.warns(RuntimeWarning):
            assert "context holds" in str(too_long.run(backend=backend).error())


def test_text_is_streamed_piece_by_piece_to_whoever_reads_it(server: str) -> None:
    @si.function
    def program(s):
        s += si.user("hello") + si.assistant(si.gen("x", max_tokens=200, temperature=0, ignore_eos=True))

    with si.RuntimeEndpoint(server) as backend:
        read = list(program.run(backend=backend, stream=True).text_iter("x"))
        quiet = program.run(backend=backend)
    assert len(read) > 10 and "".join(read) == quiet["x"]
    assert quiet.slo_report().rows[0].output_tokens == 200
    assert quiet.get_meta_info("x")["completion_tokens"] == 200


def test_more_calls_than_connections_wait_for_each_other(server: str) -> None:
    """In a process that may have few files open, hard limit and all, calls wait instead of failing."""
    script = f"""
import resource
import superinfer as si
import aiohttp, openai  # whose code is files too
resource.setrlimit(resource.RLIMIT_NOFILE, (110, 110))

@si.function
async def program(s, i):
    s += si.user(str(i)) + si.assistant(si.gen("x", max_tokens=2, temperature=0, ignore_eos=True))

with si.RuntimeEndpoint({server!r}) as backend:
    states = program.run_batch([(i,) for i in range(300)], backend=backend)
    errors = [state.error() for state in states if state.error() is not None]
    print(len(states), errors[:1])
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    si.RuntimeEndpoint({server!r})
except si.SuperinferError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[:1] == ["300 []"], done.stdout + done.stderr
    assert "EngineUnavailableError this process may have 60 files open" in done.stdout


def test_over_http_a_report_has_all_stages_that_the_engine_tells(talking_llama: Path) -> None:
    small = dict(policy="lru", page_size=8, kv_tokens=256, dram_tokens=4096, max_batch_size=8, max_batch_tokens=64)

    @si.function
    def story(s, number):
        s += f"{number}" + si.gen("x", max_tokens=120, ignore_eos=True, slo=si.SLO(tbt=0.0001))

    with (
        launch_engine(EngineConfig(model=str(talking_llama), device="cpu", **small)) as engine,
        serving_at("--engine", engine.address, "--model-name", "tiny") as url,
        si.OpenAI("tiny", base_url=f"{url}/v1") as backend,
    ):
        states = story.run_batch([{"number": number} for number in range(8)], backend=backend)
        rows = [row for state in states for row in state.slo_report().rows]
    assert len(rows) == 8
    assert sum(row.rotated_s + row.copy_wait_s + row.preempted_s for row in rows) > 0.0  # memory is for two of them
    for row in rows:
        inside = row.queue_s + row.prefill_s + row.rotated_s + row.copy_wait_s + row.preempted_s + row.decode_s
        assert inside + row.client_s == pytest.approx(max(row.e2e_s, inside), abs=1e-4)
        assert row.met is False and row.why


def test_a_promise_that_our_server_refuses_is_not_asked_for_again_and_says_when_to_come_back(
    talking_llama: Path,
) -> None:
    @si.function
    def hopeless(s):
        s += "a" + si.gen("x", max_tokens=100, ignore_eos=True, slo=si.SLO(deadline=0.01))

    with (
        slow_engine(talking_llama, policy="rota", admission="refuse", told_s=0.05) as engine,
        EngineClient(engine.address) as client,
        serving_at("--engine", engine.address, "--model-name", "tiny") as url,
        si.OpenAI("tiny", base_url=f"{url}/v1") as backend,
    ):
        sampling = SamplingParams(max_tokens=900, ignore_eos=True)  # for 45 s at least
        other = client.generate(Generate(request_id=new_request_id(), prompt=[5], sampling=sampling))
        for _ in range(8):  # how long steps take is known
            next(other)
        with pytest.warns(RuntimeWarning, match="OverloadedError"):
            error = hopeless.run(backend=backend).error()
        assert isinstance(error, si.OverloadedError) and error.retry_after_s >= 1.0
        assert client.stats().classes["default"].refused == 1


def test_an_slo_goes_to_our_server_and_its_verdict_comes_back(server: str) -> None:
    with si.OpenAI("tiny", base_url=f"{server}/v1") as backend:
        assert backend.ours
        state = chat.run("hi", backend=backend, deadline=30.0, slo=si.SLO(ttft=20.0))
        first, _ = state.slo_report().rows
        assert first.met and first.slo.ttft == 20.0 and first.queue_s is not None and first.prefill_s > 0

        @si.function
        def long(s, on_miss):
            late = si.SLO(deadline=0.05, on_miss=on_miss)
            s += si.user("x") + si.assistant(si.gen("x", max_tokens=900, ignore_eos=True, slo=late))

        state = long.run("truncate", backend=backend)
        assert state.get_meta_info("x")["finish_reason"] == "deadline" and state.slo_report().met is False
        with pytest.warns(RuntimeWarning, match="DeadlineMissedError"):
            assert isinstance(long.run("raise", backend=backend).error(), si.DeadlineMissedError)


def test_plain_text_samples_and_streams_work_on_our_server(server: str) -> None:
    @si.function
    def program(s):
        s += "once" + si.gen("x", n=2, max_tokens=4, ignore_eos=True)

    with si.RuntimeEndpoint(server) as backend:
        state = program.run(backend=backend)
        assert len(state["x"]) == 2 and state.text() == "once" + state["x"][0]
        streamed = chat.run("hi", backend=backend, stream=True)
        assert "".join(streamed.text_iter("answer")) == streamed["answer"]
        backend.flush_cache()
        assert program.run(backend=backend).error() is None


def test_our_server_refuses_by_name_what_it_cannot_do(server: str) -> None:
    with si.RuntimeEndpoint(server) as backend:

        @si.function
        def too_long(s):
            s += si.user("x" * 2000) + si.assistant(si.gen("y"))

        with pytest.warns(RuntimeWarning, match="context"):
            assert isinstance(too_long.run(backend=backend).error(), si.InvalidRequestError)
    with pytest.raises(si.InvalidRequestError, match="is not served"):
        si.OpenAI("other", base_url=f"{server}/v1")


@pytest.fixture(scope="module")
def embedded_server() -> Iterator[str]:
    """One with the embedded model."""
    with serving_at() as url:
        yield url


def test_a_session_with_tools_works_over_http(embedded_server: str) -> None:
    with si.RuntimeEndpoint(embedded_server) as backend:
        session = si.Session(system="You are a support agent.", tools=[lookup, calculator], backend=backend)
        reply = session.ask("How much are 12 lamps?", temperature=0)
        assert [(r.call.name, r.text) for r in reply.tools] == [("lookup", "9"), ("calculator", "108")]
        assert "108" in reply.text
        session.prefetch()
        again = session.ask("And 30 of them?", temperature=0)
        assert "270" in again.text
        assert again.state.get_meta_info("reply")["cached_tokens"] > 150  # what was said before was not computed again


def test_constrained_output_works_over_http(embedded_server: str) -> None:
    @si.function
    def program(s):
        s += "Q: 3 + 4?\nA:" + si.gen("digits", regex=r" ?[0-9]{2}", max_tokens=8, temperature=0)
        s += si.gen("json", json_schema={"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                                         "additionalProperties": False}, max_tokens=32, temperature=0)  # fmt: skip

    with si.RuntimeEndpoint(embedded_server) as backend:
        state = program.run(backend=backend)
    assert re.fullmatch(" ?[0-9]{2}", state["digits"]) and type(json.loads(state["json"])["a"]) is bool


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    left, _, right = expression.split()
    return str(int(left) * int(right))


# ------------------------------------------------------------------------------------------------ other services


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def backends(service: Service) -> list[si.Backend]:
    return [
        si.OpenAI("m", base_url=f"{service.url}/v1"),
        si.Anthropic("m", base_url=service.url, api_key="k", max_retries=0),
    ]


def test_messages_go_out_and_text_comes_back(service: Service) -> None:
    for backend in backends(service):
        with backend:
            state = chat.run("hi", backend=backend, stop="\n", top_p=0.5)
        assert (state["answer"], state.get_meta_info("answer")["completion_tokens"]) == ("so it is", 3)
        assert state.messages()[-1] == {"role": "assistant", "content": "so it is"}
    first, second, third, fourth = service.asked
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert (first["max_tokens"], first["temperature"], first["top_p"], first["stop"]) == (8, 0.0, 0.5, ["\n"])
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert (third["system"], third["messages"]) == ("Be brief.", [{"role": "user", "content": "hi"}])
    assert third["stop_sequences"] == ["\n"] and [m["role"] for m in fourth["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    assert "slo" not in first and "cache_salt" not in first


def test_a_temperature_that_is_said_is_sent_though_it_is_the_usual_one(service: Service) -> None:
    """Services have their own where nothing is said: vLLM takes the model's generation_config.json."""

    @si.function
    def program(s):
        s += si.user("u") + si.assistant(si.gen("x", temperature=1.0))

    for backend in backends(service):
        with backend:
            program.run(backend=backend, top_p=1.0, top_k=-1)
    for asked in service.asked:
        assert (asked["temperature"], asked["top_p"]) == (1.0, 1.0) and "top_k" not in asked


@pytest.mark.parametrize(
    ("say", "named"),
    [
        (lambda s: s.user("u") or si.assistant(si.gen("x", min_p=0.1)), "min_p=0.1"),
        (lambda s: s.user("u") or si.assistant(si.gen("x", ignore_eos=True)), "ignore_eos"),
        (lambda s: s.user("u") or si.assistant(si.gen("x", return_logprob=True)), "return_logprob"),
        (lambda s: s.user("u") or si.assistant(si.gen("x", stop_regex="[0-9]")), "stop_regex"),
        (lambda s: s.user("u") or si.assistant(si.select("x", ["a", "b"])), r"select\(\)"),
        (lambda s: s.user("u") or si.user(si.gen("x")), "inside a user message"),
        (lambda s: s.user("u") or "raw" + si.assistant(si.gen("x")), "text between messages"),
    ],
)
def test_what_a_service_cannot_do_is_refused_before_anything_is_sent(service: Service, say, named: str) -> None:
    @si.function
    def program(s):
        s += si.user("u")
        s += say(_Nothing())

    for backend in backends(service):
        with backend, pytest.warns(RuntimeWarning, match=named):
            assert isinstance(program.run(backend=backend).error(), si.UnsupportedError)
    assert service.asked == []


def test_an_answer_to_nothing_is_refused_before_it_is_sent(service: Service) -> None:
    @si.function
    def first(s):
        s += si.assistant(si.gen("x"))

    @si.function
    def instructed(s):
        s += si.system("Be brief.") + si.assistant(si.gen("x"))

    openai, anthropic = backends(service)
    with openai, anthropic:
        for program, backend in ((first, openai), (first, anthropic), (instructed, anthropic)):
            with pytest.warns(RuntimeWarning, match=r"add user\("):
                assert isinstance(program.run(backend=backend).error(), si.UnsupportedError)
        assert service.asked == []
        assert instructed.run(backend=openai)["x"] == "so it is"


@pytest.mark.parametrize("options", [{"stop_regex": "[0-9]"}, {"return_logprob": True}, {"top_logprobs_num": 2}])
def test_what_a_superinfer_server_is_not_asked_over_http_is_refused_by_name(
    server: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from superinfer.lang.server_wire import ServerWire

    asked: list[str] = []
    monkeypatch.setattr(ServerWire, "chunks", lambda self, path, body: asked.append(path))

    @si.function
    def program(s):
        s += "text" + si.gen("x", max_tokens=4, **options)

    named = "stop_regex" if "stop_regex" in options else "return_logprob"
    with si.RuntimeEndpoint(server) as backend, pytest.warns(RuntimeWarning, match=named):
        assert isinstance(program.run(backend=backend).error(), si.UnsupportedError)
    assert asked == []


def test_tools_are_refused_where_they_are_not_passed_on(service: Service) -> None:
    with (
        si.Anthropic("m", base_url=service.url, api_key="k", max_retries=0) as backend,
        pytest.raises(si.UnsupportedError, match=r"tools\(\)"),
    ):
        si.Session(tools=[lookup], backend=backend).ask("x")
    assert service.asked == []


def lookup(key: str) -> str:
    """Look up a fact by its key."""
    return {"price of lamp": "9"}.get(key, "not found")


def test_tool_calls_of_a_service_are_those_of_a_program_and_results_go_back_with_their_ids(service: Service) -> None:
    service.calls = [("lookup", '{"key": "price of lamp"}'), ("lookup", '{"key": "x"}'), ("nothing", "{}")]
    with (
        si.OpenAI("m", base_url=f"{service.url}/v1") as backend,
        si.Session(tools=[lookup], backend=backend) as session,
    ):
        reply = session.ask("How much?")
        assert [result.text for result in reply.tools][:2] == ["9", "not found"] and "no tool" in reply.tools[2].text
        assert reply.text == "so it is"
        with pytest.raises(si.UnsupportedError, match="keeps no KV cache"):
            session.prefetch()
    first, second = service.asked
    assert first["tools"][0]["function"]["name"] == "lookup" and "prompt_cache_key" not in first
    _, answer, *results = second["messages"]
    assert answer["content"] is None
    assert [call["function"]["arguments"] for call in answer["tool_calls"]] == [call[1] for call in service.calls]
    assert [call["id"] for call in answer["tool_calls"]] == [result["tool_call_id"] for result in results]
    assert results[0]["role"] == "tool" and results[0]["content"] == "9"


def test_a_call_that_cannot_be_read_goes_back_as_the_model_wrote_it(service: Service) -> None:
    service.calls = [("lookup", "{not json")]
    with si.OpenAI("m", base_url=f"{service.url}/v1") as backend:
        reply = si.Session(tools=[lookup], backend=backend).ask("How much?")
    assert reply.text == "so it is" and reply.tools == ()
    roles = [(message["role"], message["content"][:16]) for message in service.asked[1]["messages"][1:]]
    assert roles == [("assistant", '<tool_call>{"nam'), ("user", "error: the model")]


class _Nothing:
    def user(self, text: str) -> None:
        """So that each case reads as a program."""


def test_n_and_plain_text_are_refused_where_there_is_none_of_it(service: Service) -> None:
    @si.function
    def several(s):
        s += si.user("u") + si.assistant(si.gen("x", n=2))

    @si.function
    def plain(s):
        s += "once" + si.gen("x")

    chat_only, anthropic = backends(service)
    with chat_only, anthropic:
        with pytest.warns(RuntimeWarning, match="n=2"):
            several.run(backend=anthropic)
        with pytest.warns(RuntimeWarning, match="text outside roles"):
            plain.run(backend=chat_only)
    assert service.asked == []


@pytest.mark.parametrize("at", [0, 1])
def test_deadlines_are_enforced_from_here_where_the_service_knows_none(service: Service, at: int) -> None:
    service.words, service.word_s = ["w "] * 2000, 0.02

    @si.function
    def program(s, on_miss):
        deadline = 3.0 if on_miss == "truncate" else 0.2  # time for a few words, however busy the machine is
        s += si.user("u") + si.assistant(si.gen("x", slo=si.SLO(deadline=deadline, on_miss=on_miss)))

    backend = backends(service)[at]
    with backend:
        started = time.monotonic()
        state = program.run("truncate", backend=backend)
        assert time.monotonic() - started > 2.9
        assert state["x"].startswith("w w") and state["x"].count("w") < 2000
        assert state.get_meta_info("x")["finish_reason"] == "deadline"
        with pytest.warns(RuntimeWarning, match="DeadlineMissedError"):
            assert isinstance(program.run("raise", backend=backend).error(), si.DeadlineMissedError)
    end = time.monotonic() + 30
    while service.gone < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert service.gone == 2  # the request was given up, not only its answer


@pytest.mark.parametrize(("status", "kind"), [(429, si.QueueFullError), (400, si.InvalidRequestError)])
def test_a_services_errors_are_ours(service: Service, status: int, kind: type[Exception]) -> None:
    service.status = status
    openai = si.OpenAI("m", base_url=f"{service.url}/v1", max_retries=0)
    for backend in (openai, backends(service)[1]):
        with backend, pytest.warns(RuntimeWarning):
            assert type(chat.run("hi", backend=backend).error()) is kind


@pytest.mark.parametrize("kind", ["OpenAI", "Anthropic", "a superinfer server"])
def test_a_busy_service_is_asked_again_when_it_said_and_no_more_often_than_allowed(service: Service, kind: str) -> None:
    if kind == "Anthropic":
        backend: si.Backend = si.Anthropic("m", base_url=service.url, api_key="k", max_retries=1)
    else:
        service.owner = "superinfer" if kind == "a superinfer server" else "someone"
        backend = si.OpenAI("m", base_url=f"{service.url}/v1", max_retries=1)

    @si.function
    def program(s):
        s += si.user("hi") + si.assistant(si.gen("answer"))

    with backend:
        service.busy = ["2"]
        assert program.run(backend=backend)["answer"] == "so it is"
        assert len(service.came) == 2 and service.came[1] - service.came[0] >= 1.9
        service.busy = ["1", "1"]
        with pytest.warns(RuntimeWarning, match="QueueFullError: .*too many"):
            assert type(program.run(backend=backend).error()) is si.QueueFullError
        assert len(service.came) == 4 and service.came[3] - service.came[2] >= 0.9


def test_a_server_that_is_busy_for_an_hour_is_not_waited_for(service: Service) -> None:
    service.owner, service.busy = "superinfer", ["3600"]
    with si.RuntimeEndpoint(service.url) as backend, pytest.warns(RuntimeWarning, match="QueueFullError: .*too many"):
        assert type(chat.run("hi", backend=backend).error()) is si.QueueFullError
    assert len(service.came) == 1


def test_an_overloaded_server_says_when_to_try_again(service: Service) -> None:
    service.owner, service.busy, service.busy_code = "superinfer", ["7"], "overloaded"
    with si.RuntimeEndpoint(service.url) as backend, pytest.warns(RuntimeWarning, match="OverloadedError"):
        error = chat.run("hi", backend=backend).error()
    assert isinstance(error, si.OverloadedError) and error.retry_after_s == 7.0
    service.busy = ["2", "7"]
    with si.OpenAI("m", base_url=f"{service.url}/v1") as backend, pytest.warns(RuntimeWarning, match="OverloadedError"):
        chat.run("hi", backend=backend, slo=si.SLO(deadline=5.0))
    assert not service.busy and len(service.came) == 3  # after 2 s it may yet be in time, after 7 not
    first, then = (asked["slo"]["deadline_ms"] for asked in service.asked[1:])
    assert then <= first - 1_900  # of the same deadline


@pytest.mark.parametrize(
    ("breaks", "kind"),
    [
        ("ends", si.EngineUnavailableError),
        ("cut", si.EngineUnavailableError),
        ("silent", si.DeadlineMissedError),
        ("json", si.SuperinferError),
        ("error", si.SuperinferError),
    ],
)
def test_an_answer_that_breaks_off_is_no_answer(service: Service, breaks: str, kind: type[Exception]) -> None:
    service.breaks = breaks
    timeout = 1.0 if breaks == "silent" else 60.0
    openai = si.OpenAI("m", base_url=f"{service.url}/v1", timeout=timeout, max_retries=0)
    anthropic = si.Anthropic("m", base_url=service.url, api_key="k", timeout=timeout, max_retries=0)
    service.owner = "superinfer"
    ours = si.OpenAI("m", base_url=f"{service.url}/v1", timeout=timeout, max_retries=0)
    for backend in (openai, anthropic, ours):
        with backend, pytest.warns(RuntimeWarning, match=r"the service|the server"):
            state = chat.run("hi", backend=backend)
        assert type(state.error()) is kind
        with pytest.raises(kind):
            state["answer"]


def test_nobody_at_the_address_is_said_so() -> None:
    for make in (
        lambda: si.OpenAI("m", base_url="http://127.0.0.1:9/v1", max_retries=0),
        lambda: si.RuntimeEndpoint("http://127.0.0.1:9"),
    ):
        with pytest.raises(si.EngineUnavailableError):
            make()


@pytest.mark.parametrize("kind", ["OpenAI", "Anthropic", "ours"])
def test_closing_a_backend_ends_the_calls_that_are_under_way(service: Service, kind: str) -> None:
    service.words, service.word_s = ["w "] * 500, 0.02
    service.owner = "superinfer" if kind == "ours" else "someone"
    backend = backends(service)[kind == "Anthropic"] if kind != "ours" else si.RuntimeEndpoint(service.url)

    @si.function
    def program(s):
        s += si.user("u") + si.assistant(si.gen("x"))

    state = program.run(backend=backend, stream=True)
    chunks = state.text_iter("x")
    assert next(chunks).startswith("w")
    backend.close()
    started = time.monotonic()
    error = state.error()
    assert isinstance(error, si.RequestCancelledError) and "the backend was closed" in str(error)
    assert time.monotonic() - started < 5  # the text would have gone on for 10
    with pytest.raises(si.RequestCancelledError), pytest.warns(RuntimeWarning):
        program.run(backend=backend)["x"]


def test_a_server_that_asks_for_a_key_is_given_it_or_says_so(service: Service) -> None:
    service.owner, service.key = "superinfer", "secret"
    with pytest.raises(si.InvalidRequestError, match=r"refuses this API key, give api_key"):
        si.RuntimeEndpoint(service.url)
    for endpoint in (si.RuntimeEndpoint(service.url, "secret"), si.RuntimeEndpoint(service.url, api_key="secret")):
        with endpoint:
            assert chat.run("hi", backend=endpoint)["answer"] == "so it is"
    with pytest.raises(si.InvalidRequestError, match="asks for no key"):
        si.RuntimeEndpoint("ipc:///tmp/none.sock", api_key="secret")


def test_a_server_is_reached_through_the_proxy_that_the_environment_names(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.owner = "superinfer"
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", service.url.replace("//", "//someone:secret@"))
    with si.RuntimeEndpoint("http://server.invalid:8000") as backend:
        assert chat.run("hi", backend=backend)["answer"] == "so it is"
    assert service.asked[0]["path"] == "http://server.invalid:8000/v1/chat/completions"
    assert service.proxy_keys == {"Basic " + base64.b64encode(b"someone:secret").decode()}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with si.RuntimeEndpoint(service.url) as backend:
        assert chat.run("hi", backend=backend)["answer"] == "so it is"
    assert service.asked[-1]["path"] == "/v1/chat/completions"


def test_a_call_of_a_server_waits_for_no_thread(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight calls at once would wait for each other's: they all want the interpreter."""
    with si.RuntimeEndpoint(server) as backend:
        given: list[object] = []
        monkeypatch.setattr(language_loop().loop, "run_in_executor", lambda *work: given.append(work))
        chat.run("hi", backend=backend).text()
    assert given == []


def test_a_server_that_is_not_ours_is_no_runtime_endpoint(service: Service) -> None:
    with pytest.raises(si.InvalidRequestError, match="no superinfer server; use OpenAI"):
        si.RuntimeEndpoint(service.url)


def test_litellm_answers_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network while it is imported
    with si.LiteLLM("gpt-4o-mini", mock_response="so it is", api_key="k") as backend:
        state = chat.run("hi", backend=backend)
        assert state["answer"] == "so it is"
        with pytest.warns(RuntimeWarning, match="ignore_eos"):
            assert isinstance(chat.run("hi", backend=backend, ignore_eos=True).error(), si.UnsupportedError)
    with pytest.warns(RuntimeWarning, match="closed"):
        chat.run("hi", backend=backend)


# In a process of its own, for what litellm leaves behind in one.
ASK_LITELLM = """
import sys, superinfer as si

model, timeout, retries = sys.argv[4], float(sys.argv[2]), int(sys.argv[3])

@si.function
def chat(s):
    s += si.user("hi") + si.assistant(si.gen("x"))

with si.LiteLLM(model, api_base=sys.argv[1], api_key="k", timeout=timeout, max_retries=retries) as backend:
    state = chat.run(backend=backend)
    print("it is", type(state.error()).__name__ if state.error() else state["x"])
"""


def ask_litellm(service: Service, timeout_s: float, retries: int, model: str = "openai/m") -> str:
    base = service.url if model.startswith("anthropic") else f"{service.url}/v1"
    command = [sys.executable, "-c", ASK_LITELLM, base, str(timeout_s), str(retries), model]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("model", ["openai/m", "anthropic/claude-haiku-4-5"])
@pytest.mark.parametrize(("refusals", "answer"), [(1, "so it is"), (2, "QueueFullError")])
def test_a_busy_service_is_asked_again_through_litellm(
    service: Service, refusals: int, answer: str, model: str
) -> None:
    """Whoever's it is: the library itself asks only some services again."""
    service.busy = ["2"] * refusals
    assert f"it is {answer}" in ask_litellm(service, 60.0, 1, model)
    assert len(service.came) == 2 and service.came[1] - service.came[0] >= 1.9


def test_a_service_that_is_busy_for_an_hour_is_not_waited_for_through_litellm(service: Service) -> None:
    service.busy = ["3600"]
    assert "it is QueueFullError" in ask_litellm(service, 60.0, 1)
    assert len(service.came) == 1


@pytest.mark.parametrize(("status", "times"), [(529, 2), (400, 1)])
def test_a_service_that_fails_is_asked_again_through_litellm(service: Service, status: int, times: int) -> None:
    service.status = status
    ask_litellm(service, 60.0, 1, "anthropic/claude-haiku-4-5")
    assert len(service.came) == times


@pytest.mark.parametrize(("breaks", "kind"), [("cut", "EngineUnavailableError"), ("silent", "DeadlineMissedError")])
def test_what_litellm_wraps_is_told_as_what_it_is(service: Service, breaks: str, kind: str) -> None:
    service.breaks = breaks
    assert f"it is {kind}" in ask_litellm(service, 1.0 if breaks == "silent" else 60.0, retries=0)

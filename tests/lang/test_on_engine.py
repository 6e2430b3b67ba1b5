"""Programs against a real engine with a random model: what the scripted one cannot show."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from own_time import OwnTime
from slow_engine import SlowEngine

import superinfer as si
from superinfer.lang import backend as backend_module
from superinfer.lang.backend import RuntimeEndpoint
from superinfer.runtime.client import EngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.protocol import StatsReport


@si.function(deadline=60.0)
def chat(s, question, tokens=8):
    s += si.user(question)
    s += si.assistant(si.gen("answer", max_tokens=tokens, temperature=0, ignore_eos=True))
    forks = s.fork(2)
    forks += lambda i: si.user(str(i)) + si.assistant(si.gen("more", max_tokens=4, temperature=0, ignore_eos=True))
    forks.join()
    s += si.user("Which?") + si.assistant(si.select("choice", ["yes", "no"]))


def test_a_forked_process_runs_programs_on_backends_of_its_own(endpoint: RuntimeEndpoint) -> None:
    chat.run("hello")  # the language's thread is there, and a fork has none of it

    def child() -> str:
        with pytest.raises(si.InvalidRequestError, match=r"was made in process .* forked"):
            chat.run("hello")
        with si.RuntimeEndpoint(endpoint.address) as backend:
            return str(chat.run("hello", backend=backend)["answer"])

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(child()))
    process.start()
    process.join(20)
    hung = process.is_alive()
    process.kill()
    assert not hung and process.exitcode == 0
    assert answers.get() == chat.run("hello")["answer"]


def test_a_forked_process_that_ends_leaves_the_engine_alone(talking_engine: EngineProcess) -> None:
    pid = os.fork()
    if pid == 0:
        talking_engine.close()  # as the interpreter does at its end
        os._exit(0)
    end = time.monotonic() + 20
    while os.waitpid(pid, os.WNOHANG) == (0, 0):  # a lock that another thread held may keep a forked child for ever
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with si.RuntimeEndpoint(talking_engine.address, timeout=5.0):
        assert talking_engine.alive


def test_a_program_runs_the_same_twice_and_reports_its_calls(endpoint: RuntimeEndpoint) -> None:
    once, again = chat.run("hello"), chat.run("hello")
    assert once.text() == again.text() and once["choice"] in ("yes", "no") and len(once["more"]) == 2
    meta = again.get_meta_info("answer")
    assert (meta["completion_tokens"], meta["finish_reason"]) == (8, "length")
    assert meta["prompt_tokens"] == len("<|user|>hello") + 1 + len("<|assistant|>")  # <|end|> is one token
    assert meta["cached_tokens"] > 0
    report = once.slo_report()
    assert [row.call for row in report.rows] == ["answer", "more", "more", "choice"] and report.met
    # What waits for the step under way counts from the earliest that it may have come: before it was sent, perhaps.
    for row in report.rows:
        assert row.queue_s is not None and row.queue_s >= 0.0 and row.client_s is not None and row.client_s >= 0.0
        assert row.prefill_s is not None and row.decode_s is not None and row.e2e_s >= row.prefill_s + row.decode_s


def test_select_scores_as_the_engine_does(endpoint: RuntimeEndpoint) -> None:
    @si.function
    def program(s):
        s += "abc" + si.select("x", ["d", "efg"], choices_method=si.unconditional_likelihood_normalized)

    state = program.run()
    scored = state.get_meta_info("x")["input_token_logprobs"]
    with EngineClient(endpoint.address) as client:
        from superinfer.runtime.protocol import Score

        prompt = endpoint.encode("abcefg", special=True)
        expected, _ = client.score(Score(request_id="r", prompt=prompt, start=len(prompt) - 3))
    assert [score[0] for score in scored[1]] == pytest.approx([item.logprob for item in expected], abs=1e-5)


@pytest.mark.parametrize("method", [si.token_length_normalized, si.unconditional_likelihood_normalized])
def test_select_computes_the_shared_prompt_once(
    talking_engine: EngineProcess, endpoint: RuntimeEndpoint, method
) -> None:
    prompt, choices = f"{method!r} of one prompt " + "shared " * 12, [f"{i} is it" for i in range(8)]

    @si.function
    def program(s):
        s += prompt + si.select("x", choices, choices_method=method)

    before = stats(talking_engine)
    assert program.run()["x"] in choices
    now = stats(talking_engine)
    computed = (now.prompt_tokens - before.prompt_tokens) - (now.cached_tokens - before.cached_tokens)
    length, page = len(endpoint.encode(prompt, special=True)), endpoint.info.page_size
    # Of each choice: its own tokens, what of the prompt fills no block, and for some methods itself without the prompt.
    tails = sum(len(choice) * 2 + page for choice in choices)
    assert length <= computed <= length + tails < 2 * length + tails < now.prompt_tokens - before.prompt_tokens
    # Rounds: the prompt, then the requests as they come in, for some methods each choice without the prompt too.
    requests = len(choices) * (2 if method is si.unconditional_likelihood_normalized else 1)
    assert now.steps - before.steps <= 2 + requests


def test_200_programs_at_once_on_one_connection(endpoint: RuntimeEndpoint) -> None:
    @si.function
    async def program(s, i):
        s += f"{i}" + si.gen("x", max_tokens=2, temperature=0, ignore_eos=True)

    states = program.run_batch([(i % 5,) for i in range(200)])
    assert [s.error() for s in states] == [None] * 200
    assert all(states[i]["x"] == states[i % 5]["x"] for i in range(200))


def stats(engine: EngineProcess | SlowEngine) -> StatsReport:
    with EngineClient(engine.address) as client:
        return client.stats()


async def test_cancelling_a_program_frees_the_engine(slow: SlowEngine) -> None:
    @si.function
    async def long(s):
        s += "x" + si.gen("x", max_tokens=900, ignore_eos=True)
        await s.get("x")

    before = await asyncio.to_thread(stats, slow)
    with RuntimeEndpoint(slow.address) as backend:
        task = asyncio.create_task(long.arun(backend=backend))
        while not task.done() and (await asyncio.to_thread(stats, slow)).running == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        end = time.monotonic() + 10
        while (now := await asyncio.to_thread(stats, slow)).running and time.monotonic() < end:
            await asyncio.sleep(0.02)
    assert now.running == 0 and now.cancelled == before.cancelled + 1


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_who_waits_for_a_prompts_answer_frees_the_engine(
    slow: SlowEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    process = SimpleNamespace(address=slow.address, pid=0, close=lambda: None)
    monkeypatch.setattr(backend_module, "launch_engine", lambda *_, **__: process)
    before = await asyncio.to_thread(stats, slow)

    async def read() -> None:
        answer = await engine.async_generate("x", {"max_new_tokens": 900, "ignore_eos": True}, stream=stream)
        async for _ in answer:
            pass

    with si.Engine() as engine:
        task = asyncio.create_task(read())
        while not task.done() and (await asyncio.to_thread(stats, slow)).running == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        end = time.monotonic() + 10
        while (now := await asyncio.to_thread(stats, slow)).running and time.monotonic() < end:
            await asyncio.sleep(0.02)
    assert now.running == 0 and now.cancelled == before.cancelled + 1


def test_the_engine_truncates_at_the_deadline(endpoint: RuntimeEndpoint) -> None:
    @si.function
    def program(s):
        s += "x" + si.gen("x", max_tokens=900, ignore_eos=True, slo=si.SLO(deadline=0.15, on_miss="truncate"))

    state = program.run()
    meta = state.get_meta_info("x")
    assert meta["finish_reason"] == "deadline" and 0 <= meta["completion_tokens"] < 900
    assert state.slo_report().met is False


def test_an_engine_that_dies_mid_program_raises_where_the_variable_is_read(tiny_checkpoint: Path) -> None:
    command = [sys.executable, "benchmarks/noop_engine.py", "--checkpoint", str(tiny_checkpoint), "--tbt-ms", "20"]
    engine = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)

    @si.function
    def program(s):
        s += "x" + si.gen("x", max_tokens=100_000, ignore_eos=True)
        next(s.text_iter("x"))
        engine.kill()
        with OwnTime() as own:
            with pytest.raises(si.EngineDeadError):
                s["x"]
            s += si.gen("y")
            with pytest.raises(si.EngineDeadError):
                s["y"]
        return own.seconds

    with engine:
        assert engine.stdout is not None
        address = engine.stdout.readline().strip()
        with RuntimeEndpoint(address) as backend, pytest.warns(RuntimeWarning, match="EngineDeadError"):
            state = program.run(backend=backend)
    assert state.ret_value < 2
    assert isinstance(state.error(), si.EngineDeadError)


def test_programs_run_on_the_engine_that_is_started_anew_at_the_address(talking_llama: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(talking_llama), kv_tokens=4096, max_batch_size=4, threads=1, address=f"ipc://{tmp_path}/engine.sock"
    )

    @si.function
    def program(s):
        s += si.user("once") + si.assistant(si.gen("x", max_tokens=8, ignore_eos=True, temperature=0))

    with launch_engine(config) as engine:
        backend = RuntimeEndpoint(engine.address)
        before = program.run(backend=backend)["x"]
        os.kill(engine.pid, signal.SIGKILL)
    with backend, launch_engine(config):
        deadline = time.monotonic() + 60
        while not backend.client.client.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert program.run(backend=backend)["x"] == before


def test_a_backend_that_nobody_has_any_more_is_not_connected_any_more(slow: SlowEngine) -> None:
    before = len(slow.door.clients)
    for _ in range(5):
        backend = RuntimeEndpoint(slow.address)
        assert backend.info.model == "slow"
        del backend
    deadline = time.monotonic() + 60
    while len(slow.door.clients) > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(slow.door.clients) <= before


def test_a_closed_backend_says_so(talking_engine: EngineProcess) -> None:
    backend = RuntimeEndpoint(talking_engine.address)
    backend.close()
    backend.close()
    with pytest.raises(si.RequestCancelledError, match="the backend is closed"):
        chat.run("x", backend=backend)


def test_an_address_without_an_engine_is_unavailable() -> None:
    with pytest.raises(si.EngineUnavailableError):
        RuntimeEndpoint("ipc:///tmp/superinfer-nobody.sock", timeout=0.3)


def test_a_runtime_starts_an_engine_and_ends_it(talking_llama) -> None:
    with si.Runtime(model=str(talking_llama), kv_tokens=1024, threads=1) as runtime:
        pid = runtime.pid
        assert chat.run("x", backend=runtime.endpoint)["choice"] in ("yes", "no")
    assert pid is not None and runtime.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(si.InvalidRequestError, match="kv_tokenz"):
        si.Runtime(kv_tokenz=5)


def test_a_script_that_closes_nothing_ends_and_takes_its_engine_along(talking_llama: Path) -> None:
    script = f"""
import superinfer as si
runtime = si.Runtime(model_path={str(talking_llama)!r}, kv_tokens=1024, threads=1)
si.set_default_backend(runtime)
@si.function
def program(s):
    s += "x" + si.gen("x", max_tokens=2, ignore_eos=True)
program.run()
program.run(stream=True)
print(runtime.pid)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_control_c_ends_a_program_and_cancels_its_request(slow: SlowEngine) -> None:
    script = f"""
import superinfer as si
@si.function
def program(s):
    s += "x" + si.gen("x", max_tokens=900, ignore_eos=True)
    next(s.text_iter("x"))
    print("begun", flush=True)
    s["x"]
with si.RuntimeEndpoint({slow.address!r}) as backend:
    try:
        program.run(backend=backend)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
    before = stats(slow).cancelled
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == "interrupted\n"
    assert process.wait(60) == 0
    end = time.monotonic() + 10
    while (now := stats(slow)).running and time.monotonic() < end:
        time.sleep(0.02)
    assert now.cancelled == before + 1


def test_default_backend_uses_the_one_that_is_set(endpoint: RuntimeEndpoint) -> None:
    with si.default_backend() as backend:
        assert backend is endpoint
    assert chat.run("still open").error() is None

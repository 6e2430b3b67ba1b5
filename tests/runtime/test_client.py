"""A real engine process over real sockets, through its only door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
import zmq
from own_time import OwnTime
from slow_engine import slow_engine
from transformers import LlamaForCausalLM

from superinfer.errors import (
    DeadlineMissedError,
    EngineDeadError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelLoadError,
    ProtocolError,
    QueueFullError,
    RequestCancelledError,
)
from superinfer.runtime import protocol
from superinfer.runtime.client import AsyncEngineClient, EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.frontdoor import MAX_AT_ONCE
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, Hello, SamplingParams, Score
from superinfer.runtime.slo import SLO

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
CROWD = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True, n=60)  # takes an engine several seconds


def request(prompt, sampling=GREEDY, **kw) -> Generate:
    return Generate(request_id=new_request_id(), prompt=list(prompt), sampling=sampling, **kw)


def tokens(client: EngineClient, wanted: Generate) -> list[int]:
    return [token for delta in client.generate(wanted) for token in delta.token_ids]


@pytest.fixture(scope="module")
def reference(random_llama):
    model = LlamaForCausalLM.from_pretrained(random_llama).eval()

    def continue_greedily(prompt: list[int], count: int) -> list[int]:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    return continue_greedily


def wait_until_idle(client: EngineClient, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while (health := client.health()).running + health.waiting:
        assert time.monotonic() < deadline, f"still busy: {health}"
        time.sleep(0.01)


def wait_until_busy(client: EngineClient) -> None:
    deadline = time.monotonic() + 30
    while not client.health().running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_alive(client: EngineClient, alive: bool) -> None:
    deadline = time.monotonic() + 30
    while client.alive is not alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_counts_from_when_it_came_not_from_when_a_step_let_it_be_read(tiny_checkpoint, monkeypatch):
    """Who comes while a step computes is read when it is over. What it waited for that is part of its time, as its
    client sees it: of two steps of a second it gets its first token at the end of the second one."""
    with slow_engine(tiny_checkpoint, step_s=0.01, num_slots=2) as engine:
        engine.keep_time(monkeypatch, 1.0)
        with EngineClient(engine.address) as client, EngineClient(engine.address) as other:
            stream = client.generate(request([5, 6], LONG))
            next(stream)  # from now on step follows step
            engine.compute_until_a_message_comes()
            *_, last = other.generate(request([1, 2, 3]))
            stream.close()
    assert last.report.output_tokens == 12
    assert last.report.ttft_s == 2.0 and last.report.e2e_s == 13.0


# ---------------------------------------------------------------------------- generation


def test_greedy_tokens_are_those_of_transformers_alone_and_among_strangers(engine, client, reference):
    shared = list(range(10, 110))
    prompts = [[5], [7, 8, 9], shared[:40], [*shared[:70], 3], shared, [300 + i % 50 for i in range(200)]]
    expected = [reference(prompt, 12) for prompt in prompts]
    assert [tokens(client, request(prompt)) for prompt in prompts] == expected

    async def all_at_once():
        async with await AsyncEngineClient.connect(engine.address) as many:

            async def one(prompt):
                return [token async for delta in many.generate(request(prompt)) for token in delta.token_ids]

            return await asyncio.gather(*[one(prompt) for prompt in prompts * 3])

    assert asyncio.run(all_at_once()) == expected * 3


def test_an_equal_prefix_is_not_computed_again(client):
    prompt = [401 + i % 60 for i in range(100)]
    first, second = [list(client.generate(request(prompt)))[-1].report for _ in range(2)]
    assert second.cached_tokens == 96
    assert first.cached_tokens < 96


def test_deltas_arrive_while_the_engine_still_generates(client):
    stream = client.generate(request([9, 9, 9], CROWD))
    next(stream)
    health = client.health()
    assert health.running == 16
    stream.close()
    wait_until_idle(client)


def test_the_last_delta_carries_reason_and_report(client):
    *_, last = client.generate(request([4, 5, 6], slo=SLO(ttft=30, tbt=30, deadline=60)))
    assert last.finish_reason == "length"
    report = last.report
    assert (report.prompt_tokens, report.output_tokens, report.met) == (3, 12, True)
    assert report.queue_s + report.prefill_s + report.decode_s == pytest.approx(report.e2e_s)
    assert report.lateness_s < 0


def test_a_missed_promise_is_reported_with_its_cause(client):
    *_, last = client.generate(request([4, 5, 6], LONG, slo=SLO(deadline=0.02)))
    assert last.finish_reason == "length"
    assert (last.report.met, last.report.deadline_met) == (False, False)
    assert last.report.why in ("queue", "prefill", "decode")


def test_n_continuations_are_independent_and_reproducible(client):
    sampling = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)

    def run():
        found: dict[int, list[int]] = {}
        for delta in client.generate(request([11, 12, 13], sampling)):
            found.setdefault(delta.index, []).extend(delta.token_ids)
        return [found[index] for index in range(4)]

    first = run()
    assert first == run()
    assert len({tuple(t) for t in first}) == 4


def test_a_stop_id_ends_the_sequence_and_min_tokens_holds_it_back(client):
    free = tokens(client, request([21, 22]))
    stop = free[3]
    *_, last = client.generate(request([21, 22], msgspec.structs.replace(GREEDY, stop_token_ids=(stop,))))
    assert last.finish_reason == "stop"
    held = tokens(client, request([21, 22], msgspec.structs.replace(GREEDY, stop_token_ids=(stop,), min_tokens=8)))
    assert len(held) >= 8
    assert stop not in held[:8]


def test_logprobs_are_of_the_chosen_and_the_most_likely(client):
    sampling = msgspec.structs.replace(GREEDY, logprobs=3)
    for delta in client.generate(request([31, 32], sampling)):
        for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
            assert logprob.token_id == token == logprob.top[0][0]
            assert len(logprob.top) == 3
            assert 0 >= logprob.logprob == logprob.top[0][1] >= logprob.top[1][1]


def test_scores_agree_with_generated_logprobs(client):
    sampling = msgspec.structs.replace(GREEDY, logprobs=0)
    deltas = list(client.generate(request([41, 42, 43], sampling)))
    generated = [t for d in deltas for t in d.token_ids]
    said = [entry.logprob for d in deltas for entry in d.logprobs]
    scored, report = client.score(Score(request_id=new_request_id(), prompt=[41, 42, 43, *generated], start=3))
    assert [entry.logprob for entry in scored] == pytest.approx(said, abs=1e-3)
    assert report.output_tokens == 0


# ---------------------------------------------------------------------------- ends


def test_leaving_a_stream_early_cancels_it_on_the_engine(client):
    cancelled = client.stats().cancelled
    stream = client.generate(request([1, 2, 3], CROWD))
    next(stream)
    stream.close()
    wait_until_idle(client)
    assert client.stats().cancelled == cancelled + 60


def test_cancel_by_id_ends_the_stream_with_its_reason(client):
    wanted = request([1, 2, 3], CROWD)
    reasons = []
    for delta in client.generate(wanted):
        if not reasons:
            client.cancel(wanted.request_id)
        reasons.append(delta.finish_reason)
    assert [reason for reason in reasons if reason] == ["cancelled"] * 60


def test_one_continuation_can_be_cancelled_alone(tiny_checkpoint):
    wanted = request([5, 6], SamplingParams(n=2, max_tokens=100, ignore_eos=True))
    ends = {}
    with slow_engine(tiny_checkpoint, num_slots=2) as engine, EngineClient(engine.address) as client:
        for delta in client.generate(wanted):
            if not ends:
                client.cancel(wanted.request_id, 1)
                ends[0] = ""
            if delta.finish_reason:
                ends[delta.index] = delta.finish_reason
                engine.executor.step_s = 0.0
    assert ends == {0: "length", 1: "cancelled"}


def test_a_deadline_truncates_or_raises_as_asked(client):
    *_, last = client.generate(request([1], LONG, slo=SLO(deadline=0.05, on_miss="truncate")))
    assert last.finish_reason == "deadline"
    assert last.report.output_tokens < 900
    with pytest.raises(DeadlineMissedError, match=r"deadline of 0\.05 s"):
        list(client.generate(request([1], LONG, slo=SLO(deadline=0.05, on_miss="raise"))))


def test_requests_of_a_client_that_vanished_are_given_up(engine, client):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(engine.address)
    socket.send(protocol.encode(Hello(version=protocol.PROTOCOL_VERSION)))
    socket.recv()
    cancelled = client.stats().cancelled
    for _ in range(20):  # more than run at a time, so that some still wait
        socket.send(protocol.encode(request([1, 2], msgspec.structs.replace(LONG, n=3))))
    deadline = time.monotonic() + 30
    while (health := client.health()).running + health.waiting < 60:
        assert time.monotonic() < deadline, health
    socket.close(0)
    context.term()
    wait_until_idle(client)
    assert client.stats().cancelled == cancelled + 60


def test_closing_a_client_ends_its_waiting_calls(engine):
    closing = EngineClient(engine.address)
    stream = closing.generate(request([1, 2], CROWD))
    next(stream)
    threading.Timer(0.05, closing.close).start()
    with pytest.raises((RequestCancelledError, asyncio.CancelledError)):
        for _ in stream:
            pass


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ([], GREEDY, "prompt is empty"),
        ([1] * 2000, GREEDY, "2000 tokens does not fit.*1024"),
        ([1] * 1020, SamplingParams(max_tokens=100), "max_tokens=100 exceed.*at most 4"),
        ([512], GREEDY, "token id 512 is not in the vocabulary"),
        ([-1], GREEDY, "token id -1"),
        ([1], SamplingParams(stop_token_ids=(9999,)), "stop token id 9999"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_value(client, prompt, sampling, says):
    with pytest.raises(InvalidRequestError, match=says):
        list(client.generate(request(prompt, sampling)))
    assert len(tokens(client, request([1, 2]))) == 12


@pytest.mark.parametrize("start", [0, 3, -1])
def test_a_score_start_outside_the_prompt_is_refused(client, start):
    with pytest.raises(InvalidRequestError, match=f"start={start}"):
        client.score(Score(request_id=new_request_id(), prompt=[1, 2, 3], start=start))


@pytest.mark.parametrize("top", [-1, 21])
def test_more_rivals_of_a_score_than_there_may_be_are_refused(client, top):
    with pytest.raises(InvalidRequestError, match=f"top={top}"):
        client.score(Score(request_id=new_request_id(), prompt=[1, 2, 3], start=1, top=top))


def test_a_full_queue_refuses_and_serves_on(client):
    stream = client.generate(request([1], CROWD))
    next(stream)
    with pytest.raises(QueueFullError, match="64"):
        list(client.generate(request([1], SamplingParams(n=10, max_tokens=2))))
    stream.close()
    wait_until_idle(client)
    assert len(tokens(client, request([1, 2]))) == 12


def test_messages_that_cannot_be_read_disturb_nobody(engine, client):
    stream = client.generate(request([1, 2, 3], LONG))
    next(stream)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(engine.address)
    bad = [
        [b""],
        [b"\xff\x00garbage"],
        [protocol.encode(request([1]))[:-3]],
        [msgspec.msgpack.encode({"type": "Teleport"})],
        [b"two", b"frames"],
        [protocol.encode(request([1]))],  # before Hello
        [msgspec.msgpack.encode({"type": "Generate", "request_id": "x", "prompt": "text"})],
    ]
    for frames in bad:
        socket.send_multipart(frames)
        assert socket.poll(30_000), f"no answer to {frames}"
        answer = protocol.decode_to_client(socket.recv())
        assert isinstance(answer, protocol.Failed), frames
    socket.send(protocol.encode(Hello(version=99)))
    refused = protocol.decode_to_client(socket.recv())
    assert "protocol 99" in refused.reason
    socket.close(0)
    context.term()
    assert next(stream).token_ids
    stream.close()


def test_a_client_that_sends_faster_than_is_read_does_not_hold_the_steps_of_others_up(tiny_checkpoint):
    """Between two tokens of another the engine reads a few of its messages, and all of them in the end."""
    flood = 8000
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(60)

    with (
        slow_engine(tiny_checkpoint, step_s=0.005) as engine,
        EngineClient(engine.address) as client,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(engine.address)
        stream = client.generate(request([5, 6], LONG))
        next(stream)
        engine.executor.meanwhile = hold
        assert held.wait(60), "the engine makes no steps"
        socket.send(protocol.encode(Hello(version=protocol.PROTOCOL_VERSION)))
        socket.send(protocol.encode(protocol.GetStats(token=1)))
        for _ in range(flood):
            socket.send(protocol.encode(protocol.Cancel(request_id="none of ours")))
        socket.send(protocol.encode(protocol.GetStats(token=2)))
        go.set()
        reports: list[protocol.StatsReport] = []
        while len(reports) < 2:
            assert socket.poll(60_000), "messages were lost"
            message = protocol.decode_to_client(socket.recv())
            if isinstance(message, protocol.StatsReport):
                reports.append(message)
        stream.close()
    first, last = reports
    assert (first.token, last.token) == (1, 2)
    assert last.steps - first.steps >= flood // MAX_AT_ONCE - 1


def test_a_request_id_cannot_be_used_twice_at_a_time(client):
    wanted = request([1, 2], LONG)
    stream = client.generate(wanted)
    next(stream)
    with pytest.raises(InvalidRequestError, match="already in use"):
        list(client.generate(wanted))
    assert next(stream).token_ids
    stream.close()


# ---------------------------------------------------------------------------- processes


@pytest.fixture
def own_engine(random_llama):
    with launch_engine(EngineConfig(model=str(random_llama), kv_tokens=4096)) as process:
        yield process


def leftovers(address: str) -> list[str]:
    path = Path(address.removeprefix("ipc://"))
    return [str(p) for p in (path, path.parent) if p.exists()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_every_waiting_client_learns_within_two_seconds_that_the_engine_died(own_engine, how):
    clients = [EngineClient(own_engine.address) for _ in range(3)]
    failures: list[tuple[float, Exception]] = []
    own = OwnTime()
    begun = threading.Barrier(7)

    def wait(client: EngineClient) -> None:
        begun.wait(30)
        try:
            for _ in range(100):
                list(client.generate(request([1, 2], LONG)))
        except EngineDeadError as error:
            failures.append((own.seconds, error))

    threads = [threading.Thread(target=wait, args=(client,)) for client in clients for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    wait_until_busy(clients[0])
    with own:
        os.kill(own_engine.pid, how)
        for thread in threads:
            thread.join(30)
    assert len(failures) == 6
    assert max(seconds for seconds, _ in failures) < 2.0
    assert str(own_engine.pid) in str(failures[0][1])
    with pytest.raises(EngineDeadError):
        list(clients[0].generate(request([1])))
    for client in clients:
        assert not client.alive
        client.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(own_engine.pid, signal.SIGCONT)
    address = own_engine.address
    own_engine.close(timeout=2.0)
    assert not leftovers(address)


async def test_an_error_that_is_asked_for_again_and_again_holds_on_to_nobody_who_got_it(own_engine):
    async with await AsyncEngineClient.connect(own_engine.address) as client:
        own_engine.close()
        frames = []
        for _ in range(50):
            for call in (client.health(), client.open(request([1, 2]), print), anext(client.generate(request([1, 2])))):
                with pytest.raises(EngineDeadError) as raised:
                    await call
                frames.append(len(traceback.extract_tb(raised.value.__traceback__)))
            with pytest.raises(EngineDeadError) as raised:
                client.open_soon(request([1, 2]), print)
            frames.append(len(traceback.extract_tb(raised.value.__traceback__)))
    assert frames[-4:] == frames[4:8]


def test_clients_that_have_gone_are_forgotten_though_they_had_nothing_under_way(tiny_checkpoint):
    with slow_engine(tiny_checkpoint, step_s=0.0) as engine, EngineClient(engine.address) as idle:
        for number in range(12):
            with EngineClient(engine.address) as client:
                client.cancel("none of ours")
                with pytest.raises(InvalidRequestError):
                    list(client.generate(request([])))
                if number % 2:
                    assert len(tokens(client, request([5, 6]))) == 12
        deadline = time.monotonic() + 60
        while len(engine.door.clients) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(engine.door.clients) == 1
        assert idle.health().status == "ok"


def test_an_orderly_end_tells_its_clients_why_and_leaves_nothing(own_engine):
    with EngineClient(own_engine.address) as client:
        stream = client.generate(request([1, 2], LONG))
        next(stream)
        client.shutdown_engine()
        with pytest.raises(EngineDeadError, match="asked it to shut down"):
            list(stream)
    deadline = time.monotonic() + 30
    while own_engine.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not own_engine.alive
    assert not leftovers(own_engine.address)


def test_sigterm_ends_an_engine_in_order(own_engine):
    os.kill(own_engine.pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while own_engine.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    assert own_engine._process.returncode == 0
    assert not leftovers(own_engine.address)


def test_an_engine_ends_when_its_parent_is_killed(random_llama, tmp_path):
    code = (
        "import sys, time\n"
        "from superinfer.runtime.launch import launch_engine\n"
        "from superinfer.runtime.config import EngineConfig\n"
        "engine = launch_engine(EngineConfig(model=sys.argv[1], kv_tokens=1024))\n"
        "print(engine.pid, engine.address, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(random_llama)], stdout=subprocess.PIPE, text=True)
    pid, address = parent.stdout.readline().split()
    child = psutil.Process(int(pid))
    parent.kill()
    parent.wait()
    child.wait(30)
    assert not leftovers(address)


def test_a_forked_process_neither_ends_the_engine_of_its_parent_nor_keeps_it(random_llama):
    code = (
        "import os, sys, time\n"
        "from superinfer.runtime.client import EngineClient\n"
        "from superinfer.runtime.config import EngineConfig\n"
        "from superinfer.runtime.launch import launch_engine\n"
        "engine = launch_engine(EngineConfig(model=sys.argv[1], kv_tokens=1024))\n"
        "ends = os.fork()\n"
        "if ends == 0:\n"
        "    sys.exit(0)\n"  # as any process ends, with what is to be done then
        "os.waitpid(ends, 0)\n"
        "stays = os.fork()\n"
        "if stays == 0:\n"
        "    time.sleep(200)\n"
        "    os._exit(0)\n"
        "with EngineClient(engine.address) as client:\n"
        "    print(engine.pid, engine.address, stays, client.health().status, flush=True)\n"
        "time.sleep(200)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(random_llama)], stdout=subprocess.PIPE, text=True)
    pid, address, stays, status = parent.stdout.readline().split()
    engine, forked = psutil.Process(int(pid)), psutil.Process(int(stays))
    try:
        assert status == "ok"
        parent.kill()
        parent.wait()
        engine.wait(30)
        assert forked.is_running() and not leftovers(address)
    finally:
        forked.kill()


def test_threads_that_wait_for_each_other_give_way_to_other_work_unless_the_environment_says_more(
    random_llama, monkeypatch
):
    config = EngineConfig(model=str(random_llama), kv_tokens=1024)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value, spin in (("", "", "5000"), ("GOMP_SPINCOUNT", "7", "7"), ("OMP_WAIT_POLICY", "ACTIVE", None)):
        with monkeypatch.context() as environment:
            if name:
                environment.setenv(name, value)
            with launch_engine(config) as engine:
                assert psutil.Process(engine.pid).environ().get("GOMP_SPINCOUNT") == spin


def test_tcp_serves_as_ipc_does(random_llama):
    config = EngineConfig(model=str(random_llama), kv_tokens=1024, address="tcp://127.0.0.1:0")
    with launch_engine(config) as engine:
        assert engine.address.startswith("tcp://127.0.0.1:")
        with EngineClient(engine.address) as client:
            assert len(tokens(client, request([1, 2]))) == 12
        again = msgspec.structs.replace(config, address=engine.address)
        with pytest.raises(InvalidRequestError, match="choose another port"):
            launch_engine(again)


def test_an_ipc_path_in_use_is_not_taken_over(own_engine, random_llama):
    with pytest.raises(InvalidRequestError, match="already listens"):
        launch_engine(EngineConfig(model=str(random_llama), address=own_engine.address))
    with EngineClient(own_engine.address) as client:
        assert client.health().status == "ok"


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"model": "/nowhere/at/all"}, ModelLoadError, "/nowhere/at/all"),
        ({"policy": "lottery"}, InvalidRequestError, "'lottery' is unknown"),
        ({"address": "carrier-pigeon://1"}, InvalidRequestError, "carrier-pigeon"),
        ({"address": "ipc:///nowhere/engine.sock"}, InvalidRequestError, "does not exist"),
    ],
)
def test_an_engine_that_cannot_start_says_why(random_llama, config, error, says):
    with pytest.raises(error, match=says):
        launch_engine(EngineConfig(**({"model": str(random_llama)} | config)))


def test_an_engine_that_is_not_there_is_reported_with_a_remedy(tmp_path):
    with pytest.raises(EngineUnavailableError, match="superinfer engine"):
        EngineClient(f"ipc://{tmp_path}/none.sock", timeout=0.3)
    with pytest.raises(InvalidRequestError, match="tcp://HOST:PORT"):
        EngineClient("not an address", timeout=0.3)


def test_an_engine_of_another_protocol_version_is_refused(tmp_path):
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/other.sock")

    def answer() -> None:
        client, _ = router.recv_multipart()
        router.send_multipart((client, protocol.encode(protocol.Refused(version=2, reason="protocol 1 is not 2"))))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(ProtocolError, match="protocol 1 is not 2"):
        EngineClient(f"ipc://{tmp_path}/other.sock")
    thread.join()
    router.close(0)
    context.term()


async def test_a_client_that_is_closed_as_soon_as_it_is_connected_lets_go(engine):
    for _ in range(3):
        client = await AsyncEngineClient.connect(engine.address)
        await asyncio.wait_for(client.close(), 10)


ENGINE_GOES_AS_ITS_CLIENT_IS_CLOSED = """
import asyncio, os, signal, sys, time
from superinfer.runtime.client import AsyncEngineClient, EngineClient

address, pid = sys.argv[1], int(sys.argv[2])

async def main():
    client = await AsyncEngineClient.connect(address)
    await client.health()  # by now it watches
    witness = EngineClient(address)
    disable_monitor = client._socket.disable_monitor

    def when_the_engine_is_gone():
        os.kill(pid, signal.SIGKILL)
        while witness.alive:
            time.sleep(0.01)
        time.sleep(0.2)  # for this client's own socket to have noticed, too
        disable_monitor()

    client._socket.disable_monitor = when_the_engine_is_gone
    await client.close()
    witness.close()
    print("closed")

asyncio.run(main())
"""


def test_a_client_whose_engine_goes_while_it_is_closed_lets_go(own_engine):
    """A socket that tells its monitor something waits for ever where that is closed: inside of libzmq, where no timeout
    of ours can end it. So it is a process of its own that is given up."""
    arguments = [sys.executable, "-c", ENGINE_GOES_AS_ITS_CLIENT_IS_CLOSED, own_engine.address, str(own_engine.pid)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.stdout == "closed\n", done.stderr


class Relay:
    """Passes TCP connections on to an engine, until they are cut."""

    def __init__(self, engine: str) -> None:
        host, port = engine.removeprefix("tcp://").split(":")
        self._engine = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                engine = socket.create_connection(self._engine)
                self._ends += [client, engine]
                for pair in ((client, engine), (engine, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def cut(self) -> None:
        """End all connections; new ones may be made."""
        while self._ends:
            end = self._ends.pop()
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listening.close()
        self.cut()


def test_a_link_that_broke_is_made_anew_and_what_was_under_way_is_lost(random_llama):
    """So it is for a client that has stood still: its own socket then takes the link for broken."""
    config = EngineConfig(model=str(random_llama), kv_tokens=4096, address="tcp://127.0.0.1:0")
    with (
        launch_engine(config) as engine,
        contextlib.closing(Relay(engine.address)) as relay,
        EngineClient(relay.address) as client,
    ):
        for _ in range(2):
            under_way = client.generate(request([1, 2], LONG))
            next(under_way)
            relay.cut()
            with pytest.raises(EngineDeadError, match="its link broke"):
                list(under_way)
            wait_until_alive(client, True)
            assert len(tokens(client, request([1, 2]))) == 12
        wait_until_idle(client)  # the engine has given up what nobody waits for


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_that_is_started_anew_at_its_address_is_found(random_llama, tmp_path, number):
    config = EngineConfig(model=str(random_llama), kv_tokens=4096, address=f"ipc://{tmp_path}/engine.sock")
    with launch_engine(config) as engine:
        client = EngineClient(engine.address)
        under_way = client.generate(request([1, 2], LONG))
        next(under_way)
        os.kill(engine.pid, number)
        with pytest.raises(EngineDeadError, match=r"died or its link broke|stopped"):
            list(under_way)
        with pytest.raises(EngineDeadError):
            client.health()
    with client, launch_engine(msgspec.structs.replace(config, kv_tokens=2048)) as engine:
        wait_until_alive(client, True)
        assert len(tokens(client, request([1, 2]))) == 12
        assert client.info.pid == engine.pid
        assert client.info.num_blocks * client.info.page_size == 2048


def test_one_of_another_model_at_the_same_address_is_not_taken_for_the_one_before(
    random_llama, tiny_checkpoint, tmp_path
):
    config = EngineConfig(model=str(random_llama), kv_tokens=4096, address=f"ipc://{tmp_path}/engine.sock")
    with launch_engine(config) as engine:
        client = EngineClient(engine.address)
        os.kill(engine.pid, signal.SIGKILL)
        wait_until_alive(client, False)
    with client:
        with launch_engine(msgspec.structs.replace(config, model=str(tiny_checkpoint), load_format="dummy")):
            deadline = time.monotonic() + 60
            said = ""
            while "serves" not in said and time.monotonic() < deadline:
                time.sleep(0.02)
                with pytest.raises(EngineUnavailableError) as refused:
                    client.health()
                said = str(refused.value)
            assert f"serves '{tiny_checkpoint}' now, not '{random_llama}'" in said
        with launch_engine(config):
            wait_until_alive(client, True)
            assert len(tokens(client, request([1, 2]))) == 12


def test_a_frozen_engine_that_goes_on_is_found_again(own_engine):
    with EngineClient(own_engine.address) as client:
        os.kill(own_engine.pid, signal.SIGSTOP)
        wait_until_alive(client, False)
        with pytest.raises(EngineDeadError):
            client.health()
        os.kill(own_engine.pid, signal.SIGCONT)
        wait_until_alive(client, True)
        assert client.health().status == "ok" and len(tokens(client, request([1, 2]))) == 12

"""`superinfer serve` and `superinfer engine` as processes: they answer, stop in order and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from superinfer import RuntimeEndpoint, function, gen

TINY_ENGINE = ("--load-format", "dummy", "--device", "cpu", "--kv-tokens", "8192", "--threads", "1")


def serve(start: Callable[..., Any], checkpoint: Path, *more: str) -> tuple[Any, openai.OpenAI]:
    command = start("serve", "--port", "0", "--model", str(checkpoint), "--model-name", "tiny", *TINY_ENGINE, *more)
    url = command.line("serving at").split()[2]
    return command, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_and_leaves_nothing(
    start: Callable[..., Any], tiny_checkpoint: Path, number: int
) -> None:
    before = shared_memory()
    command, client = serve(start, tiny_checkpoint)
    children = command.children()
    assert children and command.left_behind(), "there is an engine with a socket"
    stream = client.completions.create(
        model="tiny", prompt="hi", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(iter(stream))]
    command.process.send_signal(number)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    status, _, err = command.end()
    assert (status, err) == (0, "")
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert command.left_behind() == [] and shared_memory() <= before


def test_streams_that_outlast_the_grace_end_with_an_error(start: Callable[..., Any], tiny_engine: Any) -> None:
    command = start("serve", "--port", "0", "--engine", tiny_engine.address, "--model-name", "tiny", "--grace", "0.2")
    client = openai.OpenAI(base_url=command.line("serving at").split()[2], api_key="none", max_retries=0)
    many = client.completions.create(
        model="tiny", prompt=["hi"] * 60, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(many))
    command.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(many)
    assert command.end()[0] == 0 and command.left_behind() == []


def test_a_killed_server_takes_its_engine_along(start: Callable[..., Any], tiny_checkpoint: Path) -> None:
    command, _ = serve(start, tiny_checkpoint)
    children = command.children()
    command.process.kill()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    command.process.communicate()
    assert command.left_behind() == []


def test_a_killed_engine_takes_its_server_along(start: Callable[..., Any], tiny_checkpoint: Path) -> None:
    """Which could serve nothing any more, and nobody would start it again."""
    command, client = serve(start, tiny_checkpoint)
    (engine,) = psutil.Process(command.process.pid).children()  # which has children of its own
    stream = client.completions.create(
        model="tiny", prompt=["hi"] * 60, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    engine.kill()
    with pytest.raises(openai.APIError, match="died or its link broke"):
        list(stream)
    status, _, err = command.end()
    assert status == 1 and f"the engine (pid {engine.pid}) was killed by signal 9" in err
    assert command.left_behind() == []


def test_an_engine_that_is_started_again_at_its_address_is_served_again(
    start: Callable[..., Any], tiny_checkpoint: Path, random_llama: Path, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/engine.sock"

    def engine(checkpoint: Path) -> Any:
        command = start("engine", "--address", address, "--model", str(checkpoint), *TINY_ENGINE)
        command.line("engine of")
        return command

    def kill(command: Any) -> None:
        for process in (command.process, *command.children()):
            process.kill()
        command.process.communicate()

    first = engine(tiny_checkpoint)
    server = start("serve", "--port", "0", "--engine", address, "--model-name", "tiny")
    url = server.line("serving at").split()[2]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:

        def answer() -> str:
            asked = client.completions.create(model="tiny", prompt="hi", max_tokens=3, extra_body={"ignore_eos": True})
            return str(asked.choices[0].finish_reason)

        def answers_soon() -> bool:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(openai.InternalServerError):
                    return answer() == "length"
                time.sleep(0.05)
            return False

        for _ in range(2):
            assert answer() == "length"
            kill(first)
            with pytest.raises(openai.InternalServerError) as refused:
                answer()
            assert refused.value.code == "engine_dead"
            first = engine(tiny_checkpoint)
            assert answers_soon()
        kill(first)
        another = engine(random_llama)
        assert any(f"serves '{random_llama}' now" in line for line in server.process.stderr)
        with pytest.raises(openai.InternalServerError):
            answer()
    kill(another)
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0


def test_what_is_no_http_is_answered_and_writes_nothing(start: Callable[..., Any], tiny_engine: Any) -> None:
    """Whoever reaches the port could fill the disk with the log."""
    command = start("serve", "--port", "0", "--engine", tiny_engine.address)
    port = int(command.line("serving at").split()[2].split(":")[2].split("/")[0])
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"what is this\r\n\r\n")
            assert b" 400 " in connection.recv(1000)
    command.process.send_signal(signal.SIGTERM)
    status, _, err = command.end()
    assert (status, err) == (0, "")


def test_serving_a_running_engine_leaves_it_running(start: Callable[..., Any], tiny_engine: Any) -> None:
    command = start("serve", "--port", "0", "--engine", tiny_engine.address)
    command.line("serving at")
    assert command.children() == []
    command.process.send_signal(signal.SIGTERM)
    assert command.end()[0] == 0 and tiny_engine.alive


def test_an_interrupted_start_leaves_nothing(start: Callable[..., Any], tiny_checkpoint: Path) -> None:
    command = start("serve", "--port", "0", "--model", str(tiny_checkpoint), *TINY_ENGINE)
    deadline = time.monotonic() + 60
    while not (children := command.children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in children:
        child.suspend()  # so that it is not ready before the signal is there
    command.process.send_signal(signal.SIGTERM)
    for child in children:
        child.resume()
    assert command.end()[0] == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert command.left_behind() == []


def test_an_engine_in_the_foreground_serves_others_until_a_signal(
    start: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    command = start("engine", "--address", "tcp://127.0.0.1:*", "--model", str(tiny_checkpoint), *TINY_ENGINE)
    address = command.line("engine of").split(" at ")[1].split()[0]
    children = command.children()
    status, out, _ = start("chat", "--engine", address, "--max-tokens", "5", stdin="hello\n").end()
    assert status == 0 and out.strip()
    timer = threading.Timer(0.1, command.process.send_signal, [signal.SIGINT])
    timer.start()
    assert command.end()[0] == 130
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert command.left_behind() == []


def test_who_looks_at_the_page_does_not_hold_up_the_end(start: Callable[..., Any], tiny_engine: Any) -> None:
    command = start("serve", "--port", "0", "--engine", tiny_engine.address, "--grace", "200")
    url = command.line("serving at").split(" showing at ")[1].split()[0]
    with httpx.stream("GET", f"{url}v1/live", timeout=60) as viewer:
        lines = viewer.iter_lines()
        assert next(lines).startswith("data: ")
        command.process.send_signal(signal.SIGTERM)
        assert "event: unavailable" in list(lines)
    assert command.end(60)[0] == 0


def test_the_engine_that_is_started_listens_where_it_is_told_to(
    start: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/engine"
    command, client = serve(start, tiny_checkpoint, "--engine-address", address)
    wanted = {"max_tokens": 8, "temperature": 0.0}
    over_http = client.completions.create(model="tiny", prompt="hi", **wanted, extra_body={"ignore_eos": True})
    with RuntimeEndpoint(address) as backend:
        state = greeting.run(backend=backend)
    assert state["more"] == over_http.choices[0].text != ""
    command.process.send_signal(signal.SIGTERM)
    assert command.end()[0] == 0 and command.left_behind() == []


@function
def greeting(s):
    s += "hi" + gen("more", max_tokens=8, temperature=0, ignore_eos=True)


def test_an_address_is_not_given_to_an_engine_that_runs(start: Callable[..., Any], tiny_engine: Any) -> None:
    command = start("serve", "--engine", tiny_engine.address, "--engine-address", "ipc:///tmp/other")
    status, _, err = command.end()
    assert status == 2 and "runs already" in " ".join(err.split())

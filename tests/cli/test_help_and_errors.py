"""Help a person can use, and one clear line for what went wrong."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import superinfer
from superinfer.cli import chat, main
from superinfer.cli.others_options import OURS

Run = Callable[..., tuple[int, str, str]]


COMMANDS = ("demo", "run", "serve", "chat", "engine", "simulate")
BENCHES = ("bench serve", "bench offline", "bench latency", "bench kernels", "bench link", "bench programs")


def test_help_names_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in (*COMMANDS, "bench", "trace"):
        assert f" {command} " in out


@pytest.mark.parametrize("command", ["demo", "run", "serve", "chat", "engine"])
def test_each_command_explains_its_options(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0 and "--kv-tokens" in out and "--model" in out


@pytest.mark.parametrize("command", [*COMMANDS, *BENCHES, "bench constrained", "trace plot"])
def test_no_word_of_help_is_cut_in_80_columns(run: Run, command: str) -> None:
    status, out, _ = run(*command.split(), "--help", COLUMNS="80")
    assert status == 0 and "…" not in out


def test_help_does_not_import_what_is_slow() -> None:
    code = (
        "import sys\nfrom superinfer.cli import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'fastapi', 'uvicorn', 'openai', 'zmq', 'aiohttp', 'numpy'}\n"
        "print(slow & set(sys.modules), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "set()"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # half a second of computing


def test_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0 and out.startswith("superinfer 0.")
    assert out.split()[1] == superinfer.__version__


def error_of(result: tuple[int, str, str], expected: int = 2) -> str:
    """The one line; 2 is the status of a wrong value, 1 that of all that is no argument's fault."""
    status, _, err = result
    assert status == expected, result
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("arguments", [("serve", "--port", "soon"), ("fly",), ("run",), ("chat", "--nonsense")])
def test_wrong_usage_is_status_two(run: Run, arguments: tuple[str, ...]) -> None:
    status, _, err = run(*arguments)
    assert status == 2 and "Usage" in err and "Traceback" not in err


def test_a_value_out_of_range_is_named(run: Run) -> None:
    assert "--dtype 'int3'" in error_of(run("engine", "--dtype", "int3"))
    assert "kv_tokens=0" in error_of(run("engine", "--kv-tokens", "0"))
    assert "port=70000" in error_of(run("serve", "--port", "70000"))
    assert "temperature=-1.0" in error_of(run("chat", "--temperature", "-1"))
    assert "'gold=ttft_ms:soon'" in error_of(run("serve", "--slo-class", "gold=ttft_ms:soon"))
    assert "its fields are ttft_ms" in error_of(run("serve", "--slo-class", "gold=ttft:5"))
    assert "sampling_defaults='mine'" in (line := error_of(run("serve", "--sampling-defaults", "mine")))
    assert "model, openai" in line
    assert "--url 'localhost:8000' must be http://" in error_of(run("chat", "--url", "localhost:8000"))


@pytest.mark.parametrize(
    "options,reason",
    [
        (("--rate", ""), "--rate '' names nothing"),
        (("--policy", " , "), "--policy ' , ' names nothing"),
        (("--policy", "fcfs,astrology"), "'astrology' is unknown"),
        (("--seed", "-1"), "seed=-1"),
        (("--max-batch-size", "0"), "max_batch_size=0"),
        (("--max-batch-tokens", "0"), "max_batch_tokens=0"),
    ],
)
def test_what_cannot_be_simulated_is_named(run: Run, options: tuple[str, ...], reason: str) -> None:
    assert reason in error_of(run("simulate", "--duration", "1", *options))


def test_a_simulated_engine_plans_one_step_ahead_or_two(run: Run) -> None:
    assert "depth=7 must be 1 or 2" in error_of(run("simulate", "--depth", "7", "--duration", "1"))


def test_a_simulations_tables_fit_a_terminal_of_80_columns(run: Run) -> None:
    options = ("--policy", "lvf-time,rota", "--dram-tokens", "65536", "--rate", "12.5", "--duration", "20")
    status, out, err = run("simulate", *options)
    assert status == 0, err
    assert all(len(line) <= 80 for line in out.splitlines()) and "…" not in out
    for column in ("TTFT p50", "goodput", "preempted", "GB/s out", "plan p50"):
        assert column in out


@pytest.mark.parametrize("name", ["x" * 300, "absent/out.json"], ids=["no name of a file", "no folder"])
def test_a_file_that_cannot_be_written_is_named(run: Run, tmp_path: Path, name: str) -> None:
    assert name in error_of(run("simulate", "--duration", "1", "--json", str(tmp_path / name)))


@pytest.mark.parametrize("command", ["bench offline", "bench kernels", "bench programs --url-peer http://127.0.0.1:9"])
def test_a_dash_is_no_file_where_tables_go_to_standard_output(run: Run, command: str) -> None:
    assert "'-' is not standard output here" in error_of(run(*command.split(), "--json", "-"))


def test_an_unknown_policy_is_named_with_the_known_ones(run: Run) -> None:
    line = error_of(run("engine", "--policy", "astrology"))
    assert "'astrology'" in line and "fcfs" in line


def test_a_path_where_no_model_is_is_a_wrong_value(run: Run, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in error_of(run("chat", "--model", str(tmp_path / "nowhere")))
    assert "not a Hugging Face checkpoint" in error_of(run("chat", "--model", str(tmp_path)))


@pytest.mark.parametrize("command", ["serve", "engine", "chat", "run", "demo", "bench latency"])
def test_an_empty_model_is_refused_with_what_to_give(run: Run, command: str) -> None:
    file = ["program.py"] if command == "run" else []
    line = error_of(run(*command.split(), "--model", "", *file))
    assert "model=''" in line and "--model" in line and "'embedded'" in line


def test_a_corrupted_checkpoint_is_named(run: Run, random_llama: Path, tmp_path: Path, start: Any) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in random_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = start("serve", "--port", "0", "--model", str(broken))
    line = error_of(command.end(), 1)
    assert str(broken) in line or "model.safetensors" in line
    assert command.left_behind() == []


def test_an_engine_that_is_not_there_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"ipc://{tmp_path}/none.sock"
    assert 1 <= chat.CONNECT_TIMEOUT_S <= 10
    monkeypatch.setattr(chat, "CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--engine", address])
    shown = capsys.readouterr()
    line = error_of((int(ended.value.code or 0), shown.out, shown.err), 1)
    assert address in line and "within 0.2 s" in line
    assert "'nonsense'" in error_of(run("serve", "--port", "0", "--engine", "nonsense"))


def test_a_port_in_use_is_found_before_an_engine_is_started(start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # this model does not exist: the port's error comes first
        line = error_of(start("serve", "--port", str(port), "--model", "/nowhere").end())
    assert f"port={port}" in line and "in use" in line


def test_an_engine_address_in_use_is_named(run: Run, tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert address in error_of(
            run("engine", "--address", address, "--model", str(tiny_checkpoint), "--load-format", "dummy")
        )


def test_a_port_that_no_machine_has_is_named(run: Run, tiny_checkpoint: Path) -> None:
    arguments = ("--address", "tcp://127.0.0.1:70000", "--model", str(tiny_checkpoint), "--load-format", "dummy")
    line = error_of(run("engine", *arguments))  # and not another port, which ZMQ would make of it
    assert "tcp://127.0.0.1:70000" in line and "65535" in line


def test_a_url_where_nothing_answers_is_named(run: Run) -> None:
    assert "http://127.0.0.1:9/v1" in error_of(run("chat", "--url", "http://127.0.0.1:9/v1", stdin="hello\n"), 1)


@pytest.mark.parametrize("command", ["serve", "chat", "demo", "run program.py"])
def test_options_of_an_engine_beside_one_that_runs_are_refused(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "program.py").touch()
    name, *file = command.split()
    arguments = (name, "--engine", "ipc:///nowhere", "--policy", "rota", "--no-plan-late")
    line = error_of(run(*arguments, *[str(tmp_path / each) for each in file]))
    assert "--engine ipc:///nowhere runs already" in line and "--policy, --no-plan-late would" in line


@pytest.mark.parametrize("command", ["chat --url", "bench programs --url-peer"])
def test_options_of_an_engine_beside_a_server_are_refused(run: Run, command: str) -> None:
    line = error_of(run(*command.split(), "http://127.0.0.1:9", "--model", "llama-3-8b"))
    assert "http://127.0.0.1:9 runs already" in line and "--model" in line


@pytest.mark.parametrize("command", ["serve", "engine"])
def test_a_model_without_its_option_is_told_where_it_goes(run: Run, command: str) -> None:
    status, _, err = run(command, "Qwen/Qwen3-8B", COLUMNS="200")
    assert status == 2 and "Did you mean --model Qwen/Qwen3-8B?" in err
    status, _, err = run("bench", "link", "Qwen/Qwen3-8B", COLUMNS="200")
    assert status == 2 and "Qwen/Qwen3-8B" in err and "--model" not in err


@pytest.mark.parametrize(
    ("command", "theirs", "ours"),
    [
        ("serve", "--max-num-seqs", "--max-batch-size"),
        ("serve", "--served-model-name", "--model-name"),
        ("serve", "--gpu-memory-utilization", "--kv-tokens"),
        ("engine", "--max-running-requests", "--max-batch-size"),
    ],
)
def test_an_option_of_another_server_is_told_what_it_is_called_here(
    run: Run, command: str, theirs: str, ours: str
) -> None:
    status, _, err = run(command, theirs, "0.9", COLUMNS="200")
    assert status == 2 and "No such option" in err
    assert re.findall(r"--[a-z][a-z-]+", err) == [theirs, ours]  # no other one


def test_every_option_that_one_of_another_server_is_told_to_be_is_there(run: Run) -> None:
    _, out, _ = run("serve", "--help", COLUMNS="200")
    assert {ours for ours in OURS.values() if f"{ours} " not in out} == set()


def test_engine_and_url_exclude_each_other(run: Run) -> None:
    assert "exclude each other" in error_of(run("chat", "--url", "http://x/v1", "--engine", "ipc://y"))

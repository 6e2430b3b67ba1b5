"""The comparison beside another server: what its parts promise, and one whole run on the embedded model."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedServer, Stream, steady

from superinfer.bench.load import Asking, probe
from superinfer.bench.openai_stream import OpenAIStreams
from superinfer.runtime.sim.workload import Job, _Shape

ROOT = Path(__file__).parent.parent.parent
PEER = ROOT / "benchmarks" / "peer"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PEER))


def free_ports() -> str:
    """The first of ten ports that nobody listens at: a server of another test may be up at the same time."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            first = found.getsockname()[1]
        if all(is_free(port) for port in range(first, first + 10)):
            return str(first)


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except (OSError, OverflowError):  # taken; or above 65535
            return False
    return True


def turn(at: float, *blocks: int) -> Any:
    return _Shape(at, 512 * len(blocks), 10, blocks)


def test_all_arms_of_a_pool_have_the_same_bytes_of_kv():
    from arms import Sizes, command_of, known_arms

    sizes = Sizes(model="m")
    for pool, blocks in (("ample", 24_000), ("tight", 9_600), ("half", 4_800), ("turns", 4_096)):
        for arm in (arm for arm in known_arms().values() if arm.pool == pool):
            command = command_of(arm, sizes, 1, "")
            tokens = blocks if arm.engine == "vllm" else blocks * 16
            assert str(tokens) in command, arm.name
            tier = str(64 << 30) if arm.engine == "vllm" else str((64 << 30) // (2 << 20) * 16)
            assert any(tier in part for part in command) == arm.dram, arm.name


def test_what_a_server_counts_is_told_and_what_it_gauges_is_not():
    from servers import counted, moved

    metrics = """# HELP s:steps_total Steps.
# TYPE s:steps_total counter
s:steps_total{engine="0"} %d
s:steps_total{engine="1"} 2
# TYPE s:step_seconds_mean gauge
s:step_seconds_mean %f
"""
    before, after = counted(metrics % (1, 0.02)), counted(metrics % (5, 0.01))
    assert before == {"s:steps_total": 3.0} and moved(before, after) == {"s:steps_total": 4.0}


def test_servers_share_a_gpu_only_where_its_memory_holds_them():
    from arms import Sizes
    from schedule import SCHEDULES, together

    sizes, h100, h200 = Sizes(model="m"), 78 << 30, 137 << 30
    for lane in SCHEDULES["slo"]:  # two pools of 18.75 GiB, each with weights of 15 GiB and what a server holds besides
        assert [together(lane, 0, sizes, memory) for memory in (h100, h200, None)] == [1, 2, 2]
        assert together(lane, 1, sizes, h200) == 1  # no more are left
    conversations = SCHEDULES["ample-turns"][1]
    assert [together(conversations, at, sizes, h100) for at in (0, 2)] == [2, 1]
    assert together(conversations, 0, sizes, 1 << 30) == 1  # the first may try


def test_several_clients_begin_together_and_their_samples_keep_the_jobs_order():
    from clients import Clients, Work

    jobs = [Job(0.05 * at, 3, 1 + at % 5, (at,), 3) for at in range(11)]
    with ScriptedServer() as server, Clients(3) as clients:

        async def ask() -> Asking:
            async with OpenAIStreams(server.url) as streams:
                known = await streams.describe("")
                return Asking(await probe(streams, known, Asking(known), [1]))

        outcome = clients.run(Work(asyncio.run(ask()), jobs, 100, 0, drain_s=30, window_s=30))
    assert [sample.due for sample in outcome.samples] == [job.at for job in jobs]
    assert [sample.tokens for sample in outcome.samples] == [job.output_length for job in jobs]
    assert outcome.window_tokens == sum(job.output_length for job in jobs)


@pytest.mark.slow
def test_what_is_not_finished_when_the_drain_is_over_has_failed():
    from clients import Clients, Work

    async def never(body: dict[str, Any], stream: Stream) -> None:
        if body["max_tokens"] == 1:
            return await steady(body, stream)
        stream.begin()
        await stream.token(1)
        await asyncio.sleep(3600)

    jobs = [Job(0.0, 3, 1, (0,), 3), Job(0.0, 3, 5, (1,), 3)]
    with ScriptedServer(answer=never) as server, Clients(2) as clients:

        async def ask() -> Asking:
            async with OpenAIStreams(server.url) as streams:
                return Asking(await probe(streams, await streams.describe(""), Asking(await streams.describe("")), [1]))

        # Time for the first answer and for what comes of the second, also where the machine stands still for a while.
        outcome = clients.run(Work(asyncio.run(ask()), jobs, 100, 0, drain_s=5, window_s=4))
    assert [sample.error for sample in outcome.samples] == ["", "not finished in time"]
    assert outcome.window_tokens == 2


def test_turns_return_to_conversations_and_single_requests_are_left_out():
    from turns import conversations

    shapes = [
        turn(0, 0, 1, 2),
        turn(0, 0, 9),  # shares the first block alone, as all do, and nobody comes back to it
        turn(1, 0, 1, 2, 3, 4),
        turn(2, 0, 7, 8),
        turn(3, 0, 1, 2, 3, 4, 5),
        turn(5, 0, 7, 8, 6),
    ]
    replay = conversations(shapes, 1.0, 10**9, 8192, 20.0)
    assert [len(job.blocks) for job in replay.jobs] == [3, 5, 3, 6, 4]
    assert replay.returns == [False, True, False, True, True]
    assert replay.working_set == 9 * 512
    assert [job.at for job in replay.jobs] == [0.0, 4.0, 8.0, 12.0, 20.0]
    shorter = conversations(shapes, 1.0, 10**9, 2700, 20.0)  # tokens of context: the longest turns do not fit
    assert [len(job.blocks) for job in shorter.jobs] == [3, 5, 3, 4]


def ten_requests(folder: Path) -> Path:
    """A folder with Azure's trace in its format."""
    rows = [f"2023-11-16 18:15:{at:02d}.0,{100 + at},{20 + at}" for at in range(10)]
    (folder / "azure_conv_2023.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_whole_run_measures_and_writes_what_it_measured(tmp_path: Path):
    command = [sys.executable, str(PEER / "run.py"), "ample", "--small", "--stand-in", "--gpus", "", "--lanes", "1"]
    command += ["--traces", str(ten_requests(tmp_path)), "--phases", "prefill,online", "--clients", "1"]
    command += ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "s"), "--port", free_ports()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*-vs-vllm-ample.json")
    arm = json.loads(path.read_text())["arms"]["ours"]
    assert arm["phases"]["prefill"]["prefill"][0]["tokens_per_s"] > 0 and arm["start_s"] > 0
    assert "prefill 4 x 64" in done.stdout
    (online,) = arm["phases"]["online"]["runs"]
    assert online["report"]["failed"] == 0 and online["report"]["ttft"]["p50"] > 0


def test_a_trace_that_is_not_there_is_said_before_anything_starts(tmp_path: Path):
    command = [sys.executable, str(PEER / "run.py"), "tiers", "--traces", str(tmp_path), "--phases", "turns"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 2 and "mooncake_conversation.jsonl" in done.stderr and "azure" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_servers_trace_their_steps_where_asked_and_a_second_pool_is_measured(tmp_path: Path):
    from superinfer.cli.trace_file import read_trace
    from superinfer.runtime.tracing import STEPS

    out = tmp_path / "out"
    command = [sys.executable, str(PEER / "run.py"), "truth", "--small", "--gpus", "", "--lanes", "0", "--trace"]
    command += ["--arms", "ours-rota-half", "--clients", "1", "--traces", str(ten_requests(tmp_path))]
    command += ["--out", str(out), "--scratch", str(tmp_path / "s"), "--port", free_ports()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    arm = json.loads(next(out.glob("*-vs-vllm-truth.json")).read_text())["arms"]["ours-rota-half"]
    assert arm["pool_tokens"] == 40 * 16 and len(arm["phases"]["slo"]["runs"]) == 2
    steps = [span.args for span in read_trace(out / "ours-rota-half.trace").tracks[STEPS]]
    counted = sum(run["counters"]["superinfer:engine_steps_total"] for run in arm["phases"]["slo"]["runs"])
    assert len(steps) >= counted > 0 and all(step["kv_read"] >= step["decodes"] for step in steps)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_command_is_run_beside_the_servers_of_one_schedule_and_its_failure_is_the_runs(tmp_path: Path):
    told = tmp_path / "told"
    command = [sys.executable, str(PEER / "run.py"), "programs", "slo", "--small", "--stand-in", "--gpus", ""]
    command += ["--lanes", "1", "--arms", "ours", "--clients", "1", "--port", free_ports()]  # of slo nothing is left
    command += ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "s"), "--then-after", "programs"]
    command += ["--then", "python -c 'import urllib.request as u; u.urlopen(\"{ours}/health\")' && "]
    command[-1] += f"echo {{ours}}={{engine}}={{vllm}}. > {told}; exit 3"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 1, done.stdout + done.stderr
    ours, engine, vllm = told.read_text().strip().split("=")
    assert ours.startswith("http://127.0.0.1:") and engine.startswith("ipc://") and vllm == "."
    assert not Path(engine.removeprefix("ipc://")).parent.exists()
    assert "FAILED" not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_programs_are_timed_on_ours_by_http_and_at_its_engine_and_on_the_other_server(tmp_path: Path):
    found = tmp_path / "programs.json"
    command = [sys.executable, str(PEER / "run.py"), "programs", "--small", "--stand-in", "--gpus", ""]
    command += ["--clients", "1", "--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "s")]
    command += ["--port", free_ports()]
    # One lane after the other without GPUs, so that this server is both ours and the other one.
    command += ["--lanes", "1", "--then", f"{sys.executable} -m superinfer bench programs --url-ours={{ours}} "]
    command[-1] += "--url-engine={engine} --url-peer={ours} --shapes react,chat --scale 0.05 --at-once 2 --rounds 1 "
    command[-1] += f"--json {found}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(found.read_text())
    assert [arm["door"] for arm in record["arms"].values()] == ["http", "zmq", "http"]
    assert set(record["ratios"]) == set(record["engine_ratios"]) == {"react", "chat"}
    assert "peer/engine" in done.stdout

"""One lane: its servers on one GPU, its phases one after another, a file of results after each of them.

Run by `run.py`, in a process of its own, so that lanes do not share an interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import closed_loop
import open_loop
import turns
from arms import Arm, Sizes, known_arms
from clients import Clients
from plan import Bench, Plan
from schedule import Lane, Run, Step, together
from servers import Server, ServerFailed

from superinfer.bench.load import Asking, probe
from superinfer.bench.openai_stream import OpenAIStreams
from superinfer.bench.openai_stream import Server as Described
from superinfer.out_file import without_nan

PHASES: dict[str, Callable[..., dict[str, Any]]] = {
    "tpot": closed_loop.tpot,
    "prefill": closed_loop.prefill,
    "offline": closed_loop.offline,
    "online": open_loop.online,
    "slo": open_loop.slo,
    "turns": turns.turns,
}


@dataclass(frozen=True)
class LaneTask:
    """What a lane's process needs. gpu: None where there is none; gpu_bytes: its memory, where known. cores: it keeps
    to. until: on time.monotonic.

    port: of its first server. stand_in: our server in vLLM's place. hold: keep the last servers until the folder has a
    file `end`; their URLs and engines' addresses are in `urls-NUMBER.json`.
    """

    number: int
    lane: Lane
    gpu: int | None
    gpu_bytes: int | None
    cores: Sequence[int]
    sizes: Sizes
    plan: Plan
    folder: Path
    port: int
    until: float
    start_limit_s: float
    clients: int
    stand_in: bool
    hold: bool


def run_lane(task: LaneTask) -> None:
    """Measure everything of a lane that time allows. What fails costs itself alone."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # servers are ended on the way out
    if task.cores:
        os.sched_setaffinity(0, task.cores)
    runs, at = task.lane.runs, 0
    try:
        with Clients(task.clients) as clients:
            while at < len(runs):
                group = runs[at : at + together(task.lane, at, task.sizes, task.gpu_bytes)]
                at += len(group)
                for run in group:
                    _start(task, known_arms()[run.arm])
                for run in group:
                    _measure(task, run, clients)
                if not (task.hold and at == len(runs)):
                    _stop_all()
            if task.hold:
                _hold(task)
    finally:
        _stop_all()


_servers: dict[str, Server] = {}


def _start(task: LaneTask, arm: Arm) -> None:
    port = task.port + len(_servers)
    _servers[arm.name] = Server(arm, task.sizes, task.gpu, port, task.folder, task.stand_in)
    _say(arm.name, f"starting on GPU {task.gpu}, port {port}")


def _stop_all() -> None:
    for server in _servers.values():
        server.stop()
    _servers.clear()


def _measure(task: LaneTask, run: Run, clients: Clients) -> None:
    server, arm = _servers[run.arm], known_arms()[run.arm]
    if task.stand_in:
        arm = replace(arm, priority="")  # ours takes none
    record: dict[str, Any] = {
        "arm": arm.name,
        "engine": arm.engine,
        "command": server.command,
        "gpu": task.gpu,
        "pool_tokens": task.sizes.blocks(arm.pool) * 16,
        "dram_bytes": task.sizes.dram_bytes if arm.dram else 0,
        "sent_slo": arm.send_slo,
        "priority": arm.priority,
        "phases": {},
    }
    try:
        # All servers of the lane are ready before any is measured: starting ones would disturb.
        for each in _servers.values():
            if each is not server:
                with contextlib.suppress(ServerFailed):  # its own turn to say so comes
                    _wait(task, each)
        _wait(task, server)
        described = asyncio.run(_describe(server.url, arm))
    except (ServerFailed, Exception) as error:
        record["failed"] = str(error)
        _say(arm.name, f"FAILED: {error}")
        _save(task, record)
        if not isinstance(error, ServerFailed):
            traceback.print_exc()
        return
    record |= {"start_s": server.ready_s, "version": described.version, "counts_tokens": described.counts}
    _save(task, record)
    bench = Bench(task.plan, arm, server, described, clients, task.sizes.blocks(arm.pool), task.until)
    for step in run.steps:
        record["phases"][step.phase] = _phase(task, bench, step)
        _save(task, record)
        if not server.alive:
            record["failed"] = f"the server ended\n{server.tail()}"
            _say(arm.name, f"FAILED: {record['failed']}")
            _save(task, record)
            return


def _wait(task: LaneTask, server: Server) -> None:
    if server.ready_s is None:
        server.wait_ready(min(task.start_limit_s, task.until - time.monotonic()))
        _say(server.arm.name, f"ready after {server.ready_s:.1f} s")


def _phase(task: LaneTask, bench: Bench, step: Step) -> dict[str, Any]:
    left, takes = bench.left_s(), step.seconds * task.plan.pace
    if left < takes:
        bench.say(f"{step.phase} left out: {left:.0f} s are left, it takes {takes:.0f} s")
        return {"left_out": f"{left:.0f} s left of {takes:.0f} s"}
    began = time.monotonic()
    arguments = {"only": step.rates} if step.rates else {}
    try:
        found = PHASES[step.phase](bench, **arguments)
    except Exception as error:
        traceback.print_exc()
        bench.say(f"{step.phase} FAILED: {error}")
        found = {"failed": f"{type(error).__name__}: {error}"}
        bench.clients.restart()
    return found | {"took_s": time.monotonic() - began}


async def _describe(url: str, arm: Arm) -> Described:
    """What the server is, once a small request was answered."""
    async with OpenAIStreams(url) as streams:
        described = await streams.describe("")
        return await probe(streams, described, Asking(described, priority=arm.priority), list(range(10, 18)))


def _hold(task: LaneTask) -> None:
    """Keep the servers for others to ask, until told to end or time is up."""
    urls = {name: {"url": server.url, "engine": server.engine} for name, server in _servers.items() if server.alive}
    (task.folder / f"urls-{task.number}.json").write_text(json.dumps(urls))
    while time.monotonic() < task.until and not (task.folder / "end").exists():
        time.sleep(0.2)


def _save(task: LaneTask, record: dict[str, Any]) -> None:
    path = task.folder / f"{record['arm']}.json"
    path.with_suffix(".new").write_text(json.dumps(without_nan(record)))
    path.with_suffix(".new").replace(path)


def _say(who: str, text: str) -> None:
    print(f"[{who}] {text}", flush=True)

"""The scripts in benchmarks/: each still finds what it takes of the package, and the engine that computes nothing
keeps to the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.protocol import Generate, SamplingParams, SequenceDelta

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARED = {"record", "gpu_common", "http_load", "timed_device", "sim_rows", "readme_vllm", "readme_rooflines"}
OF_GPUS = {"cuda", "flashinfer", "pynvml", "triton"}
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.stem not in SHARED]


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, BENCHMARKS / "peer" / "run.py"], ids=lambda path: path.stem)
def test_a_script_says_what_it_measures(monkeypatch: pytest.MonkeyPatch, script: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OF_GPUS:
            raise
        pytest.skip(f"{error.name} comes with the extra cuda")
    assert ended.value.code in (None, 0) and "usage:" in said.getvalue()


def test_the_engine_that_computes_nothing_begins_what_follows_a_request(tiny_checkpoint: Path) -> None:
    script = BENCHMARKS / "noop_engine.py"
    command = [sys.executable, str(script), "--checkpoint", str(tiny_checkpoint), "--tbt-ms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        try:
            first, then = asyncio.run(_first_and_follower(engine.stdout.readline().strip()))
        finally:
            engine.terminate()
    assert (first.finish_reason, then.finish_reason) == ("length", "length")
    assert then.report is not None and then.report.prompt_tokens == 3 + 20 + 2


async def _first_and_follower(address: str) -> tuple[SequenceDelta, SequenceDelta]:
    """The last delta of a request of two seconds, and of one that was sent with it and goes on from it."""
    first = Generate(request_id="1", prompt=[7, 8, 9], sampling=SamplingParams(max_tokens=20))
    then = Generate(request_id="2", prompt=[5, 6], sampling=SamplingParams(max_tokens=2), after="1")
    async with await AsyncEngineClient.connect(address) as client:
        arrived: list[asyncio.Queue[Any]] = [asyncio.Queue(), asyncio.Queue()]
        for request, queue in zip((first, then), arrived, strict=True):
            client.open_soon(request, queue.put_nowait)
        last, follower = [await _last(queue) for queue in arrived]
    return last, follower


async def _last(queue: asyncio.Queue[Any]) -> SequenceDelta:
    while True:
        delta = await asyncio.wait_for(queue.get(), 30.0)
        if isinstance(delta, Exception):
            raise delta
        if delta.finish_reason is not None:
            return delta

"""CPU time that the language spends on a call, beyond the backend's own: many programs at once in one process.

The backend is one that answers at once, in `--chunks` deltas, so that all CPU time but its own is the language's. Each
program makes ten calls: a chat of four turns with variables read, and a fork of three branches of two calls.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import resource
import statistics
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from record import write

import superinfer as si
from superinfer.lang.backend import Backend
from superinfer.lang.chat_text import plain_chat
from superinfer.lang.loop import language_loop
from superinfer.runtime.protocol import RequestReport
from superinfer.runtime.text import TextDelta, TextRequest

CALLS = 10
REPORT = RequestReport(
    prompt_tokens=1, cached_tokens=0, output_tokens=1, queue_s=0.0, prefill_s=0.0, decode_s=0.0, e2e_s=0.0
)


class Instant(Backend):
    """Answers every request at once."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.open = self.most_open = 0
        self.render_s = 0.0

    async def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0)
        for _ in range(self.chunks):
            yield TextDelta(0, "ok ", [1])
        yield TextDelta(0, "", finish_reason="stop", report=REPORT)
        self.open -= 1

    def encode(self, text: str, *, special: bool) -> list[int]:
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        raise NotImplementedError

    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **_: Any) -> str:
        began = time.thread_time()
        text = plain_chat(messages, add_generation_prompt=add_generation_prompt)
        self.render_s += time.thread_time() - began
        return text


@si.function(deadline=600.0)
async def program(s, i):
    """Ten calls."""
    s += si.system("You are brief.")
    for turn in range(4):
        s += si.user(f"{i} {turn}") + si.assistant(si.gen("x", max_tokens=16))
        await s.get("x")
    forks = s.fork(3)
    for fork in forks:
        fork += si.user("a") + si.assistant(si.gen("y")) + si.user("b") + si.assistant(si.gen("z"))
    await forks.ajoin()


async def backend_alone(backend: Instant, calls: int) -> float:
    """CPU seconds of a call to the backend itself."""
    request = TextRequest(prompt="x")
    started = time.process_time()
    for _ in range(calls):
        async for _ in backend.stream(request):
            pass
    return (time.process_time() - started) / calls


def measured(backend: Instant, programs: int) -> dict[str, float]:
    """One round: all programs at once."""
    before = threading.active_count()
    backend.render_s = 0.0
    started, cpu = time.perf_counter(), time.process_time()
    states = program.run_batch([(i,) for i in range(programs)], backend=backend)
    cpu = time.process_time() - cpu
    assert all(state.error() is None and len(state["z"]) == 3 for state in states)
    return {
        "cpu_us_per_call": cpu / (programs * CALLS) * 1e6,
        "template_us_per_call": backend.render_s / (programs * CALLS) * 1e6,
        "wall_s": time.perf_counter() - started,
        "threads_more": threading.active_count() - before,
        "requests_at_once": backend.most_open,
    }


def main() -> None:
    """Measure, print, write results/lang-overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--chunks", type=int, default=1, help="deltas in an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="lang-overhead", help="of the result file")
    parser.add_argument("--profile", action="store_true", help="show where the time goes and write nothing")
    arguments = parser.parse_args()
    backend = Instant(arguments.chunks)
    measured(backend, 50)
    if arguments.profile:
        profile = cProfile.Profile()
        language_loop().loop.call_soon_threadsafe(profile.enable)
        measured(backend, arguments.programs)
        language_loop().loop.call_soon_threadsafe(profile.disable)
        time.sleep(0.2)
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return
    own = asyncio.run(backend_alone(backend, 5000))
    rounds = [measured(backend, arguments.programs) for _ in range(arguments.rounds)]
    beyond = statistics.median(r["cpu_us_per_call"] - r["template_us_per_call"] for r in rounds) - own * 1e6
    print(f"{beyond:.0f} µs of CPU per call beyond the backend's own {own * 1e6:.0f} µs and its template's")
    record = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "profile"},
        "calls_per_program": CALLS,
        "backend_us_per_call": own * 1e6,
        "rounds": rounds,
        "beyond_backend_us_per_call": beyond,
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(f"written to {write(arguments.name, 'python benchmarks/lang_overhead.py', record)}")


if __name__ == "__main__":
    main()

"""An engine that computes nothing: it speaks the wire protocol and emits tokens at a given rate.

For what is to be measured or tested without a model: the HTTP layer, clients, overload.

    python benchmarks/noop_engine.py --checkpoint FOLDER --tbt-ms 20 [--capacity 256] [--ttft-ms 5]

It prints its address. A request's first token comes `--ttft-ms` after it was let in, then one every `--tbt-ms`; at
most `--capacity` requests are let in at a time, the others wait in order, and over `--max-queue` are refused. A request
whose deadline has passed is dropped where its SLO says so. Its stats tell how long finished requests were here, as if
each were one step (`finished`, `step_s_mean`). With `--stamps FILE SLOTS TOKENS` it notes when it handed
each token to its socket, see Stamps.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import mmap
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from superinfer.errors import NothingToExtendError, QueueFullError
from superinfer.runtime.engine.followers import Followers
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.protocol import (
    Cancel,
    Deltas,
    Failed,
    FinishReason,
    Generate,
    GetHealth,
    GetLive,
    GetStats,
    HealthReport,
    LiveReport,
    ModelInfo,
    RequestReport,
    SequenceDelta,
    Shutdown,
    StatsReport,
)
from superinfer.runtime.slo import TokenTimeline


class Stamps:
    """When the engine handed each token to its socket: `slots` requests of `tokens` tokens, in a file that both map.

    A request names its slot by its `program` (over HTTP: `prompt_cache_key`). Seconds of the monotonic clock, which all
    processes of a machine share.
    """

    def __init__(self, path: Path, slots: int, tokens: int) -> None:
        self._tokens = tokens
        size = 8 * slots * tokens
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._at = memoryview(self._map).cast("d")

    def write(self, slot: int, token: int, at: float) -> None:
        self._at[slot * self._tokens + token] = at

    def of(self, slot: int) -> list[float]:
        return list(self._at[slot * self._tokens : (slot + 1) * self._tokens])


@dataclass
class Running:
    """One request; times are on the monotonic clock."""

    client: bytes
    request: Generate
    arrival: float
    timeline: TokenTimeline
    started: float | None = None
    given: int = 0
    kept: int = 0  # given, but not told yet
    told: float = 0.0
    ended: bool = False


@dataclass
class NoopEngine:
    """Turns the clock into tokens. `tick` is the shortest time between two rounds, as an engine's step is."""

    door: FrontDoor
    ttft: float
    tbt: float
    capacity: int
    max_queue: int
    tick: float = 0.002
    stamps: Stamps | None = None
    live: dict[tuple[bytes, str], Running] = field(default_factory=dict)
    waiting: deque[Running] = field(default_factory=deque)
    due: list[tuple[float, int, Running]] = field(default_factory=list)
    followers: Followers = field(default_factory=Followers)
    running: int = 0
    stamped: list[tuple[Running, int]] = field(default_factory=list)
    output_tokens: int = 0
    finished: int = 0
    here_s: float = 0.0  # all finished requests together
    stopped: bool = False

    def run(self) -> None:
        """Until a Shutdown."""
        self._ids = itertools.count()
        self._began = time.monotonic()
        try:
            while not self.stopped:
                now = time.monotonic()
                wait = self.tick if self.due or self.waiting else 0.2
                if self.due:
                    wait = min(max(self.due[0][0] - now, self.tick), wait if self.waiting else 0.2)
                for client, message in self.door.receive(int(wait * 1000)):
                    self._handle(client, message)
                self.door.flush()
                for client in list(self.door.gone):
                    for key in [key for key in self.live if key[0] == client]:
                        self._end(self.live[key])
                    self.door.forget(client)
                self._emit(time.monotonic())
        finally:
            self.door.close("it was told to end")

    def _handle(self, client: bytes, message: object) -> None:
        now = time.monotonic()
        match message:
            case Generate(after=after) if after:
                if (client, after) in self.live or self.followers.get(client, after) is not None:
                    self.followers.hold(client, message)
                    return
                error = NothingToExtendError(f"request {after!r} is not under way")
                self.door.send(client, Failed(code=error.code, message=str(error), request_id=message.request_id))
            case Generate():
                if len(self.live) >= self.max_queue:
                    error = QueueFullError(f"the engine holds {len(self.live)} unfinished sequences; try again later")
                    self.door.send(client, Failed(code=error.code, message=str(error), request_id=message.request_id))
                    return
                one = Running(client, message, now, TokenTimeline(message.slo))
                self.live[client, message.request_id] = one
                self.waiting.append(one)
            case Cancel(request_id=request_id):
                if (found := self.live.get((client, request_id))) is not None:
                    self.door.send(client, Deltas(deltas=[self._delta(found, 0, "cancelled", now)]))
                    self._end(found)
            case GetHealth(token=token):
                self.door.send(client, HealthReport(
                    token=token, status="ok", uptime_s=now - self._began, running=self.running,
                    waiting=len(self.live) - self.running, idle_s=0.0,
                ))  # fmt: skip
            case GetLive(token=token):
                self.door.send(client, LiveReport(
                    token=token, requests=[], omitted=len(self.live), computing=self.running,
                    waiting=len(self.live) - self.running,
                ))  # fmt: skip
            case GetStats(token=token):
                needed = [field.name for field in msgspec.structs.fields(StatsReport) if field.required]
                counts = dict.fromkeys(needed[1:], 0) | {
                    "running": self.running, "waiting": len(self.live) - self.running, "blocks_total": 1,
                    "output_tokens": self.output_tokens, "finished": self.finished,
                    "step_s_mean": self.here_s / max(1, self.finished),
                }  # fmt: skip
                self.door.send(client, StatsReport(token=token, **counts))
            case Shutdown():
                self.stopped = True

    def _emit(self, now: float) -> None:
        """All tokens that are due, in one message a client, as an engine's step gives them out."""
        by_client: dict[bytes, list[SequenceDelta]] = defaultdict(list)
        while self.waiting and self.running < self.capacity:
            one = self.waiting.popleft()
            if one.ended:
                continue
            slo = one.request.slo
            if slo is not None and slo.on_miss != "finish" and slo.deadline and now - one.arrival > slo.deadline:
                by_client[one.client].append(self._delta(one, 0, "deadline", now))
                self._end(one)
                continue
            one.started = now
            self.running += 1
            heapq.heappush(self.due, (now + self.ttft, next(self._ids), one))
        while self.due and self.due[0][0] <= now:
            at, _, one = heapq.heappop(self.due)
            if one.ended:
                continue
            tokens = 1 + max(0, int((now - at) / self.tbt)) if self.tbt else 1
            wanted = one.request.sampling.max_tokens or 16
            tokens = min(tokens, wanted - one.given)
            one.timeline.tokens(tokens, now - one.arrival)
            if self.stamps is not None and one.request.program:
                self.stamped.append((one, one.given))
            one.given += tokens
            self.output_tokens += tokens
            done: FinishReason | None = "length" if one.given >= wanted else None
            one.kept, one.told = one.kept + tokens, one.told or now
            if done or now - one.told >= one.request.interval_s:
                by_client[one.client].append(self._delta(one, one.kept, done, now))
                one.kept, one.told = 0, now
            if done:
                self._end(one)
            else:
                heapq.heappush(self.due, (at + tokens * self.tbt, next(self._ids), one))
        if self.stamps is not None:
            self._stamp()
        for client, deltas in by_client.items():
            self.door.send(client, Deltas(deltas=deltas))

    def _stamp(self) -> None:
        assert self.stamps is not None
        now = time.perf_counter()
        for one, begin in self.stamped:
            for token in range(begin, one.given):
                self.stamps.write(int(one.request.program), token, now)
        self.stamped.clear()

    def _end(self, one: Running) -> None:
        if not one.ended:
            one.ended = True
            self.finished += 1
            self.here_s += time.monotonic() - one.arrival
            self.running -= one.started is not None
            del self.live[one.client, one.request.request_id]
            for follower, _ in self.followers.take(one.client, one.request.request_id):
                prompt = [*one.request.prompt, *(5 + k % 58 for k in range(one.given)), *follower.prompt]
                self._handle(one.client, msgspec.structs.replace(follower, prompt=prompt, after=""))

    def _delta(self, one: Running, tokens: int, reason: FinishReason | None, now: float) -> SequenceDelta:
        # Letters and digits in the test checkpoint; a fixed text in any other.
        ids = [5 + (one.given + k) % 58 for k in range(tokens)]
        return SequenceDelta(
            request_id=one.request.request_id,
            token_ids=ids,
            finish_reason=reason,
            report=self._report(one, now) if reason else None,
        )

    def _report(self, one: Running, now: float) -> RequestReport:
        started = (one.started or now) - one.arrival
        first = one.timeline.first
        verdict = one.timeline.verdict(now - one.arrival)
        slo = one.request.slo
        return RequestReport(
            prompt_tokens=len(one.request.prompt),
            cached_tokens=0,
            output_tokens=one.given,
            queue_s=started,
            prefill_s=(first if first is not None else now - one.arrival) - started,
            decode_s=0.0 if first is None else now - one.arrival - first,
            e2e_s=now - one.arrival,
            ttft_s=first,
            max_tbt_s=one.timeline.max_tbt,
            met=verdict.met if slo is not None and slo.promises_anything else None,
            ttft_met=verdict.ttft_met,
            tbt_met=verdict.tbt_met,
            deadline_met=verdict.deadline_met,
        )


def main() -> None:
    """Serve until a client asks it to end, or it is terminated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder with config.json and a tokenizer")
    parser.add_argument("--address", default="tcp://127.0.0.1:0")
    parser.add_argument("--ttft-ms", type=float, default=1.0)
    parser.add_argument("--tbt-ms", type=float, default=20.0)
    parser.add_argument("--capacity", type=int, default=1 << 20)
    parser.add_argument("--max-queue", type=int, default=1 << 20)
    parser.add_argument("--stamps", nargs=3, metavar=("FILE", "SLOTS", "TOKENS"))
    chosen = parser.parse_args()
    info = ModelInfo(
        model="noop", path=chosen.checkpoint, architecture="none", vocab_size=90, max_model_len=1 << 20,
        eos_token_ids=(2,), dtype="none", device="none", page_size=16, num_blocks=1, policy="none", pid=0,
    )  # fmt: skip
    door = FrontDoor(chosen.address, info)
    engine = NoopEngine(door, chosen.ttft_ms / 1e3, chosen.tbt_ms / 1e3, chosen.capacity, chosen.max_queue)
    if chosen.stamps:
        path, slots, tokens = chosen.stamps
        engine.stamps = Stamps(Path(path), int(slots), int(tokens))
    gc.collect()
    gc.freeze()
    print(door.address, flush=True)
    engine.run()


if __name__ == "__main__":
    main()

"""The engine loop: poll messages -> schedule -> execute -> publish tokens."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from superinfer.errors import InvalidRequestError, QueueFullError, SuperinferError
from superinfer.runtime.engine.executor import Executor
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.engine.live import live_sequences
from superinfer.runtime.engine.tier_stats import tier_stats
from superinfer.runtime.protocol import (
    Cancel,
    Deltas,
    Failed,
    Generate,
    GetHealth,
    GetLive,
    GetStats,
    HealthReport,
    LiveReport,
    Score,
    SequenceDelta,
    Shutdown,
    StatsReport,
    ToEngine,
)
from superinfer.runtime.scheduler.base import Scheduler
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate

log = logging.getLogger("superinfer.engine")

IDLE_POLL_MS = 200
PULSE_S = 1.0  # how long the requests of a client that has gone may go on at most


@dataclass
class Counters:
    """What happened since the start. Sequences, tokens, seconds."""

    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    slo_met: int = 0
    slo_missed: int = 0
    step_s: float = 0.0
    schedule_s: float = 0.0


class EngineLoop:
    """Ties the front door, the scheduler and the executor together. One thread; `stop` may be called from a signal."""

    def __init__(
        self, door: FrontDoor, intake: Intake, scheduler: Scheduler, executor: Executor, max_queue: int
    ) -> None:
        self._door = door
        self._intake = intake
        self._scheduler = scheduler
        self._executor = executor
        self._max_queue = max_queue
        self._live: dict[bytes, dict[str, list[Sequence]]] = defaultdict(dict)  # unfinished: client, request id
        self._num_live = 0
        self._in_flight: deque[int] = deque()  # steps submitted and not collected, oldest first
        self._counters = Counters()
        self._started = self._turned = self._pulsed = time.monotonic()
        self._stop_reason = ""

    def stop(self, reason: str) -> None:
        """End after the current step."""
        self._stop_reason = self._stop_reason or reason

    def run(self) -> str:
        """Serve until stopped; returns the reason. All clients have been told when it returns."""
        try:
            while not self._stop_reason:
                self._turn()
        except BaseException as error:
            self._stop_reason = f"the engine failed: {error!r}"
            raise
        finally:
            self._door.close(self._stop_reason)
            self._executor.close()
        return self._stop_reason

    def _turn(self) -> None:
        for client, message in self._door.receive(0 if self._num_live else IDLE_POLL_MS):
            self._handle(client, message)
        if self._door.orphaned:
            self.stop("the process that started it ended")
        self._see_to_clients()
        self._turned = now = time.monotonic()
        self._publish(self._scheduler.expire(now), now)
        if len(self._in_flight) < self._executor.depth:
            planned = self._start_step(now)
            if planned and len(self._in_flight) < self._executor.depth:
                return  # see to messages, then plan the next step while this one runs
        if self._in_flight:
            self._end_step()

    def _start_step(self, now: float) -> bool:
        """Plan and submit a step; False when there is nothing to compute."""
        plan = self._scheduler.plan(now)
        self._counters.schedule_s += time.monotonic() - now
        if plan is None:
            return False
        try:
            self._executor.submit(plan)
        except Exception as error:
            self._lose(plan.step, error)
        else:
            self._in_flight.append(plan.step)
        return True

    def _end_step(self) -> None:
        """Collect the oldest step under way and pass its tokens on."""
        step = self._in_flight.popleft()
        try:
            result = self._executor.collect()
        except Exception as error:
            self._lose(step, error)
            return
        now = time.monotonic()
        self._counters.steps += 1
        self._counters.step_s += result.elapsed
        updates = self._scheduler.commit(result, now)
        self._counters.schedule_s += time.monotonic() - now
        self._publish(updates, now)

    # ------------------------------------------------------------------ messages

    def _handle(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Generate() | Score():
                self._take(client, message)
            case Cancel():
                self._cancel(client, message)
            case GetHealth(token=token):
                self._door.send(client, self._health(token))
            case GetStats(token=token):
                self._door.send(client, self._stats(token))
            case GetLive(token=token, limit=limit):
                self._door.send(client, self._now(token, limit))
            case Shutdown():
                self.stop("a client asked it to shut down")

    def _take(self, client: bytes, request: Generate | Score) -> None:
        request_id = request.request_id
        try:
            if request_id in self._live[client]:
                raise InvalidRequestError(f"request id {request_id!r} is already in use; give each request its own")
            sequences = self._intake.sequences(client, request, time.monotonic())
            if self._num_live + len(sequences) > self._max_queue:
                raise QueueFullError(
                    f"the engine holds {self._num_live} unfinished sequences of at most {self._max_queue}; "
                    "try again later or raise --max-queue"
                )
        except SuperinferError as error:
            self._door.send(client, Failed(code=error.code, message=str(error), request_id=request_id))
            return
        self._live[client][request_id] = sequences
        self._num_live += len(sequences)
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _cancel(self, client: bytes, message: Cancel) -> None:
        now = time.monotonic()
        sequences = self._live[client].get(message.request_id, [])
        chosen = [s for s in sequences if message.index is None or s.index == message.index]
        updates = [self._scheduler.cancel(sequence, now) for sequence in chosen]
        self._publish([update for update in updates if update is not None], now)

    def _see_to_clients(self) -> None:
        """Send what is held back, and give up the requests of clients that have gone."""
        self._door.flush()
        now = time.monotonic()
        if now - self._pulsed > PULSE_S:
            self._pulsed = now
            for client in [client for client, requests in self._live.items() if requests]:
                self._door.send(client, Deltas(deltas=[]))
        for client in list(self._door.gone):
            for sequences in list(self._live.pop(client, {}).values()):
                for sequence in sequences:
                    if self._scheduler.cancel(sequence, now) is not None:
                        self._num_live -= 1
                        self._counters.cancelled += 1
            self._door.forget(client)

    # ------------------------------------------------------------------ results

    def _publish(self, updates: Iterable[SequenceUpdate], now: float) -> None:
        by_client: dict[bytes, list[SequenceDelta]] = defaultdict(list)
        for update in updates:
            sequence = update.sequence
            report = sequence.report(now) if update.finish_reason is not None else None
            by_client[sequence.owner].append(
                SequenceDelta(
                    request_id=sequence.request_id,
                    index=sequence.index,
                    token_ids=update.token_ids,
                    logprobs=update.logprobs,
                    finish_reason=update.finish_reason,
                    report=report,
                )
            )
            self._counters.output_tokens += len(update.token_ids)
            if report is not None:
                self._retire(sequence)
                self._count(update, report.met)
        for client, deltas in by_client.items():
            self._door.send(client, Deltas(deltas=deltas))

    def _count(self, update: SequenceUpdate, met: bool | None) -> None:
        counters = self._counters
        if update.finish_reason == "cancelled":
            counters.cancelled += 1
        else:
            counters.finished += 1
        counters.prompt_tokens += update.sequence.num_prompt
        counters.cached_tokens += update.sequence.cached
        counters.slo_met += met is True
        counters.slo_missed += met is False

    def _lose(self, step: int, error: Exception) -> None:
        """A step failed: its requests get the error, all others go on."""
        log.error("step %d failed", step, exc_info=error)
        sequences = self._scheduler.abort(step, time.monotonic())
        text = f"a step of the engine failed and this request was in it ({error}); try it again"
        for sequence in sequences:
            requests = self._live[sequence.owner]
            for sibling in requests.get(sequence.request_id, []):
                self._scheduler.cancel(sibling, time.monotonic())
            if sequence.request_id in requests:
                lost = requests.pop(sequence.request_id)
                self._num_live -= len(lost)
                self._counters.failed += len(lost)
                failed = Failed(code=SuperinferError.code, message=text, request_id=sequence.request_id)
                self._door.send(sequence.owner, failed)

    def _retire(self, sequence: Sequence) -> None:
        requests = self._live[sequence.owner]
        self._num_live -= 1
        unfinished = requests[sequence.request_id]
        unfinished.remove(sequence)
        if not unfinished:
            del requests[sequence.request_id]
            if not requests:
                del self._live[sequence.owner]

    # ------------------------------------------------------------------ reports

    def _health(self, token: int) -> HealthReport:
        now = time.monotonic()
        counts = self._scheduler.counts()
        return HealthReport(
            token=token,
            status="stopping" if self._stop_reason else "ok",
            uptime_s=now - self._started,
            running=counts.running,
            waiting=counts.waiting,
            idle_s=now - self._turned,
        )

    def _now(self, token: int, limit: int) -> LiveReport:
        tiers, tier = self._scheduler.counts().tiers, self._executor.tier
        block_bytes = tier.block_bytes if tier is not None else 0
        unfinished = (s for requests in self._live.values() for sequences in requests.values() for s in sequences)
        return LiveReport(
            token=token,
            sequences=live_sequences(unfinished, limit, time.monotonic()),
            unfinished=self._num_live,
            output_tokens=self._counters.output_tokens,
            bytes_in=tiers.totals.blocks_in * block_bytes if tiers is not None else 0,
            bytes_out=tiers.totals.blocks_out * block_bytes if tiers is not None else 0,
        )

    def _stats(self, token: int) -> StatsReport:
        counts, counters, tier = self._scheduler.counts(), self._counters, self._executor.tier
        steps = max(1, counters.steps)
        return StatsReport(
            token=token,
            steps=counters.steps,
            running=counts.running,
            waiting=counts.waiting,
            finished=counters.finished,
            cancelled=counters.cancelled,
            failed=counters.failed,
            preemptions=counts.preemptions,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            output_tokens=counters.output_tokens,
            slo_met=counters.slo_met,
            slo_missed=counters.slo_missed,
            blocks_total=counts.blocks_total,
            blocks_free=counts.blocks_free,
            blocks_cached=counts.blocks_cached,
            step_s_mean=counters.step_s / steps,
            schedule_s_mean=counters.schedule_s / steps,
            tiers=tier_stats(counts.tiers, tier.block_bytes) if counts.tiers is not None and tier is not None else None,
        )

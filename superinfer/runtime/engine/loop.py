"""The engine loop: poll messages -> schedule -> execute -> publish tokens."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from types import MappingProxyType

from superinfer.errors import (
    InvalidRequestError,
    NonFiniteError,
    NothingToExtendError,
    OverloadedError,
    QueueFullError,
    SuperinferError,
)
from superinfer.runtime.engine.attainment import Attainment
from superinfer.runtime.engine.compiling import Compiling, end
from superinfer.runtime.engine.executor import Executor
from superinfer.runtime.engine.followers import Followers, whole
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.engine.live import live_report
from superinfer.runtime.engine.outgoing import Outgoing
from superinfer.runtime.engine.plan_timing import PlanTiming
from superinfer.runtime.engine.reports import Counters, health_report, stats_report
from superinfer.runtime.protocol import (
    Cancel,
    Deltas,
    Failed,
    Generate,
    GetHealth,
    GetLive,
    GetStats,
    RequestReport,
    Score,
    SequenceDelta,
    Shutdown,
    ToEngine,
)
from superinfer.runtime.scheduler.base import Scheduler
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, StepUpdates
from superinfer.runtime.tracing import TraceRecorder

log = logging.getLogger("superinfer.engine")

IDLE_POLL_MS = 200
IDLE_S = 2.0  # without a request, until what a later one may need is made ready
LOOK_S = 2e-3  # how often it is seen, while planning is put off, whether the device is done sooner than foreseen
READING_SHARE = 0.05  # of a step, that reading messages may take
COMPILING_POLL_MS = 2  # while nothing computes and a grammar is being compiled
NON_FINITE_TEXT = (
    "the model computed values that are not numbers (NaN or infinity) for this request, so there is no next token: "
    "load it with dtype bfloat16 or float32, or check the checkpoint"
)
NOTHING: Mapping[bytes, list[SequenceDelta]] = MappingProxyType({})
PULSE_S = 1.0  # how long the requests of a client that has gone may go on at most
PULSED = 64  # clients without requests that are sent to at each pulse, in turn: one that has gone is soon forgotten


class EngineLoop:
    """Ties the front door, the scheduler and the executor together. One thread; `stop` may be called from a signal."""

    def __init__(
        self,
        door: FrontDoor,
        intake: Intake,
        scheduler: Scheduler,
        executor: Executor,
        max_queue: int,
        trace: TraceRecorder | None = None,
        *,
        plan_late: bool = True,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """plan_late: see `EngineConfig`. prepare: called once, when there has been nothing to do for a while, for what
        some first request would else wait for."""
        self._door = door
        self._intake = intake
        self._scheduler = scheduler
        self._executor = executor
        self._max_queue = max_queue
        self._trace = trace
        self._live: dict[bytes, dict[str, list[Sequence]]] = {}  # unfinished, by client and request id
        self._num_live = 0
        self._followers = Followers()
        self._outgoing = Outgoing()  # tokens that a later delta will tell
        self._compiling = Compiling()
        self._in_flight: deque[int] = deque()  # steps submitted and not collected, oldest first
        self._timing = PlanTiming(late=plan_late)
        self._counters = Counters()
        self._attainment = Attainment()
        self._started = self._turned = self._pulsed = self._read = time.monotonic()
        self._reading_s = 0.0  # what a turn may spend on messages beyond a few, so that steps of seconds read them all
        self._round: Iterator[bytes] = iter(())  # of all clients, who are pulsed in turn
        self._prepare = prepare
        self._busy = self._started  # when there was a request last
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
            if self._trace is not None:
                self._trace.close(time.monotonic())
        return self._stop_reason

    def _turn(self) -> None:
        for client, message in self._door.receive(0, self._reading_s):
            self._handle(client, message, self._read)
        self._read = time.monotonic()
        self._wait()
        if self._door.orphaned:
            self.stop("the process that started it ended")
        self._see_to_clients()
        self._turned = now = time.monotonic()
        if self._compiling:
            self._add_compiled(now)
        self._publish(self._scheduler.expire(now), now)
        if self._prepare is not None:
            self._prepare_once_idle(now)
        if len(self._in_flight) < self._executor.depth:
            if self._put_off_s(now):
                return  # a message came meanwhile, and there may be more
            planned = self._start_step(now)
            if planned and len(self._in_flight) < self._executor.depth:
                return  # see to messages, then plan the next step while this one runs
        if self._in_flight:
            self._end_step()

    def _wait(self) -> None:
        """For messages, until there is something to do."""
        if self._compiling and not self._in_flight and self._num_live == len(self._compiling):
            wait_ms = float(COMPILING_POLL_MS)
        else:
            wait_ms = self._put_off_s(time.monotonic()) * 1e3 if self._num_live else float(IDLE_POLL_MS)
        if not wait_ms:
            return
        came = None
        if wait_ms < 1.0:  # a poll waits for whole milliseconds: this is slept, and what comes meanwhile read after it
            time.sleep(wait_ms / 1e3)
            came = self._read
        for client, message in self._door.receive(int(wait_ms), self._reading_s):
            self._handle(client, message, came)
        self._read = time.monotonic()

    def _prepare_once_idle(self, now: float) -> None:
        if self._num_live:
            self._busy = now
        elif self._prepare is not None and now - self._busy >= IDLE_S:
            self._prepare()
            self._prepare = None

    def _put_off_s(self, now: float) -> float:
        """How long to wait for messages before it is looked again whether the next step is to be planned, because the
        device is busy until then."""
        if not 0 < len(self._in_flight) < self._executor.depth:
            return 0.0
        wait_s = self._timing.wait_s(now)
        return min(wait_s, LOOK_S) if wait_s and self._executor.busy else 0.0

    def _start_step(self, now: float) -> bool:
        """Plan and submit a step; False when there is nothing to compute."""
        plan = self._scheduler.plan(now)
        planned = time.monotonic()
        self._counters.schedule_s += planned - now
        if self._trace is not None:
            self._trace.planned(plan, now, planned)
        if plan is None:
            return False
        waited_s = self._executor.waited_s
        try:
            self._executor.submit(plan)
        except Exception as error:
            self._lose(plan.step, error)
        else:
            self._in_flight.append(plan.step)
            waited_s, submitted = self._executor.waited_s - waited_s, time.monotonic()
            self._timing.submitted(self._scheduler.expected_s(plan.step), now, submitted, waited_s)
            if self._trace is not None:
                self._trace.submitted(plan.step, planned, submitted)
            self._counters.prefill_tokens += plan.num_prefill_tokens
        return True

    def _end_step(self) -> None:
        """Collect the oldest step under way and pass its tokens on."""
        step = self._in_flight.popleft()
        try:
            result = self._executor.collect()
        except Exception as error:
            self._timing.ended(None, time.monotonic())
            self._lose(step, error)
            return
        now = time.monotonic()
        self._timing.ended(result.elapsed - result.link.stall_s, now)
        self._reading_s = READING_SHARE * result.elapsed
        self._counters.steps += 1
        self._counters.step_s += result.elapsed
        updates = self._scheduler.commit(result, now)
        committed = time.monotonic()
        self._counters.schedule_s += committed - now
        if self._trace is not None:
            self._trace.finished(result, now, committed)
            self._trace.gauges(self._scheduler.counts(), committed)
        self._publish_step(updates, now)
        for sequence in updates.not_finite:
            log.error("request %s: the logits of step %d are not numbers", sequence.request_id, step)
            self._counters.not_finite += 1
            self._fail(sequence.owner, sequence.request_id, NonFiniteError(NON_FINITE_TEXT))

    # ------------------------------------------------------------------ messages

    def _handle(self, client: bytes, message: ToEngine, came: float | None) -> None:
        """came: when it may have come at the earliest, if that was not just now: when messages were read before it. A
        promise begins then: what a request waits for the step under way to end is part of what its client sees."""
        match message:
            case Generate() | Score():
                self._take(client, message, came)
            case Cancel():
                self._cancel(client, message)
            case GetHealth(token=token):
                now, stopping = time.monotonic(), bool(self._stop_reason)
                uptime_s, idle_s = now - self._started, now - self._turned
                report = health_report(token, self._scheduler, stopping=stopping, uptime_s=uptime_s, idle_s=idle_s)
                self._door.send(client, report)
            case GetStats(token=token):
                counters, attainment, tier = self._counters, self._attainment, self._executor.tier
                self._door.send(client, stats_report(token, self._scheduler, counters, attainment, tier))
            case GetLive():
                sequences = [s for requests in self._live.values() for held in requests.values() for s in held]
                self._door.send(client, live_report(message, sequences, time.monotonic()))
            case Shutdown():
                self.stop("a client asked it to shut down")

    def _take(
        self, client: bytes, request: Generate | Score, came: float | None = None, without: Collection[int] = ()
    ) -> bool:
        """Take a request in; False where it could not be, which its client has been told. came: None for now. without:
        continuations that were cancelled before it could begin."""
        request_id = request.request_id
        try:
            if self._requests(client).get(request_id) or self._followers.get(client, request_id) is not None:
                raise InvalidRequestError(f"request id {request_id!r} is already in use; give each request its own")
            if isinstance(request, Generate) and request.after:
                self._hold(client, request)
                return True
            sequences = self._intake.sequences(client, request, time.monotonic() if came is None else came)
            sequences = [sequence for sequence in sequences if sequence.index not in without]
            self._check_room(self._num_live, len(sequences))
            grammar = sequences[0].sampling.grammar
            compiled = self._executor.grammars.request(grammar) if grammar is not None else None
        except SuperinferError as error:
            self._door.send(client, Failed(code=error.code, message=str(error), request_id=request_id))
            return False
        if isinstance(request, Generate) and request.interval_s:
            self._outgoing.pace(sequences, request.interval_s)
        self._live.setdefault(client, {})[request_id] = sequences
        self._num_live += len(sequences)
        if self._trace is not None:
            for sequence in sequences:
                self._trace.follow(sequence)
        if compiled is not None:
            self._compiling.hold(compiled, sequences)
            return True
        self._begin(sequences, time.monotonic())
        return True

    def _begin(self, sequences: list[Sequence], now: float) -> None:
        """A request's sequences join the others, unless what was promised cannot be kept."""
        for sequence in sequences:
            self._scheduler.add(sequence)
        waits = [wait for sequence in sequences if (wait := self._scheduler.overload(sequence, now)) is not None]
        if waits:
            self._refuse(sequences[0].owner, sequences, max(waits), now)

    def _check_room(self, held: int, wanted: int) -> None:
        """What is held for later leaves no less room for what can begin."""
        if held + wanted > self._max_queue:
            raise QueueFullError(
                f"the engine holds {held} unfinished sequences of at most {self._max_queue}; "
                "try again later or raise --max-queue"
            )

    def _hold(self, client: bytes, request: Generate) -> None:
        """Keep a request until the one that it goes on from has ended. Raises SuperinferError where it cannot be."""
        sequences = self._requests(client).get(request.after, [])
        held = self._followers.get(client, request.after)
        if not sequences and held is None:
            raise NothingToExtendError(f"request {request.after!r} is not under way: send the whole prompt")
        followed = held if held is not None else sequences[0]  # of several continuations some may have ended
        if followed.sampling.n != 1:
            raise InvalidRequestError(f"request {request.after!r} has several continuations; only one can be extended")
        self._check_room(self._num_live + len(self._followers), request.sampling.n)
        self._followers.hold(client, request)

    def _let_go(self, sequence: Sequence) -> None:
        """A sequence has ended: those that go on from it begin."""
        if not len(self._followers):
            return
        if sequence.finish_reason not in ("stop", "length"):
            self._drop_followers(sequence.owner, sequence.request_id, f"ended by {sequence.finish_reason!r}")
            return
        for follower, without in self._followers.take(sequence.owner, sequence.request_id):
            if not self._take(sequence.owner, whole(follower, sequence), without=without):
                self._drop_followers(sequence.owner, follower.request_id, "failed")

    def _drop_followers(self, client: bytes, request_id: str, why: str) -> None:
        for dropped in self._followers.drop(client, request_id):
            text = f"request {request_id!r}, which this one goes on from, {why}: send the whole prompt"
            self._door.send(client, Failed(code=NothingToExtendError.code, message=text, request_id=dropped.request_id))

    def _refuse(self, client: bytes, sequences: list[Sequence], retry_after_s: float, now: float) -> None:
        """What was promised cannot be kept for one of a request's sequences: the whole request is sent back."""
        first = sequences[0]
        for sequence in sequences:
            self._scheduler.cancel(sequence, now)
            self._outgoing.forget(sequence)
        self._remove(client, first.request_id)
        self._num_live -= len(sequences)
        self._attainment.refused(first.slo_class, len(sequences))
        text = f"the engine is overloaded and cannot keep what was promised; try again in {retry_after_s:.0f} s"
        self._door.send(
            client,
            Failed(code=OverloadedError.code, message=text, request_id=first.request_id, retry_after_s=retry_after_s),
        )
        self._drop_followers(client, first.request_id, "was refused")

    def _add_compiled(self, now: float) -> None:
        """Sequences whose grammar is compiled join the others; those whose grammar cannot be used are told so."""
        for sequence in self._compiling.expired(now):
            self._scheduler.add(sequence)  # which ends it before it is planned
        for sequences, error in self._compiling.compiled():
            if error is None:
                self._begin(sequences, now)
                continue
            for sequence in sequences:
                end(sequence, now)
            if not isinstance(error, SuperinferError):
                log.error("a grammar could not be compiled", exc_info=error)
                error = SuperinferError(f"the grammar could not be compiled: {error}")
            self._fail(sequences[0].owner, sequences[0].request_id, error)

    def _end(self, sequence: Sequence, now: float) -> SequenceUpdate | None:
        """Cancel a sequence, with the scheduler or not there yet. None if it had ended before."""
        return self._compiling.cancel(sequence, now) or self._scheduler.cancel(sequence, now)

    def _cancel(self, client: bytes, message: Cancel) -> None:
        now = time.monotonic()
        held = self._followers.cancel(client, message.request_id, message.index)
        if held is not None:
            if self._followers.get(client, message.request_id) is None:
                self._drop_followers(client, message.request_id, "was cancelled")
            self._door.send(client, Deltas(deltas=[_never_begun(message.request_id, at) for at in held]))
            return
        sequences = self._requests(client).get(message.request_id, [])
        chosen = [s for s in sequences if message.index is None or s.index == message.index]
        updates = [self._end(sequence, now) for sequence in chosen]
        self._publish([update for update in updates if update is not None], now)

    def _see_to_clients(self) -> None:
        """Send what is held back, and give up the requests of clients that have gone."""
        self._door.flush()
        now = time.monotonic()
        if now - self._pulsed > PULSE_S:
            self._pulsed = now
            some = tuple(islice(self._round, PULSED))
            if len(some) < PULSED:
                self._round = iter(tuple(self._door.clients))
            for client in {*self._live, *some}:
                self._door.send(client, Deltas(deltas=[]))
        for client in list(self._door.gone):
            self._followers.forget(client)
            for sequences in list(self._live.pop(client, {}).values()):
                for sequence in sequences:
                    if self._end(sequence, now) is not None:
                        self._num_live -= 1
                        self._counters.cancelled += 1
                        self._outgoing.forget(sequence)
            self._door.forget(client)

    # ------------------------------------------------------------------ results

    def _publish_step(self, updates: StepUpdates, now: float) -> None:
        """Tell clients what a step has brought."""
        self._counters.output_tokens += len(updates.tokens)
        steady, paced = self._outgoing.steady(updates.sequences, updates.tokens, now)
        if not updates.others and not paced:
            for client, deltas in steady.items():
                self._door.send(client, Deltas(deltas=deltas))
            return
        self._counters.output_tokens -= len(paced)  # counted below
        self._publish(chain(paced, updates.others), now, steady)

    def _publish(
        self, updates: Iterable[SequenceUpdate], now: float, steady: Mapping[bytes, list[SequenceDelta]] = NOTHING
    ) -> None:
        """Tell clients of `updates`, with the deltas of `steady`: one message for each client."""
        by_client: dict[bytes, list[SequenceDelta]] = defaultdict(list)
        for client, deltas in steady.items():
            by_client[client] += deltas
        ended: list[Sequence] = []
        for update in updates:
            sequence = update.sequence
            report = sequence.report(now) if update.finish_reason is not None else None
            self._counters.output_tokens += len(update.token_ids)
            if self._outgoing.keeps(update, now):
                continue
            token_ids, logprobs = self._outgoing.all_of(update)
            by_client[sequence.owner].append(
                SequenceDelta(
                    request_id=sequence.request_id,
                    index=sequence.index,
                    token_ids=token_ids,
                    logprobs=logprobs,
                    finish_reason=update.finish_reason,
                    report=report,
                )
            )
            if report is not None:
                self._retire(sequence)
                self._counters.ended(update, report.met)
                self._attainment.ended(sequence.slo_class, update.finish_reason, report)
                ended.append(sequence)
        for client, deltas in by_client.items():
            self._door.send(client, Deltas(deltas=deltas))
        for sequence in ended:
            self._let_go(sequence)

    def _lose(self, step: int, error: Exception) -> None:
        """A step failed: its requests get the error, all others go on."""
        log.error("step %d failed", step, exc_info=error)
        sequences = self._scheduler.abort(step, time.monotonic())
        if self._trace is not None:
            self._trace.lost(step, time.monotonic())
        text = f"a step of the engine failed and this request was in it ({error}); try it again"
        for sequence in sequences:
            self._fail(sequence.owner, sequence.request_id, SuperinferError(text))

    def _fail(self, client: bytes, request_id: str, error: SuperinferError) -> None:
        """End all sequences of a request with an error, unless that has been done."""
        lost = self._requests(client).get(request_id, [])
        for sibling in lost:
            self._scheduler.cancel(sibling, time.monotonic())
        if lost:
            self._remove(client, request_id)
            self._num_live -= len(lost)
            self._counters.failed += len(lost)
            for sequence in lost:
                self._outgoing.forget(sequence)
            self._door.send(client, Failed(code=error.code, message=str(error), request_id=request_id))
            self._drop_followers(client, request_id, "failed")

    def _retire(self, sequence: Sequence) -> None:
        self._num_live -= 1
        unfinished = self._live[sequence.owner][sequence.request_id]
        unfinished.remove(sequence)
        if not unfinished:
            self._remove(sequence.owner, sequence.request_id)

    def _requests(self, client: bytes) -> Mapping[str, list[Sequence]]:
        """A client's unfinished ones, by id."""
        return self._live.get(client, {})

    def _remove(self, client: bytes, request_id: str) -> None:
        """Forget a request, and a client without any."""
        requests = self._live[client]
        del requests[request_id]
        if not requests:
            del self._live[client]


def _never_begun(request_id: str, index: int) -> SequenceDelta:
    """The last delta of a request that was cancelled while it was held."""
    report = RequestReport(
        prompt_tokens=0, cached_tokens=0, output_tokens=0, queue_s=0.0, prefill_s=0.0, decode_s=0.0, e2e_s=0.0
    )
    return SequenceDelta(request_id=request_id, index=index, finish_reason="cancelled", report=report)

"""The second tier on a GPU: pinned host memory behind two copy streams, ordered by events.

Who schedules only groups a plan's copies (`copy_batches`) and hands them over; a thread of its own gives them to the
device, through calls that run without the GIL. Nothing waits for the device: work waits for copies on its stream, and
reports ask events. docs/duplexkv.md says what is guaranteed; the device is behind `CopyDevice`, so that all of this is
tested without one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from superinfer.runtime.kv.busy_spans import BusySpans
from superinfer.runtime.kv.copies import Copies, LinkUse
from superinfer.runtime.kv.copy_batches import Arranger, Batch, Places, moves_of
from superinfer.runtime.kv.copy_device import CopyDevice

log = logging.getLogger("superinfer.engine")

Job = Callable[[], None]
# Between two events further apart than this, CUDA's float milliseconds lose microseconds.
REBASE_S = 8.0
HURRY_S = 2e-5


class Submitter(Protocol):
    """Runs jobs in order, at its leisure. done: how many it has run."""

    done: int

    def put(self, job: Job) -> None:
        """It may wait until `wake`."""

    def wake(self) -> None:
        """There is work."""

    def finish(self, count: int) -> None:
        """Return once the first `count` jobs have run."""

    def close(self) -> None:
        """Run what is there and end."""


class SubmitThread:
    """Implements `Submitter`. Jobs must not raise.

    Who calls `finish` runs the jobs it needs itself: to wait for the thread would be to wait for the GIL, which the
    thread, going on to later jobs, gives up for too short to be taken.
    """

    def __init__(self, first: Job) -> None:
        """first: run by the thread before all jobs, and not counted."""
        self.done = 0
        self._jobs: deque[Job] = deque()
        self._turn = threading.Lock()  # held while a job runs: they run in order, whoever runs them
        self._hurried = False  # somebody wants his turn at once
        self._wakes: SimpleQueue[bool] = SimpleQueue()  # True when there are jobs, False to end
        self._thread = threading.Thread(target=self._run, args=(first,), name="kv-copies", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """See Submitter. The thread sleeps on: it would ask for the GIL while more jobs are being made."""
        self._jobs.append(job)

    def wake(self) -> None:
        """See Submitter."""
        self._wakes.put(True)

    def finish(self, count: int) -> None:
        """See Submitter."""
        if self.done >= count:
            return
        self._hurried = True
        with self._turn:
            self._hurried = False
            while self.done < count:
                self._run_next()

    def close(self) -> None:
        """See Submitter."""
        self._wakes.put(False)
        self._thread.join()

    def _run(self, first: Job) -> None:
        try:
            first()
        except Exception as error:  # every job will fail, and say so
            log.error("the thread that submits copies has no device", exc_info=error)
        while True:
            more = self._wakes.get()
            while self._jobs:
                while self._hurried:
                    time.sleep(HURRY_S)
                with self._turn:
                    if self._jobs:  # unless it has been run already
                        self._run_next()
            if not more:
                return

    def _run_next(self) -> None:
        self._jobs.popleft()()
        self.done += 1


class CudaDuplex:
    """Moves blocks between `places`. start, wait and report are called by one thread, in the order of the plans.

    device: its compute stream is the one that all work of the model is given to. submitter: None for a thread.
    """

    def __init__(self, device: CopyDevice, places: Places, *, submitter: Submitter | None = None) -> None:
        self._device = device
        self._places = places
        self._submitter = submitter or SubmitThread(device.use)
        self._jobs = 0
        self._arranger = Arranger(places.block_bytes)
        self._streams = [device.new_stream(), device.new_stream()]  # in, out
        self._under_way: tuple[deque[Batch], deque[Batch]] = (deque(), deque())
        self._over = [0, 0]  # the last batch of each direction that was reported
        self._plans = 0
        self._fenced = [0, 0]  # the last plan whose fence each stream waits for: the submitting side's
        self._free_events: deque[tuple[int, int]] = deque()  # (jobs that may still name it, event)
        self._events: list[int] = []
        self._stalls: deque[tuple[int, int]] = deque()
        self._stall_s = 0.0
        self._spans = BusySpans()
        self._last_end = [0.0, 0.0]
        self._unmarked = [False, False]  # the last batch of each direction has no end to be asked
        self._base = self._event()
        self._base_s = 0.0
        device.record(self._base, device.compute_stream())

    # ------------------------------------------------------------------ the engine's side

    def start(self, copies: Copies, wanted: Collection[int] = (), *, hold: bool = False) -> None:
        """Begin a plan's copies; call before its work, after that of the plans before it. wanted: what it waits for.

        hold: only what `wait` asks for is given to the device until `release` is called: the thread that submits would
        want the GIL while the caller, who is about to give the device its step, has better to do.
        """
        if not copies:
            return
        batches = self._arranger.arrange(copies, wanted)
        fence = self._event()
        self._plans += 1
        self._device.record(fence, self._device.compute_stream())
        follows = [False, False]  # something of this plan on the same stream
        for batch in batches:
            self._jobs += 1
            batch.job, batch.plan, batch.fence, batch.end = self._jobs, self._plans, fence, self._event()
            if batch.after > self._over[not batch.out]:
                batch.wait = self._end_of(not batch.out, batch.after)
            if batch.wait or not follows[batch.out]:
                batch.begin, follows[batch.out] = self._event(), True
            self._under_way[batch.out].append(batch)
            self._submitter.put(partial(self._submit, batch))
        self._free_events.append((self._jobs, fence))
        if not hold:
            self._submitter.wake()

    def release(self) -> None:
        """What was started with `hold` may be given to the device."""
        if self._submitter.done < self._jobs:
            self._submitter.wake()

    def wait(self, ids: Collection[int]) -> None:
        """What is given to the compute stream from now on comes after all of `ids`. Does not wait for the device."""
        last: list[Batch | None] = [None, None]
        for id in ids:
            batch = self._arranger.find(id)
            if batch is not None and ((known := last[batch.out]) is None or batch.seq > known.seq):
                last[batch.out] = batch
        needed = [batch for batch in last if batch is not None]
        if not needed:
            return
        # A stream does not wait for an event that is yet to be recorded.
        self._submitter.finish(max(batch.job for batch in needed))
        device, stream = self._device, self._device.compute_stream()
        before, after = self._event(), self._event()
        device.record(before, stream)
        for batch in needed:
            device.wait(stream, batch.end)
        device.record(after, stream)
        self._stalls.append((before, after))

    def report(self) -> tuple[list[int], list[int], LinkUse]:
        """Ids copied and ids failed that no report has had, and the link's seconds since the last one."""
        copied: list[int] = []
        failed: list[int] = []
        reached = self._reached()
        over: list[Batch] = []
        jobs, free_events = self._jobs, self._free_events
        for out in (True, False):
            batches, first = self._under_way[out], None  # first: of a run on a stream that does not rest within it
            while batches and batches[0].seq <= reached[out]:
                batch = batches.popleft()
                over.append(batch)
                if batch.failed:
                    failed += batch.failed
                    copied += [id for id in batch.ids if id not in batch.failed]
                else:
                    copied += batch.ids
                first = batch if first is None else first
                after = batches[0] if batches and batches[0].seq <= reached[out] else None
                if after is None or after.begin or batch.unordered or after.unordered:
                    self._account(first, batch)
                    first = None
                if batch.begin:
                    free_events.append((jobs, batch.begin))
                free_events.append((jobs, batch.end))
            self._over[out] = max(self._over[out], reached[out])
        if over:
            self._arranger.forget(over)
        for out in (True, False):
            self._spans.forget(out, self._last_end[not out] if self._under_way[not out] else self._last_end[out])
        self._account_stalls()
        in_s, out_s, both_s = self._spans.take()
        use = LinkUse(in_s, out_s, both_s, self._stall_s)
        self._stall_s = 0.0
        return copied, failed, use

    def close(self) -> None:
        """Returns when all copies are over."""
        self._submitter.close()
        for stream in self._streams:
            self._device.synchronize(stream)
        self._device.free(self._streams, self._events)
        self._streams, self._events = [], []

    # ------------------------------------------------------------------ the submitting thread's side

    def _submit(self, batch: Batch) -> None:
        try:
            self._submit_one(batch)
        except Exception as error:  # the scheduler knows what a lost copy means; the engine serves on
            log.error("copies of %d KV blocks could not be made", len(batch.ids), exc_info=error)
            batch.failed, batch.unordered = batch.ids, True
            self._mark_end(batch)

    def _mark_end(self, batch: Batch) -> None:
        """Of one that failed: who waits for it waits for those before it on its stream, too."""
        try:
            self._device.record(batch.end, self._streams[batch.out])
        except Exception as error:
            log.error("no event marks the end of copies: waiting for their stream", exc_info=error)
            with contextlib.suppress(Exception):  # there is nothing left to order then
                self._device.synchronize(self._streams[batch.out])

    def _submit_one(self, batch: Batch) -> None:
        device, stream = self._device, self._streams[batch.out]
        if (
            self._fenced[batch.out] != batch.plan
        ):  # a stream is in order: what waits once has waited for all that follows
            device.wait(stream, batch.fence)
            self._fenced[batch.out] = batch.plan
        if batch.wait:
            device.wait(stream, batch.wait)
        if batch.begin:
            device.record(batch.begin, stream)
        moves = moves_of(batch.out, batch.hbm, batch.dram, self._places)
        lost = device.copy(stream, moves.dsts, moves.srcs, moves.sizes)
        device.record(batch.end, stream)
        if lost:
            batch.failed = [batch.ids[at] for move in lost for at in moves.copies_of(move)]

    # ------------------------------------------------------------------ inside

    def _event(self) -> int:
        """A fresh event, or one that no job to come will name."""
        if self._free_events and self._free_events[0][0] <= self._submitter.done:
            return self._free_events.popleft()[1]
        event = self._device.new_event()
        self._events.append(event)
        return event

    def _end_of(self, out: bool, seq: int) -> int:
        """The event of a batch that is under way: one of this plan's before it, or of a plan before."""
        batches = self._under_way[out]
        return batches[seq - batches[0].seq].end  # numbered without gaps

    def _reached(self) -> list[int]:
        """The last batch of each direction that is over. What such a batch followed is over too, though it may not
        have been when it was asked."""
        reached, grown = list(self._over), False
        for out in (True, False):  # mostly all of them are, which the last one knows
            batches = self._under_way[out]
            if batches and self._is_over(batches[-1], 0) and not any([batch.unordered for batch in batches]):
                reached[out] = batches[-1].seq
            elif batches:
                grown = True
        while grown:
            grown = False
            for out in (True, False):
                for batch in self._under_way[out]:
                    if batch.seq > reached[out]:
                        if not self._is_over(batch, reached[not out]):
                            break
                        reached[out], grown = batch.seq, True
                    if batch.after > reached[not out]:
                        reached[not out], grown = batch.after, True
        return reached

    def _is_over(self, batch: Batch, reached_of_other: int) -> bool:
        if batch.job > self._submitter.done:
            return False
        if batch.unordered:  # it has waited for nothing itself
            return batch.after <= reached_of_other
        return self._device.reached(batch.end)

    def _account(self, first: Batch, batch: Batch) -> None:
        """Of a run of batches, from the `first` to the last."""
        if batch.unordered:  # nothing marks its end, so the next one's begin may not be known
            self._unmarked[batch.out] = True
            return
        end = self._base_s + self._device.seconds(self._base, batch.end)
        if first.begin:
            self._spans.add(batch.out, end - self._device.seconds(first.begin, batch.end), end)
        elif not self._unmarked[batch.out]:
            self._spans.add(batch.out, self._last_end[batch.out], end)
        self._unmarked[batch.out] = False
        self._last_end[batch.out] = end
        if end - self._base_s > REBASE_S:
            self._free_events.append((self._jobs, self._base))
            self._base, self._base_s = batch.end, end
            batch.end = self._event()

    def _account_stalls(self) -> None:
        while self._stalls and self._device.reached(self._stalls[0][1]):
            before, after = self._stalls.popleft()
            self._stall_s += self._device.seconds(before, after)
            self._free_events += ((self._jobs, before), (self._jobs, after))

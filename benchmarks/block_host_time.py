"""What a KV block moved costs the scheduling thread, without a GPU: all but what the device itself would do.

bookkeeping: sequences leave, others come back into their room, and new ones are mirrored, through the door that the
scheduler uses: to plan that, and to take in the report. CPU time; with room in DRAM, and with DRAM full of prefixes.
body: those copies on a device that does nothing: `start` and `report` on the scheduling thread, `submit` on the one
that submits. CPU time.
in_step: all four as an engine's step has them, beside the thread that submits, with DRAM full. CPU time. The goal is a
microsecond for them all.

    python benchmarks/block_host_time.py --other CHECKOUT

measures another checkout of this repository too, in turn, by this file.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from array import array
from collections import deque
from pathlib import Path
from typing import Any, cast

import numpy as np
from record import write

from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.kv.tiers import TierTable

PAGE = 16
PLACES = Places(0, 0, 2 << 20, 512)
MIRRORS = 32  # in a step, at most: what the scheduler takes for an unknown link
SWITCH_S = 0.5e-3  # of the interpreter's threads: engine/cuda_tier.py
USLEEP = ctypes.CDLL(None).usleep
GIL_RELEASES = 20
PARTS = ("plan_us", "submit_us", "report_us", "settle_us")


class Lives:
    """Sequences of `blocks` blocks, the last of which is partial, in a cache that holds one of them in HBM and
    `others` in DRAM: one that waits there, and else prefixes that nobody holds."""

    def __init__(self, blocks: int, others: int) -> None:
        self.kv = DuplexCache(blocks, others * blocks, PAGE)
        self._blocks, self._tokens = blocks, itertools.count()
        self._waiting = self.compute()
        self.leave(self._waiting)
        self.settle([copy.id for copy in self.kv.take_copies()], self._waiting)

    def warm(self) -> None:
        """Until DRAM is full, but for the room of what came back last."""
        while self.kv.num_dram_free >= self._blocks:
            copies, back = self.exchange()
            self.settle([copy.id for copy in copies], back)
            self.kv.release(back)

    def compute(self) -> TierTable:
        """A new sequence, of which nothing is mirrored."""
        table = cast(TierTable, self.kv.open(""))
        assert self.kv.allocate(table, self._blocks) is not None
        tokens = array("i", itertools.islice(self._tokens, self._blocks * PAGE))
        self.kv.commit(table, tokens, len(tokens) - 1)
        return table

    def leave(self, table: TierTable) -> None:
        """It is rotated out."""
        assert self.kv.park(table, self._blocks * PAGE - 1)

    def come_back(self, instead: TierTable) -> TierTable:
        """Who waits is rotated in, `instead` waits from now on; the plan asks what its work has to wait for."""
        table, self._waiting = self._waiting, instead
        assert self.kv.resume(table, 0)
        self.kv.awaits(table)
        return table

    def exchange(self) -> tuple[Any, TierTable]:
        """A new sequence leaves and who waits takes its room: the copies, a plan's, and who is back."""
        table = self.compute()
        self.leave(table)
        back = self.come_back(table)
        return self.kv.take_copies(), back

    def settle(self, ids: list[int], table: TierTable) -> None:
        """A result reports these; the next plan asks what a sequence still waits for."""
        self.kv.settle(ids, ())
        assert not self.kv.awaits(table)


def measure_bookkeeping(rounds: int = 40, blocks: int = 140) -> dict[str, dict[str, float]]:
    """Least CPU microseconds a block that moves, of `rounds`. exchange: one sequence leaves (`leave`), one comes back;
    taking in the report includes that the next plan asks what is still waited for."""
    rows = {}
    for room, others, is_full in (("room in DRAM", 3 * rounds, False), ("DRAM full", 8, True)):
        lives = Lives(blocks, others)
        if is_full:
            lives.warm()
        spent: dict[str, list[float]] = {}
        for _ in range(rounds):
            for what, took in itertools.chain(_timed_exchange(lives), _timed_mirrors(lives)):
                spent.setdefault(what, []).append(took * 1e6)
        assert is_full or lives.kv.num_dram_free
        rows[room] = {what: min(took) for what, took in spent.items()}
        told = ", ".join(f"{what} {took:.2f}" for what, took in rows[room].items())
        print(f"bookkeeping, µs a block, {room}: {told}", flush=True)
    return rows


def _timed_exchange(lives: Lives) -> list[tuple[str, float]]:
    """CPU seconds a block of each part."""
    table = lives.compute()
    marks = [time.thread_time()]
    lives.leave(table)
    marks.append(time.thread_time())
    back = lives.come_back(table)
    copies = lives.kv.take_copies()
    marks.append(time.thread_time())
    ids = [copy.id for copy in copies]
    marks.append(time.thread_time())
    lives.settle(ids, back)
    marks.append(time.thread_time())
    lives.kv.release(back)
    leave, come_back, _, settle = (b - a for a, b in itertools.pairwise(marks))
    each = len(ids) // 2
    assert len(ids) == 2 * each
    return [("leave", leave / each), ("come back", come_back / each), ("settle", settle / len(ids))]


def _timed_mirrors(lives: Lives) -> list[tuple[str, float]]:
    """CPU seconds a block of each part, of as many as a step mirrors."""
    table, found = lives.compute(), []
    while True:
        began = time.thread_time()
        lives.kv.mirror(MIRRORS)
        copies = lives.kv.take_copies()
        planned = time.thread_time()
        ids = [copy.id for copy in copies]
        before = time.thread_time()
        lives.settle(ids, table)
        settled = time.thread_time()
        if len(ids) < MIRRORS:
            lives.kv.release(table)
            return found
        found += [("mirror", (planned - began) / MIRRORS), ("settle mirrors", (settled - before) / MIRRORS)]


class NoDevice:
    """A CopyDevice on which all is done at once, and nothing is."""

    def __init__(self) -> None:
        self._handles = 0

    def use(self) -> None:
        """See CopyDevice."""

    def compute_stream(self) -> int:
        """See CopyDevice."""
        return 0

    def new_stream(self) -> int:
        """See CopyDevice."""
        return self.new_event()

    def new_event(self) -> int:
        """See CopyDevice."""
        self._handles += 1
        return self._handles

    def free(self, streams: list[int], events: list[int]) -> None:
        """See CopyDevice."""

    def record(self, event: int, stream: int) -> None:
        """See CopyDevice."""

    def wait(self, stream: int, event: int) -> None:
        """See CopyDevice."""

    def reached(self, event: int) -> bool:
        """See CopyDevice."""
        return True

    def seconds(self, earlier: int, later: int) -> float:
        """See CopyDevice."""
        return 1e-3

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """See CopyDevice."""
        return []

    def synchronize(self, stream: int) -> None:
        """See CopyDevice."""


class Inline:
    """A Submitter whose jobs run when asked for."""

    def __init__(self) -> None:
        self.done, self._jobs = 0, deque()

    def put(self, job: Any) -> None:
        """See Submitter."""
        self._jobs.append(job)

    def wake(self) -> None:
        """See Submitter."""

    def finish(self, count: int) -> None:
        """See Submitter."""
        while self.done < count:
            self._jobs.popleft()()
            self.done += 1

    def close(self) -> None:
        """See Submitter."""


def measure_body(rounds: int = 100, blocks: int = 140) -> dict[str, dict[str, float]]:
    """Least CPU microseconds a block, of `rounds`, on a device that does nothing. wanted: its step waits for one."""
    rows = {}
    for name in ("mirrors", "exchange"):
        submitter = Inline()
        duplex, lives, spent = CudaDuplex(NoDevice(), PLACES, submitter=submitter), Lives(blocks, 4), []
        lives.warm()
        for _ in range(rounds):
            table = lives.compute()
            if name == "mirrors":
                lives.kv.mirror(MIRRORS)
                copies = lives.kv.take_copies()
            else:
                lives.leave(table)
                table = lives.come_back(table)
                copies = lives.kv.take_copies()
            ids = [copy.id for copy in copies]
            marks = [time.thread_time()]
            duplex.start(copies, (ids[-1],))
            marks.append(time.thread_time())
            submitter.finish(duplex._jobs)
            marks.append(time.thread_time())
            copied = duplex.report()[0]
            marks.append(time.thread_time())
            assert sorted(copied) == ids
            lives.settle(copied, table)
            lives.kv.release(table)
            spent.append([(b - a) / len(ids) * 1e6 for a, b in itertools.pairwise(marks)])
        start, submit, report = (min(column) for column in zip(*spent, strict=True))
        rows[name] = {"blocks": len(ids), "start_us": start, "submit_us": submit, "report_us": report}
        print(
            f"body, µs a block, {name}, {len(ids)}: start {start:.2f}, report {report:.2f}; "
            f"submit {submit:.2f} on its own thread",
            flush=True,
        )
    return rows


class SlowDevice(NoDevice):
    """Its copies take 1.5 µs of the caller's time each, without the GIL, as the driver's do."""

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """See CopyDevice."""
        USLEEP(int(1.5 * len(dsts)))
        return []


class Driver(SlowDevice):
    """Its short calls take the caller's time with the GIL, as the driver's do: a microsecond each. Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def _call(self) -> None:
        self.calls += 1
        until = time.perf_counter() + 1e-6
        while time.perf_counter() < until:
            pass

    def record(self, event: int, stream: int) -> None:
        """See CopyDevice."""
        self._call()

    def wait(self, stream: int, event: int) -> None:
        """See CopyDevice."""
        self._call()

    def reached(self, event: int) -> bool:
        """See CopyDevice."""
        self._call()
        return True

    def seconds(self, earlier: int, later: int) -> float:
        """See CopyDevice."""
        self._call()
        return 1e-3


def _spins_per_s() -> float:
    began, spun = time.perf_counter(), 0
    while spun < 1_000_000:
        spun += 1
    return 1_000_000 / (time.perf_counter() - began)


SPINS_PER_S = _spins_per_s()


def measure_in_step(
    rounds: int = 300, blocks: int = 140, work_s: float = 3e-4, step_s: float = 4e-3
) -> dict[str, float]:
    """Steps in which one sequence leaves and another takes its room: `blocks` copies each way, each copy in behind a
    copy out. `submit` starts them, and then spends `work_s` on what is not copies, giving up the GIL now and then as
    torch's calls do; `collect` comes `step_s` later. Median microseconds of this thread's CPU for each block moved. And
    what `submit` takes longer by the clock (`submit_clock_us`) than in steps without copies, in turn, which tells of
    the two threads in each other's way where the machine is otherwise idle; and short driver calls a step."""
    sys.setswitchinterval(SWITCH_S)
    device, lives = Driver(), Lives(blocks, 8)
    lives.warm()
    duplex = CudaDuplex(device, PLACES)
    spent: dict[str, list[float]] = {part: [] for part in PARTS}
    clocks: dict[bool, list[float]] = {True: [], False: []}
    moved = 2 * blocks
    for turn in range(2 * rounds):
        moving = turn % 2 == 0
        table = lives.compute()
        marks = [time.thread_time()]
        if moving:
            lives.leave(table)
            table = lives.come_back(table)
        copies = lives.kv.take_copies()
        marks.append(time.thread_time())
        began = time.perf_counter()
        duplex.start(copies, hold=True)
        duplex.wait(())
        marks.append(time.thread_time())
        for _ in range(GIL_RELEASES):
            spun = 0
            while spun < work_s / GIL_RELEASES * SPINS_PER_S:
                spun += 1
            time.sleep(0)
        released = time.thread_time()
        duplex.release()
        marks[-1] += time.thread_time() - released
        clocks[moving].append(time.perf_counter() - began)
        time.sleep(step_s)
        marks += [time.thread_time()]
        copied = duplex.report()[0]
        marks.append(time.thread_time())
        while len(copied) < len(copies):
            time.sleep(1e-4)
            copied += duplex.report()[0]
        settling = time.thread_time()
        lives.settle(copied, table)
        if moving:
            assert len(copies) == moved
            plan, submit, _, report = (b - a for a, b in itertools.pairwise(marks))
            for part, seconds in zip(PARTS, (plan, submit, report, time.thread_time() - settling), strict=True):
                spent[part].append(seconds / moved * 1e6)
        lives.kv.release(table)
    duplex.close()
    row = {part: statistics.median(times) for part, times in spent.items()}
    row |= {"sum_us": sum(row.values()), "blocks": moved, "driver_calls": device.calls / rounds}
    longer = statistics.median(clocks[True]) - statistics.median(clocks[False])
    row["submit_clock_us"] = longer / moved * 1e6
    print(
        f"in a step: {_told(row)}; by the clock submit is {row['submit_clock_us']:.2f} longer; "
        f"{row['driver_calls']:.0f} short driver calls for {moved} blocks",
        flush=True,
    )
    return row


def _told(row: dict[str, float]) -> str:
    parts = ", ".join(f"{part.removesuffix('_us')} {row[part]:.2f}" for part in PARTS)
    return f"{parts}: {row['sum_us']:.2f} µs a block"


def measure_in_turn(checkout: Path, rounds: int = 5) -> dict[str, Any]:
    """`measure_in_step` of the code here and of another checkout of this repository, in turn, each time in a process
    of its own; the least of each part."""
    code = "import json, block_host_time; print(json.dumps(block_host_time.measure_in_step()))"
    here = Path(__file__).parent
    rows: dict[str, list[dict[str, float]]] = {"here": [], "other": []}
    for _ in range(rounds):
        for name, root in (("here", here.parent), ("other", checkout.resolve())):
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{here}"},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = {"other_commit": head.stdout.strip(), "runs": rows}
    for name, runs in rows.items():
        found[name] = {part: min(run[part] for run in runs) for part in PARTS}
        found[name]["sum_us"] = sum(found[name].values())
        print(f"{name:5}: {_told(found[name])}")
    return found


def measure_beside_thread(rounds: int = 40, plans: int = 16, blocks: int = 140) -> dict[str, float]:
    """Plans of `blocks` each way, one behind the other, the submitting thread at work: median microseconds of the
    scheduling thread in `start` and `report`, of the clock and of the CPU, for each block moved."""
    lives, wall, cpu = Lives(blocks, 2 * plans), [], []
    duplex = CudaDuplex(SlowDevice(), PLACES)
    for _ in range(rounds):
        made = []
        for _ in range(plans):
            copies, back = lives.exchange()
            made.append(copies)
            lives.kv.release(back)
        moved, copied, spent, busy = sum(map(len, made)), [], 0.0, 0.0
        for copies in made:
            began, worked = time.perf_counter(), time.thread_time()
            duplex.start(copies)
            spent += time.perf_counter() - began
            busy += time.thread_time() - worked
        while len(copied) < moved:
            began, worked = time.perf_counter(), time.thread_time()
            some = duplex.report()[0]
            if some:  # the others only pass the time
                spent += time.perf_counter() - began
                busy += time.thread_time() - worked
            copied += some
            time.sleep(1e-4)
        lives.settle(copied, back)
        wall.append(spent / moved * 1e6)
        cpu.append(busy / moved * 1e6)
    batches = duplex._jobs / rounds / plans
    duplex.close()
    row = {
        "blocks": moved / plans,
        "batches": batches,
        "wall_us": statistics.median(wall),
        "cpu_us": statistics.median(cpu),
    }
    print(f"beside the thread: {row['wall_us']:.2f} µs a block, CPU {row['cpu_us']:.2f}; {batches:.0f} batches a plan")
    return row


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="block-host-time-cpu")
    parser.add_argument("--other", type=Path, help="another checkout, whose steps are measured in turn with this one's")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"bookkeeping": measure_bookkeeping(), "body": measure_body()}
    record["beside_thread"] = measure_beside_thread()
    record["in_step"] = measure_in_step()
    if arguments.other:
        record["in_turn"] = measure_in_turn(arguments.other)
    print(f"written to {write(arguments.name, 'python benchmarks/block_host_time.py', record)}")


if __name__ == "__main__":
    main()

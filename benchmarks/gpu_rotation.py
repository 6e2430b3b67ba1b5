"""What rotation costs a GPU that computes: TPOT beside copies, and an overload with the second tier and without it.

traffic: batches of decodes with Llama-3-8B's shape; beside each step blocks that nobody uses move both ways, at a share
of what the link does at once. Everything else is as without, so the difference is the copies' cost.
overload: more requests than HBM holds, under `lru`, with DRAM and without; then a quiet time. In this process, without
the door.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections import deque

from gpu_common import MODEL, gpu_executor, random_prompt
from record import write

from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.tier_stats import tier_stats
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.kv.copies import NO_COPIES, BlockCopy, Copies
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence

TRAFFIC_BLOCKS = 1024  # of each pool, set apart for copies that mean nothing
FIRST_ID = 1 << 40  # of their ids


def sequence(id: int, prompt: list[int], tokens: int, now: float) -> Sequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return Sequence(id=id, prompt=prompt, max_tokens=tokens, arrival=now, sampling=sampling, seed=id)


class Traffic:
    """Copies both ways between blocks set apart, `per_step` blocks each way and step."""

    def __init__(self, first_hbm: int, per_step: int) -> None:
        self._hbm = list(range(first_hbm, first_hbm + TRAFFIC_BLOCKS))
        self.per_step = per_step
        self._last: dict[tuple[str, int], int] = {}
        self._next = FIRST_ID
        self._at = 0

    def copies(self) -> Copies:
        """Of the next plan. Each follows what touched its blocks before, as the bookkeeping would have it."""
        made = []
        for i in range(2 * self.per_step):
            place = self._at = (self._at + 1) % TRAFFIC_BLOCKS
            hbm, dram = self._hbm[place * 7 % TRAFFIC_BLOCKS], place * 5 % TRAFFIC_BLOCKS
            keys = (("hbm", hbm), ("dram", dram))
            after = tuple(sorted({self._last[key] for key in keys if key in self._last}))
            made.append(BlockCopy(self._next, bool(i % 2), hbm, dram, after))
            self._last |= dict.fromkeys(keys, self._next)
            self._next += 1
        return Copies.of(made)


def decode_times(executor: CudaExecutor, batch: int, steps: int, per_step: int) -> dict[str, object]:
    """Steady decode steps, with `per_step` blocks each way beside each of them."""
    limits = executor.limits
    kv = KVCache(limits.num_blocks - TRAFFIC_BLOCKS, limits.page_size, prefix_cache=False)
    scheduler = build_scheduler("fcfs", kv, SchedulerLimits(batch, 8192, limits.max_model_len))
    rng = random.Random(batch)
    for i in range(batch):
        scheduler.add(sequence(i, random_prompt(rng, 512), steps + 64, 0.0))
    while scheduler.counts().waiting:  # prefill, one step at a time
        plan = scheduler.plan(time.monotonic())
        executor.submit(plan)
        scheduler.commit(executor.collect(), time.monotonic())
    traffic = Traffic(limits.num_blocks - TRAFFIC_BLOCKS, per_step)
    rows, moved, busy = [], 0, [0.0, 0.0, 0.0]
    executor.submit(scheduler.plan(time.monotonic()))
    began = time.perf_counter()
    for _ in range(steps):
        plan = dataclasses.replace(scheduler.plan(time.monotonic()), copies=traffic.copies() if per_step else NO_COPIES)
        before = time.perf_counter()
        executor.submit(plan)
        submitted = time.perf_counter()
        result = executor.collect()
        scheduler.commit(result, time.monotonic())
        rows.append({"submit_ms": (submitted - before) * 1e3, "device_ms": result.elapsed * 1e3})
        moved += len(result.copied)
        busy = [a + b for a, b in zip(busy, result.link, strict=False)]
        assert not result.failed_copies
    seconds = time.perf_counter() - began
    last = executor.collect()
    while per_step and executor._duplex._arranger._batch_of:  # the next run begins with nothing under way
        time.sleep(0.01)
        executor._duplex.report()
    assert last.tokens or (last.decoded is not None and len(last.decoded))
    scheduler.commit(last, time.monotonic())
    block = executor.tier.block_bytes
    return {
        "per_step": per_step,
        "tpot_ms": seconds / steps * 1e3,
        "device_ms": statistics.median(row["device_ms"] for row in rows),
        "submit_ms": statistics.median(row["submit_ms"] for row in rows),
        "moved_gb_s": moved * block / seconds / 1e9,
        "link_busy_s": dict(zip(("in_s", "out_s", "both_s"), busy, strict=True)),
        "seconds": seconds,
    }


def measure_traffic(executor: CudaExecutor, batch: int, steps: int, share: float, rounds: int) -> dict[str, object]:
    """Rounds without and with copies, alternating; `share`: of the link's measured speed at once."""
    link = executor.tier.link
    base = decode_times(executor, batch, steps, 0)
    step_s = base["tpot_ms"] / 1e3
    rate = min(link.in_both, link.out_both)
    per_step = max(1, round(share * rate * step_s / executor.tier.block_bytes))
    pairs = []
    for _ in range(rounds):
        pairs.append((decode_times(executor, batch, steps, 0), decode_times(executor, batch, steps, per_step)))
    slower = statistics.median(busy["tpot_ms"] / quiet["tpot_ms"] for quiet, busy in pairs) - 1
    found = {"batch": batch, "share": share, "per_step": per_step, "tpot_slower": slower, "rounds": pairs}
    quiet, busy = pairs[-1]
    print(
        f"batch {batch}: TPOT {quiet['tpot_ms']:.2f} ms, beside {busy['moved_gb_s']:.1f} GB/s of copies "
        f"{busy['tpot_ms']:.2f} ms: {slower:+.1%}",
        flush=True,
    )
    return found


def overload(
    executor: CudaExecutor, blocks: int, dram: int, requests: int, rate: float, seed: int
) -> dict[str, object]:
    """`requests` arrivals at `rate` a second, of 200 to 1,200 prompt tokens and 100 to 300 of output. dram: blocks."""
    limits, rng = executor.limits, random.Random(seed)
    link = executor.tier.link if executor.tier is not None else None
    kv = build_cache(blocks, dram, limits.page_size, link=link)
    scheduler = build_scheduler("lru", kv, SchedulerLimits(limits.num_slots, 2048, blocks * limits.page_size))
    arrivals = deque()
    at = 0.0
    for id in range(requests):
        at += rng.expovariate(rate)
        arrivals.append((at, id, random_prompt(rng, rng.randrange(200, 1200)), rng.randrange(100, 300)))
    first: dict[int, float] = {}
    born: dict[int, float] = {}
    ahead: deque[int] = deque()
    tokens = 0
    began = time.monotonic()
    while True:
        now = time.monotonic()
        while arrivals and began + arrivals[0][0] <= now:
            _, id, prompt, output = arrivals.popleft()
            born[id] = now
            scheduler.add(sequence(id, prompt, output, now))
        plan = scheduler.plan(now)
        if plan is not None:
            executor.submit(plan)
            ahead.append(plan.step)
        if ahead and (plan is None or len(ahead) == executor.depth):
            ahead.popleft()
            for update in scheduler.commit(executor.collect(), time.monotonic()):
                tokens += len(update.token_ids)
                if update.token_ids:
                    first.setdefault(update.sequence.id, time.monotonic() - born[update.sequence.id])
        elif plan is None:
            if not arrivals:
                break
            time.sleep(0.001)
    seconds = time.monotonic() - began
    counts = scheduler.counts()
    ttft = sorted(first.values())
    tiers = tier_stats(counts.tiers, executor.tier.block_bytes) if counts.tiers is not None else None
    found = {
        "dram_blocks": dram,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "ttft_p50_s": ttft[len(ttft) // 2],
        "ttft_p90_s": ttft[int(len(ttft) * 0.9)],
        "preemptions": counts.preemptions,
        "tiers": {name: getattr(tiers, name) for name in tiers.__struct_fields__} if tiers is not None else None,
    }
    said = ""
    if tiers is not None:
        said = (
            f"; {tiers.rotations_out} rotations, {tiers.mirror_hit_rate:.0%} of their blocks mirrored before, in "
            f"{tiers.gbps_in:.1f} GB/s, out {tiers.gbps_out:.1f}, stalled {tiers.stall_s:.2f} s"
        )
    print(
        f"overload with {dram} DRAM blocks: {found['tokens_per_s']:.0f} tokens/s, "
        f"TTFT p50 {found['ttft_p50_s']:.2f} s, p90 {found['ttft_p90_s']:.2f} s, {counts.preemptions} recomputed{said}",
        flush=True,
    )
    return found


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-rotation")
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dram-gib", type=float, default=16.0)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rate", type=float, default=60.0)
    parser.add_argument("--blocks", type=int, default=3000, help="HBM blocks of the overload")
    arguments = parser.parse_args()
    executor = gpu_executor(
        max_batch_size=max(*arguments.batch, 128),
        max_batch_tokens=8192,
        dram_tokens=int(arguments.dram_gib * (1 << 30) / (2 << 20)) * 16,
    )
    if executor.tier is None or executor.tier.link is None or executor.tier.num_blocks < TRAFFIC_BLOCKS:
        raise SystemExit(f"there is no second tier of {TRAFFIC_BLOCKS} blocks to measure; the log above says why")
    measured: dict[str, object] = {"settings": vars(arguments), "link": dataclasses.asdict(executor.tier.link)}
    measured["model"] = MODEL
    path = None
    measured["traffic"] = []
    for batch in arguments.batch:
        settings = batch, arguments.steps, arguments.share, arguments.rounds
        measured["traffic"].append(measure_traffic(executor, *settings))
        path = write(arguments.name, "python benchmarks/gpu_rotation.py", measured)
    measured["overload"] = [
        overload(executor, arguments.blocks, dram, arguments.requests, arguments.rate, seed)
        for seed, dram in ((0, 0), (0, executor.tier.num_blocks))
    ]
    path = write(arguments.name, "python benchmarks/gpu_rotation.py", measured)
    executor.close()
    print(f"written to {path}")


if __name__ == "__main__":
    main()

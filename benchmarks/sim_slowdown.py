"""A machine that becomes slower while it serves, and quicker again. Simulated; the scheduler sees measured steps only.

Llama-3-8B on an H100, a KV pool of 153,600 tokens, Azure 2023 conversation lengths, Poisson arrivals for 60 s, SLO ttft
1 s and tbt 100 ms. At 20 s steps begin to take twice as long: to the end, or up to 40 s. And to the end, with arrivals
for 120 s, of which those of the other cases are the first: what is kept at whose expense shows only once others come.
`rota, term by term`: without recognising a change of the machine as a whole (runtime/scheduler/cost.py). `rota, a
half`: with a first token worth half of a promise (runtime/scheduler/triage.py). Needs the trace's file (CC-BY; Patel et
al., Splitwise, ISCA 2024).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from record import write

from superinfer.runtime.scheduler import cost, standing
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
KV_TOKENS, DRAM_TOKENS = 153_600, 524_288
SLOWER = 20.0, 2.0  # seconds, times
# Seconds of arrivals, and paces.
CASES = {
    "slower": (60.0, (SLOWER,)),
    "slower until 40 s": (60.0, (SLOWER, (40.0, 1.0))),
    "slower, 120 s": (120.0, (SLOWER,)),
}
LONGEST = max(duration for duration, _ in CASES.values())
WINDOWS = (0, 20, 25, 30, 40, 45, 50, 60, 75, 90, 105, 120)  # seconds, of arrivals
ARMS = ("rota", "rota, term by term", "rota, a half", "fcfs")


def run(rate: float, seed: int, arm: str, case: str, trace: Path) -> dict[str, Any]:
    """One run: shares of promises kept, of all requests and by when they came; and the 99th percentile of gaps."""
    duration, paces = CASES[case]
    jobs = make_jobs("azure", rate=rate, duration=LONGEST, seed=seed, trace=trace, slos=[(1.0, STREAM)])
    jobs = [job for job in jobs if job.at < duration]
    ended: list[Sequence] = []
    config = SimConfig(policy=arm.partition(",")[0], kv_tokens=KV_TOKENS, dram_tokens=DRAM_TOKENS, paces=paces)
    changed, first_token = cost.CHANGED, standing.FIRST_TOKEN
    try:
        if arm == "rota, term by term":
            cost.CHANGED = 10**9
        if arm == "rota, a half":
            standing.FIRST_TOKEN = 0.5
        result = simulate(jobs, profile_of("h100-pcie5"), shape_of("llama-3-8b"), config, ended.append)
    finally:
        cost.CHANGED, standing.FIRST_TOKEN = changed, first_token
    by_arrival = []
    for begin, end in itertools.pairwise(at for at in WINDOWS if at <= duration):
        mine = [sequence for sequence in ended if begin <= sequence.arrival < end]
        met = [s.timeline.verdict((s.finished_at or 0.0) - s.arrival).met for s in mine]
        by_arrival.append(statistics.mean(met))
    return {
        "met": result.met,
        "ttft_met": result.ttft_met,
        "tbt_p99_ms": result.tbt.p99 * 1e3,
        "met_by_arrival": by_arrival,
    }


def main() -> None:
    """Simulate, print, write results/sim-slowdown.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--rates", default="18")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for rate in map(float, arguments.rates.split(",")):
        for case in CASES:
            for arm in ARMS:
                runs = [run(rate, seed, arm, case, arguments.trace) for seed in range(arguments.seeds)]
                row: dict[str, Any] = {"rate": rate, "case": case, "arm": arm, "seeds": arguments.seeds}
                for figure in ("met", "ttft_met", "tbt_p99_ms"):
                    row[figure] = statistics.mean(one[figure] for one in runs)
                row["met_by_seed"] = [one["met"] for one in runs]
                row["met_by_arrival"] = [
                    statistics.mean(v) for v in zip(*(r["met_by_arrival"] for r in runs), strict=True)
                ]
                rows.append(row)
                print(
                    f"{rate:g}/s {case:18} {arm:18} TTFT {row['ttft_met']:6.1%}  all {row['met']:6.1%}  TBT p99 "
                    f"{row['tbt_p99_ms']:.0f} ms  by arrival {' '.join(f'{met:.0%}' for met in row['met_by_arrival'])}",
                    flush=True,
                )
    out = write(
        "sim-slowdown",
        f"python benchmarks/sim_slowdown.py azure_conv_2023.csv --rates {arguments.rates} --seeds {arguments.seeds}",
        {"simulated": True, "hardware": "h100-pcie5", "model": "llama-3-8b", "windows_s": WINDOWS, "runs": rows},
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()

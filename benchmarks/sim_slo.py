"""RotaSched against its baselines, simulated: one GPU, Azure 2023 conversation lengths, a sweep of rates.

Llama-3-8B, a KV pool of 153,600 tokens, 64 GiB of DRAM behind PCIe 5, Poisson arrivals for 60 s, SLO ttft 1 s and tbt
100 ms. Everything is simulated (docs/simulator.md). Needs the trace's file (CC-BY; Patel et al., Splitwise, ISCA 2024).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import RESULTS, write
from sim_rows import commit, draw, kept_rows

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.report import Point, check_can_plot, plot_residency
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
KV_TOKENS, DRAM_TOKENS = 153_600, 524_288
POLICIES = "rota,fcfs,edf,sjf,priority,lru,lvf-time"


def summary(result: SimResult) -> dict[str, float]:
    """What is compared."""
    moved = result.moved
    return {
        "ttft_met": result.ttft_met or 0.0,
        "met": result.met or 0.0,
        "goodput": result.goodput,
        "tokens_per_s": result.tokens_per_s,
        "tpot_ms": result.tpot.mean * 1e3,
        "ttft_p50_s": result.ttft.p50,
        "tbt_p50_ms": result.tbt.p50 * 1e3,
        "tbt_p99_ms": result.tbt.p99 * 1e3,
        "preemptions": result.preemptions,
        "rotations": moved.rotations_out if moved else 0,
        "gbps_in": moved.gbps_in if moved else 0.0,
        "gbps_out": moved.gbps_out if moved else 0.0,
        "stall_share": moved.stall_share if moved else 0.0,
        "plan_cpu_p50_ms": result.plan_ms.p50,
    }


def main() -> None:
    """Simulate, print, write results/sim-<gpu>-slo.json and three pictures beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--hardware", default="h100-pcie5")
    parser.add_argument("--rates", default="10,15,20,25,30,35,40,45")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--keep", action="store_true", help="keep the file's rows of other rates and policies")
    arguments = parser.parse_args()
    check_can_plot(RESULTS)
    profile, shape = profile_of(arguments.hardware), shape_of("llama-3-8b")
    name = f"sim-{profile.name.partition('-')[0]}-slo"
    rates, policies = [float(rate) for rate in arguments.rates.split(",")], arguments.policies.split(",")
    anew = {(rate, policy) for rate in rates for policy in policies}
    rows = kept_rows(name, ("rate", "policy"), anew) if arguments.keep else []
    points = []
    for rate in rates:
        for policy in policies:
            # The artifact's rule is for a link nine times as fast; here it thrashes, at minutes of wall time a run.
            seeds = 1 if policy == "lvf-time" else arguments.seeds
            runs = []
            for seed in range(seeds):
                jobs = make_jobs(
                    "azure", rate=rate, duration=arguments.duration, seed=seed, trace=arguments.trace,
                    slos=[(1.0, STREAM)],
                )  # fmt: skip
                config = SimConfig(policy=policy, kv_tokens=KV_TOKENS, dram_tokens=DRAM_TOKENS)
                result = simulate(jobs, profile, shape, config)
                runs.append(summary(result))
                if seed == 0 and rate == 25 and policy in ("rota", "fcfs"):
                    points.append(Point(rate, result))
            mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
            spread = {name: [min(r[name] for r in runs), max(r[name] for r in runs)] for name in ("met", "ttft_met")}
            row = {"rate": rate, "policy": policy, "seeds": seeds, "commit": commit(), "mean": mean, "range": spread}
            rows.append(row)
            print(
                f"{rate:g}/s {policy:9} TTFT {mean['ttft_met']:6.1%}  all {mean['met']:6.1%}  goodput "
                f"{mean['goodput']:5.2f}  {mean['tokens_per_s']:5,.0f} tok/s  TPOT {mean['tpot_ms']:.1f} ms  "
                f"{mean['rotations']:,.0f} rotations  plan {mean['plan_cpu_p50_ms']:.2f} ms",
                flush=True,
            )
            _write(arguments, name, rows)
    shown = [{**row, **row["mean"]} for row in rows if row["policy"] in ("rota", "fcfs", "sjf", "edf")]
    draw(shown, name)
    if points:
        plot_residency(points, RESULTS, name)


def _write(arguments: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> None:
    """What there is so far."""
    rows.sort(key=lambda row: (row["rate"], POLICIES.split(",").index(row["policy"])))
    write(
        name,
        f"python benchmarks/sim_slo.py azure_conv_2023.csv --hardware {arguments.hardware} --rates {arguments.rates} "
        f"--seeds {arguments.seeds} --policies {arguments.policies}{' --keep' if arguments.keep else ''}",
        {
            "simulated": True, "hardware": arguments.hardware, "model": "llama-3-8b", "workload": "azure",
            "duration_s": arguments.duration, "kv_tokens": KV_TOKENS, "dram_tokens": DRAM_TOKENS,
            "slo": {"ttft": STREAM.ttft, "tbt": STREAM.tbt}, "runs": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

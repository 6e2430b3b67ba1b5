"""What planning each step late is worth (`EngineConfig.plan_late`), simulated: an H200, Azure 2023 lengths.

Llama-3-8B, a KV pool of 153,600 tokens, 64 GiB of DRAM, Poisson arrivals for 60 s, SLO ttft 1 s and tbt 100 ms, 15 s
for the drain. Steps are planned just before the one before them ends, or when that begins; what they cost the host and
how far they are from what is expected is as measured (sim_truth.py). Judged where the client stands.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from record import write
from sim_rows import commit
from sim_slo import DRAM_TOKENS, KV_TOKENS, STREAM
from sim_truth import SPREAD, host_of, simulated

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig
from superinfer.runtime.sim.workload import make_jobs

WAY_S, DRAIN_S = 0.002, 15.0
FIGURES = ("ttft_s", "ttft_p50_s", "tpot_s", "ttft_met", "met", "tokens_per_s", "rotations")


def main() -> None:
    """Simulate, print, write results/sim-plan-late.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--hardware", default="h200-pcie5")
    parser.add_argument("--cells", default="fcfs:10,fcfs:15,rota:10,rota:15,rota:25,rota:35", help="policy:rate")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    profile, shape = profile_of(given.hardware), shape_of("llama-3-8b")
    rows = []
    for policy, rate in (cell.split(":") for cell in given.cells.split(",")):
        for late in (False, True):
            runs = []
            for seed in range(given.seeds):
                jobs = make_jobs(
                    "azure", rate=float(rate), duration=60.0, seed=seed, trace=given.trace, slos=[(1.0, STREAM)]
                )
                config = SimConfig(
                    policy=policy,
                    kv_tokens=KV_TOKENS,
                    dram_tokens=DRAM_TOKENS,
                    depth=2,
                    plan_late=late,
                    host=host_of(None),
                    spread=SPREAD,
                    spread_seed=seed,
                    way_s=WAY_S,
                    give_up_s=DRAIN_S,
                )
                figures, _ = simulated(jobs, profile, shape, config)
                runs.append(figures)
            means = {name: statistics.mean(run[name] or 0.0 for run in runs) for name in FIGURES}
            rows.append({"policy": policy, "rate": float(rate), "late": late, **means})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
            print(f"{policy} {rate}/s {'late' if late else 'at once':8}{shown}", flush=True)
    settings = {"hardware": profile.name, "seeds": given.seeds, "way_s": WAY_S, "drain_s": DRAIN_S, "commit": commit()}
    command = f"python benchmarks/sim_plan_late.py {given.trace.name} --cells {given.cells} --seeds {given.seeds}"
    print(f"written to {write('sim-plan-late', command, {**settings, 'rows': rows})}")


if __name__ == "__main__":
    main()

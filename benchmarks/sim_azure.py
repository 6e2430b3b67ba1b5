"""The simulator against a real server: vLLM 0.24 on an H100, KV pool held to 153,600 tokens, Azure 2023 lengths.

What was measured there stands below; nothing in the simulator was fitted to it (docs/simulator.md). Several seeds, as
one minute of Poisson arrivals scatters. Needs the trace's file (CC-BY; Patel et al., Splitwise, ISCA 2024).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import write

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO

# vLLM 0.24.0, one NVIDIA H100 80GB HBM3, Llama-3-8B shape, bf16, Poisson arrivals for 60 s, ignore_eos, November 2026.
# TTFT in seconds, mean TPOT in ms, output tokens/s; None: over 30 s.
MEASURED: dict[int, dict[str, float | None]] = {
    15: {"ttft_p50": 0.07, "ttft_p90": 0.18, "within_1s": 1.0, "within_5s": 1.0, "tpot_ms": 15.5, "tok_s": 3107},
    25: {"ttft_p50": 6.7, "ttft_p90": 14.7, "within_1s": 0.183, "within_5s": 0.397, "tpot_ms": 29.4, "tok_s": 3928},
    35: {"ttft_p50": 21.0, "ttft_p90": None, "within_1s": 0.086, "within_5s": 0.174, "tpot_ms": 30.3, "tok_s": 3994},
}  # fmt: skip


def summary(result: SimResult) -> dict[str, float]:
    """The columns of MEASURED, and the output tokens for each request that this seed drew."""
    return {
        "ttft_p50": result.ttft.p50,
        "ttft_p90": result.ttft.p90,
        "within_1s": result.within_1s,
        "within_5s": result.within_5s,
        "tpot_ms": result.tpot.mean * 1e3,
        "tok_s": result.tokens_per_s,
        "requests": result.requests,
        "output_tokens": result.tokens_per_s * result.duration,
    }


def main() -> None:
    """Simulate, print beside the measured, write results/sim-h100-azure.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    profile, shape = profile_of("h100-pcie5"), shape_of("llama-3-8b")
    config = SimConfig(policy="fcfs", kv_tokens=153_600)
    slos = [(1.0, SLO(ttft=1.0, tbt=0.1))]
    rows: list[dict[str, Any]] = []
    for rate, measured in MEASURED.items():
        runs = []
        for seed in range(arguments.seeds):
            jobs = make_jobs("azure", rate=rate, duration=60, seed=seed, trace=arguments.trace, slos=slos)
            runs.append(summary(simulate(jobs, profile, shape, config)))
        mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
        spread = {name: [min(run[name] for run in runs), max(run[name] for run in runs)] for name in runs[0]}
        rows.append({"rate": rate, "simulated": mean, "range": spread, "measured": measured})
        for name, value in measured.items():
            low, high = spread[name]
            text = "over 30" if value is None else f"{value:g}"
            print(f"{rate}/s  {name:10}  measured {text:>8}  simulated {mean[name]:9.3f}  ({low:.3f} to {high:.3f})")
    out = write(
        "sim-h100-azure",
        f"python benchmarks/sim_azure.py azure_conv_2023.csv --seeds {arguments.seeds}",
        {
            "hardware": profile.name,
            "model": shape.name,
            "policy": config.policy,
            "kv_tokens": config.kv_tokens,
            "seeds": arguments.seeds,
            "measured_on": "vLLM 0.24.0, NVIDIA H100 80GB HBM3, 60 s of Poisson arrivals",
            "rates": rows,
        },
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()

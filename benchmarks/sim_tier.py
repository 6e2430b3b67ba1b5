"""What the second tier does to an overload under policy `lru`, simulated: tokens/s and first tokens beside those of one
tier, over links from that of the hardware down to 0.5 GB/s.

    python benchmarks/sim_tier.py
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from record import write

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, SimResult, simulate
from superinfer.runtime.sim.workload import Job

# Prompt and output tokens, requests a second. The first is the overload of benchmarks/gpu_rotation.py.
WORKLOADS = {"short": ((200, 1200), (100, 300), 60.0), "long": ((20, 600), (50, 800), 60.0)}
POOL, DRAM = 3000 * 16, 8192 * 16  # tokens
LINKS = (None, 12.0, 3.0, 0.5)  # GB/s each way; None: the hardware's own


def jobs_of(workload: str, requests: int, seed: int) -> list[Job]:
    """Arrivals one by one, at random."""
    prompts, outputs, rate = WORKLOADS[workload]
    rng, jobs, at = random.Random(seed), [], 0.0
    for number in range(requests):
        at += rng.expovariate(rate)
        length = rng.randrange(*prompts)
        jobs.append(Job(at, length, rng.randrange(*outputs), (-1 - number,), length))
    return jobs


def serve(jobs: list[Job], hardware: str, gb_s: float | None, dram: int) -> SimResult:
    """One run. dram: tokens."""
    profile = profile_of(hardware)
    if gb_s is not None:
        profile = profile._replace(link_in=gb_s * 1e9, link_out=gb_s * 1e9, link_duplex=1.8 * gb_s * 1e9)
    batch = dict(max_batch_size=128, max_batch_tokens=2048, depth=2)
    config = SimConfig(policy="lru", kv_tokens=POOL, dram_tokens=dram, **batch)
    return simulate(jobs, profile, shape_of("llama-3-8b"), config)


def row_of(result: SimResult, without: SimResult) -> dict[str, Any]:
    moved = result.moved
    assert moved is not None
    return {
        "tokens_per_s": result.tokens_per_s,
        "of_one_tier": result.tokens_per_s / without.tokens_per_s,
        "ttft_p50": result.ttft.p50,
        "ttft_p90": result.ttft.p90,
        "rotations": moved.rotations_out,
        "preemptions": result.preemptions,
        "gb_in": moved.bytes_in / 1e9,
        "gb_out": moved.bytes_out / 1e9,
    }


def main() -> None:
    """Simulate, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="sim-tier")
    parser.add_argument("--hardware", nargs="+", default=["h200-pcie5", "h100-pcie5", "gh200-144"])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    runs = []
    for hardware in arguments.hardware:
        for workload in WORKLOADS:
            for seed in range(arguments.seeds):
                jobs = jobs_of(workload, arguments.requests, seed)
                without = serve(jobs, hardware, None, 0)
                rows = {str(gb_s or "own"): row_of(serve(jobs, hardware, gb_s, DRAM), without) for gb_s in LINKS}
                one = {"tokens_per_s": without.tokens_per_s, "ttft_p50": without.ttft.p50, "ttft_p90": without.ttft.p90}
                runs.append({"hardware": hardware, "workload": workload, "seed": seed, "one_tier": one, "links": rows})
                shown = ", ".join(
                    f"{name} {row['of_one_tier']:.3f} (TTFT p50 {row['ttft_p50']:.2f} s, {row['rotations']} rotations)"
                    for name, row in rows.items()
                )
                print(
                    f"{hardware} {workload} seed {seed}: one tier TTFT p50 {without.ttft.p50:.2f} s; {shown}",
                    flush=True,
                )
    least = min(row["of_one_tier"] for run in runs for row in run["links"].values())
    print(f"least tokens/s of one tier's: {least:.3f}")
    record = {"settings": vars(arguments) | {"pool_tokens": POOL, "dram_tokens": DRAM}, "least": least, "runs": runs}
    print(f"written to {write(arguments.name, 'python benchmarks/sim_tier.py', record)}")


if __name__ == "__main__":
    main()

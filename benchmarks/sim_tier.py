"""What the second tier does to an overload, simulated: tokens/s, first tokens and promises beside those of one tier,
for each policy, over links from that of the hardware down to 0.5 GB/s.

    python benchmarks/sim_tier.py [--trace azure_conv_2023.csv]

Workload "azure" is left out without its trace (CC-BY; Patel et al., Splitwise, ISCA 2024).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from record import write

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, make_jobs
from superinfer.runtime.slo import SLO

# Prompt and output tokens, requests a second. The first is the overload of benchmarks/gpu_rotation.py.
WORKLOADS = {"short": ((200, 1200), (100, 300), 60.0), "long": ((20, 600), (50, 800), 60.0)}
# As in the other simulated figures; requests a second, more than one tier of this size serves.
DRAWN = {"sharegpt": 40.0, "lmsys": 60.0, "azure": 25.0}
STREAM = SLO(ttft=1.0, tbt=0.1)
POLICIES = ("fcfs", "edf", "sjf", "priority", "lru", "rota")
GOAL = 0.98
POOL, DRAM = 3000 * 16, 8192 * 16  # tokens
LINKS = (None, 12.0, 3.0, 0.5)  # GB/s each way; None: the hardware's own


def jobs_of(workload: str, requests: int, seed: int, trace: Path | None) -> list[Job]:
    """Arrivals one by one, at random."""
    if workload in DRAWN:
        rate, slos = DRAWN[workload], [(1.0, STREAM)]
        trace = trace if workload == "azure" else None
        return make_jobs(workload, rate=rate, duration=requests / rate, seed=seed, trace=trace, slos=slos)
    prompts, outputs, rate = WORKLOADS[workload]
    rng, jobs, at = random.Random(seed), [], 0.0
    for number in range(requests):
        at += rng.expovariate(rate)
        length = rng.randrange(*prompts)
        jobs.append(Job(at, length, rng.randrange(*outputs), (-1 - number,), length, STREAM))
    return jobs


def serve(jobs: list[Job], policy: str, hardware: str, gb_s: float | None, dram: int) -> SimResult:
    """One run. dram: tokens."""
    profile = profile_of(hardware)
    if gb_s is not None:
        profile = profile._replace(link_in=gb_s * 1e9, link_out=gb_s * 1e9, link_duplex=1.8 * gb_s * 1e9)
    batch = dict(max_batch_size=128, max_batch_tokens=2048, depth=2)
    config = SimConfig(policy=policy, kv_tokens=POOL, dram_tokens=dram, **batch)
    return simulate(jobs, profile, shape_of("llama-3-8b"), config)


def figures(result: SimResult) -> dict[str, Any]:
    """What is compared."""
    return {
        "tokens_per_s": result.tokens_per_s,
        "ttft_p50": result.ttft.p50,
        "ttft_p90": result.ttft.p90,
        "met": result.met,
        "preemptions": result.preemptions,
    }


def row_of(result: SimResult, without: SimResult) -> dict[str, Any]:
    """Of a run with two tiers."""
    moved = result.moved
    assert moved is not None
    return figures(result) | {
        "of_one_tier": result.tokens_per_s / without.tokens_per_s,
        "rotations": moved.rotations_out,
        "gb_in": moved.bytes_in / 1e9,
        "gb_out": moved.bytes_out / 1e9,
    }


def measure(policy: str, hardware: str, workload: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All links, beside one tier."""
    jobs = jobs_of(workload, arguments.requests, seed, arguments.trace)
    without = serve(jobs, policy, hardware, None, 0)
    rows = {str(gb_s or "own"): row_of(serve(jobs, policy, hardware, gb_s, DRAM), without) for gb_s in LINKS}
    shown = ", ".join(
        f"{name} {row['of_one_tier']:.3f} (TTFT p50 {row['ttft_p50']:.2f} s, {row['met']:.0%} met, "
        f"{row['rotations']} rotations)"
        for name, row in rows.items()
    )
    print(
        f"{policy:8} {hardware} {workload} seed {seed}: one tier TTFT p50 {without.ttft.p50:.2f} s, "
        f"{without.met:.0%} met; {shown}",
        flush=True,
    )
    case = {"policy": policy, "hardware": hardware, "workload": workload, "seed": seed}
    return case | {"one_tier": figures(without), "links": rows}


def least(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By policy: the least share of one tier's tokens/s, the least mean over seeds, and what missed the goal."""
    found: dict[str, Any] = {}
    for policy in dict.fromkeys(run["policy"] for run in runs):
        shares: dict[tuple[str, str, str], list[float]] = {}
        for run in runs:
            if run["policy"] == policy:
                for link, row in run["links"].items():
                    shares.setdefault((run["hardware"], run["workload"], link), []).append(row["of_one_tier"])
        means = {" ".join(case): sum(values) / len(values) for case, values in shares.items()}
        found[policy] = {
            "least": min(min(values) for values in shares.values()),
            "least_mean": min(means.values()),
            "runs": sum(map(len, shares.values())),
            "runs_below": sum(value < GOAL for values in shares.values() for value in values),
            "means_below": {case: mean for case, mean in means.items() if mean < GOAL},
        }
    return found


def main() -> None:
    """Simulate, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="sim-tier")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--hardware", nargs="+", default=["h200-pcie5", "h100-pcie5", "gh200-144"])
    parser.add_argument("--workloads", nargs="+", default=[*WORKLOADS, *DRAWN])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    workloads = [name for name in arguments.workloads if name != "azure" or arguments.trace]
    runs = [
        measure(policy, hardware, workload, seed, arguments)
        for policy in arguments.policies
        for hardware in arguments.hardware
        for workload in workloads
        for seed in range(arguments.seeds)
    ]
    found = least(runs)
    for policy, row in found.items():
        print(
            f"{policy:8} least tokens/s of one tier's {row['least']:.3f}, least mean of seeds {row['least_mean']:.3f}; "
            f"{row['runs_below']} of {row['runs']} runs below {GOAL}"
        )
    given = vars(arguments) | {"trace": arguments.trace.name if arguments.trace else None, "workloads": workloads}
    settings = given | {"pool_tokens": POOL, "dram_tokens": DRAM, "slo": {"ttft": STREAM.ttft, "tbt": STREAM.tbt}}
    record = {"settings": settings, "least": found, "runs": runs}
    command = f"python benchmarks/sim_tier.py --hardware {' '.join(arguments.hardware)} --seeds {arguments.seeds}"
    command += " --trace azure_conv_2023.csv" if arguments.trace else ""
    print(f"written to {write(arguments.name, command, record)}")


if __name__ == "__main__":
    main()

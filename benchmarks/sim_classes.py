"""RotaSched, simulated on one H100: mixed classes, and prompts that share prefixes.

Mixed: half the requests of an Azure trace are interactive (ttft 1 s, tbt 100 ms), half are a batch without a promise.
Agents: 20 tenants with a system prompt of 2,000 tokens each, and Mooncake's conversations, with the scheduler's
knowledge of prefixes on and off (the cache itself is on in both).
Mooncake's prompts of 12,000 tokens come again after a median of 384 requests, which no memory here holds. `mooncake/8`
has an eighth of each prompt's tokens, every block of 512 being one of 64: then DRAM holds about so many requests.
`mooncake-gh200` has whole prompts again, on a GH200 of 144 GB with 400 GiB of DRAM, and lasts long enough for repeats.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from record import write

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, lognormal, make_jobs
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
H100, LLAMA = profile_of("h100-pcie5"), shape_of("llama-3-8b")
KV_TOKENS, DRAM_TOKENS = 153_600, 524_288
GH200, GH200_DRAM = profile_of("gh200-144"), 400 * 2**30 // LLAMA.kv_bytes_per_token
TENANTS, SYSTEM, PART = 20, 2000, 500


def agents(rate: float, duration: float, seed: int) -> list[Job]:
    """Requests of TENANTS, each its system prompt and up to PART tokens of its own; answers of 200 +- 150 tokens."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * duration * 2)))
    times = times[times < duration]
    outputs = lognormal(rng, 200, 150, len(times))
    jobs = []
    for number, (at, output) in enumerate(zip(times, outputs, strict=True)):
        tenant, own = int(rng.integers(TENANTS)), int(rng.integers(50, PART))
        blocks = (*(tenant * 10 + part for part in range(SYSTEM // PART)), -1 - number)
        jobs.append(Job(float(at), SYSTEM + own, int(output), blocks, PART, STREAM))
    return jobs


def run(jobs: list[Job], policy: str, workload: str = "", **settings: Any) -> SimResult:
    """With both tiers: on the H100, or what the workload names."""
    if workload == "mooncake-gh200":
        config = SimConfig(policy=policy, dram_tokens=GH200_DRAM, **settings)
        return simulate(jobs, GH200, LLAMA, config)
    config = SimConfig(policy=policy, kv_tokens=KV_TOKENS, dram_tokens=DRAM_TOKENS, **settings)
    return simulate(jobs, H100, LLAMA, config)


def _shared_jobs(name: str, rate: float, arguments: argparse.Namespace, seed: int) -> list[Job]:
    if name == "agents":
        return agents(rate, arguments.duration, seed)
    slo = STREAM if name == "mooncake/8" else SLO(ttft=5.0, tbt=0.1)
    duration = arguments.long if name == "mooncake-gh200" else arguments.duration
    jobs = make_jobs("mooncake", rate=rate, duration=duration, seed=seed, trace=arguments.mooncake, slos=[(1.0, slo)])
    if name == "mooncake/8":
        return [job._replace(prompt_length=max(1, job.prompt_length // 8), block=64) for job in jobs]
    return jobs


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",") if rate]


def main() -> None:
    """Simulate, print, write results/sim-classes.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("azure", type=Path)
    parser.add_argument("mooncake", type=Path)
    parser.add_argument("--mixed-rates", default="20,22")
    parser.add_argument("--agent-rates", default="30,40,60")
    parser.add_argument("--mooncake-rates", default="2,3")
    parser.add_argument("--scaled-rates", default="20,30")
    parser.add_argument("--gh200-rates", default="4,6")
    parser.add_argument("--long", type=float, default=300.0, help="seconds of mooncake-gh200")
    parser.add_argument("--scaled-seeds", type=int, default=5, help="of mooncake/8: as few requests as these vary")
    parser.add_argument("--name", default="sim-classes", help="of the result file")
    parser.add_argument("--duration", type=float, default=60.0)
    arguments = parser.parse_args()
    mixed, shared = [], []
    for rate in _rates(arguments.mixed_rates):
        jobs = make_jobs(
            "azure", rate=rate, duration=arguments.duration, seed=0, trace=arguments.azure,
            slos=[(0.5, STREAM), (0.5, SLO.batch())],
        )  # fmt: skip
        for policy in ("fcfs", "rota"):
            result = run(jobs, policy)
            row = {"rate": rate, "policy": policy, "interactive_met": result.met, "ttft_met": result.ttft_met}
            mixed.append(row | {"tokens_per_s": result.tokens_per_s, "duration_s": result.duration})
            print(mixed[-1], flush=True)
    workloads = {
        "agents": arguments.agent_rates,
        "mooncake": arguments.mooncake_rates,
        "mooncake/8": arguments.scaled_rates,
        "mooncake-gh200": arguments.gh200_rates,
    }
    for name, rates in workloads.items():
        for rate in _rates(rates):
            seeds = arguments.scaled_seeds if name == "mooncake/8" else 1
            all_jobs = [_shared_jobs(name, rate, arguments, seed) for seed in range(seeds)]
            for policy, aware in (("rota", True), ("rota", False), ("fcfs", True)):
                runs = [run(jobs, policy, name, prefix_aware=aware) for jobs in all_jobs]
                row = {"workload": name, "rate": rate, "policy": policy, "prefix_aware": aware, "seeds": seeds}
                for figure in ("met", "goodput", "cached", "ttft_met"):
                    row[figure] = statistics.mean(getattr(result, figure) for result in runs)
                row["goodput_by_seed"] = [result.goodput for result in runs]
                shared.append(row)
                print(row, flush=True)
    out = write(
        arguments.name,
        f"python benchmarks/sim_classes.py azure_conv_2023.csv mooncake_conversation.jsonl --mixed-rates "
        f"{arguments.mixed_rates!r} --agent-rates {arguments.agent_rates!r} "
        f"--mooncake-rates {arguments.mooncake_rates!r} --scaled-rates {arguments.scaled_rates!r} "
        f"--gh200-rates {arguments.gh200_rates!r} --long {arguments.long:g} --scaled-seeds {arguments.scaled_seeds} "
        f"--duration {arguments.duration:g} --name {arguments.name}",
        {"simulated": True, "hardware": H100.name, "model": LLAMA.name, "mixed": mixed, "shared_prefixes": shared},
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()

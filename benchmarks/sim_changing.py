"""RotaSched against its baselines where the load changes: what requests are like, or how many come. Simulated.

Llama-3-8B on an H200, a KV pool of 153,600 tokens, 64 GiB of DRAM behind PCIe 5, SLO ttft 1 s and tbt 100 ms. Unless
told otherwise arrivals are Poisson, answers have 200 tokens on average, and lengths are drawn around means that may
change (lognormal, standard deviation half of the mean).

growing: prompts of 200 tokens at first, and of 4,000 after 60 s, at 14 requests/s.
to long, to short: chat (400 tokens) until 30 s and documents (6,000) from then on, at 8/s; and the other way round.
agents: 64 conversations of 12 turns, one every 6 s, all within half a second; each adds 900 tokens to a context.
wave: prompts of 1,000 tokens at 20/s, but for a swing of 0.9 times that, once in 60 s, for 120 s.
bursts: the same at 8/s, and at 48/s for 10 s of every 30.
More than the machine can do, one every 0.1 s for 24 s, with answers of 200 tokens:
alike: prompts of 6,000 tokens. doubling: of 4,000 at first and 8,000 at last, each within 30 % of that. dearer: the
same exactly, so that each is a little dearer than any before it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from record import write

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, lognormal
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
KV_TOKENS, DRAM_TOKENS = 153_600, 524_288
POLICIES = "rota,fcfs,edf,sjf"
ANSWER = 200
AGENTS, TURNS, TURN_S, ADDED, PART, SAID = 64, 12, 6.0, 900, 128, 100
AT_ONCE, EVERY_S = 240, 0.1

Of = Callable[[float], float]  # of the time, seconds


def length(rng: np.random.Generator, mean: float) -> int:
    """Tokens around this mean."""
    return int(lognormal(rng, mean, mean / 2, 1)[0])


def drawn(seed: int, duration: float, most: float, rate: Of, prompt: Of) -> list[Job]:
    """Poisson arrivals whose rate, at most `most`, and mean prompt are functions of the time; they share nothing."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / most, math.ceil(most * duration * 2) + 50))
    jobs: list[Job] = []
    for at in times[times < duration].tolist():
        if rng.random() * most < rate(at):
            tokens = length(rng, prompt(at))
            jobs.append(Job(at, tokens, length(rng, ANSWER), (-1 - len(jobs),), tokens, STREAM))
    return jobs


def agents(seed: int) -> list[Job]:
    """Turns that go on from the ones before them, in blocks of PART tokens."""
    rng = np.random.default_rng(seed)
    jobs = []
    for agent in range(AGENTS):
        blocks: tuple[int, ...] = ()
        for turn in range(TURNS):
            first = (agent * TURNS + turn) * 1000
            blocks += tuple(range(first, first + max(1, round(length(rng, ADDED) / PART))))
            at = turn * TURN_S + float(rng.uniform(0.0, 0.5))
            jobs.append(Job(at, len(blocks) * PART, length(rng, SAID), blocks, PART, STREAM))
    return sorted(jobs, key=lambda job: job.at)


def one_by_one(prompts: np.ndarray) -> list[Job]:
    """One every EVERY_S."""
    lengths = prompts.astype(int).tolist()
    return [Job(n * EVERY_S, tokens, ANSWER, (-1 - n,), tokens, STREAM) for n, tokens in enumerate(lengths)]


def doubling(seed: int, within: float) -> list[Job]:
    """Prompts that double, each within such a share of that."""
    spread = np.random.default_rng(seed).uniform(1 - within, 1 + within, AT_ONCE)
    return one_by_one(np.linspace(4000, 8000, AT_ONCE) * spread)


CASES: dict[str, Callable[[int], list[Job]]] = {
    "growing": lambda seed: drawn(seed, 60.0, 14.0, lambda at: 14.0, lambda at: 200 + 3800 * at / 60),
    "to long": lambda seed: drawn(seed, 60.0, 8.0, lambda at: 8.0, lambda at: 400 if at < 30 else 6000),
    "to short": lambda seed: drawn(seed, 60.0, 8.0, lambda at: 8.0, lambda at: 6000 if at < 30 else 400),
    "agents": agents,
    "wave": lambda seed: drawn(
        seed, 120.0, 38.0, lambda at: 20.0 - 18.0 * math.cos(at * math.tau / 60), lambda at: 1000
    ),
    "bursts": lambda seed: drawn(seed, 90.0, 48.0, lambda at: 48.0 if at % 30 < 10 else 8.0, lambda at: 1000),
    "alike": lambda seed: one_by_one(np.full(AT_ONCE, 6000)),
    "doubling": lambda seed: doubling(seed, 0.3),
    "dearer": lambda seed: doubling(seed, 0.0),
}


def main() -> None:
    """Simulate, print, write results/sim-changing.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--policies", default=POLICIES)
    arguments = parser.parse_args()
    profile, shape, rows = profile_of("h200-pcie5"), shape_of("llama-3-8b"), []
    for case in arguments.cases.split(","):
        for policy in arguments.policies.split(","):
            config = SimConfig(policy=policy, kv_tokens=KV_TOKENS, dram_tokens=DRAM_TOKENS)
            runs = [simulate(CASES[case](seed), profile, shape, config) for seed in range(arguments.seeds)]
            row: dict[str, Any] = {"case": case, "policy": policy, "met_by_seed": [run.met or 0.0 for run in runs]}
            row["met"] = statistics.mean(row["met_by_seed"])
            row["tokens_per_s"] = statistics.mean(run.tokens_per_s for run in runs)
            rows.append(row)
            print(f"{case:9} {policy:5} all {row['met']:6.1%}  {row['tokens_per_s']:5,.0f} tok/s", flush=True)
    out = write(
        "sim-changing",
        f"python benchmarks/sim_changing.py --seeds {arguments.seeds} --cases {arguments.cases!r} --policies "
        f"{arguments.policies}",
        {
            "simulated": True, "hardware": profile.name, "model": shape.name, "kv_tokens": KV_TOKENS,
            "dram_tokens": DRAM_TOKENS, "slo": {"ttft": STREAM.ttft, "tbt": STREAM.tbt}, "runs": rows,
        },
    )  # fmt: skip
    print(f"written to {out}")


if __name__ == "__main__":
    main()

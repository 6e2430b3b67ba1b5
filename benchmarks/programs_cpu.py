"""Share of whole programs that keep their deadline, with and without planning, on the embedded model.

Programs of five shapes arrive at random times, whether or not earlier ones have ended, at `--load` times the rate
that the engine was measured to sustain; each has a deadline drawn from a range and is given up then. Every arm gets
the same arrivals; arms alternate within a round. Lengths are fixed by the shapes, so every arm computes the same.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from record import write

import superinfer as si

HISTORY = si.History()
TREE, TURNS, DOCUMENTS = 3, 5, 6


def words(seed: int, count: int) -> str:
    """Text that no other program shares."""
    return " ".join(f"shelf {seed} {i} holds {seed * i % 97} boxes." for i in range(count))


def says(name: str, tokens: int) -> Any:
    """An answer of exactly so many tokens."""
    return si.assistant(si.gen(name, max_tokens=tokens, temperature=0, ignore_eos=True))


@si.function(history=HISTORY)
async def tree_of_thought(s, seed):
    """A plan for each of three branches, three solutions of each, and a verdict."""
    s += si.user(words(seed, 4) + " How many boxes?")
    branches = s.fork(TREE)
    for branch in branches:
        branch += says("plan", 8) + si.user("Solve it.")
        leaves = branch.fork(TREE)
        leaves += says("solution", 12)
        await leaves.ajoin()
    await branches.ajoin()
    s += says("verdict", 8)


@si.function(history=HISTORY)
async def react(s, seed):
    """Thoughts with a tool of 20 ms between them."""
    s += si.user(words(seed, 3) + " Which shelf is fullest?")
    for turn in range(TURNS):
        s += says("thought", 10)
        await s.get("thought")
        await asyncio.sleep(0.02)
        s += si.user(f"Observation {turn}: {seed % (turn + 7)}")
    s += says("answer", 8)


@si.function(history=HISTORY)
async def map_reduce(s, seed):
    """A note on each document, then one answer."""
    s += si.system("You take notes.")
    notes = s.fork(DOCUMENTS)
    notes += lambda i: si.user(words(seed + i, 4) + " Write one note.") + says("note", 10)
    await notes.ajoin()
    s += si.user(" ".join(s["note"]))
    s += says("answer", 24)


@si.function(history=HISTORY)
async def extraction(s, seed):
    """One long call."""
    s += si.user(words(seed, 8) + " As JSON.")
    s += says("fields", 40)


@si.function(history=HISTORY)
async def chat(s, seed):
    """Two turns."""
    s += si.user(words(seed, 2) + " Hello.")
    s += says("first", 20)
    await s.get("first")
    s += si.user("Go on.")
    s += says("second", 20)


SHAPES = (tree_of_thought, react, map_reduce, extraction, chat)


async def sustained(count: int) -> float:
    """Programs per second with 12 under way all the time; every shape teaches what it takes meanwhile."""
    limit = asyncio.Semaphore(12)

    async def one(at: int) -> None:
        async with limit:
            await SHAPES[at % len(SHAPES)].arun(10_000 + at)

    started = time.perf_counter()
    await asyncio.gather(*[one(at) for at in range(count)])
    return count / (time.perf_counter() - started)


async def open_loop(
    seed: int, rate: float, seconds: float, deadlines: Sequence[float], plan: bool
) -> list[tuple[str, bool]]:
    """(shape, kept its deadline) of every program that arrived."""
    rng = random.Random(seed)
    slo = si.SLO(on_miss="raise")

    async def one(at: int, wait: float, deadline: float) -> tuple[str, bool]:
        await asyncio.sleep(wait)
        program = SHAPES[at % len(SHAPES)]
        try:
            state = await program.arun(seed * 1000 + at, deadline=deadline, slo=slo, plan=plan)
        except si.DeadlineMissedError:
            return program.name, False
        return program.name, state.stream_executor.error is None and bool(state.slo_report().program.met)

    arrivals, at = [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        arrivals.append((at, rng.uniform(*deadlines)))
    order = list(range(len(arrivals)))
    rng.shuffle(order)
    return list(await asyncio.gather(*[one(order[i], *arrival) for i, arrival in enumerate(arrivals)]))


def main() -> None:
    """Measure, print, write results/programs-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fcfs,edf", help="one or more, with commas")
    parser.add_argument("--load", type=float, default=1.5, help="times the sustained rate")
    parser.add_argument("--deadlines", default="2,10", help="range in seconds, uniform")
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals in each arm and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="programs-cpu", help="of the result file")
    arguments = parser.parse_args()
    policies = arguments.policy.split(",")
    deadlines = [float(d) for d in arguments.deadlines.split(",")]
    arms = [(policy, plan) for policy in policies for plan in ((False,) if policy == "fcfs" else (False, True))]
    met: dict[str, list[float]] = {}
    shapes: dict[str, dict[str, list[bool]]] = {}
    engines = {policy: si.Runtime(policy=policy, threads=2) for policy in policies}
    try:
        si.set_default_backend(engines[policies[0]])
        asyncio.run(sustained(10))  # warm up
        rate = asyncio.run(sustained(30))
        print(f"sustained {rate:.2f} programs/s; arrivals at {arguments.load * rate:.2f}/s")
        for round_ in range(arguments.rounds):
            for policy, plan in arms if round_ % 2 == 0 else arms[::-1]:
                arm = f"{policy}{' planned' if plan else ''}"
                si.set_default_backend(engines[policy])
                si.flush_cache()
                done = asyncio.run(open_loop(round_ + 1, arguments.load * rate, arguments.seconds, deadlines, plan))
                met.setdefault(arm, []).append(statistics.mean(kept for _, kept in done))
                for shape, kept in done:
                    shapes.setdefault(arm, {}).setdefault(shape, []).append(kept)
                print(f"round {round_ + 1}  {arm:14}  {len(done):3} programs  met {met[arm][-1]:.2f}", flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    share = {arm: statistics.mean(values) for arm, values in met.items()}
    measured = {
        "model": "embedded, float32",
        "settings": vars(arguments),
        "sustained_programs_per_s": rate,
        "met_by_round": met,
        "met": share,
        "met_by_shape": {
            arm: {shape: statistics.mean(kept) for shape, kept in by.items()} for arm, by in shapes.items()
        },
    }
    print(f"written to {write(arguments.name, 'python benchmarks/programs_cpu.py', measured)}")


if __name__ == "__main__":
    main()

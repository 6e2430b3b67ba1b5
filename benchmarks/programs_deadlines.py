"""Share of whole programs that keep their deadline under overload, by policy, with and without planning. Simulated.

The planner, the history, the scheduler and the KV bookkeeping are the real ones; the clock and the device (an H100
with Llama-3-8B, unless told otherwise) are simulated. Programs of five shapes arrive as a Poisson process, each with
a deadline drawn from a range, and are given up once it has passed. Answers end well before their max_tokens. Every arm
gets the same programs at the same times. The planner learns from programs that arrive slowly before the measured ones
do.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from record import write

from superinfer.lang.callgraph import Call, CallGraph, site_of
from superinfer.lang.history import History
from superinfer.lang.planner import Planner, Sent, hints_unseen
from superinfer.lang.promise import Promises
from superinfer.lang.report import CallReport
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepRates
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.executor import END_TOKEN, SimExecutor
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import kv_room

PAGE = 16
LONGEST = 4  # times as long as their answers become, calls allow them to be
IGNORE_EOS = SamplingParams(ignore_eos=True)
_unique = itertools.count(1)


@dataclass
class Node:
    """A call to be: `text` new prompt tokens behind those of the call that it goes on from, `output` tokens, and `lag`
    seconds of the program itself before it."""

    name: str
    path: tuple[str, ...]
    after: tuple[int, ...]
    extends: int | None
    text: int
    output: int
    lag: float = 0.0


Shape = Callable[[random.Random], list[Node]]


def tree_of_thought(rng: random.Random) -> list[Node]:
    """Three levels of four forks, and a verdict."""
    nodes: list[Node] = []
    level: list[tuple[int | None, tuple[str, ...]]] = [(None, ())]
    for depth in range(3):
        grown = []
        for parent, path in level:
            for i in range(4):
                after = () if parent is None else (parent,)
                child = (*path, f"fork[{i}]")
                nodes.append(
                    Node(f"step {depth}", child, after, parent, 300 if parent is None else 20, _around(rng, 25))
                )
                grown.append((len(nodes) - 1, child))
        level = grown
    nodes.append(Node("verdict", (), tuple(at for at, _ in level if at is not None), None, 1500, _around(rng, 40)))
    return nodes


def react(rng: random.Random) -> list[Node]:
    """Six turns, a tool of about 100 ms between them."""
    nodes = [Node("thought", (), (), None, 500, _around(rng, 50))]
    for turn in range(1, 6):
        nodes.append(Node("thought", (), (turn - 1,), turn - 1, 120, _around(rng, 50), rng.expovariate(10)))
    return nodes


def map_reduce(rng: random.Random) -> list[Node]:
    """A note on each of 16 documents, then one answer."""
    nodes = [Node("note", (f"fork[{i}]",), (), None, _around(rng, 400), _around(rng, 40)) for i in range(16)]
    return [*nodes, Node("answer", (), tuple(range(16)), None, 1000, _around(rng, 120))]


def extraction(rng: random.Random) -> list[Node]:
    """One call."""
    return [Node("fields", (), (), None, _around(rng, 900), _around(rng, 120))]


def chat(rng: random.Random) -> list[Node]:
    """Four turns of a scripted user."""
    nodes = [Node("reply", (), (), None, 200, _around(rng, 80))]
    for turn in range(1, 4):
        nodes.append(Node("reply", (), (turn - 1,), turn - 1, 40, _around(rng, 80)))
    return nodes


SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (tree_of_thought, react, map_reduce, extraction, chat)
}  # fmt: skip


def _around(rng: random.Random, mean: int) -> int:
    """A length: lognormal, standard deviation about half the mean."""
    return max(4, min(4 * mean, round(mean * rng.lognormvariate(-0.11, 0.47))))


@dataclass
class Program:
    """One run. due: seconds of simulated time."""

    shape: str
    nodes: list[Node]
    start: float
    deadline: float
    measured: bool
    graph: CallGraph
    texts: list[list[int]] = field(default_factory=list)
    open: dict[int, Sequence] = field(default_factory=dict)
    left: int = 0
    met: bool = False
    over: bool = False
    id: str = field(default_factory=lambda: f"program {next(_unique)}")


class World:
    """A clock, a simulated engine, and programs on it."""

    def __init__(self, policy: str, plan: bool, options: argparse.Namespace) -> None:
        profile, shape = profile_of(options.hardware), shape_of(options.model)
        rates = StepRates.seed(profile, shape)
        blocks = kv_room(profile, shape) // PAGE
        limits = ExecutorLimits(
            num_blocks=blocks, page_size=PAGE, num_slots=options.slots, max_model_len=16384, vocab_size=shape.vocab
        )
        self.scheduler = build_scheduler(
            policy, KVCache(blocks, PAGE), SchedulerLimits(options.slots, options.batch_tokens, 16384)
        )
        self.lengths: list[int] = []  # of answers, by a sequence's seed
        self.executor = SimExecutor(rates, limits, lengths=self.lengths)
        self.plan = plan
        self.history = History()
        self.planners = {name: Planner(name, self.history) for name in SHAPES}
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.ticket = itertools.count()
        self.owner: dict[int, tuple[Program, Call]] = {}

    def at(self, when: float, do: Callable[[float], None]) -> None:
        """Do it then."""
        heapq.heappush(self.events, (when, next(self.ticket), do))

    def run(self, programs: list[Program]) -> None:
        """To the end of all programs."""
        for program in programs:
            program.left = len(program.nodes)
            self.at(program.start, lambda now, p=program: self._begin(p, now))
            self.at(program.start + program.deadline, lambda now, p=program: self._give_up(p))
        now, clock = 0.0, 0
        while True:
            while self.events and self.events[0][0] <= now:
                heapq.heappop(self.events)[2](now)
            plan = self.scheduler.plan(now)
            if plan is not None:
                self.executor.submit(plan)
                result = self.executor.collect()
                now += result.elapsed
                for update in self.scheduler.commit(result, now):
                    if update.finish_reason is not None:
                        self._ended(update.sequence, now)
                clock += 1
            elif self.events:
                now = max(now, self.events[0][0])
            else:
                return

    def _begin(self, program: Program, now: float) -> None:
        for at, node in enumerate(program.nodes):
            call = Call(at, "", node.name, node.path, node.after, node.extends, LONGEST * node.output)
            visit = 1 + sum(c.name == node.name and c.path == node.path for c in program.graph.calls)
            call.site = site_of(node.path, node.name, visit)
            program.graph.calls.append(call)
            program.texts.append([])
        for at, node in enumerate(program.nodes):
            if not node.after:
                self._send(program, at, now)

    def _send(self, program: Program, at: int, now: float) -> None:
        if program.over:
            return
        node, call = program.nodes[at], program.graph.calls[at]
        before = program.texts[node.extends] if node.extends is not None else []
        prompt = before + [next(_unique)] * node.text
        program.texts[at] = prompt
        call.begun = now - program.start
        due = program.start + program.deadline
        promise = Promises(due=due).for_call(None, now)
        planner = self.planners[program.shape]
        unplanned = Sent(promise.slo, hints_unseen("", None, promise.shared))
        sent = planner.send(call, promise, due - now, "") if self.plan else unplanned
        sequence = Sequence(
            id=next(_unique), prompt=prompt, arrival=now, max_tokens=call.max_tokens, sampling=IGNORE_EOS, slo=sent.slo,
            hints=sent.hints, program=program.id, seed=len(self.lengths), stop_ids=(END_TOKEN,),
        )  # fmt: skip
        self.lengths.append(node.output)
        program.open[at] = sequence
        self.owner[sequence.id] = (program, call)
        self.scheduler.add(sequence)

    def _ended(self, sequence: Sequence, now: float) -> None:
        program, call = self.owner.pop(sequence.id)
        program.open.pop(call.index, None)
        if program.over:
            return
        report = sequence.report(now)
        row = CallReport(call=call.name, e2e_s=report.e2e_s, output_tokens=report.output_tokens, finish_reason="stop")
        call.end(now - program.start, row, report)
        program.texts[call.index] = list(sequence.tokens)
        program.left -= 1
        for at, node in enumerate(program.nodes):
            if call.index in node.after and all(program.graph.calls[b].ended is not None for b in node.after):
                self.at(now + node.lag, lambda then, at=at: self._send(program, at, then))
        if program.left == 0:
            program.over = program.met = True
            program.graph.ended = now - program.start
            self.history.learn(program.graph)

    def _give_up(self, program: Program) -> None:
        if not program.over:
            program.over = True
            for sequence in program.open.values():
                self.scheduler.cancel(sequence, program.start + program.deadline)


def arrivals(seed: int, rate: float, warm_s: float, seconds: float, deadlines: list[float]) -> Iterator[Program]:
    """Programs at a tenth of the rate with ample time for `warm_s`, then the measured ones."""
    rng = random.Random(seed)
    now, end = 0.0, warm_s + seconds
    while True:
        measured = now >= warm_s
        now += rng.expovariate(rate if measured else rate / 10)
        if now >= end:
            return
        shape = rng.choice(list(SHAPES))
        deadline = rng.uniform(*deadlines) if measured else 60.0
        yield Program(shape, SHAPES[shape](rng), now, deadline, measured, CallGraph(shape))


def main() -> None:
    """Measure, print, write results/programs-simulated.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fcfs,edf,rota", help="one or more, with commas")
    parser.add_argument("--rates", default="10,16,25", help="programs/s, with commas")
    parser.add_argument("--deadlines", default="2,10", help="range in seconds, uniform")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measured arrivals")
    parser.add_argument("--warm", type=float, default=30.0, help="seconds of arrivals to learn from")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--slots", type=int, default=128, help="sequences in one step")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in one step")
    parser.add_argument("--hardware", default="h100-pcie5")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--name", default="programs-simulated", help="of the result file")
    arguments = parser.parse_args()
    deadlines = [float(d) for d in arguments.deadlines.split(",")]
    arms = [(policy, plan) for policy in arguments.policy.split(",") for plan in (False, True)]
    arms = [(policy, plan) for policy, plan in arms if not (policy == "fcfs" and plan)]  # fcfs is deaf to deadlines
    points = []
    for rate in (float(r) for r in arguments.rates.split(",")):
        for policy, plan in arms:
            shares, by_shape, began = [], {}, time.perf_counter()
            for seed in range(arguments.seeds):
                programs = list(arrivals(seed, rate, arguments.warm, arguments.seconds, deadlines))
                World(policy, plan, arguments).run(programs)
                measured = [p for p in programs if p.measured]
                shares.append(statistics.mean(p.met for p in measured))
                for program in measured:
                    by_shape.setdefault(program.shape, []).append(program.met)
            met = statistics.mean(shares)
            shape_met = {shape: statistics.mean(kept) for shape, kept in sorted(by_shape.items())}
            points.append(
                {
                    "rate": rate,
                    "policy": policy,
                    "planned": plan,
                    "met": met,
                    "met_by_seed": shares,
                    "by_shape": shape_met,
                }
            )
            told = "  ".join(f"{shape} {share:.2f}" for shape, share in shape_met.items())
            took = time.perf_counter() - began
            print(
                f"{rate:5.1f}/s  {policy:5}{' planned' if plan else '':8}  met {met:.3f}   {told}  ({took:.0f} s)",
                flush=True,
            )
    path = write(
        arguments.name, "python benchmarks/programs_deadlines.py", {"settings": vars(arguments), "points": points}
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()

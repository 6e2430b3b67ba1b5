"""64 agents at once, each with tools, a deadline for every turn, and a system prompt that half of the others share.

    python examples/agents_64.py [--agents 64] [--deadline 40]

Each agent is a `Session` of two turns. While its tools run, its KV may wait in the engine's second tier. The table
shows what everybody does; afterwards a line for each kind says how many turns were in time. With `superinfer run
--address ...` it runs on an engine of yours.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import superinfer as si

PRICES = {"lamp": 9, "chair": 40, "desk": 85, "kettle": 12, "clock": 15, "mirror": 30, "ladder": 60, "basket": 7}
SYSTEMS = {"support": "You are a support agent.", "shop": "You help with orders. Use the tools."}
COLUMNS = 4  # of agents beside each other


@dataclass
class Agent:
    """One agent and what is seen of it. due: when its turn must be done, on the monotonic clock."""

    number: int
    kind: str
    deadline: float
    doing: str = "waits"
    due: float | None = None
    rng: random.Random = field(default_factory=random.Random)
    kept: list[bool] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tool_calls: int = 0
    output_tokens: int = 0
    error: str = ""

    def tools(self) -> list:
        """Its own: they tell what it does. Tools take their time, as those of real agents do."""

        async def busy(name: str) -> None:
            self.doing, self.tool_calls = name, self.tool_calls + 1
            await asyncio.sleep(self.rng.uniform(0.1, 1.0))
            self.doing = "thinks"

        async def lookup(key: str) -> str:
            """Look up a fact by its key."""
            await busy("lookup")
            price = PRICES.get(key.removeprefix("price of "))
            return "not found" if price is None else str(price)

        async def calculator(expression: str) -> str:
            """Evaluate an arithmetic expression."""
            await busy("calculator")
            left, sign, right = expression.split()
            a, b = int(left), int(right)
            return str({"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else "undefined"}[sign])

        return [lookup, calculator]

    async def work(self) -> None:
        """Two turns; an error ends this agent and no other."""
        things = self.rng.sample(sorted(PRICES), 2)
        questions = [f"How much are {self.rng.randint(2, 30)} {things[0]}s?", f"What does the {things[1]} cost?"]
        with si.Session(
            name=self.kind,
            system=SYSTEMS[self.kind],
            tools=self.tools(),
            deadline=self.deadline,
            slo_class=self.kind,
            tool_s=0.5,
        ) as session:
            try:
                for question in questions:
                    self.doing, self.due = "thinks", time.monotonic() + self.deadline
                    reply = await session.aask(question, temperature=0, max_new_tokens=64)
                    report = reply.state.slo_report()
                    self.kept.append(bool(report.program.met))
                    self.answers.append(reply.text)
                    self.output_tokens += sum(row.output_tokens for row in report.rows)
                self.doing = "done"
            except si.SuperinferError as error:
                self.doing, self.error = "failed", f"{type(error).__name__}: {error}"

    def shown(self) -> Text:
        """One cell of the table."""
        left = self.due - time.monotonic() if self.due is not None else self.deadline
        style = {"done": "green", "failed": "red", "thinks": "cyan", "waits": "dim"}.get(self.doing, "yellow")
        if (self.doing == "done" and not all(self.kept)) or left < 0 <= len(self.kept) < 2:
            style = "red"
        clock = f"{sum(self.kept)}/2 in time" if self.doing == "done" else f"{left:5.1f} s left"
        return Text(f"{self.number:2} {self.doing:10} {clock}", style)


def table(agents: list[Agent]) -> Table:
    """All agents, side by side."""
    grid = Table.grid(padding=(0, 3))
    rows = -(-len(agents) // COLUMNS)
    for row in range(rows):
        grid.add_row(*(agent.shown() for agent in agents[row::rows]))
    done = sum(agent.doing == "done" for agent in agents)
    tools = sum(agent.tool_calls for agent in agents)
    grid.add_row(Text(f"{done} of {len(agents)} done, {tools} tool calls", "bold"))
    return grid


async def run(agents: list[Agent], console: Console) -> None:
    """All at once, in this one thread."""
    work = asyncio.gather(*(agent.work() for agent in agents))
    with Live(table(agents), console=console, refresh_per_second=4, transient=not console.is_terminal) as live:
        while not work.done():
            live.update(table(agents))
            await asyncio.wait([work], timeout=0.25)
        live.update(table(agents))
    await work


def main() -> None:
    """Run them and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--deadline", type=float, default=40.0, help="seconds for a turn; some agents have half of it")
    chosen, _ = parser.parse_known_args()
    rng = random.Random(0)
    agents = [
        Agent(i, sorted(SYSTEMS)[i % 2], chosen.deadline * rng.choice([0.5, 1.0, 1.0]), rng=random.Random(i))
        for i in range(chosen.agents)
    ]
    console = Console(highlight=False)
    # Room for about a dozen agents' KV at a time; the others' waits in the second tier.
    with si.default_backend(policy="rota", kv_tokens=4096, dram_tokens=65536):
        began = time.monotonic()
        asyncio.run(run(agents, console))
        took = time.monotonic() - began
    console.print(f"{'agents':8} {'turns in time':>13} {'tool calls':>10} {'tokens':>7}")
    for kind in sorted(SYSTEMS):
        mine = [agent for agent in agents if agent.kind == kind]
        turns = f"{sum(map(sum, (agent.kept for agent in mine)))} of {2 * len(mine)}"
        calls, tokens = sum(a.tool_calls for a in mine), sum(a.output_tokens for a in mine)
        console.print(f"{kind:8} {turns:>13} {calls:>10} {tokens:>7}")
    console.print(f"for example: {agents[0].answers[0] if agents[0].answers else agents[0].error}")
    for agent in agents:
        if agent.error:
            console.print(f"agent {agent.number} failed: {agent.error}")
    console.print(f"{len(agents)} agents in {took:.1f} s")


if __name__ == "__main__":
    main()

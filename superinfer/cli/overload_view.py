"""The demo's overload on the terminal: where requests are, live; at the end what was kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from superinfer.cli.overload import Glance, Overload, PolicyRun

LINE_EVERY_S = 2.0
BAR = "■"
CHANGED = 1.3  # times: a machine whose steps differ by as much is not the same one
LANES = (("waiting", "yellow"), ("computing", "green"), ("in host memory", "blue"))


class OverloadView:
    """Live lanes on a terminal, elsewhere a line every two seconds. Use it in a `with` block."""

    def __init__(self, console: Console, policy: str) -> None:
        self._console, self._policy = console, policy
        self._said = 0.0
        self._live = Live(console=console, refresh_per_second=12, transient=True) if console.is_terminal else None

    def __call__(self, glance: Glance) -> None:
        """Show it."""
        if self._live is not None:
            self._live.update(lanes(self._policy, glance))
        elif glance.elapsed_s - self._said >= LINE_EVERY_S:
            self._said = glance.elapsed_s
            self._console.print(
                f"  {self._policy} {glance.elapsed_s:5.1f} s: waiting {glance.waiting}, computing {glance.computing}, "
                f"in host memory {glance.in_host_memory}, finished {glance.finished} of {glance.total}, "
                f"kept {glance.kept}, broken {glance.broken}",
                soft_wrap=True,
            )

    def __enter__(self) -> OverloadView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()


def lanes(policy: str, glance: Glance) -> Group:
    """A bar for each place where requests are, a mark for each of them."""
    grid = Table.grid(padding=(0, 2))
    counts = (glance.waiting, glance.computing, glance.in_host_memory)
    for (name, style), count in zip(LANES, counts, strict=True):
        grid.add_row(f"  {name}", str(count), Text(BAR * count, style))
    kept = Text.assemble((BAR * glance.kept, "bright_green"), (BAR * glance.broken, "red"))
    grid.add_row("  promises", f"{glance.kept} kept, {glance.broken} broken", kept)
    head = f"  [bold]{policy}[/bold]  {glance.elapsed_s:.1f} s, {glance.finished} of {glance.total} finished"
    return Group(Text.from_markup(head), grid)


def explain(overload: Overload) -> str:
    """What is about to happen."""
    slo = overload.slo
    return (
        f"{len(overload.asks)} requests, HBM for {overload.kv_tokens} tokens of KV, host memory for "
        f"{overload.dram_tokens}; each is promised its first token in {slo.ttft:.1f} s and one every "
        f"{1e3 * (slo.tbt or 0.0):.0f} ms"
    )


def results(runs: Sequence[PolicyRun]) -> Table:
    """Both runs side by side."""
    table = Table(
        title="The same overload under two policies", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("first in time", "all in time", "TTFT p50", "max", "tok/s", "rotated"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        ttft = run.ttft()
        table.add_row(
            run.policy,
            f"{run.ttft_kept:.0%}",
            f"{run.kept:.0%}",
            f"{statistics.median(ttft):.2f} s",
            f"{max(ttft):.2f} s",
            f"{run.tokens_per_s:.0f}",
            str(run.rotations),
        )
    return table


def speed_changes(overload: Overload, runs: Sequence[PolicyRun]) -> str:
    """A warning where the machine was not equally fast for both runs, else ""."""
    took = {"before": overload.speed.alone_s} | {f"after {run.policy}": run.alone_s for run in runs}
    if max(took.values()) < CHANGED * min(took.values()):
        return ""
    steps = ", ".join(f"{1e3 * seconds:.1f} ms {when}" for when, seconds in took.items())
    return (
        f"This machine's speed changed meanwhile: a decode step of one request took {steps}. So the figures are not of "
        "the policies alone; run it again while nothing else runs."
    )

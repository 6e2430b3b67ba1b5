"""`superinfer demo`: two example programs with deadlines, their tokens as they come, and which promises were kept; then
one overload under two policies."""

from __future__ import annotations

import asyncio
import contextlib
import runpy
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import superinfer
from superinfer.cli.engines import CONNECT_TIMEOUT_S, engine_address, start_progress
from superinfer.cli.overload import (
    BASELINE,
    Glance,
    Overload,
    PolicyRun,
    Speed,
    measure_speed,
    plan_overload,
    run_policy,
)
from superinfer.cli.overload_picture import save_picture
from superinfer.cli.overload_view import OverloadView, explain, results, speed_changes
from superinfer.errors import InvalidRequestError, SuperinferError
from superinfer.lang.backend import RuntimeEndpoint
from superinfer.lang.report import CallReport, SLOReport
from superinfer.out_file import check_writable
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.protocol import ModelInfo
from superinfer.runtime.scheduler.registry import POLICIES
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextDelta, TextRequest


@dataclass(frozen=True)
class Example:
    """A program of the examples folder. `arguments` makes its arguments from what the file defines."""

    title: str
    file: str
    program: str
    arguments: Callable[[dict[str, Any]], tuple[Any, ...]]


QUESTIONS = ["How much are 12 lamps?", "And 30 of them?", "What does the chair cost?"]
EXAMPLES = (
    Example("An agent with tools, several turns", "agent_with_tools.py", "shop_assistant", lambda _: (QUESTIONS,)),
    Example("Fork over documents, join", "documents_fork_join.py", "summarise", lambda found: (found["DOCUMENTS"],)),
)


@dataclass(frozen=True)
class DemoOptions:
    """overload_s: about how long each overloaded run takes, 0: none. policy: the one beside fcfs. picture: an SVG."""

    overload_s: float
    policy: str
    picture: Path

    def __post_init__(self) -> None:
        if not 0 <= self.overload_s <= 600:
            raise InvalidRequestError(f"overload={self.overload_s} must be from 0 to 600 seconds")
        if self.policy not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise InvalidRequestError(f"--against {self.policy!r} is no policy; choose one of {known}")
        check_writable(self.picture)


def run_demo(config: EngineConfig, address: str, options: DemoOptions) -> None:
    """Run both programs, then the overload. Raises what starting or reaching an engine raises, and what a program
    raises."""
    console = Console(highlight=False)
    folder = examples_folder()
    reports: list[SLOReport] = []
    with (
        engine_address(config, address) as found,
        TokenView(console) as view,
        WatchedEndpoint(found, view) as backend,
    ):
        for example in EXAMPLES:
            console.print(f"\n[bold]{example.title}[/bold] [dim](examples/{example.file})[/dim]")
            names = runpy.run_path(str(folder / example.file))
            state = names[example.program].run(*example.arguments(names), backend=backend)
            reports.append(state.slo_report())
        measured = None
        if options.overload_s and not address:
            with console.status("measuring this machine's speed"):
                measured = asyncio.run(measure_speed(found))
    console.print()
    console.print(table_of(reports))
    if measured is not None and measured[1].device == "cpu":
        show_overload(console, config, *measured, options)
    elif options.overload_s:
        why = f"the engine at {address} is not ours to overload" if address else "it is shown on the CPU only"
        console.print(f"[dim]No overload: {why}[/dim]")
    console.print("[dim]Your own: superinfer run FILE, superinfer chat, superinfer serve[/dim]")


def show_overload(console: Console, config: EngineConfig, speed: Speed, info: ModelInfo, options: DemoOptions) -> None:
    """Both runs, then both figures and a picture."""
    overload = plan_overload(
        speed,
        info.vocab_size,
        seconds=options.overload_s,
        page_size=config.page_size,
        max_model_len=info.max_model_len,
    )
    console.print(f"\n[bold]An overload, twice[/bold] [dim]({explain(overload)})[/dim]")
    runs = [_overloaded(console, config, overload, policy) for policy in (BASELINE, options.policy)]
    console.print(results(runs))
    if warning := speed_changes(overload, runs):
        console.print(f"[yellow]{warning}[/yellow]")
    path = save_picture(options.picture, overload, runs)
    console.print("Every request of both runs, as a picture:", str(path.absolute()), soft_wrap=True)


def _overloaded(console: Console, config: EngineConfig, overload: Overload, policy: str) -> PolicyRun:
    with start_progress(f"starting an engine with {policy}") as progress, OverloadView(console, policy) as view:

        def look(glance: Glance) -> None:
            progress.close()
            view(glance)

        return run_policy(config, overload, policy, look, progress)


def examples_folder() -> Path:
    """The examples: inside an installed package, or beside it in the repository. Raises SuperinferError."""
    package = Path(superinfer.__file__).parent
    for folder in (package / "_examples", package.parent / "examples"):
        if all((folder / example.file).is_file() for example in EXAMPLES):
            return folder
    raise SuperinferError(f"the examples are not in {package / '_examples'}; install superinfer again")


class TokenView:
    """Shows the text of calls as it comes: a line for each that runs on a terminal, elsewhere one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[int, str] = {}
        self._calls = 0
        self._live = Live(console=console, refresh_per_second=15, transient=True) if console.is_terminal else None

    def begin(self) -> int:
        """A call begins; returns its number."""
        self._calls += 1
        self._running[self._calls] = ""
        return self._calls

    def add(self, call: int, text: str) -> None:
        """New text of a call."""
        self._running[call] += text
        self._draw()

    def end(self, call: int) -> None:
        """A call is over: its line stays."""
        text = self._running.pop(call)
        self._draw()
        self._console.print(_line(text, "bright_black"))

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Group(*(_line(text, "cyan") for text in self._running.values())))

    def __enter__(self) -> TokenView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()


def _line(text: str, style: str) -> Text:
    return Text.assemble("  ", (" ".join(text.split()), style))


class WatchedEndpoint(RuntimeEndpoint):
    """An engine whose answers pass by a view."""

    def __init__(self, address: str, view: TokenView) -> None:
        super().__init__(address, timeout=CONNECT_TIMEOUT_S)
        self._view = view

    async def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See Backend.stream."""
        call = self._view.begin()
        try:
            async with contextlib.aclosing(super().stream(request)) as deltas:
                async for delta in deltas:
                    self._view.add(call, delta.text)
                    yield delta
        finally:
            self._view.end(call)


def table_of(reports: list[SLOReport]) -> Table:
    """Each call and each program: what was promised, what happened, met or not."""
    table = Table(
        title="What was promised, and what happened", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("call", overflow="fold")
    table.add_column("promised")
    for heading in ("ttft", "max tbt", "done", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kept")
    for report in reports:
        for row in report.rows:
            table.add_row(*_cells(row))
        program = report.program
        promised = "" if program.deadline_s is None else f"deadline {_seconds(program.deadline_s)}"
        tokens = str(sum(row.output_tokens for row in report.rows))
        done = _seconds(program.elapsed_s)
        table.add_row(f"{program.name} (all)", promised, "", "", done, tokens, _met(program.met), style="bold")
        table.add_section()
    return table


def _cells(row: CallReport) -> tuple[str | Text, ...]:
    return (
        "/".join((*row.path, row.call)),
        _promise(row.slo),
        _seconds(row.ttft_s),
        _seconds(row.max_tbt_s),
        _seconds(row.e2e_s),
        str(row.output_tokens),
        _met(row.met, row.why),
    )


def _promise(slo: SLO | None) -> str:
    if slo is None:
        return ""
    parts = (("ttft", slo.ttft), ("tbt", slo.tbt), ("deadline", slo.deadline))
    return ", ".join(f"{name} {_seconds(value)}" for name, value in parts if value is not None)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def _met(met: bool | None, why: str = "") -> Text:
    if met is None:
        return Text("nothing promised", "dim")
    return Text("met", "green") if met else Text(f"missed ({why})" if why else "missed", "red")

"""Results for people and for files: a table, JSON, plots."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.table import Table

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.sim.result import Movement, SimResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(msgspec.Struct, frozen=True):
    """One run: its rate of arrivals, requests per second, and what came of it."""

    rate: float
    result: SimResult


def tables(points: Many[Point], title: str = "") -> list[Table]:
    """What requests saw, and what the memory and the host did for it: a row for each run, within 80 columns."""
    seen, done = _table(title, SEEN), _table("", DONE)
    for rate, result in ((point.rate, point.result) for point in points):
        seen.add_row(
            result.policy,
            f"{rate:g}",
            _seconds(result.ttft.p50),
            _seconds(result.ttft.p99),
            _percent(result.ttft_met),
            _percent(result.met),
            f"{result.goodput:.2f}/s",
            _seconds(result.tpot.mean),
            _seconds(result.tbt.p99),
            f"{result.tokens_per_s:,.0f}",
        )
        done.add_row(
            result.policy,
            f"{rate:g}",
            f"{result.preemptions:,}",
            *_moved(result.moved),
            f"{result.plan_ms.p50:.2f} ms",
            f"{result.requests_per_wall_s:.0f}/s",
        )
    return [seen, done]


# Met: the share of promises kept, of first tokens and of whole answers; goodput: requests of which all was met.
SEEN = ("policy", "req/s", "TTFT p50", "p99", "TTFT met", "all met", "goodput", "TPOT", "TBT p99", "tok/s")
# Stalled: the share of the time that steps stood still for copies. Planning takes real time, and so does simulating.
DONE = ("policy", "req/s", "preempted", "rotated", "GB/s in", "GB/s out", "stalled", "plan p50", "simulated")


def _table(title: str, columns: Many[str]) -> Table:
    made = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    return made


def as_json(points: Many[Point], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, as `out_file.json_text` takes it."""
    runs = [{"rate": point.rate, **msgspec.to_builtins(point.result)} for point in points]
    return {"settings": settings, "runs": runs}


def plot_residency(points: Many[Point], folder: Path, name: str) -> Path:
    """One picture: who was where over time, a panel for each run. Returns its path.

    Raises UnsupportedError where matplotlib is not installed.
    """
    figure = _figure(figsize=(6, 2.5 * len(points)))
    for at, point in enumerate(points):
        rows = point.result.residency
        title = f"{point.result.policy} at {point.rate:g}/s, {name}"
        axes = figure.add_subplot(len(points), 1, at + 1, ylabel="sequences", title=title)
        parts = [[r.resident for r in rows], [r.rotated for r in rows], [r.waiting for r in rows]]
        axes.stackplot([r.at for r in rows], parts, labels=["in HBM", "rotated out", "waiting, no KV"], alpha=0.8)
        axes.legend(fontsize="small", loc="upper left")
    axes.set_xlabel("s")
    path = folder / f"{name}-residency.png"
    figure.savefig(path, dpi=100)
    return path


def check_can_plot(folder: Path) -> None:
    """Before minutes of simulating, not after: make the folder. Raises UnsupportedError where matplotlib is not
    installed, InvalidRequestError for a folder that cannot be made."""
    _figure((1, 1))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError(f"the folder {str(folder)!r} for plots cannot be made: {error.strerror}") from None


def _figure(figsize: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("plots need matplotlib; install it with: pip install 'superinfer[plot]'") from None
    return Figure(figsize=figsize, layout="constrained")


def plot(points: Many[Point], folder: Path, name: str) -> list[Path]:
    """Three pictures: those of `plot_by_rate`, and who was where over time at the highest rate. Returns their paths.

    Raises as `check_can_plot`.
    """
    paths, most = plot_by_rate(points, folder, name), max(point.rate for point in points)
    return [*paths, plot_residency([point for point in points if point.rate == most], folder, name)]


def plot_by_rate(points: Many[Point], folder: Path, name: str) -> list[Path]:
    """Two pictures: attainment and TBT against rate, a line for each policy. Returns their paths.

    Raises as `check_can_plot`.
    """
    check_can_plot(folder)
    paths = []
    for kind, label in (("attainment", "share of requests"), ("tbt", "TBT, ms")):
        figure = _figure((6, 4))
        axes = figure.add_subplot(xlabel="requests/s", ylabel=label, title=name)
        for at, policy in enumerate(dict.fromkeys(point.result.policy for point in points)):
            mine = sorted((p for p in points if p.result.policy == policy), key=lambda p: p.rate)
            rates = [point.rate for point in mine]
            for line, style, values in _lines(kind, [point.result for point in mine]):
                axes.plot(rates, values, style, marker="o", color=f"C{at}", label=f"{policy}, {line}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(folder / f"{name}-{kind}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths


def _lines(kind: str, results: Many[SimResult]) -> list[tuple[str, str, list[float]]]:
    """(name, line style, values) of a policy's lines in one picture."""
    if kind == "attainment":
        nothing = math.nan
        return [
            ("TTFT", "-", [r.ttft_met if r.ttft_met is not None else nothing for r in results]),
            ("whole timeline", "--", [r.met if r.met is not None else nothing for r in results]),
        ]
    return [("p50", "-", [r.tbt.p50 * 1e3 for r in results]), ("p99", "--", [r.tbt.p99 * 1e3 for r in results])]


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _moved(moved: Movement | None) -> list[str]:
    if moved is None:
        return ["–"] * 4
    rates = f"{moved.gbps_in:.1f}", f"{moved.gbps_out:.1f}"
    return [f"{moved.rotations_out:,}", *rates, f"{100 * moved.stall_share:.1f} %"]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"

"""A load test's report for a person."""

from __future__ import annotations

from rich import box
from rich.table import Table

from superinfer.bench.load_report import LoadReport, Spread


def table(found: LoadReport, title: str) -> Table:
    """Quantiles, then what was kept and what went wrong."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("", "mean", "p50", "p90", "p95", "p99", "max"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, spread in (
        ("TTFT", found.ttft),
        ("TBT", found.tbt),
        ("TPOT", found.tpot),
        ("end to end", found.e2e),
        ("client: sent late", found.client_sent),
        ("client: read late", found.client_loop),
    ):
        shown.add_row(name, *_cells(spread))
    shown.add_section()
    kept = found.attainment
    rows = [
        ("requests", f"{found.completed} of {found.requests} answered in {found.duration:.1f} s"),
        ("TTFT kept", _percent(kept.ttft_met)),
        ("whole timeline kept", _percent(kept.met)),
        ("goodput", f"{found.goodput:.2f} requests/s"),
        ("output", f"{found.output_tokens_per_s:,.0f} tokens/s"),
    ]
    if len(found.by_class) > 1:
        rows += [
            (f"  {name}", f"{_percent(part.met)} of {part.requests}, TTFT {_percent(part.ttft_met)}")
            for name, part in found.by_class.items()
        ]
    rows += [(f"failed: {kind}", f"{entry['count']} ({entry['example']:.60})") for kind, entry in found.errors.items()]
    if found.late_by:
        rows.append(("late because of", ", ".join(f"{stage} {count}" for stage, count in found.late_by.items())))
        parts = ", ".join(f"{stage} {_seconds(value)}" for stage, value in found.late_stages.items() if value > 5e-4)
        rows.append(("where late ones were", parts))
    outer = Table.grid()
    outer.add_row(shown)
    facts = Table.grid(padding=(0, 2))
    for name, value in rows:
        facts.add_row(name, value)
    outer.add_row(facts)
    return outer


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["–"] * 6
    return [_seconds(v) for v in (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _percent(share: float | None) -> str:
    return "nothing promised" if share is None else f"{100 * share:.1f} %"

"""A record of arms as one short table: what is in it, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def table(record: dict[str, Any]) -> str:
    """A line for each number, a column for each arm."""
    arms: dict[str, Any] = record["arms"]
    rows: dict[str, dict[str, str]] = {}
    for name, arm in arms.items():
        for label, value in lines(arm):
            rows.setdefault(label, {})[name] = value
    width = max([len(label) for label in rows], default=10)
    columns = (
        {name: max(len(name), *(len(row.get(name, "")) for row in rows.values())) for name in arms} if rows else {}
    )
    head = " " * width + "".join(f"  {name:>{columns.get(name, len(name))}}" for name in arms)
    body = [
        f"{label:<{width}}" + "".join(f"  {row.get(name, ''):>{columns[name]}}" for name in arms)
        for label, row in rows.items()
    ]
    return "\n".join([head, *body])


def lines(arm: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Labels and numbers of one arm."""
    if arm.get("failed"):
        yield "failed", str(arm["failed"]).splitlines()[0][:40]
    if arm.get("start_s") is not None:
        yield "start, s", f"{arm['start_s']:.1f}"
    for name, phase in arm["phases"].items():
        if "failed" in phase or "left_out" in phase:
            yield name, str(phase.get("failed") or "left out")[:40]
            continue
        yield from _LINES[name](phase)


def _tpot(phase: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in phase["tpot"]:
        yield f"TPOT at batch {row['batch']}, ms a step", f"{row['steps_ms']:.2f}"
        if row.get("streamed_ms") is not None:
            yield f"TPOT at batch {row['batch']}, ms streamed", f"{row['streamed_ms']:.2f}"


def _prefill(phase: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in phase["prefill"]:
        yield f"prefill {row['prompts']} x {row['tokens']}, tokens/s", f"{row['tokens_per_s']:,.0f}"


def _offline(phase: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "offline, output tokens/s", f"{phase['output_tokens_per_s']:,.0f}"


def _rates(phase: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for run in phase["runs"]:
        found, rate = run["report"], f"{run['rate']:g}/s"
        met = found["attainment"]
        for label, spread, which in (
            ("TTFT p50, ms", "ttft", "p50"),
            ("TTFT p99, ms", "ttft", "p99"),
            ("TPOT p50, ms", "tpot", "p50"),
        ):
            value = found[spread]
            yield f"{rate} {label}", "none" if value is None else f"{value[which] * 1e3:,.1f}"
        yield f"{rate} TTFT met", _share(met["ttft_met"])
        yield f"{rate} timeline met", _share(met["met"])
        yield f"{rate} tokens/s in the window", f"{run['window_tokens_per_s']:,.0f}"
        yield f"{rate} given up", str(found["failed"])
        if found["client_warning"]:
            yield f"{rate} client", "SHORT OF TIME"


def _turns(phase: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for label, name in (("returning", "ttft_returning"), ("first", "ttft_first")):
        if phase[name] is not None:
            yield f"TTFT p50 of {label} turns, ms", f"{phase[name]['p50'] * 1e3:,.1f}"
    if phase["report"]["ttft"] is not None:
        yield "TTFT p50 of all turns, ms", f"{phase['report']['ttft']['p50'] * 1e3:,.1f}"
    yield "turns given up", str(phase["report"]["failed"])


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


_LINES = {"tpot": _tpot, "prefill": _prefill, "offline": _offline, "online": _rates, "slo": _rates, "turns": _turns}

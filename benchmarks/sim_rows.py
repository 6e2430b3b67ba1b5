"""Rows of simulated runs that are measured in several goes: kept in one file, and drawn from it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from record import RESULTS

from superinfer.bench.record import environment
from superinfer.runtime.sim.report import Point, plot_by_rate


def commit() -> str | None:
    """Of the code that runs, for each row: not all of a file need be of one commit."""
    return environment("")["commit"]


def kept_rows(name: str, key: tuple[str, ...], anew: set[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The rows of results/<name>.json but those whose `key` is to be measured anew."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    return [row for row in rows if "commit" in row and tuple(row[part] for part in key) not in anew]


def draw(rows: list[dict[str, Any]], name: str) -> None:
    """Attainment and TBT against rate, from rows with rate, policy, ttft_met, met, tbt_p50_ms and tbt_p99_ms."""
    points = []
    for row in rows:
        tbt = SimpleNamespace(p50=row["tbt_p50_ms"] / 1e3, p99=row["tbt_p99_ms"] / 1e3)
        result: Any = SimpleNamespace(policy=row["policy"], ttft_met=row["ttft_met"], met=row["met"], tbt=tbt)
        points.append(Point(row["rate"], result))
    plot_by_rate(points, RESULTS, name)

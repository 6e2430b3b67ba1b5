"""Where these scripts' numbers go: `results/<name>.json`, with what is needed to judge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from superinfer.bench.record import write_record

RESULTS = Path(__file__).parent / "results"


def write(name: str, command: str, measured: dict[str, Any]) -> Path:
    """Write `results/<name>.json`: `measured` with device, date, commit, versions and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    return write_record(RESULTS / f"{name}.json", command, measured)

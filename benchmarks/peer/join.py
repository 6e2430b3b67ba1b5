"""Joins what several commands of `run.py` measured of one schedule on one machine, each some of its lanes.

python benchmarks/peer/join.py FIRST.json SECOND.json --out benchmarks/results/h200-vs-vllm-slo.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SAME = ("device", "settings", "commit")  # of records that may be joined


def join(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first, with the arms and ceilings of all. ValueError where they differ in what must be the same, or share an
    arm."""
    first = records[0]
    commands, arms, ceilings = [], {}, {}
    for record in records:
        odd = [name for name in SAME if _said(record, name) != _said(first, name)]
        if odd:
            raise ValueError(f"the records differ in {', '.join(odd)}: they are not of one machine and one plan")
        twice = sorted(arms.keys() & record["arms"].keys())
        if twice:
            raise ValueError(f"arms {twice} are in two of the records; leave one out")
        arms |= record["arms"]
        ceilings |= record["ceilings"]
        commands.append(record["command"])
    return {**first, "command": "; ".join(commands), "arms": arms, "ceilings": ceilings}


def _said(record: dict[str, Any], name: str) -> Any:
    """Without the folder where a command put the model's config."""
    value = record.get(name)
    if name == "settings":
        value = {**value, "sizes": {**value["sizes"], "model": ""}}
    return value


def main() -> None:
    """Join and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = join([json.loads(path.read_text()) for path in given.records])
    given.out.write_text(json.dumps(found, separators=(",", ":")))


if __name__ == "__main__":
    main()

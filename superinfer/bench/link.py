"""`superinfer bench link`: how fast blocks move between GPU and host memory, by size, direction and method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from superinfer.errors import UnsupportedError


def link(
    gib: Annotated[
        float, typer.Option(help="GiB moved each way with the largest blocks; less with smaller ones.")
    ] = 4.0,
    rounds: Annotated[int, typer.Option(help="How often each is measured; the median counts.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Measure the link between GPU and host memory: sizes × directions × methods, and which method is the best."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("bench link measures a GPU's link to host memory, and torch sees no GPU here")
    from superinfer.bench.link_methods import BLOCK_SIZES, LinkBench, Row
    from superinfer.bench.record import write_record
    from superinfer.out_file import check_writable

    check_writable(json_path)
    bench = LinkBench(gib, rounds)
    print(bench.title(), flush=True)
    print(heading(), flush=True)
    rows: list[Row] = []
    for size in BLOCK_SIZES:
        for row in bench.rows(size):
            rows.append(row)
            print(line(row), flush=True)
    found = verdict(rows, max(BLOCK_SIZES))
    print(found["text"])
    if json_path is not None:
        measured: dict[str, Any] = {
            "settings": {"gib": gib, "rounds": rounds},
            "link": bench.kind,
            "rows": [row.as_dict() for row in rows],
            "verdict": found,
        }
        write_record(json_path, "superinfer bench link", measured)
        print(f"written to {json_path}")
    bench.close()


def heading() -> str:
    """Of the table."""
    return f"{'block':>9} {'method':34} {'in':>7} {'out':>7} {'at once':>8}  GB/s   host time a block"


def line(row: Any) -> str:
    """One row of it."""
    size = f"{row.block_bytes >> 10} KiB"
    if row.error is not None:
        return f"{size:>9} {row.method:34} did not work: {row.error}"
    host = f"{row.host_us:.2f} µs" if row.host_us is not None else ""
    both = row.both_in + row.both_out
    return f"{size:>9} {row.method:34} {row.alone_in:7.1f} {row.alone_out:7.1f} {both:8.1f}         {host}"


def verdict(rows: list[Any], block_bytes: int) -> dict[str, Any]:
    """The quickest method both ways at once with blocks of that size, and how near the engine's comes to whole copies.

    Returns its text and the numbers in it.
    """
    of_size = [row for row in rows if row.block_bytes == block_bytes and row.error is None]
    roof = next((row for row in of_size if row.method == "contiguous"), None)
    others = [row for row in of_size if row.method != "contiguous"]
    if not others:
        return {"text": "no method worked", "method": None}
    best = max(others, key=lambda row: row.both_in + row.both_out)
    found: dict[str, Any] = {"method": best.method, "at_once_gb_s": best.both_in + best.both_out}
    text = f"best at {block_bytes >> 10} KiB: {best.method}, {found['at_once_gb_s']:.1f} GB/s both ways at once"
    engine = next((row for row in others if row.method == "engine"), None)
    if roof is not None and engine is not None:
        shares = {
            "in": engine.alone_in / roof.alone_in,
            "out": engine.alone_out / roof.alone_out,
            "at_once": (engine.both_in + engine.both_out) / (roof.both_in + roof.both_out),
        }
        found["engine_share_of_contiguous"] = shares
        said = ", ".join(f"{share:.1%} {name.replace('_', ' ')}" for name, share in shares.items())
        text += f"; the engine's path reaches {said} of contiguous copies"
    return found | {"text": text}

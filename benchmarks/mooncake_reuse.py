"""What Mooncake's trace repeats, and what knowing that can be worth to a scheduler: of the trace alone, nothing is run.

Shares of prompt tokens that are cached, when all requests are computed in order: by size of the cache, with the least
recently used block dropped first, and with the one that is wanted last (Belady; nobody can know that). And an estimate
of goodput: a GH200 (144 GB, 400 GiB of DRAM) keeps all requests whose machine time is below a price, the highest at
which their work fits into 95 % of the time: with the work that is left beside what is cached (`knows`), and with that
of whole prompts (`blind`), which then leaves a part of the machine to nobody who is in time. Both have the cache.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from record import write

from superinfer.runtime.scheduler.cost import StepRates
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import kv_room

BLOCK = 512
GH200, LLAMA = profile_of("gh200-144"), shape_of("llama-3-8b")
HELD = kv_room(GH200, LLAMA) + 400 * 2**30 // LLAMA.kv_bytes_per_token
RATES = StepRates.seed(GH200, LLAMA)
TTFT_S, SUPPLY = 5.0, 0.95
BATCH = 64  # sequences that share what each step costs beside their own work


class Row(NamedTuple):
    """A request of the trace. Tokens; ids of blocks of 512."""

    prompt: int
    output: int
    blocks: list[int]


def read(path: Path) -> list[Row]:
    """The trace, in order."""
    rows = map(json.loads, path.read_text().splitlines())
    return [Row(row["input_length"], row["output_length"], row["hash_ids"]) for row in rows]


def hits(row: Row, cached: OrderedDict[int, None] | dict[int, float]) -> int:
    """Tokens of the prompt that are cached: whole blocks from the first on, and never all."""
    count = 0
    while count < len(row.blocks) - 1 and row.blocks[count] in cached:
        count += 1
    return count * BLOCK


def remember(row: Row, cached: OrderedDict[int, None], most: int) -> None:
    """The row's blocks are the newest of `most`, the end of a prompt older than its beginning."""
    for block in reversed(row.blocks):
        cached[block] = None
        cached.move_to_end(block)
    while len(cached) > most:
        cached.popitem(last=False)


def least_recently_used(rows: list[Row], tokens: int) -> float:
    """Share of all prompt tokens that is cached."""
    cached: OrderedDict[int, None] = OrderedDict()
    found = 0
    for row in rows:
        found += hits(row, cached)
        remember(row, cached, tokens // BLOCK)
    return found / sum(row.prompt for row in rows)


def wanted_last(rows: list[Row], tokens: int) -> float:
    """The same with the block dropped whose next use is furthest away."""
    following: dict[int, float] = {}
    uses: list[list[float]] = []
    for at in range(len(rows) - 1, -1, -1):
        uses.append([following.get(block, float("inf")) for block in rows[at].blocks])
        following.update(dict.fromkeys(rows[at].blocks, at))
    cached: dict[int, float] = {}
    order: list[tuple[float, int]] = []
    found = 0
    for row, wanted in zip(rows, reversed(uses), strict=True):
        found += hits(row, cached)
        for block, use in zip(row.blocks, wanted, strict=True):
            cached[block] = use
            heapq.heappush(order, (-use, block))
        while len(cached) > tokens // BLOCK:
            use, block = heapq.heappop(order)
            if cached.get(block) == -use:
                del cached[block]
    return found / sum(row.prompt for row in rows)


def reuse(rows: list[Row]) -> dict[str, object]:
    """Of requests that repeat more than the block that begins all: how far back, and how much is their own."""
    last: dict[int, int] = {}
    distances, own = [], []
    for at, row in enumerate(rows):
        found = hits(row, last)  # type: ignore[arg-type]
        if found > BLOCK:
            distances.append(at - last[row.blocks[found // BLOCK - 1]])
            own.append(row.prompt - found)
        last.update(dict.fromkeys(row.blocks, at))
    quantiles = (0.1, 0.25, 0.5, 0.75, 0.9)
    return {
        "share_of_requests": len(own) / len(rows),
        "requests_back": np.quantile(distances, quantiles).tolist(),
        "own_tokens": np.quantile(own, quantiles).tolist(),
        "own_tokens_mean": float(np.mean(own)),
    }


def seconds(row: Row, cached: int) -> tuple[float, float]:
    """Machine time of a request's prefill and of its decodes."""
    own = row.prompt - cached
    prefill_s = own * (RATES.token_s + RATES.pair_s * (cached + own / 2))
    each_s = RATES.kv_s * (row.prompt + row.output / 2) + RATES.decode_s + RATES.token_s
    return prefill_s, row.output * (each_s + (RATES.step_s + RATES.dense_s) / BATCH)


def kept_at(rows: list[Row], price: float, knows: bool) -> tuple[float, float, float]:
    """With this price: share of requests kept, seconds of the machine for each that came, true and as believed. Of the
    last two thirds of the trace."""
    cached: OrderedDict[int, None] = OrderedDict()
    kept, true, believed, begin = 0, 0.0, 0.0, len(rows) // 3
    for at, row in enumerate(rows):
        prefill_s, decode_s = seconds(row, hits(row, cached))
        asked = (prefill_s, decode_s) if knows else seconds(row, 0)
        if sum(asked) > price or asked[0] > TTFT_S:
            continue
        remember(row, cached, HELD // BLOCK)
        if at >= begin:
            kept, true, believed = kept + 1, true + prefill_s + decode_s, believed + sum(asked)
    count = len(rows) - begin
    return kept / count, true / count, believed / count


def goodput(rows: list[Row], rate: float, knows: bool) -> float:
    """Requests a second kept at the highest price that fits."""
    low, high = 0.0, 64.0
    for _ in range(14):
        price = (low + high) / 2
        low, high = (price, high) if rate * kept_at(rows, price, knows)[2] <= SUPPLY else (low, price)
    return rate * kept_at(rows, low, knows)[0]


def main() -> None:
    """Count, print, write results/mooncake-reuse.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="mooncake_conversation.jsonl")
    parser.add_argument("--rates", default="3.4,4,6,8,12,20")
    arguments = parser.parse_args()
    rows = read(arguments.trace)
    sizes = [680_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 10**9]
    cached = [
        {"tokens": size, "lru": least_recently_used(rows, size), "wanted_last": wanted_last(rows, size)}
        for size in sizes
    ]
    estimates = []
    for rate in map(float, arguments.rates.split(",")):
        knows, blind = goodput(rows, rate, True), goodput(rows, rate, False)
        estimates.append({"rate": rate, "knows": knows, "blind": blind, "ratio": knows / blind})
        print(estimates[-1], flush=True)
    found = {"cached": cached, "reuse": reuse(rows), "hardware": GH200.name, "model": LLAMA.name, "held_tokens": HELD}
    print(found)
    out = write(
        "mooncake-reuse",
        f"python benchmarks/mooncake_reuse.py mooncake_conversation.jsonl --rates {arguments.rates}",
        found | {"estimates": estimates},
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()

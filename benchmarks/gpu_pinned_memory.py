"""How large a second tier can be: memory touched and pinned, blocks moved from and to all of it, and what came back.

Blocks all over the pool, its last among them, are filled from the GPU, the GPU's are overwritten, and all come back and
are compared. Then blocks scattered over the whole pool move both ways at once, as `superinfer bench link` has it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from record import write

from superinfer.runtime.engine.cuda_tier import PinnedDuplex
from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.copy_batches import Places, moves_of_copies
from superinfer.runtime.kv.cuda_driver import CudaDriver
from superinfer.runtime.kv.link_measure import scattered, timed
from superinfer.runtime.kv.pinned import PinnedPool, available_bytes, numa_node

GIB = 1 << 30
BLOCK_BYTES = 2 << 20  # of Llama-3-8B with 16 tokens
HBM_BLOCKS = 4096


def pinned_pool(driver: CudaDriver, blocks: int, marks: list[tuple[float, float]]) -> PinnedPool:
    """marks: gets seconds since the start and the share that is pinned, of every piece."""
    started = time.perf_counter()

    def on_progress(stage: str, share: float) -> None:
        marks.append((time.perf_counter() - started, share))
        if not marks[1:] or int(share * 10) > int(marks[-2][1] * 10):
            print(f"{marks[-1][0]:6.1f} s  {share:4.0%}", flush=True)

    node = numa_node(driver.pci_address(torch.cuda.current_device()))
    return PinnedPool(
        blocks, BLOCK_BYTES, register=driver.register, unregister=driver.unregister, node=node, on_progress=on_progress
    )


def comes_back(duplex: PinnedDuplex, hbm: torch.Tensor, dram: int) -> bool:
    """Whether blocks that went to places all over the pool, the last of them too, come back as they were."""
    count = len(hbm) // 2
    places = [at * (dram - 1) // (count - 1) for at in range(count)]
    bits = hbm.view(torch.int64)
    there = bits[:count].clone()
    ids = range(1, 2 * count + 1)
    duplex.start(Copies.of(BlockCopy(ids[i], True, i, places[i]) for i in range(count)))
    duplex.wait(ids[:count])
    torch.cuda.synchronize()
    bits.fill_(-1)
    duplex.start(Copies.of(BlockCopy(ids[count + i], False, count + i, places[i], (ids[i],)) for i in range(count)))
    duplex.wait(ids[count:])
    torch.cuda.synchronize()
    copied, failed, _ = duplex.report()
    return len(copied) == 2 * count and not failed and torch.equal(bits[count:], there)


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=400.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="gpu-pinned-memory")
    arguments = parser.parse_args()
    hbm = torch.randint(-(1 << 62), 1 << 62, (HBM_BLOCKS, BLOCK_BYTES // 8), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    driver = CudaDriver(torch.cuda.current_stream().cuda_stream)
    free = available_bytes()
    marks: list[tuple[float, float]] = []
    print(f"{(free or 0) / GIB:.0f} GiB of host memory are free", flush=True)
    pool = pinned_pool(driver, int(arguments.gib * GIB) // BLOCK_BYTES, marks)
    pin_s, gib = marks[-1][0], pool.num_blocks * BLOCK_BYTES / GIB
    print(f"{gib:.1f} GiB pinned in {pin_s:.1f} s{': ' * bool(pool.shortfall)}{pool.shortfall}", flush=True)
    places = Places(hbm.data_ptr(), pool.address, BLOCK_BYTES, pool.piece_blocks)
    duplex = PinnedDuplex(driver, places, pool)
    exact = comes_back(duplex, hbm, pool.num_blocks)
    print(f"{HBM_BLOCKS // 2:,} blocks from all over it came back {'as they were' if exact else 'WRONG'}", flush=True)

    def issue(stream: int, copies: Any) -> None:
        moves = moves_of_copies(copies, places)
        if driver.copy(stream, moves.dsts, moves.srcs, moves.sizes):
            raise RuntimeError("copies between the tiers fail")

    both = scattered(HBM_BLOCKS // 2, HBM_BLOCKS, pool.num_blocks)
    timed(driver, issue, both)
    rounds = [max(timed(driver, issue, both)) for _ in range(arguments.rounds)]
    rate = 2 * len(both[0]) * BLOCK_BYTES / statistics.median(rounds) / 1e9
    print(f"{rate:.1f} GB/s both ways at once, blocks scattered over all of it", flush=True)
    record = {
        "settings": vars(arguments),
        "free_bytes": free,
        "pinned_bytes": int(gib * GIB),
        "shortfall": pool.shortfall,
        "pin_s": pin_s,
        "marks": marks,
        "bit_exact": exact,
        "both_ways_gb_s": rate,
        "both_ways_s": rounds,
    }
    command = f"python benchmarks/gpu_pinned_memory.py --gib {arguments.gib:g}"
    print(f"written to {write(arguments.name, command, record)}")
    duplex.close()


if __name__ == "__main__":
    main()

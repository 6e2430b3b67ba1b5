"""The methods that `bench link` compares, on random scattered blocks; every one is checked before it is timed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from superinfer.runtime.engine.cuda_tier import device_link
from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.copy_batches import BATCH_BYTES, Places, moves_of_copies
from superinfer.runtime.kv.cuda_driver import CudaDriver
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.kv.link_measure import Issue, scattered, timed
from superinfer.runtime.kv.pinned import PinnedPool, numa_node

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# A block of Llama-3-8B with 16 tokens; a quarter of it; what one layer's keys of it are where layers lie apart.
BLOCK_SIZES = (2 * MIB, 512 * KIB, 32 * KIB)
MOST_COPIES = 16384  # of one direction in one measurement: Tensor.copy_ takes 10 µs each
RUN = 16  # neighbours in both pools, for what coalescing makes of 32 KiB blocks
KERNEL_WORDS = 1024
PLAN_COPIES = 128  # of one direction in one plan of the engine


@dataclasses.dataclass(slots=True)
class Row:
    """GB/s of one method with one block size, alone and at once. host_us: of the calling thread, per block moved.
    error: why it did not work."""

    block_bytes: int
    method: str
    alone_in: float = 0.0
    alone_out: float = 0.0
    both_in: float = 0.0
    both_out: float = 0.0
    host_us: float | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, object]:
        """For a record."""
        return dataclasses.asdict(self)


@triton.jit
def _copy_blocks(dsts, srcs, words, WORDS: tl.constexpr):
    """Program (b, p) copies part p of block b; addresses are numbers, so one side may be mapped host memory."""
    dst = tl.load(dsts + tl.program_id(0)).to(tl.pointer_type(tl.int64))
    src = tl.load(srcs + tl.program_id(0)).to(tl.pointer_type(tl.int64))
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    tl.store(dst + at, tl.load(src + at, mask=at < words), mask=at < words)


class LinkBench:
    """Two pools as large as the largest measurement needs, for all of them."""

    def __init__(self, gib: float, rounds: int) -> None:
        """gib: moved each way with the largest blocks; both pools hold twice that."""
        self._rounds = rounds
        largest = max(BLOCK_SIZES)
        blocks = max(8, int(gib * GIB / largest))
        self._hbm = torch.randint(0, 255, (2 * blocks * largest,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self._driver = CudaDriver(torch.cuda.current_stream().cuda_stream)
        ordinal = torch.cuda.current_device()
        self.kind = device_link(self._driver, torch.device("cuda", ordinal))
        self._node = numa_node(self._driver.pci_address(ordinal))
        started = time.perf_counter()
        self._pool = PinnedPool(
            2 * blocks,
            largest,
            register=self._driver.register,
            unregister=self._driver.unregister,
            node=self._node,
        )
        self._pin_s = time.perf_counter() - started
        self._bytes = self._pool.num_blocks * largest
        self._dram = torch.from_numpy(self._pool.array[: self._bytes])
        if self._pool.num_blocks < 16:
            raise RuntimeError(f"host memory could not be pinned: {self._pool.shortfall}")

    def title(self) -> str:
        """What is measured, for a person."""
        node = f", NUMA node {self._node}" if self._node is not None else ""
        return (
            f"{torch.cuda.get_device_name()}, {self.kind}{node}, CUDA {'.'.join(map(str, self._driver.version))}; "
            f"{self._bytes / GIB:.1f} GiB touched and pinned in {self._pin_s:.1f} s; batched copies: "
            f"{'yes' if self._driver.is_batched else 'no'}"
        )

    def rows(self, size: int) -> Iterator[Row]:
        """All methods with blocks of `size` bytes."""
        blocks = self._bytes // size
        count = min(MOST_COPIES, blocks // 2)
        ways = scattered(count, blocks, blocks)
        places = Places(
            self._hbm.data_ptr(), self._pool.address, size, self._pool.piece_blocks * max(BLOCK_SIZES) // size
        )
        yield self._row(size, "contiguous", ways, lambda stream, copies: self._whole(stream, copies, size))
        yield self._engine_row(size, ways, places)
        yield self._row(size, "batched", ways, lambda stream, copies: self._batched(stream, copies, places))
        yield self._row(size, "one driver call each", ways, lambda stream, copies: self._singly(stream, copies, places))
        yield self._row(size, "Tensor.copy_ each", ways, lambda stream, copies: self._tensors(stream, copies, size))
        yield self._row(size, "zero-copy kernel", ways, lambda stream, copies: self._kernel(stream, copies, places))
        if size == min(BLOCK_SIZES):
            runs = _in_runs(count, blocks)
            yield self._engine_row(size, runs, places, f"engine, in runs of {RUN}")

    def close(self) -> None:
        """Give the memory back."""
        del self._dram
        self._pool.close()

    # ------------------------------------------------------------------ measuring

    def _row(self, size: int, method: str, ways: tuple[list[BlockCopy], list[BlockCopy]], issue: Issue) -> Row:
        row = Row(size, method)
        chunk = len(ways[0]) if method == "contiguous" else max(1, BATCH_BYTES // size)
        spent = [0.0]

        def counted(stream: int, copies: Sequence[BlockCopy]) -> None:
            before = time.perf_counter()
            issue(stream, copies)
            spent[0] += time.perf_counter() - before

        def run(*given: list[BlockCopy]) -> list[float]:
            return timed(self._driver, counted, given, chunk)  # type: ignore[arg-type]

        try:
            if method != "contiguous":
                self._check(ways, size, lambda: run(*ways))
            run(*ways)
            spent[0] = 0.0
            self._fill(row, len(ways[0]) * size, run, ways)
            if method != "contiguous":
                row.host_us = spent[0] / (self._rounds * 4 * len(ways[0])) * 1e6
        except Exception as error:
            row.error = repr(error)
        return row

    def _engine_row(
        self, size: int, ways: tuple[list[BlockCopy], list[BlockCopy]], places: Places, method: str = "engine"
    ) -> Row:
        """The second tier's own body: grouping, its thread, events, reports, in plans of PLAN_COPIES each way. Seconds
        from before the first plan to the last copy's report, so all that is slow in it counts."""
        row = Row(size, method)
        duplex = CudaDuplex(self._driver, places)
        spent = [0.0]

        def run(*given: list[BlockCopy]) -> list[float]:
            plans = [
                Copies.of([*given[0][at : at + PLAN_COPIES], *given[1][at : at + PLAN_COPIES]])
                for at in range(0, max(map(len, given)), PLAN_COPIES)
            ]
            left, out = sum(map(len, given)), {copy.id for copy in given[1]}
            began = time.perf_counter()
            for plan in plans:
                duplex.start(plan)
            spent[0] += time.perf_counter() - began
            over = [0.0, 0.0]
            while left:
                before = time.perf_counter()
                copied, failed, _ = duplex.report()
                if copied:  # the others only pass the time
                    spent[0] += time.perf_counter() - before
                if failed:
                    raise RuntimeError(f"{len(failed)} copies failed")
                for way, some in enumerate((any(i not in out for i in copied), any(i in out for i in copied))):
                    over[way] = time.perf_counter() - began if some else over[way]
                left -= len(copied)
                time.sleep(1e-4)
            return over

        try:
            self._check(ways, size, lambda: run(*ways))
            spent[0] = 0.0
            self._fill(row, len(ways[0]) * size, run, ways)
            row.host_us = spent[0] / (self._rounds * 4 * len(ways[0])) * 1e6
        except Exception as error:
            row.error = repr(error)
        duplex.close()
        return row

    def _fill(
        self,
        row: Row,
        size: int,
        run: Callable[..., list[float]],
        ways: tuple[list[BlockCopy], list[BlockCopy]],
    ) -> None:
        """Medians, GB/s. size: bytes moved each way."""

        def rate(seconds: float) -> float:
            return size / seconds / 1e9

        row.alone_in = rate(statistics.median(run(ways[0], [])[0] for _ in range(self._rounds)))
        row.alone_out = rate(statistics.median(run([], ways[1])[1] for _ in range(self._rounds)))
        both = sorted((run(*ways) for _ in range(self._rounds)), key=sum)[self._rounds // 2]
        row.both_in, row.both_out = rate(both[0]), rate(both[1])

    def _check(self, ways: tuple[list[BlockCopy], list[BlockCopy]], size: int, run: Callable[[], object]) -> None:
        """Raises RuntimeError where blocks do not arrive: on random bytes, some of each way."""
        some = [copy for way in ways for copy in way[:: max(1, len(way) // 16)]]
        ends = [self._ends(copy, size) for copy in some]
        for dst, src in ends:
            src.random_(0, 255)
            dst.zero_()
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
        for dst, src in ends:
            if not torch.equal(dst.cpu(), src.cpu()):
                raise RuntimeError("a block did not arrive as it was")

    def _ends(self, copy: BlockCopy, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a copy goes to and comes from."""
        hbm = self._hbm[copy.hbm * size : (copy.hbm + 1) * size]
        dram = self._dram[copy.dram * size : (copy.dram + 1) * size]
        return (dram, hbm) if copy.out else (hbm, dram)

    # ------------------------------------------------------------------ methods

    def _whole(self, stream: int, copies: Sequence[BlockCopy], size: int) -> None:
        """As many bytes in as few copies as the pinned pieces allow: what the link can do."""
        total, piece = len(copies) * size, self._pool.piece_blocks * max(BLOCK_SIZES)
        base = self._bytes // 2 if copies[0].out else 0
        parts = [(at, min(piece - at % piece, base + total - at)) for at in _cuts(base, base + total, piece)]
        hbm = np.array([self._hbm.data_ptr() + at for at, _ in parts], dtype=np.uint64)
        dram = np.array([self._pool.address + at for at, _ in parts], dtype=np.uint64)
        sizes = np.array([length for _, length in parts], dtype=np.uint64)
        ends = (dram, hbm) if copies[0].out else (hbm, dram)
        if self._driver.copy_singly(stream, *ends, sizes):
            raise RuntimeError("copies fail")

    def _batched(self, stream: int, copies: Sequence[BlockCopy], places: Places) -> None:
        if not self._driver.is_batched:
            raise RuntimeError("this driver has no batched copy")
        moves = moves_of_copies(copies, places)
        if self._driver.copy(stream, moves.dsts, moves.srcs, moves.sizes):
            raise RuntimeError("copies fail")

    def _singly(self, stream: int, copies: Sequence[BlockCopy], places: Places) -> None:
        moves = moves_of_copies(copies, places._replace(piece_blocks=1))
        if self._driver.copy_singly(stream, moves.dsts, moves.srcs, moves.sizes):
            raise RuntimeError("copies fail")

    def _tensors(self, stream: int, copies: Sequence[BlockCopy], size: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            for copy in copies:
                dst, src = self._ends(copy, size)
                dst.copy_(src, non_blocking=True)

    def _kernel(self, stream: int, copies: Sequence[BlockCopy], places: Places) -> None:
        moves = moves_of_copies(copies, places._replace(piece_blocks=1))
        words = places.block_bytes // 8
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            ends = torch.from_numpy(np.stack((moves.dsts, moves.srcs)).view(np.int64)).pin_memory()
            dsts, srcs = ends.to("cuda", non_blocking=True)
            _copy_blocks[(len(copies), triton.cdiv(words, KERNEL_WORDS))](dsts, srcs, words, WORDS=KERNEL_WORDS)


def _cuts(start: int, end: int, piece: int) -> list[int]:
    """Where copies of [start, end) begin that do not reach from one piece into the next."""
    return [start, *range(start - start % piece + piece, end, piece)]


def _in_runs(count: int, blocks: int, seed: int = 0) -> tuple[list[BlockCopy], list[BlockCopy]]:
    """Like `scattered`, of runs of neighbours."""
    ins, outs = scattered(count // RUN, blocks // RUN, blocks // RUN, seed)
    spread = [
        [
            BlockCopy(copy.id * RUN + i, copy.out, copy.hbm * RUN + i, copy.dram * RUN + i)
            for copy in way
            for i in range(RUN)
        ]
        for way in (ins, outs)
    ]
    return spread[0], spread[1]

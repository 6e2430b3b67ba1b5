"""Host memory for the DRAM tier: mapped near the GPU, touched by several threads, pinned piece by piece.

Touching first and registering afterwards is several times faster than an allocation that is born pinned, and can stop
anywhere: what could not be had or pinned makes the pool smaller, not the start fail. While one piece is pinned, the
next is touched.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

log = logging.getLogger("superinfer.engine")

Progress = Callable[[str, float], None]

PIECE_BYTES = 1 << 30  # pinned at once: long enough to be quick, short enough to show progress
RESERVE_BYTES = 1 << 30  # of the machine's memory, left alone
TOUCH_THREADS = 16
PAUSE_S = 0.1
STAGE = "pinning host memory"

_NO_RESERVE = 0x4000  # MAP_NORESERVE: memory is taken as it is touched; what there is of it is asked piece by piece
_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers
_PREFERRED = 1  # this node first, others when it is full


def numa_node(pci: str, sysfs: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node of a PCI device; None where the machine has one node only, or does not say."""
    try:
        node = int((sysfs / pci / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer_node(address: int, size: int, node: int) -> bool:
    """Ask for the pages of [address, address + size) on `node`. False where the system would not."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    mask = (ctypes.c_ulong * 16)()  # 1,024 nodes
    mask[node // 64] = 1 << node % 64
    call = ctypes.CDLL(None, use_errno=True).syscall
    arguments = (ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_ulong(size), ctypes.c_int(_PREFERRED))
    return int(call(*arguments, mask, ctypes.c_ulong(1024), ctypes.c_uint(0))) == 0


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be taken without swapping; None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


class _Piece(NamedTuple):
    """Memory that is pinned together: where it begins and how long it is, bytes. touches: what writes to its pages."""

    start: int
    size: int
    blocks: int
    touches: list[Future[int]]

    def touched(self) -> None:
        """Wait until every page exists."""
        for touch in self.touches:
            touch.result()


class PinnedPool:
    """`num_blocks` blocks of `block_bytes`, at most as many as were asked for: look before use.

    address: of block 0; block b lies at address + b · block_bytes. piece_blocks: blocks pinned together; one copy must
    not reach from one piece into the next. shortfall: why there are fewer than asked for; "" if there are not.
    """

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        *,
        register: Callable[[int, int], None],
        unregister: Callable[[int], None],
        node: int | None = None,
        piece_bytes: int = PIECE_BYTES,
        available: Callable[[], int | None] = available_bytes,
        patience_s: float = 2.0,
        on_progress: Progress | None = None,
    ) -> None:
        """register(address, size) pins, unregister(address) undoes it; whatever they raise makes the pool smaller.
        node: the NUMA node to take memory from first. patience_s: how long to wait for free memory, once: virtual
        machines get theirs as they use it."""
        self.block_bytes = block_bytes
        # Pieces begin and end on pages: no page may be pinned twice.
        pages = mmap.PAGESIZE // math.gcd(block_bytes, mmap.PAGESIZE)
        self.piece_blocks = max(1, piece_bytes // (block_bytes * pages)) * pages
        self.num_blocks = 0
        self.shortfall = ""
        self._unregister = unregister
        self._available = available
        self._patience_s = patience_s
        self._pieces: list[int] = []
        self._map = self._reserve(num_blocks * block_bytes)
        if self._map is None:
            self.address = 0
            return
        self.array = np.frombuffer(self._map, dtype=np.uint8)
        self.address = self.array.ctypes.data
        if node is not None and not prefer_node(self.address, len(self._map), node):
            log.warning("host memory could not be placed on NUMA node %d, the GPU's; copies may be slower", node)
        self._pin(num_blocks, register, on_progress)
        if self.num_blocks < num_blocks:
            held, wanted = (n * block_bytes / 2**30 for n in (self.num_blocks, num_blocks))
            log.warning("the DRAM tier has %.1f GiB instead of %.1f: %s", held, wanted, self.shortfall)

    def blocks(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The pool as an array [num_blocks, *shape]."""
        return self.array[: self.num_blocks * self.block_bytes].view(dtype).reshape(self.num_blocks, *shape)

    def close(self) -> None:
        """Unpin and give back. Copies to and from the pool must be over, and arrays of it gone."""
        for address in self._pieces:
            try:
                self._unregister(address)
            except Exception as error:
                log.warning("host memory could not be unpinned: %s", error)
        self._pieces, self.num_blocks = [], 0
        self.array = np.empty(0, dtype=np.uint8)
        self._map = None  # unmapped once the last array of it is gone

    def _reserve(self, size: int) -> mmap.mmap | None:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except OSError as error:
            self.shortfall = f"the system gives no {size} bytes of address space ({error})"
            return None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:  # 512 times fewer pages to touch and to pin
                mapped.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                log.info("no huge pages for the DRAM tier: %s", error)
        return mapped

    def _pin(self, wanted: int, register: Callable[[int, int], None], on_progress: Progress | None) -> None:
        with ThreadPoolExecutor(min(TOUCH_THREADS, os.cpu_count() or 1)) as threads:
            piece = self._begin_piece(0, wanted, threads)
            while piece is not None:
                if on_progress is not None:
                    on_progress(STAGE, self.num_blocks / wanted)
                piece.touched()
                following = self._begin_piece(self.num_blocks + piece.blocks, wanted, threads)
                try:
                    register(self.address + piece.start, piece.size)
                except Exception as error:
                    self.shortfall = f"pinning was refused ({error}); `ulimit -l` may say why"
                    self._give_back(piece)
                    if following is not None:
                        self._give_back(following)
                    return
                self._pieces.append(self.address + piece.start)
                self.num_blocks += piece.blocks
                piece = following
        if on_progress is not None and self.num_blocks == wanted:
            on_progress(STAGE, 1.0)

    def _begin_piece(self, first: int, wanted: int, threads: ThreadPoolExecutor) -> _Piece | None:
        """The piece from block `first` on, whose memory is being touched from now on. None at the end, or where that
        much memory is not there."""
        blocks = min(self.piece_blocks, wanted - first)
        size = blocks * self.block_bytes
        if not blocks or not self._is_there(size):
            return None
        start = first * self.block_bytes
        share = max(mmap.PAGESIZE, -(-size // TOUCH_THREADS // mmap.PAGESIZE) * mmap.PAGESIZE)
        parts = [(self.address + at, min(share, start + size - at)) for at in range(start, start + size, share)]
        # memset runs without the GIL.
        return _Piece(start, size, blocks, [threads.submit(ctypes.memset, at, 0, part) for at, part in parts])

    def _is_there(self, size: int) -> bool:
        """Whether that much memory may be touched."""
        while True:
            free = self._available()
            if free is None or free >= size + RESERVE_BYTES:
                return True
            if self._patience_s <= 0:
                self.shortfall = f"{free >> 20} MiB of memory are free and {RESERVE_BYTES >> 20} stay so"
                return False
            time.sleep(PAUSE_S)
            self._patience_s -= PAUSE_S

    def _give_back(self, piece: _Piece) -> None:
        assert self._map is not None
        piece.touched()
        size = -(-piece.size // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, piece.start, min(size, len(self._map) - piece.start))

"""Gives a CUDA executor its second tier: host memory near the GPU, pinned; the link measured; the body started."""

from __future__ import annotations

import logging
import sys

import torch

from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.executor import TierLimits
from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.cuda_driver import CudaDriver, CudaError
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.kv.link_measure import measure_link
from superinfer.runtime.kv.link_profile import LinkProfile, link_kind
from superinfer.runtime.kv.pinned import PinnedPool, Progress, numa_node

log = logging.getLogger("superinfer.engine")

PAGEABLE_USES_HOST_PAGE_TABLES = 100  # CUdevice_attribute
SWITCH_S = 0.5e-3


class PinnedDuplex(CudaDuplex):
    """A CudaDuplex that owns its pool."""

    def __init__(self, driver: CudaDriver, places: Places, pool: PinnedPool) -> None:
        super().__init__(driver, places)
        self.pool = pool

    def close(self) -> None:
        """See Duplex.close; then the pool is unpinned."""
        super().close()
        self.pool.close()


def add_cuda_tier(executor: CudaExecutor, num_blocks: int, on_progress: Progress | None = None) -> None:
    """Put `num_blocks` DRAM blocks behind the executor's cache, or as many as can be pinned; with none, it goes on
    without, and says so. Its cache must hold nothing yet."""
    cache = executor.cache
    driver = CudaDriver(torch.cuda.current_stream(cache.device).cuda_stream)
    pool = PinnedPool(
        num_blocks,
        cache[0].nbytes,
        register=driver.register,
        unregister=driver.unregister,
        node=numa_node(driver.pci_address(cache.device.index or 0)),
        on_progress=on_progress,
    )
    if not pool.num_blocks:
        log.warning("there is no second KV tier: %s", pool.shortfall)
        pool.close()
        return
    places = Places(cache.data_ptr(), pool.address, pool.block_bytes, pool.piece_blocks)
    torch.cuda.synchronize(cache.device)  # the cache's own zeros come first
    link = _measured(driver, places, executor.limits.num_blocks, pool.num_blocks, device_link(driver, cache.device))
    # The thread that submits copies shares the interpreter with the one that schedules. Whoever waits for the other to
    # give it up waits this long at most, rather than 5 ms, half a step.
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
    executor.add_tier(PinnedDuplex(driver, places, pool), TierLimits(pool.num_blocks, pool.block_bytes, link))


def _measured(driver: CudaDriver, places: Places, hbm: int, dram: int, kind: str) -> LinkProfile | None:
    try:
        link = measure_link(driver, places, hbm, dram, kind)
    except (RuntimeError, CudaError) as error:
        log.warning("the link to host memory (%s) could not be measured: %s", kind, error)
        return None
    print(f"engine {link.line()}", file=sys.stderr)
    return link


def device_link(driver: CudaDriver, device: torch.device) -> str:
    """What joins the GPU to host memory."""
    ordinal = device.index or 0
    shares = driver.attribute(ordinal, PAGEABLE_USES_HOST_PAGE_TABLES) == 1
    return link_kind(torch.cuda.get_device_name(device), driver.pci_address(ordinal), shares_page_tables=shares)
